"""`pivotjax inspect`: what is in a checkpoint, in words and in JSON."""

import json

import jax
import numpy as np
import pytest
import yaml
from tiny_projectors import tiny

from pivotjax.checkpoints import store, torch_bridge
from pivotjax.models import projector


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_it_says_what_a_projector_is(command, tmp_path, kind):
    params, info = tiny(3), {"name": "expert:cats", "init_id": "one", "domains": ["cats"], "versions": {"jax": "1"}}
    path = tmp_path / ("p" if kind == "orbax" else "p.safetensors")
    (store.save_projector if kind == "orbax" else torch_bridge.save_torch)(path, params, info)
    found = json.loads(command("inspect", path, "--json").out)
    assert found | info == found and found["path"] == str(path)
    assert found["parameters"] == 6 * 4 + 4 + 4 * 4 + 4
    assert found["tensors"]["linear_0.kernel"] == "float32[6, 4]" and len(found["tensors"]) == 4
    assert found["finite"] is True and found["fingerprint"] == projector.fingerprint(params)
    assert yaml.safe_load(command("inspect", path).out) == found


def test_it_says_that_numbers_are_not_finite(command, tmp_path):
    params = jax.tree.map(lambda leaf: leaf.at[0].set(np.inf), tiny(3))
    store.save_projector(tmp_path / "p", params, {})
    assert json.loads(command("inspect", tmp_path / "p", "--json").out)["finite"] is False
