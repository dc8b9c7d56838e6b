"""`pivotjax convert SRC DST`: a model or a projector in another format, tensor by tensor."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath

from pivotjax import __version__, files
from pivotjax import config as configs
from pivotjax.checkpoints import folders, hub, model_store, names, pickles, store, torch_bridge
from pivotjax.checkpoints.moving import Step, Writer, in_order, move
from pivotjax.checkpoints.names import Entry
from pivotjax.checkpoints.tensors import ShardedWriter, Spec, sharded
from pivotjax.errors import InputError
from pivotjax.jobs import joined_model, model_source, small_files
from pivotjax.jobs.model_source import Held, Source
from pivotjax.models import projector
from pivotjax.models.multimodal import llava_original
from pivotjax.progress import say

_DTYPES = {name: np.dtype(getattr(jnp, name)) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class ConvertConfig:
    """Converts a model or a projector to another format, tensor by tensor: `pivotjax convert SRC DST`

    SRC: a Hugging Face folder, a checkpoint of the LLaVA repository, an Orbax checkpoint of a model, or a projector
    alone (Orbax, .safetensors, mm_projector.bin). A projector becomes a model with --vision and --language. DST ending
    in .safetensors or .bin is a projector's file."""

    src: tyro.conf.Positional[str]
    """Path of the checkpoint; hf://OWNER/NAME is downloaded."""
    dst: tyro.conf.Positional[str]
    """What to write; nothing may be there yet."""
    to: Literal["orbax", "hf", "llava"] | None = None
    """Format of DST: Orbax, Hugging Face, or the LLaVA repository's. Default: orbax, and hf where SRC is Orbax."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of all floating-point tensors in DST (default: as they are)."""
    shard_size: str = "5GB"
    """Largest file of a Hugging Face or LLaVA folder."""
    projector: Path | None = None
    """Projector that takes the place of SRC's."""
    part: Literal["projector", "language", "vision"] | None = None
    """Only this part of SRC."""
    vision: str | None = None
    """Folder of the vision tower, where SRC has none inside. With --to llava: what LLaVA will open its tower by, a hub
    id or a path."""
    language: str | None = None
    """Folder of the language model, where SRC is a projector alone."""
    bin: bool = False
    """Write the projector as mm_projector.bin (with --to llava; beside the model's files where there is a model)."""
    download: bool = False
    """SRC may be OWNER/NAME on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of SRC on the hub."""

    def __post_init__(self) -> None:
        configs.size(self.shard_size)


def main(args: Sequence[str]) -> None:
    """Command line."""
    run(configs.overridden(ConvertConfig(tyro.MISSING, tyro.MISSING), args, "pivotjax convert"))


def run(config: ConvertConfig) -> None:
    """Converts; DST appears whole or not at all."""
    path, out = hub.located(config.src, config.download, config.revision), hub.path_of(config.dst)
    if out.exists():
        raise InputError(f"{out} exists already; give another name, or remove it")
    if config.bin and config.to != "llava":
        raise InputError("--bin goes with --to llava; a projector alone is written as a pickle where DST ends in .bin")
    kind = model_source.kind_of(path)
    if kind == "projector":
        found = model_source.read_projector(path)
        if config.vision is None and config.language is None:
            _write_projector(config, out, found.params, _taken_from(path) | found.info)
            say(f"wrote {out}")
            return
        if config.vision is None or config.language is None:
            raise InputError("a model is made of a projector with both --vision and --language, the folders of its "
                             "parts")
        parts = hub.located(config.vision), hub.located(config.language)
        source, config = joined_model.join(path, found, *parts), replace(config, to=config.to or "hf")
    elif kind == "model":
        source = _opened(config, path)
    else:
        hint = "merge it into its base model first" if kind == "adapter" else f"there is no {folders.CONFIG} beside it"
        raise InputError(f"{path} cannot be converted: {'a LoRA adapter' if kind == 'adapter' else 'tensors alone'}; "
                         f"{hint}")
    with source:
        if config.part == "projector":
            _write_projector(config, out, _projector_in(source), _taken_from(path))
        else:
            _write_model(config, out, source)
    say(f"wrote {out}")


def _taken_from(path: Path) -> dict[str, Any]:
    return {"source": path.name, "versions": {"pivotjax": __version__}}


# Projectors.


def _write_projector(config: ConvertConfig, out: Path, params: projector.Params, info: Mapping[str, Any]) -> None:
    """A projector's file, or the folder that the format asks for."""
    params = {name: {leaf: _cast(np.asarray(value), config.dtype) for leaf, value in layer.items()}
              for name, layer in params.items()}  # fmt: skip
    for name, layer in params.items():
        for leaf, value in layer.items():
            if not names.finite(value):
                raise InputError(f"{config.src}: {name}/{leaf} of the projector holds values that are not finite")
    suffix = out.suffix if out.suffix in (".safetensors", ".bin") else None
    if config.to == "hf" or (suffix and config.to == "orbax"):
        raise InputError(f"a projector alone cannot be written to {out} as {config.to}; name a file *.safetensors or "
                         "*.bin, or leave --to out for an Orbax checkpoint")
    if "bias" not in params["linear_0"] and (suffix or config.to == "llava"):
        raise InputError(f"the projector of {config.src} has no biases, as LLaVA's mm_projector always has; leave --to "
                         "out for an Orbax checkpoint")
    info = {key: value for key, value in info.items() if key not in ("format", "fingerprint")}
    if suffix is None and config.to != "llava":
        store.save_projector(out, params, info)
        return
    if suffix:
        _write_torch(out, params, info)
        return
    with files.atomic_path(out) as folder:
        folder.mkdir()
        _write_torch(folder / f"mm_projector.{'bin' if config.bin else 'safetensors'}", params, info)


def _write_torch(file: Path, params: projector.Params, info: dict[str, Any]) -> None:
    tensor_names = info.get("tensor_names")
    if file.suffix == ".bin":
        pickles.write_state_dict(file, torch_bridge.to_torch(params, tensor_names))
    else:
        torch_bridge.save_torch(file, params, info, tensor_names)


def _cast(array: np.ndarray, dtype: str | None) -> np.ndarray:
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return names.as_dtype(array, _DTYPES[dtype])


def _projector_in(source: Source) -> projector.Params:
    """The projector of a model, in memory."""
    held = model_source.below(source.held, "projector")
    if not held:
        raise InputError(f"{source.path} has no projector; it has {', '.join(source.layout.parts)}")
    params: projector.Params = {}
    for path, one in held.items():
        _, layer, leaf = path.split("/")
        params.setdefault(layer, {})[leaf] = one.transform.forward(*(one.checkpoint.read(key) for key in one.keys))
    return params


# What is converted.


def _opened(config: ConvertConfig, path: Path) -> Source:
    """A model from disk, with the projector that was asked for, and only the part that was."""
    if config.language is not None:
        raise InputError("--language goes with a projector alone; this SRC is a model already")
    tower = None if config.vision is None or config.to == "llava" else hub.located(config.vision)
    source = model_source.open_source(path, tower, images_only=config.part == "vision")
    if config.projector is not None:
        source = model_source.with_projector(source, config.projector)
    if config.part in ("language", "vision") and source.layout.parts != (config.part,):
        source = _part(source, config.part)
    return source


def _part(source: Source, part: str) -> Source:
    """The language model or the vision tower of a whole model."""
    whole = model_source.whole_config(source)
    settings = source.layout.settings
    dtypes = {key: settings[key] for key in ("torch_dtype", "dtype") if key in settings}
    if part == "language":
        own = dtypes | settings["text_config"]
        own |= {"model_type": whole.language_type, "tie_word_embeddings": whole.language.tie_embeddings}
    else:
        own = dtypes | settings["vision_config"] | {"model_type": whole.vision_type}
    layout = model_source.layout(own, str(source.path))
    return replace(source, layout=layout, held=model_source.fitting(source, part, layout), original=None)


# Where it goes.


class Target(NamedTuple):
    """What is written.

    Fields:
        settings: config.json.
        entries: what each parameter is called there.
    """

    settings: dict[str, Any]
    entries: dict[str, Entry]


def _write_model(config: ConvertConfig, out: Path | epath.Path, source: Source) -> None:
    to = config.to or ("hf" if source.format == "orbax" else "orbax")
    target = {"orbax": _to_orbax, "hf": _to_hugging_face, "llava": _to_llava}[to](config, source)
    if config.dtype:
        target = target._replace(settings=folders.with_dtype(target.settings, config.dtype))
    steps = in_order(_step(path, held, target.entries[path], config) for path, held in source.held.items())
    what = f"convert {source.layout.family}"
    if isinstance(out, epath.Path):
        if to != "orbax":
            raise InputError(f"only Orbax checkpoints are written to {out}; give a local path, or --to orbax")
        _write_to_bucket(out, source, target, steps, what)
        return
    with files.atomic_path(out) as folder:
        if to == "orbax":
            with model_store.OrbaxWriter(folder, _info(source, target), out) as writer:
                move(steps, writer, what)
            (folder / model_store.FILES).mkdir()
            small_files.write(source, folder / model_store.FILES)
            store.note_sizes(folder)
        else:
            folder.mkdir()
            folders.write_config(folder, target.settings)
            with _shards(config, folder, steps, target, source) as writer:
                move(steps, writer, what)
            small_files.write(source, folder)
            if config.bin:
                _write_projector(config, folder / "mm_projector.bin", _projector_in(source), {})


def _write_to_bucket(out: epath.Path, source: Source, target: Target, steps: Sequence[Step], what: str) -> None:
    """An Orbax checkpoint that is there when Orbax has finished it; its small files follow."""
    with model_store.OrbaxWriter(out, _info(source, target), out) as writer:
        move(steps, writer, what)
    with tempfile.TemporaryDirectory() as folder:
        small_files.write(source, Path(folder))
        (out / model_store.FILES).mkdir()
        for file in Path(folder).iterdir():
            (out / model_store.FILES / file.name).write_bytes(file.read_bytes())


def _step(path: str, held: Held, entry: Entry, config: ConvertConfig) -> Step:
    """One parameter on its way: read, checked, cast, in the layout in which it is written."""
    read = Entry(path, held.keys, held.transform, held.shape)
    same = held.transform is entry.transform and len(held.keys) == 1  # there and back again changes nothing
    dtype = _DTYPES.get(config.dtype) if _is_float(held) else None

    def make(*found: np.ndarray) -> np.ndarray:
        if same and dtype is None:
            if not names.finite(found[0]):
                raise names.not_finite(held.keys[0], str(held.checkpoint.path))
            return found[0]
        ours = names.converted(read, found, dtype, str(held.checkpoint.path))
        return entry.transform.inverse(ours)

    return Step(held.checkpoint, held.keys, make, entry.keys[0])


def _is_float(held: Held) -> bool:
    return jnp.issubdtype(held.checkpoint.specs[held.keys[0]].dtype, jnp.floating)


def _shards(
    config: ConvertConfig, folder: Path, steps: Sequence[Step], target: Target, source: Source
) -> AbstractContextManager[Writer]:
    """Files for what the steps make, in their order."""
    paths = {entry.keys[0]: path for path, entry in target.entries.items()}
    specs = {}
    for step in steps:
        held, entry = source.held[paths[step.name]], target.entries[paths[step.name]]
        dtype = held.checkpoint.specs[held.keys[0]].dtype
        specs[step.name] = Spec(_DTYPES.get(config.dtype, dtype) if _is_float(held) else dtype, entry.given)
    return ShardedWriter(folder, sharded(specs, configs.size(config.shard_size)), {"format": "pt"})


def _to_orbax(config: ConvertConfig, source: Source) -> Target:
    return Target(source.layout.settings, model_source.entries(source.layout.names.ours(), source.layout.tree))


def _info(source: Source, target: Target) -> dict[str, Any]:
    """What an Orbax checkpoint says about itself."""
    return {
        "family": source.layout.family,
        "config": target.settings,
        "original": source.original,
        "source": {"path": source.path.name, "format": source.format},
        "versions": {"pivotjax": __version__},
    }


def _to_hugging_face(config: ConvertConfig, source: Source) -> Target:
    return Target(source.layout.settings, model_source.entries(source.layout.names, source.layout.tree))


def _to_llava(config: ConvertConfig, source: Source) -> Target:
    """The LLaVA repository's layout, its tower inside."""
    whole, settings, where = model_source.whole_config(source), source.layout.settings, str(source.path)
    if settings["model_type"] not in ("llava", "llava_next"):
        raise InputError(f"{where} is of family {settings['model_type']}, for which the LLaVA repository has no layout")
    named = config.vision or (source.original or {}).get("mm_vision_tower")
    if not named:
        raise InputError("--to llava needs --vision: the hub id or path by which LLaVA will open its vision tower, "
                         "such as openai/clip-vit-large-patch14-336")
    tokens = model_source.vocabulary(source.folders[0])
    rows = llava_original.original_rows(whole.language.vocab_size, whole.image_token, tokens)
    made = llava_original.original_settings(settings, named, rows, where, source.original)
    made |= {"unfreeze_mm_vision_tower": True}
    if source.original is None and small_files.pads_to_squares(source.folders):
        made["image_aspect_ratio"] = "pad"
    table = llava_original.resized(llava_original.names(whole), whole.language.vocab_size, rows)
    return Target(made, model_source.entries(table, source.layout.tree))
