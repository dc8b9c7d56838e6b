"""Commands in processes of their own: one that can be interrupted, or several that find each other on the loopback."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "pivotjax.cli"]
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile, not to run


class Ran(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str
    seconds: float


def run(*args: Any, log: Path, until: Path | None = None, stop: signal.Signals | None = None) -> Ran:
    """Runs `pivotjax ARGS`; with `until`, sends the signal `stop` as soon as that path exists."""
    started = time.monotonic()
    with (
        open(log, "w+") as err,
        subprocess.Popen([*COMMAND, *map(str, args)], stdout=subprocess.PIPE, stderr=err, cwd=ROOT, text=True) as one,
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


class Ended(NamedTuple):
    """How one of several processes ended."""

    status: int
    err: str


def environment(*folders: str, **more: str) -> dict[str, str]:
    """That of a process which imports pivotjax and what is in `folders`; `more` is added."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *folders, os.environ.get("PYTHONPATH", "")])} | more


def free_port() -> int:
    """One below those that the system hands out to whoever connects."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def together(commands: Sequence[Sequence[Any]], env: dict[str, str] | None = None, timeout: float = 300) -> list[Ended]:
    """Runs them at once, and waits for all; none is left behind."""
    running = [
        subprocess.Popen([str(word) for word in command], env=env or environment(), stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
        for command in commands
    ]  # fmt: skip
    try:
        said = [one.communicate(timeout=timeout)[1] for one in running]
    finally:
        for one in running:
            one.kill()
    return [Ended(one.returncode, err) for one, err in zip(running, said)]


def on_hosts(count: int, command: Sequence[Any], env: dict[str, str] | None = None) -> list[str]:
    """What the processes said on stderr that run a command of pivotjax as `count` hosts, all with success."""
    shared = ["--hosts.coordinator", f"127.0.0.1:{free_port()}", "--hosts.count", count, "--hosts.index"]
    each = [[*shared, index] for index in range(count)] if count > 1 else [[]]
    ended = together([[*command, *own] for own in each], env)
    assert [one.status for one in ended] == [0] * count, ended
    return [one.err for one in ended]
