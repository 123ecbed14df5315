"""The example, the README and the benchmark do what they say."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import LIMIT, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
ECHO_GATE = ROOT / "examples" / "echo_gate.py"
STRICT = (sys.executable, "-X", "dev", "-W", "error")
PROGRAM = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTED = [
    pytest.param(program, id=f"{path.stem}-{n}")
    for path in sorted((ROOT / "docs").glob("*.md"))
    for n, program in enumerate(PROGRAM.findall(path.read_text()))
]


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Run a server that prints a line when it is ready; end it, whatever happens."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def dial(port: int, source: str = "127.0.0.1") -> socket.socket:
    """Connect to a server of 127.0.0.1 from *source*."""
    return socket.create_connection(("127.0.0.1", port), LIMIT, (source, 0))


@pytest.mark.slow
def test_demo() -> None:
    """The demo shows the three verdicts from both sides and ends well."""
    done = subprocess.run(
        [*STRICT, str(ECHO_GATE), "--demo"], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["client", "first", "denied", "second"]
    assert "reset by the server" in lines[2]
    assert lines[2].endswith("REJECT: on the deny list")
    assert lines[3].endswith("DEFER: all places are taken, then ACCEPT: accepted by the condition")


@pytest.mark.slow
def test_echo_gate_serves_until_interrupted() -> None:
    """Without --demo it echoes, denies, keeps the limit, and closes cleanly on Ctrl-C."""
    options = ("--port", "0", "--limit", "1", "--deny", "127.0.0.2")
    with running(*STRICT, str(ECHO_GATE), *options) as server:
        assert server.stdout is not None
        found = re.search(r"\('127\.0\.0\.1', (\d+)\)", server.stdout.readline())
        assert found is not None
        port = int(found[1])
        with (
            dial(port) as first,
            dial(port, "127.0.0.2") as denied,
            dial(port) as second,
            dial(port) as third,
        ):
            for client in (first, second):
                assert client.recv(100) == b"welcome\n"
            with pytest.raises(ConnectionResetError):
                denied.recv(100)
            while "on the deny list" not in server.stdout.readline():
                pass
            assert wire(third) == "open"
            first.close()
            assert third.recv(100) == b"welcome\n"


@pytest.mark.slow
@pytest.mark.parametrize("program", DOCUMENTED)
def test_documents(program: str, tmp_path: Path) -> None:
    """Each program of the documents ends by itself, and well."""
    path = tmp_path / "program.py"
    path.write_text(program)
    done = subprocess.run(
        [*STRICT, str(path)], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark measures on Linux only")
def test_benchmark_quick() -> None:
    """The benchmark runs, and no connection in it ends the wrong way."""
    if shutil.which("cc") is None:
        pytest.skip("needs the system package gcc, for the load generator and the C loop")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_accept.py"), "--quick"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "C loop" in done.stdout
    for loop in ("asyncio", "uvloop"):
        assert re.search(rf"{loop} +condaccept accept\(\), 16 tasks", done.stdout)
