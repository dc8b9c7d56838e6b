"""What the benchmarks of large files share: cold files, `dd` beside us, the memory of a command."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path


def forget(paths: Iterable[Path]) -> None:
    """Drops files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(paths: Iterable[Path]) -> float:
    """Seconds that dd takes to read files that are not in the page cache."""
    paths = list(paths)
    forget(paths)
    started = time.monotonic()
    for path in paths:
        _dd(f"if={path}", "of=/dev/null")
    return time.monotonic() - started


def write_seconds(out: Path, nbytes: int) -> float:
    """Seconds that dd takes to write so many bytes to the disk; they are removed again."""
    started = time.monotonic()
    _dd("if=/dev/zero", f"of={out}", f"count={nbytes}", "iflag=count_bytes", "conv=fsync")
    seconds = time.monotonic() - started
    out.unlink()
    return seconds


def _dd(*args: str) -> None:
    subprocess.run(["dd", "bs=16M", *args], check=True, stderr=subprocess.DEVNULL)


def measured(args: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak of anonymous memory (RssAnon, sampled) of one `pivotjax` command."""
    command = [sys.executable, "-m", "pivotjax.cli", *args]
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.01)
    if process.returncode:
        sys.exit(f"it failed: {' '.join(command)}")
    return time.monotonic() - started, peak


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
