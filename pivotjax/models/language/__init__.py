"""Language models: one network, a registry of families, and a loader for GGUF files and Hugging Face folders."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from pivotjax.checkpoints import names
from pivotjax.checkpoints.gguf import GGUF
from pivotjax.checkpoints.tensors import open_checkpoint
from pivotjax.errors import InputError
from pivotjax.files import read_json, sha256
from pivotjax.models.abstract import abstract as abstract_of
from pivotjax.models.language import llama, mistral, phi3, qwen2, qwen3, sentencepiece
from pivotjax.models.language.decoder import Cache, Decoder, DecoderConfig, Plan, Remat
from pivotjax.models.language.family import Family
from pivotjax.models.settings import Settings

__all__ = [
    "FAMILIES", "GGUF_FAMILIES", "Cache", "Decoder", "DecoderConfig", "Family", "Language", "Place", "Plan", "Remat",
    "abstract", "family_of", "has_tokenizer", "load_language", "load_weights", "read_tokenizer",
]  # fmt: skip


Place = Callable[[Any], Any]  # shapes of parameters -> their shardings

# Keyed by config.json's `model_type`.
FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
}
GGUF_FAMILIES: dict[str, Family] = {"llama": llama.GGUF_FAMILY}  # keyed by `general.architecture`


class Language(NamedTuple):
    """A frozen language model with its tokenizer: `nnx.merge(graphdef, params)` is the network."""

    name: str
    config: DecoderConfig
    graphdef: nnx.GraphDef
    params: dict  # nested dict of arrays; layers stacked on a leading axis
    tokenizer: Tokenizer
    eos_id: int
    identity: str  # SHA-256 of the weight files


def load_language(path: Path, dtype=jnp.float32, place: Place | None = None) -> Language:
    """Loads a `.gguf` file or a Hugging Face folder (config.json, safetensors, tokenizer.json) with weights in `dtype`.

    Tensors are read one at a time, and each goes straight to where `place` (a tree of shapes -> a tree of shardings)
    wants it: no device has to hold the whole model. InputError if the file is missing, damaged, or of an unknown
    architecture.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, dtype, place)
    if not path.is_file():
        raise InputError(f"there is no language model at {path}; give a .gguf file or a Hugging Face folder")
    if path.suffix != ".gguf":
        raise InputError(f"{path} is no language model that can be read; give a .gguf file or a Hugging Face folder")
    return _load_gguf(path, dtype, place)


def family_of(model_type: Any, where: str, families: Mapping[str, Family] = FAMILIES) -> Family:
    """The family of that name; InputError where there is none."""
    if not isinstance(model_type, str) or model_type not in families:
        raise InputError(f"{where}: architecture {model_type!r} is not supported; known: {', '.join(families)}")
    return families[model_type]


def abstract(family: Family, config: DecoderConfig, dtype) -> tuple[nnx.GraphDef, dict]:
    """The network's graph and its parameters as shapes only; nothing is allocated."""
    return abstract_of(lambda: family.module(config, dtype=dtype, rngs=nnx.Rngs(0)))


def load_weights(
    family: Family,
    config: DecoderConfig,
    tensors: Mapping[str, np.ndarray],
    dtype,
    where: str,
    place: Place | None = None,
) -> tuple[nnx.GraphDef, dict]:
    """A decoder's graph and its parameters in `dtype`, from tensors that bear the family's names."""
    graphdef, shapes = abstract(family, config, dtype)
    placed = place(shapes) if place else None
    return graphdef, names.load(tensors, family.names(config), shapes, where=where, shardings=placed)


def _load_gguf(path: Path, dtype, place: Place | None) -> Language:
    file = GGUF(path)
    family = family_of(file.metadata("general.architecture"), str(path), GGUF_FAMILIES)
    config = family.config(file)
    graphdef, params = load_weights(family, config, file, dtype, str(path), place)
    eos_id = int(file.metadata("tokenizer.ggml.eos_token_id"))
    return Language(path.stem, config, graphdef, params, file.tokenizer(), eos_id, sha256(path))


def _load_folder(path: Path, dtype, place: Place | None) -> Language:
    settings = Settings(read_json(path / "config.json"), str(path / "config.json"))
    family = family_of(settings.get("model_type"), str(path))
    config = family.config(settings.fields, settings.where)
    with open_checkpoint(path) as tensors:
        graphdef, params = load_weights(family, config, tensors, dtype, str(path), place)
        hashes = "".join(tensors.digests().values())
    identity = hashlib.sha256(hashes.encode()).hexdigest()
    return Language(path.name, config, graphdef, params, read_tokenizer(path), _eos_id(settings), identity)


def has_tokenizer(folder: Path) -> bool:
    """Whether `read_tokenizer` finds one."""
    return any((folder / name).is_file() for name in ("tokenizer.json", sentencepiece.FILE))


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder: tokenizer.json, or Llama's tokenizer.model; InputError if there is neither."""
    file = folder / "tokenizer.json"
    if not file.is_file() and (folder / sentencepiece.FILE).is_file():
        return sentencepiece.read(folder / sentencepiece.FILE)
    if not file.is_file():
        raise InputError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
    try:
        return Tokenizer.from_str(file.read_text())
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"{file} is not a tokenizer ({error}); save the model's fast tokenizer there") from error


def _eos_id(settings: Settings) -> int:
    eos = settings.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(eos, int):
        raise InputError(f"{settings.where} has no eos_token_id; add it")
    return eos
