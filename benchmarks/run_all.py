"""Run the benchmarks one after the other; a whole run rewrites RESULTS.md and its pictures.

    python benchmarks/run_all.py [--only "accept stream"] [OPTIONS OF THE SCRIPTS]

With --only, or with any option for the scripts, everything is printed and nothing written.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import _cli
import _plot
from _contestants import HERE
from _results import Run, document

SCRIPTS = ("accept", "conditions", "stream", "defer", "flood", "pacing")
RESULTS = HERE / "RESULTS.md"
PICTURES = HERE / "results"


class FailedError(Exception):
    """A script ended with another exit status than 0; it has said why."""


def main() -> int:
    """Run what was asked for; the exit status is that of the first that fails."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--only", default="", metavar="NAMES", help=" ".join(SCRIPTS))
    options, passed_on = parser.parse_known_args()
    names = options.only.split() or SCRIPTS
    unknown = sorted(set(names) - set(SCRIPTS))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    try:
        if passed_on or options.only:
            for name in names:
                run(name, *passed_on)
        else:
            everything()
    except FailedError as error:
        return int(error.args[0])
    return 0


def everything() -> None:
    """Run all scripts as they are, and keep what they found if all of them ended well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            _plot.target("RESULTS.svg")
        except argparse.ArgumentTypeError as error:
            print(f"the pictures can't be drawn: {error}", file=sys.stderr)
            raise FailedError(2) from error
        runs = {script: kept(script, folder) for script in SCRIPTS}
        PICTURES.mkdir(exist_ok=True)
        for script in SCRIPTS:
            shutil.copyfile(folder / f"{script}.svg", PICTURES / f"{script}.svg")
    date = datetime.now(UTC).date().isoformat()
    RESULTS.write_text(document(date, machine(runs["accept"]), runs), encoding="utf-8")
    print(f"written: {RESULTS}, {PICTURES}")


def kept(name: str, folder: Path) -> Run:
    """Run a script and return what it found; its picture is in *folder*."""
    report, picture = folder / f"{name}.json", folder / f"{name}.svg"
    printed = run(name, "--json", str(report), "--plot", str(picture))
    return Run(f"python benchmarks/bench_{name}.py", printed, json.loads(report.read_text()))


def run(name: str, *arguments: str) -> str:
    """Run a script, let its output through, and return it.

    Raises:
        FailedError: It ended with another exit status than 0.
    """
    command = (sys.executable, str(HERE / f"bench_{name}.py"), *arguments)
    printed = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  # ours
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                printed.append(line)
            process.wait()
        finally:
            process.terminate()  # if it is still there: it ends its children then
    if process.returncode:
        raise FailedError(process.returncode)
    return "".join(printed)


def machine(accept: Run) -> dict[str, object]:
    """Return what the numbers were measured on."""
    return {"CPU": cpu_model(), **accept.report["machine"]}


def cpu_model() -> str:
    """Return what the kernel calls the first core."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    _cli.run(main)
