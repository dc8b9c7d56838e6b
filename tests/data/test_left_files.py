"""What a process that was killed has left of a file goes when the file is written again."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

from pivotjax import files

WRITES = """
import os, signal, sys
from pathlib import Path
from pivotjax import files
with files.atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path) -> Path:
    """The path that a process was about to write when it was killed."""
    path = tmp_path / "00000.arrayrecord"
    subprocess.run([sys.executable, "-c", WRITES, path], env=environment())
    assert len(hidden(tmp_path)) == 1
    return path


def hidden(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


def test_what_was_left_goes(killed):
    files.write_bytes(killed, b"whole")
    assert killed.read_bytes() == b"whole" and hidden(killed.parent) == []


def test_what_another_still_writes_stays(tmp_path):
    path, mine = tmp_path / "a", tmp_path / ".a.fixtures"
    mine.mkdir()
    with files.atomic_path(path) as slow:
        slow.write_bytes(b"slow")
        files.write_bytes(path, b"quick")
        assert slow.exists() and path.read_bytes() == b"quick"
    assert path.read_bytes() == b"slow" and hidden(tmp_path) == [mine]


def test_what_was_put_aside_is_never_lost(killed):
    (left,) = hidden(killed.parent)
    (left / "replaced").mkdir()
    files.write_bytes(killed, b"whole")
    assert hidden(killed.parent) == [left]
