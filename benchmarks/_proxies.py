"""HAProxy and nginx as they are installed here: where they are, which, and their configurations."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

TIMEOUT = 10  # seconds
SYSTEM = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where servers are; not in everybody's PATH."""

HAPROXY = """\
global
    nbthread 1
frontend gate
    mode tcp
    timeout client 10s
    bind fd@{descriptor}
    tcp-request connection reject
"""
"""It takes over a listening descriptor."""
NGINX = """\
{load_module}
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr emerg;
events {{ worker_connections 4096; }}
stream {{ server {{ listen 127.0.0.1:{port} backlog={backlog}; {job} }} }}
"""
NGINX_JOBS = {"reject": 'deny all; return "";', "accept": 'return "hello";'}
"""A server needs something to do behind the access rules; nobody gets there."""


def find(name: str) -> str | None:
    """Return the path of ``haproxy`` or ``nginx``, or None."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), SYSTEM)))


def lacks(name: str) -> str:
    """Return what is missing to run that server here; nothing if it can be run."""
    if find(name) is None:
        return name
    if name == "nginx" and load_module() is None:
        return "nginx's stream module"
    return ""


def load_module() -> str | None:
    """Return the line that loads nginx's stream module, empty if it is built in, or None."""
    says = _says("nginx", "-V")
    if re.search(r"--with-stream(?!\S)", says):
        return ""
    folder = re.search(r"--modules-path=(\S+)", says)
    module = Path(folder[1]) / "ngx_stream_module.so" if folder else None
    return f"load_module {module};" if module and module.exists() else None


def versions() -> dict[str, str]:
    """Return the versions of those that are here, by the name in the tables."""
    found = {
        "HAProxy": re.search(r"HAProxy version (\d[\d.]*)", _says("haproxy", "-v")),
        "nginx": re.search(r"nginx/(\d[\d.]*)", _says("nginx", "-v")),
    }
    return {name: match[1] if match else "not installed" for name, match in found.items()}


def _says(name: str, option: str) -> str:
    program = find(name)
    if program is None:
        return ""
    finished = subprocess.run(  # noqa: S603  # the server that is installed here
        [program, option], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    return finished.stdout + finished.stderr
