"""The examples, the README and the documents do what they say."""

from __future__ import annotations

import contextlib
import os
import re
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
HOT_RESTART = ROOT / "examples" / "hot_restart.py"
WORKERS = ROOT / "examples" / "workers.py"
STRICT = (sys.executable, "-W", "error")
"""Not in development mode: on a loaded machine asyncio's debug mode complains of slow callbacks."""
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


def see_denial(port: int) -> None:
    """Connect from 127.0.0.2 and see the reset; connect() itself may, when the server is quick."""
    with pytest.raises(ConnectionResetError), dial(port, "127.0.0.2") as denied:
        denied.recv(10)


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
        with dial(port) as first, dial(port) as second:
            first.sendall(b"one")
            assert first.recv(10) == b"one"
            see_denial(port)
            second.sendall(b"two")
            # The line of the deferral, which comes behind that of the rejection.
            while "all places are taken" not in server.stdout.readline():
                pass
            assert wire(second) == "open"
            first.close()
            assert second.recv(10) == b"two"
            server.send_signal(signal.SIGINT)
            out, _ = server.communicate(timeout=LIMIT)
        assert server.returncode == 0
        assert out.splitlines()[-1] == "closed"
        assert "Traceback" not in out


@pytest.mark.slow
def test_hot_restart() -> None:
    """Three generations under load: each serves, no caller sees an error."""
    done = subprocess.run(
        [*STRICT, str(HOT_RESTART), "--demo"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["generation", str(n)] for n in (1, 2, 3)]
    assert all(int(line.split()[3]) >= 200 for line in lines[:3])
    assert lines[3:] == [
        "a caller of generation 1 was served by it to the end",
        "errors: none",
    ]


@pytest.mark.slow
def test_hot_restart_by_hand(tmp_path: Path) -> None:
    """A second process replaces the first, which finishes its stream; a signal ends the second."""
    command = (*STRICT, str(HOT_RESTART), "--port", "0", "--control", str(tmp_path / "control"))
    with running(*command) as first:
        assert first.stdout is not None
        port = int(first.stdout.readline().split()[-1])
        with dial(port) as early:
            early.sendall(b"who?\n")
            assert int(early.recv(100)) == first.pid
            with running(*command) as second:
                assert second.stdout is not None
                assert second.stdout.readline() == f"{second.pid} serves {port}\n"
                with dial(port) as late:
                    late.sendall(b"who?\n")
                    assert int(late.recv(100)) == second.pid
                early.sendall(b"still?\n")
                assert int(early.recv(100)) == first.pid
                early.close()
                assert first.communicate(timeout=LIMIT)[0] == f"{first.pid} has ended\n"
                second.send_signal(signal.SIGTERM)
                assert second.communicate(timeout=LIMIT)[0] == f"{second.pid} has ended\n"
                assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.slow
def test_workers() -> None:
    """Everybody is served by one of the workers, each with its own socket or all with one."""
    done = subprocess.run(
        [*STRICT, str(WORKERS), "--demo"], capture_output=True, text=True, timeout=100, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    own, shared = done.stdout.split("one socket for all:\n")
    for part in (own, shared):
        counts = re.findall(r"^    worker [123] +(\d+)$", part, re.MULTILINE)
        assert sum(map(int, counts)) == 100


@pytest.mark.slow
def test_workers_until_interrupted() -> None:
    """Without --demo the workers serve until Ctrl-C, and end with their parent."""
    with running(*STRICT, str(WORKERS), "--port", "0", "--inherit") as parent:
        assert parent.stdout is not None
        found = re.search(r"^2 workers on \('127\.0\.0\.1', (\d+)\)", parent.stdout.readline())
        assert found is not None
        with dial(int(found[1])) as client:
            assert client.recv(100).startswith(b"worker ")
        parent.send_signal(signal.SIGINT)
        assert parent.communicate(timeout=LIMIT)[0] == "closed\n"
        assert parent.returncode == 0
        with pytest.raises(ConnectionRefusedError):
            dial(int(found[1]))


@pytest.mark.slow
def test_readme(tmp_path: Path) -> None:
    """The program in the README runs as it stands, on a port of its own."""
    program = PROGRAM.findall((ROOT / "README.md").read_text())[0]
    assert program.count("7007") == 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "readme.py"
    ready = 'print("ready")\n        await listener.serve('
    path.write_text(program.replace("7007", str(port)).replace("await listener.serve(", ready, 1))
    with running(*STRICT, str(path)) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        with (
            dial(port) as first,
            dial(port) as second,
            dial(port) as third,
        ):
            for client in (first, second):
                assert client.recv(100) == b"welcome\n"
            see_denial(port)
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
