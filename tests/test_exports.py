"""What is public, that it is described, and which room may know which."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import condaccept
import condaccept.exceptions
import condaccept.gates
import condaccept.testing
from condaccept import AcceptError

if TYPE_CHECKING:
    from types import ModuleType

SOURCE = Path(condaccept.__file__).parent

PUBLIC = [condaccept, condaccept.exceptions, condaccept.gates, condaccept.testing]

ROOMS = [
    "exceptions",
    "_verdict",
    "_qos",
    "_pending",
    "_events",
    "_ledger",
    "_capacity",
    "_exhaustion",
    "_sockets",
    "_watch",
    "gates",
    "_transports",
    "_delivery",
    "_channel",
    "_stream",
    "_group",
    "_waking",
    "_moving",
    "_taking",
    "_admitting",
    "_deciding",
    "_accepting",
    "_consumption",
    "_serving",
    "_shutdown",
    "_open",
    "_arguments",
    "_listener",
    "_listen",
    "_inherited",
    "testing",
]
"""From left to right: a room may use those to its left, and none to its right."""

PURE = ROOMS[: ROOMS.index("_sockets")]
"""What these do needs no socket, no loop and no clock."""

NAMED_FOR_TYPES = {("exceptions", "_verdict"), ("exceptions", "_qos")}
"""An annotation alone: an error carries the verdict, or the flow spec, it is about."""


def files() -> list[Path]:
    """Return every source file of the package."""
    return sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    """Return the room that a source file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def only_for_types(tree: ast.Module) -> set[ast.AST]:
    """Return whatever stands under ``if TYPE_CHECKING``."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return the modules that a file imports, and whether each is for types alone."""
    tree = ast.parse(path.read_text())
    for_types = only_for_types(tree)
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in for_types) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            assert node.module is not None
            if node.module in {"condaccept", "condaccept.gates"}:
                # From a package a module of it may be imported: name that one.
                found += [
                    (f"{node.module}.{alias.name}", node in for_types) for alias in node.names
                ]
            else:
                found.append((node.module, node in for_types))
    return found


def names_bound(module: ModuleType) -> set[str]:
    """Return the names without an underscore that a module gives to things of its own."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    hidden = only_for_types(tree)
    bound: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            bound.add(node.name)
        elif isinstance(node, ast.Assign):
            bound |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            bound.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and node not in hidden:
            # ``from x import y as y`` is how a name is given on.
            bound |= {each.name for each in node.names if each.asname == each.name}
    return {name for name in bound if not name.startswith("_")}


def by_kind(name: str) -> tuple[int, str]:
    """Sort constants before classes, and classes before functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


# -- what is public


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_all_is_exact(module: ModuleType) -> None:
    """`__all__` holds every public name of a module, and no other; sorted, each once."""
    exported = module.__all__

    assert isinstance(exported, tuple)
    assert list(exported) == sorted(set(exported), key=by_kind)
    assert set(exported) == names_bound(module)
    for name in exported:
        assert hasattr(module, name)


def test_no_further_public_module() -> None:
    """Besides those looked at here, every module is private or a part of a public package."""
    found = {
        ".".join(("condaccept", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in files()
        if not any(part.startswith("_") for part in path.relative_to(SOURCE).parts)
    }

    assert found == {
        "condaccept.exceptions",
        "condaccept.gates.handshake",
        "condaccept.testing",
    }


def test_every_room_says_what_it_offers() -> None:
    """Every module has an `__all__`, and what it names is there."""
    for path in files():
        parts = path.relative_to(SOURCE).with_suffix("").parts
        module = importlib.import_module(".".join(("condaccept", *parts)).removesuffix(".__init__"))
        assert all(hasattr(module, name) for name in module.__all__), module.__name__


def test_the_package_exports_every_error() -> None:
    """Every exception can be imported from the package, and is the same there."""
    for name in condaccept.exceptions.__all__:
        assert getattr(condaccept, name) is getattr(condaccept.exceptions, name)
        assert name in condaccept.__all__


def test_every_error_is_exported() -> None:
    """There is no accept error that nobody can name."""

    def leaves(of: type[AcceptError]) -> set[str]:
        return {of.__name__}.union(*(leaves(each) for each in of.__subclasses__()))

    assert leaves(AcceptError) == set(condaccept.exceptions.__all__)


def test_star_import() -> None:
    """A star import gives the public names and nothing else."""
    namespace: dict[str, Any] = {}
    exec("from condaccept import *", namespace)  # noqa: S102 - the only way to write it in a function

    assert set(namespace) - {"__builtins__"} == set(condaccept.__all__)


@pytest.mark.parametrize("name", ["Accept", "AcceptError", "Event", "Outcome", "Status", "Verdict"])
def test_public_classes_are_found_by_name(name: str) -> None:
    """A public class can be pickled by reference: it is where it says it is."""
    cls = getattr(condaccept, name)
    assert pickle.loads(pickle.dumps(cls)) is cls  # noqa: S301 - made here


# -- that it is described


def public_objects() -> list[tuple[str, Any]]:
    """Return public classes and functions, with the public members of the classes."""
    found: dict[str, Any] = {}
    for module in PUBLIC:
        for name in module.__all__:
            thing = getattr(module, name)
            if not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue
            found[f"{module.__name__}.{name}"] = thing
            if inspect.isclass(thing):
                members = {
                    f"{module.__name__}.{name}.{key}": value
                    for key, value in vars(thing).items()
                    if not key.startswith("_")
                    and (inspect.isroutine(value) or isinstance(value, property))
                }
                found |= members
    return list(found.items())


def test_docstrings() -> None:
    """Every public class, function, method and property says what it is for."""
    things = public_objects()
    assert len(things) > 100
    undescribed = [
        name
        for name, thing in things
        # A gate's methods are described where every gate's are: in `Gate`.
        if not (inspect.getdoc(thing) or "").strip() and "HandshakeGate." not in name
    ]

    assert undescribed == []


def test_docstrings_are_their_own() -> None:
    """A class says what itself is, not what attrs or its parent wrote."""
    for name, thing in public_objects():
        if inspect.isclass(thing):
            doc = thing.__doc__ or ""
            assert "Method generated by attrs" not in doc, name
            assert doc not in {parent.__doc__ for parent in thing.__mro__[1:]}, name


def test_summaries_are_sentences() -> None:
    """The first line of a docstring is one sentence, with its full stop."""
    for name, thing in public_objects():
        doc = inspect.getdoc(thing)
        if doc:
            summary = doc.split("\n\n")[0]
            assert summary.rstrip().endswith((".", "::")), f"{name}: {summary!r}"


# -- which room may know which


def test_every_file_has_its_room() -> None:
    """Every source file belongs to a room of the plan, and every room is there."""
    assert {room(path) for path in files()} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_import_direction(name: str) -> None:
    """A room imports from rooms to its left only, for annotations too."""
    for path in files():
        if room(path) != name:
            continue
        for module, for_types in imports(path):
            if module.split(".")[0] != "condaccept":
                continue
            other = module.split(".")[1]
            assert other in ROOMS, f"{path.name} imports {module}, from the package itself"
            if for_types and (name, other) in NAMED_FOR_TYPES:
                continue
            assert ROOMS.index(other) <= ROOMS.index(name), f"{path.name} imports {module}"


def test_the_deviation_is_there() -> None:
    """What is excused is also done; an excuse nobody needs is to go."""
    done = {
        (room(path), module.split(".")[1])
        for path in files()
        for module, for_types in imports(path)
        if for_types and module.startswith("condaccept.")
    }
    assert done >= NAMED_FOR_TYPES


@pytest.mark.parametrize("name", PURE)
def test_pure_rooms(name: str) -> None:
    """A pure room imports nothing that could reach the world outside."""
    outside = {"asyncio", "socket", "select", "selectors", "ssl", "os", "time", "threading"}
    for path in files():
        if room(path) == name:
            assert not outside & {module.split(".")[0] for module, _ in imports(path)}


def test_nothing_but_attrs() -> None:
    """At run time the library needs the standard library and attrs; uvloop is the user's choice."""
    needed = {module.split(".")[0] for path in files() for module, _ in imports(path)}

    assert needed - set(sys.stdlib_module_names) == {"attrs", "condaccept"}
