"""Commands run in this process, and tiny projectors on disk for them to work on."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from pivotjax import cli
from pivotjax.checkpoints import store
from pivotjax.models import projector


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


def tiny(seed: int = 0, kind: str = "mlp2x_gelu", d_in: int = 6, d_out: int = 4) -> projector.Params:
    return projector.init(kind, d_in, d_out, jax.random.key(seed), 1.0)


class Family(NamedTuple):
    """A W0 and two experts of it on disk, and a recipe that merges them."""

    folder: Path
    recipe: Path

    def write(self, name: str, params: projector.Params, **info: Any) -> Path:
        about = {"init_id": "one", "name": name, "domains": [name]} | info
        store.save_projector(self.folder / name, params, about)
        return self.folder / name


@pytest.fixture
def family(tmp_path) -> Family:
    made = Family(tmp_path / "family", tmp_path / "recipe.yaml")
    made.write("w0", tiny(0))
    for seed, name in enumerate(("cats", "dogs"), 1):
        made.write(name, jax.tree.map(lambda w, d: w + 0.1 * d, tiny(0), tiny(seed)))
    models = "".join(f"  - model: {made.folder / name}\n" for name in ("cats", "dogs"))
    made.recipe.write_text(f"models:\n{models}base_model: {made.folder / 'w0'}\nout: {tmp_path / 'out'}\n")
    return made
