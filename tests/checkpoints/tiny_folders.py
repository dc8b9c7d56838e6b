"""Folders of transformers with a few thousand random parameters: every family, whole and in parts."""

import json
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

WORDS, ROWS = 20, 24  # tokens of the tokenizer; rows of the vocabulary
_TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=ROWS, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
TEXTS = {
    "llama": lambda **new: hf.LlamaConfig(**_TEXT | new),
    "llama tied": lambda **new: hf.LlamaConfig(**_TEXT | dict(tie_word_embeddings=True) | new),
    "llama biases": lambda **new: hf.LlamaConfig(**_TEXT | dict(attention_bias=True, mlp_bias=True) | new),
    "mistral": lambda **new: hf.MistralConfig(**_TEXT | dict(num_key_value_heads=1) | new),
    "qwen2": lambda **new: hf.Qwen2Config(**_TEXT | new),
    "qwen3": lambda **new: hf.Qwen3Config(**_TEXT | dict(head_dim=6) | new),
    "phi3": lambda **new: hf.Phi3Config(**_TEXT | new),
}
_TOWER = dict(hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=3, image_size=8,
              patch_size=4)  # fmt: skip
TOWERS = {
    "clip": lambda: (hf.CLIPVisionConfig(**_TOWER), hf.CLIPVisionModel),
    "siglip": lambda: (hf.SiglipVisionConfig(**_TOWER), hf.SiglipVisionModel),
    "siglip headless": lambda: (hf.SiglipVisionConfig(**_TOWER, vision_use_head=False), hf.SiglipVisionModel),
    "siglip2": lambda: (hf.Siglip2VisionConfig(**_TOWER, num_patches=9), hf.Siglip2VisionModel),
}
_JOINED = {
    "llava": (hf.LlavaConfig, hf.LlavaForConditionalGeneration, "clip"),
    "llava siglip": (hf.LlavaConfig, hf.LlavaForConditionalGeneration, "siglip"),
    "llava_next": (hf.LlavaNextConfig, hf.LlavaNextForConditionalGeneration, "clip"),
    "idefics3": (hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, Idefics3VisionConfig),
    "smolvlm": (hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, SmolVLMVisionConfig),
}
WHOLE = tuple(_JOINED)


def _model(make, config, dtype):
    torch.manual_seed(0)
    model = make(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text(name: str, dtype=torch.float32, **new):
    """A language model."""
    config = TEXTS[name](**new)
    return _model(hf.AutoModelForCausalLM.from_config, config, dtype)


def tower(name: str, dtype=torch.float32):
    """A vision tower."""
    config, kind = TOWERS[name]()
    return _model(kind, config, dtype)


def whole(name: str, language: str = "llama", dtype=torch.float32):
    """A multimodal model."""
    config_kind, kind, vision = _JOINED[name]
    parts = dict(text_config=TEXTS[language](), image_token_id=WORDS)
    parts["vision_config"] = TOWERS[vision]()[0] if isinstance(vision, str) else vision(**_TOWER)
    if name == "llava siglip":
        parts |= dict(vision_feature_select_strategy="full", vision_feature_layer=-1)
    if name == "llava_next":
        parts |= dict(image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]])
    return _model(kind, config_kind(**parts), dtype)


def save(model, folder: Path, **options) -> Path:
    """As transformers saves it, with a tokenizer and a processor."""
    model.save_pretrained(folder, **options)
    if model.config.model_type not in ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model"):
        save_tokenizer(folder)
    if "vision" in model.config.model_type or hasattr(model.config, "vision_config"):
        save_processor(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """`<s>`, `</s>` and words w3 .. w19; the image token is for whole models alone."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = json.loads((folder / "config.json").read_text())
    if "vision_config" in config:
        tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def save_processor(folder: Path) -> None:
    """CLIP's, for images of 8 x 8."""
    fields = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8},
              "crop_size": {"height": 8, "width": 8}}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
