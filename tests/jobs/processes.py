"""Commands in processes of their own, which can be interrupted."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Ran(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str
    seconds: float


def run(*args: Any, log: Path, until: Path | None = None, stop: signal.Signals | None = None) -> Ran:
    """Runs `pivotjax ARGS`; with `until`, sends the signal `stop` as soon as that path exists."""
    started = time.monotonic()
    # A runner in the background may have been told to ignore Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-m", "pivotjax.cli", *map(str, args)]
    with (
        open(log, "w+") as err,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, cwd=ROOT, text=True) as one,
    ):
        try:
            while until is not None and not until.exists() and one.poll() is None:
                time.sleep(0.05)
            if stop is not None:
                one.send_signal(stop)
            out, _ = one.communicate(timeout=3600)
        finally:
            one.kill()
        err.seek(0)
        return Ran(one.returncode, out, err.read(), time.monotonic() - started)
