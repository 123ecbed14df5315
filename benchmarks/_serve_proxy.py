"""HAProxy or nginx under measurement: ``python _serve_proxy.py haproxy|nginx JOB``.

This process becomes the server, so that the pid that is measured is the server's own.
Both servers handle SIGALRM and live on, so a child stays behind: it prints the port as soon
as somebody listens there, and ends the server after LIFETIME, or itself after the server.

HAProxy inherits the listening socket. nginx can inherit one, too (the environment variable
``NGINX``), but 1.22 crashes on it without a master process: `ngx_event_process_init` deletes
the events of a predecessor that there never was. It gets a port that a bound socket, which
does not listen, keeps free for whoever sets SO_REUSEADDR, as nginx does.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import tempfile
from typing import TYPE_CHECKING

import _proxies
from _serving import BACKLOG, HOST, LIFETIME, announce

if TYPE_CHECKING:
    from typing import NoReturn

PATIENCE = 5  # milliseconds between two looks whether the server listens


def main(name: str, job: str) -> None:
    """Bind, leave a guard behind, and become the server."""
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind((HOST, 0))
    if name == "haproxy":
        place.listen(BACKLOG)
    place.set_inheritable(True)
    folder = tempfile.TemporaryDirectory()
    server = os.pidfd_open(os.getpid())
    if os.fork():
        become(name, job, place, folder.name)
    guard(server, place, folder)


def become(name: str, job: str, place: socket.socket, folder: str) -> NoReturn:
    """Run the server in this process, its configuration in memory."""
    program = _proxies.find(name)
    assert program is not None, name
    descriptor = os.memfd_create(name, 0)
    configuration = f"/proc/self/fd/{descriptor}"
    if name == "haproxy":
        assert job == "reject", "HAProxy says nothing of its own accord"
        text = _proxies.HAPROXY.format(descriptor=place.fileno())
        arguments = ["-q", "-db", "-f", configuration]
    else:
        text = _proxies.NGINX.format(
            load_module=_proxies.load_module(),
            folder=folder,
            port=place.getsockname()[1],
            backlog=BACKLOG,
            job=_proxies.NGINX_JOBS[job],
        )
        arguments = ["-c", configuration, "-p", folder, "-e", "stderr"]
    os.write(descriptor, text.encode())
    os.execv(program, [name, *arguments])  # noqa: S606  # no shell is wanted


def guard(server: int, place: socket.socket, folder: tempfile.TemporaryDirectory[str]) -> None:
    """Print the port once somebody listens, and see to it that the server ends."""
    address = place.getsockname()
    place.close()
    ended = select.poll()
    ended.register(server, select.POLLIN)
    with folder:
        while not listens(address):
            if ended.poll(PATIENCE):
                return
        announce(address[1])
        if not ended.poll(LIFETIME * 1000):
            signal.pidfd_send_signal(server, signal.SIGKILL)


def listens(address: tuple[str, int]) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:  # a fast server is done already
        pass
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
