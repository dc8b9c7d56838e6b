"""Commands run in this process."""

import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from pivotjax import cli


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capsys) -> Callable[..., Ended]:
    """`command("convert", "a", "b", ...)` as the console script runs it."""

    def run(*args: Any) -> Ended:
        capsys.readouterr()
        status = 0
        before = signal.getsignal(signal.SIGTERM)
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            signal.signal(signal.SIGTERM, before)
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture
def done(command) -> Callable[..., Ended]:
    """Runs a command that must succeed."""

    def run(*args: Any) -> Ended:
        ended = command(*args)
        assert ended.status == 0, ended.err
        return ended

    return run


@pytest.fixture
def refused(command) -> Callable[..., str]:
    """Runs a command that must end in one line on stderr and status 2; returns the line."""

    def run(*args: Any) -> str:
        ended = command(*args)
        assert (ended.status, ended.out) == (2, ""), ended
        assert ended.err.endswith("\n") and ended.err.count("\n") == 1, ended.err
        assert ended.err.startswith("pivotjax"), ended.err
        return ended.err

    return run
