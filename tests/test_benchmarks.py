"""The benchmarks run, and nothing in them ends the wrong way. What they measure is not tested."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.support import LIMIT

if TYPE_CHECKING:
    from types import ModuleType

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
STRICT = (sys.executable, "-W", "error")
LOOPS = ("asyncio", "uvloop")
DRAWS = importlib.util.find_spec("matplotlib") is not None

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks need Linux")
needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None,
    reason="needs the system package gcc, for the C programs of the benchmarks",
)
needs_matplotlib = pytest.mark.skipif(not DRAWS, reason="needs matplotlib, of the extra 'plot'")


class Done(NamedTuple):
    """A script that has ended well."""

    printed: str
    report: dict[str, Any]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the modules of the benchmarks found, as they are when a script there runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str) -> ModuleType:
    """Return a module of the benchmarks."""
    return importlib.import_module(name)


def quick(script: str, folder: Path) -> Done:
    """Run a benchmark once through, its report and its picture into *folder*."""
    report, picture = folder / "report.json", folder / "picture.svg"
    plot = ("--plot", str(picture)) if DRAWS else ()
    done = subprocess.run(
        [*STRICT, str(BENCHMARKS / script), "--quick", "--json", str(report), *plot],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    if DRAWS:
        assert picture.read_text().rstrip().endswith("</svg>")
    return Done(done.stdout, json.loads(report.read_text()))


@pytest.mark.slow
@needs_compiler
def test_benchmark_of_accepting(tmp_path: Path) -> None:
    """All who are here serve every job that is theirs, and no connection ends the wrong way."""
    done = quick("bench_accept.py", tmp_path)

    rows = done.report["rows"]
    there = {(row["loop"], row["name"]) for row in rows}
    assert {("", "C loop")} | {(loop, "protocol") for loop in LOOPS} <= there
    assert {(loop, "condaccept accept(), 16 tasks") for loop in LOOPS} <= there
    for name in ("HAProxy", "nginx"):
        assert (("", name) in there) != (name in done.report["left_out"])
    assert {row["job"] for row in rows if row["name"] == "HAProxy"} <= {"reject"}
    assert all(row["rate"] > 0 for row in rows)
    assert re.search(r"^0 of \d+ connections ended the wrong way$", done.printed, re.MULTILINE)


@pytest.mark.slow
@needs_compiler
def test_benchmark_of_conditions(tmp_path: Path) -> None:
    """Every condition decides, in the jobs in which there is something to compare it with."""
    done = quick("bench_conditions.py", tmp_path)

    jobs: dict[str, set[str]] = {}
    for row in done.report["rows"]:
        jobs.setdefault(row["name"], set()).add(row["job"])
    assert jobs == {
        "no condition": {"accept"},
        "a constant": {"accept", "reject"},
        "address and data": {"reject"},
        "async, at once": {"reject"},
        "async, one turn of the loop": {"reject"},
    }
    assert "0 of 3072 connections ended the wrong way" in done.printed


@pytest.mark.slow
def test_benchmark_of_pacing(tmp_path: Path) -> None:
    """Every client gets every byte."""
    done = quick("bench_pacing.py", tmp_path)

    assert "0 of 6 transfers ended with another number of bytes" in done.printed
    samples = done.report["samples"]
    assert {sample["loop"] for sample in samples} == set(LOOPS)
    assert {sample["received"] for sample in samples} == {1_000_000}


@pytest.mark.slow
@needs_compiler
def test_benchmark_of_streams(tmp_path: Path) -> None:
    """Every echo is what was sent."""
    done = quick("bench_stream.py", tmp_path)

    for loop in LOOPS:
        for name in ("asyncio streams", "protocol", r"condaccept send\(\)", r"condaccept write"):
            assert len(re.findall(rf"{loop} +{name}.*\d%", done.printed)) == 5
    assert "and 0 connections went wrong" in done.printed


@pytest.mark.slow
def test_benchmark_of_deferring(tmp_path: Path) -> None:
    """Every connection is deferred, open and silent at the end."""
    done = quick("bench_defer.py", tmp_path)

    for loop in LOOPS:
        assert len(re.findall(rf"{loop} +\d+ deferred", done.printed)) == 10
    assert "offered again, all in a row" in done.printed
    assert "0 of 1680 connections did not stay deferred" in done.printed


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("compiler", ["cc", "none"])
def test_benchmark_of_floods(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str
) -> None:
    """With either generator all are reset, and every echo is right."""
    monkeypatch.setenv("CC", compiler)
    done = quick("bench_flood.py", tmp_path)

    for loop in LOOPS:
        for name in ("start_server", "protocol", r"condaccept serve\(\)"):
            assert len(re.findall(rf"{loop} +{name} .*%", done.printed)) == 1
    assert " 0 ended the wrong way" in done.printed


# -- the load generator


def end_in_every_way(listener: socket.socket) -> None:
    """Serve five clients, each with another ending; all of them have sent 16 bytes."""
    for answer, reset in ((b"hello", 0), (b"", 1), (b"", 0), (b"hell", 0), (b"hello!", 0)):
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(16, socket.MSG_WAITALL) == bytes(16)
            connection.sendall(answer)
            if reset:
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("language", ["C", "Python"])
def test_generator_tells_endings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, language: str
) -> None:
    """Both generators tell a greeting, a reset and an EOF from each other and from the rest."""
    monkeypatch.setenv("CC", "cc" if language == "C" else "none")
    written_in, command = module("_build").generator("_load", tmp_path)
    assert written_in == language
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=end_in_every_way, args=[listener])
        server.start()
        port = listener.getsockname()[1]
        done = subprocess.run(
            [*command, str(port), "5", "1", "16"],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=True,
        )
        server.join(LIMIT)

    *counts, took = map(int, done.stdout.split())
    assert counts == [1, 1, 1, 2]
    assert took > 0


# -- HAProxy and nginx


@pytest.mark.slow
@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("name", "job", "ending"),
    [("haproxy", "reject", "reset"), ("nginx", "reject", "empty"), ("nginx", "accept", "hello")],
)
def test_proxies(name: str, job: str, ending: str) -> None:
    """The server runs under the pid that was started, ends callers so, and leaves nothing."""
    lacks = module("_proxies").lacks(name)
    if lacks:
        package = "libnginx-mod-stream" if lacks != name else name
        pytest.skip(f"needs the system package {package}")
    with subprocess.Popen(
        [*STRICT, str(BENCHMARKS / "_serve_proxy.py"), name, job],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            port = int(process.stdout.readline())
            assert [end_of(port) for _ in range(50)] == [ending] * 50
            assert Path(f"/proc/{process.pid}/comm").read_text().strip() == name
        finally:
            process.kill()
        # At the end of both when the guard that the server left behind is gone, too.
        assert (process.stdout.read(), process.stderr.read()) == ("", "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), LIMIT)


def end_of(port: int) -> str:
    """Connect, and return what came before the end, or how it ended."""
    got = b""
    try:
        with socket.create_connection(("127.0.0.1", port), LIMIT) as client:
            while data := client.recv(64):
                got += data
    except ConnectionResetError:
        return f"{got.decode()} reset".lstrip()
    return got.decode() or "empty"


# -- pictures


@needs_matplotlib
@pytest.mark.slow
@pytest.mark.usefixtures("modules")
def test_same_numbers_make_the_same_picture(tmp_path: Path) -> None:
    """A picture has no date and no chance in it, and says what it shows."""
    plot = module("_plot")
    bars = [
        plot.Bar("", "C loop", 5.0, 4.0, 6.0, ours=False),
        plot.Bar("uvloop", "condaccept serve()", 7.25, 7.0, 9.0),
    ]
    panels = [plot.Panel("reject", "µs per connection", bars)] * 3
    for name in ("one.svg", "two.svg", "three.png"):
        plot.draw(tmp_path / name, panels)

    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    for words in ("reject", "µs per connection", "C loop", "uvloop", "condaccept serve()", "7.2"):
        assert words in text
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("modules")
def test_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where matplotlib is missing, the option says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    with pytest.raises(argparse.ArgumentTypeError, match="pip install matplotlib"):
        module("_plot").target("x.svg")


@pytest.mark.slow
def test_picture_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """A picture that can't be drawn ends the script at once."""
    done = subprocess.run(
        [*STRICT, str(BENCHMARKS / "bench_pacing.py"), "--plot", str(tmp_path / "x.txt")],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert "neither .svg nor .png" in done.stderr
    assert "round 1" not in done.stderr


# -- results


def reports(ratio: float, haproxy: float | None) -> dict[str, Any]:
    """Return what all scripts may have written, every ratio the same, but for HAProxy's."""
    accept = [
        {
            "job": job,
            "burst": burst,
            "loop": loop,
            "name": f"condaccept {how}",
            "times_c_loop": ratio if burst == 64 else 0.01,
            "times_start_server": ratio + extra if burst == 64 else 0.01,
            "times_haproxy": haproxy if job == "reject" else None,
        }
        for job in ("reject", "accept")
        for burst in (1, 64)
        for loop in LOOPS
        for how, extra in (("accept(), 1 task", 0.5), ("streams()", 0.25), ("serve()", 0.0))
    ]
    stream = [
        {"job": job, "loop": loop, "name": name, "times_streams": ratio + extra}
        for job in ([64, 1, False], [64, 32, False], [61440, 1, False], [61440, 8, False])
        for loop in LOOPS
        for name, extra in (
            ("protocol", 9.0),
            ("condaccept send()", 0.125),
            ("condaccept write(), drain()", 0.0),
        )
    ]
    defer = {
        "rows": [
            {"loop": loop, "size": size, "what": "reconsider", "times_first": value}
            for loop in LOOPS
            for size, value in ((10, 1.0), (10_000, ratio))
        ],
        "samples": [
            {"loop": loop, "size": 10_000, "kind": kind, "values": {"once": bytes_}}
            for loop in LOOPS
            for kind, bytes_ in (("plain", 1000 * ratio), ("long", 1.0))
        ],
    }
    flood = [
        {"loop": loop, "name": "condaccept serve()", "times_start_server": ratio} for loop in LOOPS
    ]
    return {
        "accept": {"rows": accept},
        "stream": {"rows": stream},
        "defer": defer,
        "flood": {"rows": flood},
    }


@pytest.mark.usefixtures("modules")
def test_goals() -> None:
    """A goal is held against the row that it names, in bursts of 64, the better where it may be."""
    found = {(goal.what, goal.loop): goal for goal in module("_goals").goals(reports(0.5, None))}

    def of(what: str, loop: str = "uvloop") -> tuple[float | None, bool]:
        goal = found[what, loop]
        return goal.reached, goal.met

    assert len(found) == 2 * 11
    assert of("`serve()` and reject, to the C loop") == (0.5, True)
    assert of("`serve()` and reject, to HAProxy") == (None, False)
    assert of("`serve()` and reject, to `start_server`") == (0.5, False)
    assert of("`accept()` or `streams()`, 5 bytes, close, to `start_server`") == (0.75, False)
    assert of("`serve()`, 5 bytes, close, to `start_server`") == (0.5, True)
    assert of("`serve()`, 5 bytes, close, to `start_server`", "asyncio") == (0.5, False)
    echoes = "echoes per second, 64 B on 32 connections, to asyncio's streams"
    assert of(echoes) == (0.625, False)
    assert of("memory of each of 10,000 deferred") == (500.0, True)
    assert of("waking one of 10,000 by `reconsider()`, to one of 10") == (0.5, True)
    assert found[echoes, "uvloop"].limit == 1.05
    assert found[echoes, "asyncio"].limit == 1.5


@pytest.mark.usefixtures("modules")
def test_results_document() -> None:
    """The document has the machine, the goals, and each script's command, table and picture."""
    results = module("_results")
    runs = {
        name: results.Run(f"python benchmarks/bench_{name}.py", f"the table of {name}\n", report)
        for name, report in reports(1.125, 1.0).items()
    }
    text = results.document("2030-01-02", {"CPU": "a fast one", "CPUs": 2}, runs)

    assert "| date | 2030-01-02 |\n| CPU | a fast one |\n| CPUs | 2 |\n" in text
    assert "| `serve()` and reject, to HAProxy | uvloop | ≤ 1.10 | 1.00 | yes |" in text
    assert "| memory of each of 10,000 deferred | asyncio | ≤ 700 B | 1,125 B | no |" in text
    rejects = [line for line in text.splitlines() if "to the C loop" in line]
    assert [line.split(" | ")[1] for line in rejects] == ["asyncio", "uvloop"]
    for name in runs:
        assert f"```console\n$ python benchmarks/bench_{name}.py\nthe table of {name}\n```" in text
        assert f"![bench_{name}.py](results/{name}.svg)" in text


@pytest.mark.usefixtures("modules")
def test_results_without_haproxy() -> None:
    """What was not measured is neither reached nor missed."""
    results = module("_results")
    runs = {name: results.Run("", "", report) for name, report in reports(1.0, None).items()}
    text = results.document("2030-01-02", {}, runs)

    assert "| `serve()` and reject, to HAProxy | uvloop | ≤ 1.10 | not measured |  |" in text


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "arguments", [("--only", "pacing", "--quick", "--loop", "uvloop"), ("--only", "nonsense")]
)
def test_run_of_some_writes_nothing(arguments: tuple[str, ...]) -> None:
    """Anything but a whole run prints what the scripts print, and leaves the results alone."""
    results = BENCHMARKS / "RESULTS.md"
    before = results.stat().st_mtime_ns if results.exists() else None
    done = subprocess.run(
        [*STRICT, str(BENCHMARKS / "run_all.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    if "nonsense" in arguments:
        assert done.returncode == 2
        assert "there is no benchmark nonsense" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "0 of 3 transfers" in done.stdout
    assert (results.stat().st_mtime_ns if results.exists() else None) == before
