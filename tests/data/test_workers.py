"""Worker processes: the batches that threads make, through deaths, errors and ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from greys import Greys

from pivotjax.data import workers
from pivotjax.data.pipeline import Feed
from pivotjax.data.shared import Part
from pivotjax.errors import InputError

PARENT = """
import sys
from pathlib import Path
from pivotjax.data.workers import Ahead
from test_workers import Numbers

if __name__ == "__main__":
    with Ahead(Numbers(Path(sys.argv[1])), 0, 2) as batches:
        for batch in batches:
            print(int(batch["step"]), flush=True)
"""


@dataclass(frozen=True)
class Numbers:
    """Batch s holds s; each process that makes one says so in a folder."""

    lives: Path
    deadly: bool = False

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        (self.lives / str(os.getpid())).touch()
        if self.deadly and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return {"step": np.array(step), "ones": np.ones((100, 100))}

    def parts(self, step: int) -> dict[str, Part]:
        return {key: Part([array], ()) for key, array in self[step].items()}


def living(folder: Path) -> list[int]:
    """The processes beside this one that have made batches and are still there."""
    made = sorted({int(file.name) for file in folder.iterdir()} - {os.getpid()})
    return [pid for pid in made if _state(pid) not in ("", "Z")]


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return ""


def wait_until(true, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(true())


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def test_a_killed_worker_is_replaced_and_no_batch_is_lost(tmp_path, captioner, capsys):
    """Two workers make what threads make; one is killed in the middle; at the end none is left."""
    domains = [Greys("many", 40, frozenset({3}), tmp_path, seconds=0.002), Greys("few", 5)]
    feed = Feed({"a": domains}, captioner, 4, seed=0, bad_limit=1, workers=2)
    with Feed({"a": domains}, captioner, 4, seed=0, bad_limit=1).start(0) as threads:
        expected = [next(threads) for _ in range(60)]
    with feed.start(2) as batches:
        assert all(same(next(batches), expected[step]) for step in range(2, 6))
        assert len(living(tmp_path)) == 2
        os.kill(living(tmp_path)[0], signal.SIGKILL)
        # More than lie ready: those that the dead worker had finished are taken all the same.
        assert all(same(next(batches), expected[step]) for step in range(6, 60))
    assert not living(tmp_path)
    assert "an input worker died with exit code -9 at step" in capsys.readouterr().err


def test_workers_that_die_again_and_again_end_the_run_with_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "_RESTARTS", 1)
    with workers.Ahead(Numbers(tmp_path, deadly=True), 0, 1) as batches:
        with pytest.raises(InputError, match="workers died 2 times, the last one with exit code -9; give the machine"):
            for step in range(4):  # the last ones before a death can be lost with it
                assert int(next(batches)["step"]) == step
    assert not living(tmp_path)


def test_an_error_of_a_worker_is_the_runs(tmp_path, captioner):
    """And no worker initialises a JAX backend, which on a TPU host would take the chips from the run."""
    broken = Greys("broken", 5, bad=frozenset(range(5)))
    feed = Feed({"a": [broken]}, captioner, 2, seed=0, workers=1)
    with feed.start(0) as batches, pytest.raises(InputError, match="domain broken: 200 samples in a row"):
        next(batches)
    with workers.Ahead(_Backends(), 0, 1) as batches:
        assert not next(batches)["initialised"]


class _Backends:
    def __len__(self) -> int:
        return 10

    def parts(self, step: int) -> dict[str, Part]:
        from jax._src import xla_bridge

        import pivotjax.data.features  # noqa: F401 (with all that it imports)

        return {"initialised": Part([np.array(xla_bridge.backends_are_initialized())], ())}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_run(tmp_path, how):
    """However the process that reads the batches ends."""
    script, lives = tmp_path / "parent.py", tmp_path / "lives"
    script.write_text(PARENT)
    lives.mkdir()
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, script, lives], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert [parent.stdout.readline().strip() for _ in range(4)] == ["0", "1", "2", "3"]
        assert len(living(lives)) == 2
        parent.send_signal(how)
        assert parent.wait(30) != 0
        assert wait_until(lambda: not living(lives))
    finally:
        parent.kill()
        parent.wait()
