"""`pivotjax pretrain` on two processes: the same projectors as on one, written once."""

import jax
import numpy as np
import pytest
import tiny_world
from processes import COMMAND, on_hosts
from tiny_world import llava_corpus

from pivotjax.checkpoints import store
from pivotjax.jobs import pretrain
from pivotjax.training.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Tiny towers and two corpora of plain pictures."""
    folder = tmp_path_factory.mktemp("world")
    return tiny_world.recipe(
        folder,
        {name: llava_corpus(folder / name) for name in ("plain", "simple")},
        {"train": 24, "calibration": 4, "test": 2},
        training={"steps": 6, "batch": 4, "learning_rate": 2e-3, "log_every": 1},
        checkpoints={"every_steps": 4, "keep_best": 1},
        metrics={"evaluate_every": 3, "evaluate_batches": 1},
    )


def test_two_processes_give_the_projectors_of_one(recipe, tmp_path):
    pretrain.main([str(recipe), "--out", str(tmp_path / "one")])
    said = on_hosts(2, [*COMMAND, "pretrain", recipe, "--out", tmp_path / "two"])
    assert f"projectors: {tmp_path}/two/projectors" in said[0] and "projectors" not in said[1]
    for name in ("w0", "plain", "simple"):
        one, two = (store.load_projector(tmp_path / out / "projectors" / name) for out in ("one", "two"))
        assert one.info["init_id"] == two.info["init_id"] and one.info["backbone"] == two.info["backbone"]
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)  # AdamW makes small gradients large
    for file in ("metrics", "held_out"):
        one, two = (read_metrics(tmp_path / out, file) for out in ("one", "two"))
        assert [row["step"] for row in one] == [row["step"] for row in two]
        curves = [[row[name]["loss"] for row in rows for name in ("plain", "simple")] for rows in (one, two)]
        np.testing.assert_allclose(*curves, rtol=1e-5)
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "held_out.jsonl", "checkpoints.json", "projectors", "training"}
