"""The vision transformers against transformers: tiny random models, written by `save_pretrained` and read by us."""

import json
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from pivotjax.checkpoints import names
from pivotjax.checkpoints.tensors import open_checkpoint
from pivotjax.errors import InputError
from pivotjax.models.processors import Normalisation
from pivotjax.models.vision import FAMILIES, Features, abstract, encode, load_encoder
from pivotjax.models.vision.vit import _bucket_table

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=6
)
NAFLEX = {key: value for key, value in SIZES.items() if key != "image_size"} | {"num_patches": 16}
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
CUT = dict(image_size=23, patch_size=7)  # no multiple of the patch
TOLERANCE = 1e-4  # of the largest value


def clip(**changes):
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES | changes))


def siglip(**changes):
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES | changes))


def whole(model, config, sizes=SIZES):
    return model(config(vision_config=sizes, text_config=TEXT))


SQUARE = {
    "clip": clip,
    "clip cut edge": lambda: clip(**CUT),
    "clip gelu": lambda: clip(hidden_act="gelu", layer_norm_eps=1e-3),
    "clip one layer": lambda: clip(num_hidden_layers=1, num_attention_heads=1),
    "clip projection": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SIZES)),
    "clip whole": lambda: whole(transformers.CLIPModel, transformers.CLIPConfig),
    "siglip": siglip,
    "siglip cut edge": lambda: siglip(**CUT),
    "siglip one layer, no head": lambda: siglip(num_hidden_layers=1, vision_use_head=False),
    "siglip quick_gelu, one patch": lambda: siglip(hidden_act="quick_gelu", patch_size=24),
    "siglip whole": lambda: whole(transformers.SiglipModel, transformers.SiglipConfig),
}
VARIABLE = {
    "idefics3": lambda **more: Idefics3VisionTransformer(Idefics3VisionConfig(**SIZES | more)),
    "smolvlm": lambda **more: SmolVLMVisionTransformer(SmolVLMVisionConfig(**SIZES | more)),
}


class Saved(NamedTuple):
    """A model of transformers, and its folder."""

    model: Any
    folder: Any

    @property
    def tower(self):
        """The image tower, wherever it stands."""
        return getattr(self.model, "vision_model", self.model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(make)`: a model with noise on every parameter (biases would be zeros), and its folder."""

    def save(make):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("tower")
        model.save_pretrained(folder)
        return Saved(model, folder)

    return save


class Loaded(NamedTuple):
    """Our network."""

    config: Any
    network: Any
    states: Any  # hidden states at every depth, in one compiled function
    run: Any  # the last of them


def loaded(folder):
    settings = json.loads((folder / "config.json").read_text())
    family = FAMILIES[settings["model_type"]]
    config = family.config(settings, "config.json")
    graphdef, shapes = abstract(family, config)
    params = names.load(open_checkpoint(folder), family.names(config), shapes, where=str(folder))
    network = nnx.merge(graphdef, params)
    states = jax.jit(lambda *args: [network(*args, depth=depth) for depth in range(config.num_layers + 1)])
    return Loaded(config, network, states, jax.jit(lambda *args: network(*args)))


def assert_close(ours, theirs, what=""):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    difference = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert difference < TOLERANCE, f"{what}: {difference}"


def compare(ours, theirs, *pixels):
    """Hidden states of every layer, and the last one behind the final norm where transformers gives that."""
    assert len(theirs.hidden_states) == ours.config.num_layers + 1
    states = ours.states(*pixels)
    for depth, state in enumerate(theirs.hidden_states):
        assert_close(states[depth], state, f"layer {depth}")
    last = states[-1]
    behind = last if ours.config.has_class_token else ours.network.final_norm(last)
    assert_close(behind, theirs.last_hidden_state, "last_hidden_state")
    if ours.config.has_class_token and theirs.get("pooler_output") is not None:
        assert_close(ours.network.final_norm(last[:, 0]), theirs.pooler_output, "pooler_output")


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *shape, 3)).astype(np.float32)


def first(array):
    """Channels first, for torch."""
    return torch.tensor(np.moveaxis(array, -1, 1))


@pytest.mark.parametrize("name", SQUARE)
def test_every_layer_agrees_with_transformers(saved, name):
    model = saved(SQUARE[name])
    ours = loaded(model.folder)
    pixels = images(ours.config.image_size, ours.config.image_size)
    with torch.no_grad():
        theirs = model.tower(first(pixels), output_hidden_states=True)
    compare(ours, theirs, pixels)
    with pytest.raises(InputError, match="resize them first"):
        ours.network(images(48, 24))


@pytest.mark.parametrize("name", VARIABLE)
@pytest.mark.parametrize("changes, size", [({}, (24, 24)), ({}, (20, 45)), (CUT | {"num_hidden_layers": 1}, (38, 17))])
def test_images_of_any_size_with_padding(saved, name, changes, size):
    """Positions go by the relative place among an image's own patches; padded patches are not seen."""
    model = saved(partial(VARIABLE[name], **changes))
    ours = loaded(model.folder)
    pixels = images(*size)
    grid = (size[0] // ours.config.patch_size, size[1] // ours.config.patch_size)
    mask = np.zeros((2, *grid), bool)
    mask[0], mask[1, : max(grid[0] - 1, 1), : max(grid[1] - 2, 1)] = True, True
    with torch.no_grad():
        theirs = model.tower(first(pixels), torch.tensor(mask), output_hidden_states=True)
        unmasked = model.tower(first(pixels), output_hidden_states=True)
    compare(ours, theirs, pixels, mask)
    compare(ours, unmasked, pixels)


@pytest.mark.parametrize("side", [*range(2, 19), 26, 27, 32])
def test_buckets_are_those_of_torch(side):
    for count in range(1, side + 1):
        boundaries = torch.arange(1 / side, 1.0, 1 / side)
        place = torch.clamp(torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor([count])), max=1 - 1e-6)
        expected = torch.bucketize(place, boundaries, right=True).numpy()
        np.testing.assert_array_equal(_bucket_table(count, side)[count], expected)


@pytest.mark.parametrize("make", [
    lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**NAFLEX)),
    lambda: whole(transformers.Siglip2Model, transformers.Siglip2Config, NAFLEX),
])  # fmt: skip
def test_naflex_at_several_grids(saved, make):
    """Larger than the table of positions, smaller, equal to it, and one patch high."""
    model = saved(make)
    ours = loaded(model.folder)
    grid = np.array([[7, 3], [2, 5], [4, 4], [1, 20]])
    pixels = np.random.default_rng(0).normal(size=(4, 22, 3 * 6**2)).astype(np.float32)
    mask = np.arange(22) < grid.prod(1)[:, None]
    pixels *= mask[..., None]
    with torch.no_grad():
        theirs = model.tower(*map(torch.tensor, (pixels, mask, grid)), output_hidden_states=True)
    compare(ours, theirs, pixels, None, grid)


def test_naflex_takes_whole_images(saved):
    model = saved(lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**NAFLEX)))
    ours = loaded(model.folder)
    pixels = images(24, 18)
    patches = pixels.reshape(2, 4, 6, 3, 6, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 12, -1)
    grid = np.array([[4, 3], [4, 3]])
    np.testing.assert_allclose(ours.run(pixels), ours.run(patches, None, grid), atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "clip whole"])
def test_both_layouts_of_names_are_read(saved, name):
    """Older transformers write `vision_model.` before a tower's names and keep a buffer of position numbers."""
    model = saved(SQUARE[name])
    pixels = images(24, 24)
    expected = loaded(model.folder).run(pixels)
    tensors = load_file(model.folder / "model.safetensors")
    own = {key for key in tensors if not key.startswith(("text", "logit", "visual"))}
    bare = {key.removeprefix("vision_model."): tensors[key] for key in own}
    for stem in ("", "vision_model."):
        renamed = {stem + key: value for key, value in bare.items()}
        renamed |= {key: value for key, value in tensors.items() if key not in own}
        renamed[f"{stem}embeddings.position_ids"] = torch.arange(17)[None]
        save_file(renamed, model.folder / "model.safetensors")
        np.testing.assert_array_equal(loaded(model.folder).run(pixels), expected)
        type(model.model).from_pretrained(model.folder)  # transformers reads either


@pytest.mark.parametrize("name", [*SQUARE, *VARIABLE, "naflex"])
def test_every_tensor_goes_back_bit_for_bit(saved, name):
    naflex = lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**NAFLEX))  # noqa: E731
    folder = saved((SQUARE | VARIABLE | {"naflex": naflex})[name]).folder
    tensors, settings = open_checkpoint(folder), json.loads((folder / "config.json").read_text())
    family = FAMILIES[settings["model_type"]]
    table = family.names(config := family.config(settings, ""))
    entries = [entry for leaf in names.leaves(table, abstract(family, config)[1]) for entry in leaf.entries]
    places = names.resolve(tensors, table, entries, "tower")
    for entry in entries:
        (key,) = entry.keys
        before = tensors[places[key]]
        np.testing.assert_array_equal(entry.transform.inverse(entry.transform.forward(before)), before)
    left = {key for key in tensors if key not in places.values()}
    assert all(key.startswith(("text_", "logit_", "visual_projection")) for key in left)


# Through `load_encoder`, as pre-training takes them.


def with_processor(model, **changes):
    """The model's folder with a preprocessor_config.json beside it."""
    kind = transformers.SiglipImageProcessorPil if "siglip" in model.model.config.model_type else None
    kind = kind or transformers.CLIPImageProcessorPil
    size = model.tower.config.image_size
    kind(size={"height": size, "width": size}, do_center_crop=False, **changes).save_pretrained(model.folder)
    return model.folder


@pytest.mark.parametrize("name, layer, select", [
    ("clip", -2, "patch"), ("clip", -1, "cls_patch"), ("clip", 1, "cls_patch"), ("clip", 0, "patch"),
    ("clip one layer", -2, "patch"), ("clip cut edge", -3, "patch"), ("clip whole", -2, "patch"),
    ("siglip", -2, "patch"), ("siglip whole", -1, "patch"), ("siglip cut edge", -2, "patch"),
])  # fmt: skip
def test_encoder_gives_the_chosen_layer(saved, name, layer, select):
    model = saved(SQUARE[name])
    encoder = load_encoder(with_processor(model, image_mean=[0.4, 0.5, 0.6]), Features(layer, select))
    side, rng = encoder.image_size, np.random.default_rng(1)
    pictures = rng.integers(0, 256, (3, side, side, 3), np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(model.folder, backend="pil")
    with torch.no_grad():
        pixels = processor(list(pictures), return_tensors="pt")["pixel_values"]
        expected = model.tower(pixels, output_hidden_states=True).hidden_states[layer]
    if "clip" in name and select == "patch":
        expected = expected[:, 1:]
    tokens = encode(encoder, pictures)
    assert tokens.shape == (3, encoder.num_tokens, encoder.dim) and tokens.dtype == jnp.float32
    assert_close(tokens, expected)
    assert encoder.normalise == Normalisation(1 / 255, (0.4, 0.5, 0.6), encoder.normalise.std)


def test_encoder_of_naflex(saved):
    """Its images are the squares whose patches are the table of positions."""
    model = saved(lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**NAFLEX)))
    processor = transformers.Siglip2ImageProcessorPil(patch_size=6, max_num_patches=16)
    processor.save_pretrained(model.folder)
    encoder = load_encoder(model.folder)
    pictures = np.random.default_rng(1).integers(0, 256, (3, 24, 24, 3), np.uint8)
    inputs = processor(list(pictures), return_tensors="pt")
    with torch.no_grad():
        states = model.tower(*inputs.values(), output_hidden_states=True).hidden_states
    assert inputs["spatial_shapes"].tolist() == [[4, 4]] * 3
    assert_close(encode(encoder, pictures), states[-2])


def test_weights_in_a_torch_file(saved):
    """OpenAI's ViT-L/14-336 has no safetensors on the hub."""
    model = saved(clip)
    folder = with_processor(model)
    pictures = np.random.default_rng(1).integers(0, 256, (2, 24, 24, 3), np.uint8)
    before = load_encoder(folder)
    expected = encode(before, pictures)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    after = load_encoder(folder)
    np.testing.assert_array_equal(encode(after, pictures), expected)
    assert after.identity != before.identity


def test_spatial_reduction_is_part_of_the_features(saved):
    folder = with_processor(saved(siglip))
    pictures = np.random.default_rng(1).integers(0, 256, (2, 24, 24, 3), np.uint8)
    plain, pooled = (load_encoder(folder, Features(kind=kind)) for kind in ("mlp2x_gelu", "avg_pool2_mlp2x_gelu"))
    shuffled = load_encoder(folder, Features(kind="pixel_shuffle4_linear"))
    assert [(one.num_tokens, one.dim) for one in (plain, pooled, shuffled)] == [(16, 32), (4, 32), (1, 512)]
    grid = np.asarray(encode(plain, pictures)).reshape(2, 2, 2, 2, 2, 32)
    np.testing.assert_allclose(encode(pooled, pictures), grid.mean((2, 4)).reshape(2, 4, 32), atol=1e-5)
    np.testing.assert_allclose(encode(shuffled, pictures), grid.reshape(2, 1, 512), atol=1e-5)


def test_identity_is_of_all_that_features_depend_on(saved):
    model = saved(clip)
    folder = with_processor(model)
    chosen = [Features(), Features(-1), Features(-2, "cls_patch"), Features(kind="avg_pool2_linear")]
    found = [load_encoder(folder, one).identity for one in chosen]
    assert len(set(found)) == len(chosen)
    assert load_encoder(folder, Features(kind="mlp3x_gelu")).identity == found[0]
    with_processor(model, image_std=[0.1, 0.1, 0.1])
    assert load_encoder(folder).identity not in found


def change(folder, file="config.json", **fields):
    settings = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(settings))


@pytest.mark.parametrize("fields, message", [
    ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ({"num_channels": 1}, "num_channels 1"),
    ({"num_attention_heads": 5}, "num_attention_heads 5"),
    ({"image_size": [24, 24]}, "image_size is"),
    ({"image_size": 5}, "image_size 5"),
    ({"model_type": "vit"}, "model_type 'vit' is no known vision encoder; known: clip_vision_model"),
    ({"num_hidden_layers": 1}, "tensor names do not match the model; .* unknown"),
    ({"intermediate_size": 49}, "the model's config needs"),
])  # fmt: skip
def test_configs_that_are_refused(saved, fields, message):
    folder = with_processor(saved(clip))
    change(folder, **fields)
    with pytest.raises(InputError, match=message) as caught:
        load_encoder(folder)
    assert "\n" not in str(caught.value)


def test_features_that_are_refused(saved, tmp_path):
    folder = with_processor(saved(siglip))
    for chosen, message in {
        Features(select_features="cls_patch"): "no class token",
        Features(-4): "select_layer -4 is none of a tower of 2",
        Features(kind="pixel_shuffle3_linear"): "16 tokens are no square grid",
        Features(kind="shuffle"): "projector kind 'shuffle' is unknown",
    }.items():
        with pytest.raises(InputError, match=message):
            load_encoder(folder, chosen)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json"):
        load_encoder(folder)
    clip_folder = with_processor(saved(clip))
    with pytest.raises(InputError, match="17 tokens are no square grid"):
        load_encoder(clip_folder, Features(-2, "cls_patch", "avg_pool2_linear"))
    with pytest.raises(InputError, match="cannot read"):
        load_encoder(tmp_path / "absent")


def test_fields_that_a_config_leaves_out(saved):
    """Old config.json files hold only what differs from the class; LLaVA's vision_config is one."""
    for make, values in ((clip, ("quick_gelu", 1e-5)), (siglip, ("gelu_pytorch_tanh", 1e-6))):
        kind = make().config.model_type
        config = FAMILIES[kind].config({"hidden_size": 1024, "num_attention_heads": 16, "hidden_act": None}, "")
        default = type(make().config)(hidden_size=1024, num_attention_heads=16)
        assert (config.activation, config.norm_eps) == (default.hidden_act, default.layer_norm_eps) == values
        assert (config.image_size, config.patch_size) == (default.image_size, default.patch_size)
        assert (config.num_layers, config.mlp_dim) == (default.num_hidden_layers, default.intermediate_size)
    early = {"vision_config": {"image_size": 224}, "vision_config_dict": {"image_size": 336, "patch_size": 14}}
    assert FAMILIES["clip"].config(early, "").num_patches == 576
