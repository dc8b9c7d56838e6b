"""Whole models of transformers with a few thousand random parameters, on disk, and inputs for them."""

from typing import Any

import numpy as np
import torch
import transformers as hf
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

VOCAB, IMAGE = 93, 90  # neither a multiple of 64; two ids behind the image token
_TEXT = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=VOCAB, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
TEXT = {
    "llama": lambda **new: hf.LlamaConfig(**_TEXT | new),
    "mistral": lambda **new: hf.MistralConfig(**_TEXT | dict(sliding_window=24, num_key_value_heads=1) | new),
    "qwen2": lambda **new: hf.Qwen2Config(**_TEXT | new),
    "qwen3": lambda **new: hf.Qwen3Config(**_TEXT | dict(head_dim=12) | new),
    "phi3": lambda **new: hf.Phi3Config(**_TEXT | new),
}
_TOWER = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3, image_size=18,
              patch_size=4)  # fmt: skip
TOWERS = {
    "clip": lambda **new: hf.CLIPVisionConfig(**_TOWER | new),
    "siglip": lambda **new: hf.SiglipVisionConfig(**_TOWER | new),
    "idefics3": lambda **new: Idefics3VisionConfig(**_TOWER | dict(image_size=16) | new),
    "smolvlm": lambda **new: SmolVLMVisionConfig(**_TOWER | dict(image_size=16) | new),
}
_JOINED = {
    "llava": (hf.LlavaConfig, hf.LlavaForConditionalGeneration),
    "llava_next": (hf.LlavaNextConfig, hf.LlavaNextForConditionalGeneration),
    "idefics3": (hf.Idefics3Config, hf.Idefics3ForConditionalGeneration),
    "smolvlm": (hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration),
}
GRIDS = [[18, 36], [36, 18], [36, 36], [54, 18]]


def build(family: str, text: str, tower: str, *, of_text=(), of_tower=(), seed: int = 0, **joined: Any):
    """A random model of transformers in evaluation mode, far from its initial state."""
    torch.manual_seed(seed)
    config_class, model_class = _JOINED[family]
    parts = dict(text_config=TEXT[text](**dict(of_text)), vision_config=TOWERS[tower](**dict(of_tower)))
    if family == "llava_next":
        joined = {"image_grid_pinpoints": GRIDS} | joined
    if family in ("llava", "llava_next"):
        joined = {"vision_feature_select_strategy": "default" if tower == "clip" else "full"} | joined
    model = model_class(config_class(**parts, **{"image_token_id": IMAGE} | joined)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.12 * torch.randn_like(parameter))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model


def tokens_of_image(model, size=(18, 18)) -> int:
    """How many image tokens transformers wants for one image of that height and width."""
    config = model.config
    pixels = {"pixel_values": torch.zeros(1, 3, config.vision_config.image_size, config.vision_config.image_size)}
    if config.model_type == "llava_next":
        pixels = {"pixel_values": torch.zeros(1, 5, 3, 18, 18), "image_sizes": torch.tensor([size])}
    if config.model_type in ("idefics3", "smolvlm"):
        pixels = {"pixel_values": torch.ones(1, 1, 3, *pixels["pixel_values"].shape[2:])}
    with torch.no_grad():
        return len(torch.cat(tuple(model.get_image_features(**pixels).pooler_output)))


def inputs_for(model, images=(1, 2, 1), texts=(5, 9, 2), seed: int = 0, left: bool = True) -> dict[str, np.ndarray]:
    """A batch: row i has `images[i]` images and `texts[i]` words around them; padded to one length."""
    random, kind = np.random.default_rng(seed), model.config.model_type
    size = model.config.vision_config.image_size
    count = sum(images)
    made: dict[str, np.ndarray] = {}
    if kind == "llava":
        made["pixel_values"] = random.normal(size=(count, 3, size, size))
        lengths = [tokens_of_image(model)] * count
    elif kind == "llava_next":
        sizes = [[(20, 50), (47, 11), (30, 31), (18, 18)][i % 4] for i in range(count)]
        made["pixel_values"] = random.normal(size=(count, 5, 3, size, size))
        made["image_sizes"] = np.array(sizes)
        lengths = [tokens_of_image(model, one) for one in sizes]
    else:
        made |= _tiles(random, images, size)
        lengths = [tokens_of_image(model)] * count
    rows, left_over = [], list(lengths)
    for number, words in zip(images, texts):
        row = [1]
        for _ in range(number):
            row += [*random.integers(3, IMAGE, 2), *[IMAGE] * left_over.pop(0)]
        rows.append([*row, *random.integers(3, IMAGE, words)])
    longest = max(map(len, rows))
    ids, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"token_ids": ids, "attention_mask": mask} | {
        name: value.astype(np.float32) if name == "pixel_values" else value for name, value in made.items()
    }


def _tiles(random, images, size) -> dict[str, np.ndarray]:
    """Idefics3's: the last tile of each row covers a part only, shorter rows are filled up with zeros."""
    shape = (len(images), max(images), 3, size, size)
    pixels, mask = np.zeros(shape), np.zeros((*shape[:2], size, size), np.int64)
    for row, count in enumerate(images):
        pixels[row, :count] = random.normal(size=(count, *shape[2:]))
        mask[row, :count] = 1
        mask[row, count - 1, size - 5 :] = 0
        mask[row, count - 1, :, size - 4 :] = 0
        pixels[row, count - 1] *= mask[row, count - 1]
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def torch_inputs(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Under the names that transformers gives them."""
    return {"input_ids" if name == "token_ids" else name: torch.tensor(value) for name, value in inputs.items()}


def torch_logits(model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model(**torch_inputs(inputs)).logits.float().numpy()
