"""`pivotjax pretrain` with tiny CLIP and SigLIP towers from their Hugging Face folders, and what comes after it."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import SIDE, WORDS, make_language, make_tower, pictures

from pivotjax.checkpoints import store
from pivotjax.checkpoints.training import CheckpointConfig
from pivotjax.data.features import FeatureSource
from pivotjax.data.images import render
from pivotjax.data.sources import SOURCES, Source
from pivotjax.errors import InputError
from pivotjax.jobs import assemble, generate
from pivotjax.jobs.assemble import DataConfig, ModelConfig
from pivotjax.jobs.pretrain import PretrainConfig, run
from pivotjax.models.projector import ProjectorConfig
from pivotjax.training.metrics import read_metrics
from pivotjax.training.optimizer import TrainingConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A language model's folder and two domains of the same pictures."""
    folder = tmp_path_factory.mktemp("world")
    make_language(folder / "language")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plain", "simple"):
            patch.setitem(SOURCES, name, Source(name, (), "none", "none", lambda files: pictures()))
        yield folder


def train(world, kind, **model):
    tower = make_tower(kind, world / kind)
    out = world / f"out-{kind}"
    config = PretrainConfig(
        out,
        ModelConfig(str(world / kind), str(world / "language"), **model),
        DataConfig(("plain", "simple"), prompt="a", max_caption=4, train=24, calibration=2, test=2),
        TrainingConfig(steps=12, batch=4, learning_rate=2e-2, log_every=1),
        CheckpointConfig(every_steps=12),
        cache=world / "cache",
    )
    run(config)
    return config, tower


TOWERS = {
    "clip": dict(select_layer=-1, select_features="cls_patch"),
    "siglip": dict(projector=ProjectorConfig("pixel_shuffle2_mlp2x_gelu")),
}


@pytest.fixture(scope="module", params=TOWERS)
def trained(request, world):
    return request.param, *train(world, request.param, **TOWERS[request.param])


def test_two_experts_learn(trained):
    kind, config, _ = trained
    rows = read_metrics(config.out)
    assert len(rows) == 12
    for name in ("plain", "simple"):
        losses = [row[name]["loss"] for row in rows]
        assert np.mean(losses[-3:]) < 0.7 * losses[0], losses
    params = store.load_projector(config.out / "projectors" / "plain").params
    shapes = {name: layer["kernel"].shape for name, layer in params.items()}
    assert shapes == {"linear_0": (24 if kind == "clip" else 4 * 24, 32), "linear_1": (32, 32)}


def test_features_on_disk_are_the_towers(trained, world):
    """Rendered, normalised as the tower's processor does, and stored: what transformers makes of the same picture."""
    kind, _, (model, processor) = trained
    paths = list((world / "cache" / "features").glob("plain-test-*"))
    by_tokens = {source[0]["features"].shape: source for source in (FeatureSource(path, "plain") for path in paths)}
    source = by_tokens[(17, 24) if kind == "clip" else (4, 96)]
    known = {item.key: item for item in pictures()}
    rendered = [render(known[source[i]["key"]], SIDE) for i in range(len(source))]
    with torch.no_grad():
        pixels = processor(rendered, return_tensors="pt")["pixel_values"]
        states = model(pixels, output_hidden_states=True).hidden_states
    expected = (states[-1] if kind == "clip" else states[-2]).numpy()
    if kind == "siglip":
        expected = expected.reshape(-1, 2, 2, 2, 2, 24).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 96)
    for i in range(len(source)):
        np.testing.assert_allclose(source[i]["features"], expected[i], rtol=2e-3, atol=2e-3)  # float16 on disk


def test_a_projector_finds_its_tower_again(trained, world, tmp_path):
    _, config, _ = trained
    projector = config.out / "projectors" / "plain"
    Image.new("RGB", (90, 40), "red").save(tmp_path / "red.png")
    text = generate.run(
        generate.GenerateConfig(tmp_path / "red.png", model=projector, max_new=3, cache=world / "cache")
    )
    assert set(text.split()) <= set(WORDS)
    info = store.load_projector(projector).info
    assert info["config"]["model"]["select_layer"] == config.model.select_layer
    info["config"]["model"]["select_layer"] = 1
    with pytest.raises(InputError, match="was trained between other weights \\(vision differ"):
        assemble.frozen_of(info, world / "cache", "the projector")


def test_choices_that_do_not_fit_the_tower(world):
    make_tower("siglip", world / "other")
    for model, message in {
        ModelConfig(str(world / "other"), str(world / "language"), select_features="cls_patch"): "no class token",
        ModelConfig(str(world / "other"), str(world / "language"), select_layer=3): "select_layer 3 is none of",
        ModelConfig(
            str(world / "other"), str(world / "language"), projector=ProjectorConfig("avg_pool3_linear")
        ): "16 tokens are no square grid with a side that 3 divides",
    }.items():
        with pytest.raises(InputError, match=message):
            assemble.load_frozen(model, DataConfig(prompt="a", max_caption=4), world / "cache")
