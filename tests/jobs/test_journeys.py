"""What docs/checkpoints.md tells to do, with tiny models: bring a checkpoint, train or merge, take it back."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_world import make_language, make_tower, pictures

import pivotjax
from pivotjax.checkpoints import store
from pivotjax.data.sources import SOURCES, Source
from pivotjax.jobs import assemble, merge, pretrain
from pivotjax.models.vision import encode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tower, a language model, and two experts that were trained between them and merged."""
    folder = tmp_path_factory.mktemp("world")
    make_tower("clip", folder / "tower")
    make_language(folder / "language")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plain", "simple"):
            patch.setitem(SOURCES, name, Source(name, (), "none", "none", lambda files: pictures()))
        options = {
            "out": folder / "run", "model.vision": folder / "tower", "model.language": folder / "language",
            "data.domains": ("plain", "simple"), "data.prompt": "a", "data.max-caption": 4, "data.train": 24,
            "data.calibration": 2, "data.test": 2, "training.steps": 12, "training.batch": 4,
            "training.learning-rate": 2e-2, "checkpoints.every-steps": 12, "cache": folder / "cache",
        }  # fmt: skip
        pretrain.main(_arguments(options))
    recipe = folder / "merge.yaml"
    trained = folder / "run" / "projectors"
    models = "".join(f"  - model: {trained / name}\n" for name in ("plain", "simple"))
    recipe.write_text(
        f"models:\n{models}merge_method: task_arithmetic\nbase_model: {trained / 'w0'}\nout: {folder / 'merged'}\n"
    )
    merge.main([str(recipe)])
    return folder


def _arguments(options):
    words = []
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def inputs_of(model):
    """A prompt of two pictures, as `prepare` makes it and as transformers takes it."""
    pictures = [Image.new("RGB", (30, 22), "red"), Image.new("RGB", (18, 40), "blue")]
    ours = model.prepare(pictures, "<image>a red picture<image>a")
    names = {"token_ids": "input_ids"}
    return ours, {names.get(name, name): torch.tensor(value) for name, value in ours.items()}


def test_a_merged_projector_gives_the_same_logits_in_torch(world, command):
    ended = command("convert", world / "merged" / "projector", world / "whole", "--to", "hf", "--vision",
                    world / "tower", "--language", world / "language")  # fmt: skip
    assert ended.status == 0, ended
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        world / "whole", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = store.load_projector(world / "merged" / "projector").params
    for i in range(2):
        layer = getattr(theirs.model.multi_modal_projector, f"linear_{i + 1}")
        assert (layer.weight.detach().numpy() == np.asarray(trained[f"linear_{i}"]["kernel"]).T).all()
    ours = pivotjax.load_model(world / "whole")
    inputs, given = inputs_of(ours)
    with torch.no_grad():
        expected = theirs.eval()(**given).logits.numpy()
    found = np.asarray(ours.logits(**inputs))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    ids = theirs.generate(**given, max_new_tokens=6, do_sample=False)[:, given["input_ids"].shape[1] :].numpy()
    assert (np.asarray(ours.generate(**inputs, max_new=6))[:, : ids.shape[1]] == ids).all()


@pytest.mark.parametrize("to", ["orbax", "llava"])
def test_the_same_model_in_every_format(world, command, tmp_path, to):
    whole = tmp_path / "whole"
    parts = ["--vision", world / "tower", "--language", world / "language"]
    assert command("convert", world / "merged" / "projector", whole, "--to", "hf", *parts).status == 0
    more = ["--vision", str(world / "tower")] if to == "llava" else []
    assert command("convert", whole, tmp_path / to, "--to", to, *more).status == 0
    first, other = pivotjax.load_model(whole), pivotjax.load_model(tmp_path / to, vision=world / "tower")
    inputs, _ = inputs_of(first)
    expected, found = np.asarray(first.logits(**inputs)), np.asarray(other.logits(**inputs))
    rows = 64 if to == "orbax" else 10  # with and without those of `<image>` and of the padding
    assert found.shape[-1] == rows
    np.testing.assert_allclose(found, expected[..., :rows], atol=1e-6 * np.abs(expected).max())
    picture = tmp_path / "red.png"
    Image.new("RGB", (30, 22), "red").save(picture)
    options = ["--model", whole, "--template", "plain", "--max-new", 4]
    said = command("generate", picture, "a", *options)
    again = command("generate", picture, "a", "--model", tmp_path / to, *options[2:], "--vision", world / "tower")
    assert (said.status, said.out) == (again.status, again.out) and said.out.strip()


def test_the_parts_of_a_whole_model_are_trained_between_and_put_back(world, command, tmp_path):
    whole, parts = tmp_path / "whole", ["--vision", world / "tower", "--language", world / "language"]
    assert command("convert", world / "run" / "projectors" / "w0", whole, "--to", "hf", *parts).status == 0
    for part in ("vision", "language"):
        assert command("convert", whole, tmp_path / part, "--part", part, "--to", "hf").status == 0
    model = assemble.ModelConfig(str(tmp_path / "vision"), str(tmp_path / "language"))
    same = assemble.ModelConfig(str(world / "tower"), str(world / "language"))
    data = assemble.DataConfig(prompt="a", max_caption=4)
    taken, first = (assemble.load_frozen(one, data, world / "cache") for one in (model, same))
    picture = np.random.default_rng(0).integers(0, 256, (1, 18, 18, 3), np.uint8)
    assert (encode(taken.encoder, picture) == encode(first.encoder, picture)).all()
    rows = first.language.config.vocab_size
    assert (taken.language.params["embedding"][:rows] == first.language.params["embedding"]).all()
    new = world / "merged" / "projector"
    assert command("convert", whole, tmp_path / "new", "--projector", new, "--to", "hf").status == 0
    ours = pivotjax.load_model(whole)
    ours.params["projector"] = store.load_projector(new).params
    inputs, _ = inputs_of(ours)
    assert (ours.logits(**inputs) == pivotjax.load_model(tmp_path / "new").logits(**inputs)).all()
