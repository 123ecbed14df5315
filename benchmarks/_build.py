"""Compiling the C programs of the benchmarks, where there is a compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT = 60  # seconds


def compile_c(name: str, folder: Path) -> Path | None:
    """Compile ``NAME.c`` of this folder into *folder*.

    Returns:
        The program, or None if there is no compiler (``cc``, or what ``$CC`` says)
        or if it failed, in which case it has said why on stderr.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        return None
    program = folder / name
    command = [*compiler, "-O2", "-o", str(program), str(HERE / f"{name}.c")]
    finished = subprocess.run(command, timeout=TIMEOUT, check=False)  # noqa: S603  # $CC is the caller's own
    return program if finished.returncode == 0 else None


def generator(name: str, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Return a load generator's language and command: ``NAME.c``, else ``NAME.py``."""
    program = compile_c(name, folder)
    return (
        ("C", (str(program),))
        if program
        else ("Python", (sys.executable, str(HERE / f"{name}.py")))
    )
