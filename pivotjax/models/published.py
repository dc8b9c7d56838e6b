"""Sizes of well-known models, as their config.json on the Hugging Face hub states them.

A step can be compiled and its cost known before any weights are there; nothing is downloaded. A name matches by its
last part, whatever stands before it: `models/vicuna-7b-v1.5`, `hf://lmsys/vicuna-7b-v1.5`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SIGLIP = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@dataclass(frozen=True)
class Published:
    """What is known of a model without its files.

    Fields:
        source: where its config.json is.
        settings: the fields of config.json that sizes depend on (of a CLIP or SigLIP, those of its image tower).
        pixels: mean and standard deviation of its image processor.
        begins: its tokenizer begins a text with a token of its own.
    """

    source: str
    settings: Mapping[str, Any]
    pixels: Mapping[str, tuple[float, ...]] | None = None
    begins: bool = False


def _llama(source: str, begins: bool = True, **sizes: Any) -> Published:
    return Published(f"https://huggingface.co/{source}", {"model_type": "llama", **sizes}, begins=begins)


def _qwen(source: str, dim: int, mlp: int, layers: int, heads: int, kv: int, tied: bool, vocabulary: int) -> Published:
    sizes = dict(hidden_size=dim, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
                 num_key_value_heads=kv, tie_word_embeddings=tied, vocab_size=vocabulary, max_window_layers=layers,
                 max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6)  # fmt: skip
    return Published(f"https://huggingface.co/{source}", {"model_type": "qwen2", **sizes})


def _tower(source: str, kind: str, pixels: Mapping[str, tuple[float, ...]], **sizes: Any) -> Published:
    return Published(f"https://huggingface.co/{source}", {"model_type": kind, **sizes}, pixels)


LANGUAGE: dict[str, Published] = {
    "vicuna-7b-v1.5": _llama(
        "lmsys/vicuna-7b-v1.5", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    "vicuna-13b-v1.5": _llama(
        "lmsys/vicuna-13b-v1.5", vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=40, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    "smollm2-135m": _llama(
        "HuggingFaceTB/SmolLM2-135M", begins=False, vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_theta=100000, tie_word_embeddings=True,
    ),
    "smollm2-360m": _llama(
        "HuggingFaceTB/SmolLM2-360M", begins=False, vocab_size=49152, hidden_size=960, intermediate_size=2560,
        num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_theta=100000, tie_word_embeddings=True,
    ),
    "smollm2-1.7b": _llama(
        "HuggingFaceTB/SmolLM2-1.7B", begins=False, vocab_size=49152, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_theta=130000, tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": _qwen("Qwen/Qwen2.5-0.5B", 896, 4864, 24, 14, 2, True, 151936),
    "qwen2.5-1.5b": _qwen("Qwen/Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, True, 151936),
    "qwen2.5-3b": _qwen("Qwen/Qwen2.5-3B", 2048, 11008, 36, 16, 2, True, 151936),
    "qwen2.5-7b": _qwen("Qwen/Qwen2.5-7B", 3584, 18944, 28, 28, 4, False, 152064),
}  # fmt: skip

VISION: dict[str, Published] = {
    "clip-vit-large-patch14-336": _tower(
        "openai/clip-vit-large-patch14-336", "clip_vision_model", _CLIP, image_size=336, patch_size=14,
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    ),
    "clip-vit-base-patch32": _tower(
        "openai/clip-vit-base-patch32", "clip_vision_model", _CLIP, image_size=224, patch_size=32,
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    ),
    "siglip-so400m-patch14-384": _tower(
        "google/siglip-so400m-patch14-384", "siglip_vision_model", _SIGLIP, image_size=384, patch_size=14,
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
    ),
    "siglip-base-patch16-224": _tower(
        "google/siglip-base-patch16-224", "siglip_vision_model", _SIGLIP, image_size=224, patch_size=16,
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    ),
}  # fmt: skip


def find(models: Mapping[str, Published], name: str) -> Published | None:
    """The published sizes of a model by the last part of its path; instruction-tuned Qwen and SmolLM are their base."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return models.get(last) or models.get(last.removesuffix("-instruct"))
