"""Tiny projectors on disk for commands to work on."""

import jax
import pytest
from tiny_projectors import Family, tiny


@pytest.fixture
def family(tmp_path) -> Family:
    made = Family(tmp_path / "family", tmp_path / "recipe.yaml")
    made.write("w0", tiny(0))
    for seed, name in enumerate(("cats", "dogs"), 1):
        made.write(name, jax.tree.map(lambda w, d: w + 0.1 * d, tiny(0), tiny(seed)))
    models = "".join(f"  - model: {made.folder / name}\n" for name in ("cats", "dogs"))
    made.recipe.write_text(f"models:\n{models}base_model: {made.folder / 'w0'}\nout: {tmp_path / 'out'}\n")
    return made
