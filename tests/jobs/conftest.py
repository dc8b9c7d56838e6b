"""Commands run in this process, and tiny projectors on disk for them to work on."""

import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import pytest
from tiny_projectors import Family, tiny

from pivotjax import cli


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capsys) -> Callable[..., Ended]:
    """`command("merge", "recipe.yaml", ...)` as the console script runs it."""

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
def refused(command) -> Callable[..., str]:
    """Runs a command that must end in one line on stderr and status 2; returns the line."""

    def run(*args: Any) -> str:
        ended = command(*args)
        assert (ended.status, ended.out) == (2, ""), ended
        assert ended.err.endswith("\n") and ended.err.count("\n") == 1, ended.err
        assert ended.err.startswith("pivotjax"), ended.err
        return ended.err

    return run


@pytest.fixture
def family(tmp_path) -> Family:
    made = Family(tmp_path / "family", tmp_path / "recipe.yaml")
    made.write("w0", tiny(0))
    for seed, name in enumerate(("cats", "dogs"), 1):
        made.write(name, jax.tree.map(lambda w, d: w + 0.1 * d, tiny(0), tiny(seed)))
    models = "".join(f"  - model: {made.folder / name}\n" for name in ("cats", "dogs"))
    made.recipe.write_text(f"models:\n{models}base_model: {made.folder / 'w0'}\nout: {tmp_path / 'out'}\n")
    return made
