"""What a path holds, whatever its format: each parameter of a model with the checkpoint and tensor that it is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax import files
from pivotjax.checkpoints import folders, lora, model_store, names, store, tensors, torch_bridge
from pivotjax.checkpoints.names import Names, Transform, identity
from pivotjax.checkpoints.tensors import Checkpoint
from pivotjax.errors import InputError
from pivotjax.jobs import merge_inputs
from pivotjax.models import language, multimodal, projector, vision
from pivotjax.models.multimodal import llava_original
from pivotjax.models.multimodal.network import MultimodalConfig
from pivotjax.models.settings import Settings

PARTS = ("vision", "projector", "language")
_PROJECTORS = ("mm_projector.safetensors", "mm_projector.bin")  # as LLaVA's folders of pre-trained projectors name them

Kind = Literal["model", "projector", "adapter", "tensors"]


def kind_of(path: Path) -> Kind:
    """What a path holds, as far as names tell: a model with its config, a projector, a LoRA adapter, or tensors alone.

    InputError if there is nothing that could be a checkpoint.
    """
    if not path.exists():
        raise InputError(f"no checkpoint at {path}; for a model of the Hugging Face hub write hf://OWNER/NAME, or add "
                         "--download to convert (nothing is downloaded otherwise)")
    if path.is_file():
        with tensors.open_checkpoint(path) as checkpoint:
            return _kind_of_file(checkpoint)
    if store.is_orbax(path):
        return "model" if model_store.is_model(path) else "projector"
    if not isinstance(path, Path):
        raise InputError(f"{path} is no Orbax checkpoint, and nothing else is read from a bucket; copy it here first")
    if (path / lora.CONFIG).exists() or (path / lora.WEIGHTS).exists():
        return "adapter"
    if folders.holds_weights(path):
        return "model" if (path / folders.CONFIG).exists() else "tensors"
    if any((path / name).exists() for name in _PROJECTORS):
        return "projector"
    raise InputError(f"{path} holds no checkpoint: neither {folders.SINGLE} nor {folders.PICKLED} (or their shards), "
                     f"{_PROJECTORS[0]}, {lora.CONFIG} or Orbax's metadata")


def _kind_of_file(checkpoint: Checkpoint) -> Kind:
    if lora.is_adapter(checkpoint):
        return "adapter"
    return "projector" if torch_bridge.names_a_projector(checkpoint) else "tensors"


class Layout(NamedTuple):
    """A model by its config.json.

    Fields:
        settings: config.json as transformers has it.
        config: of the network (of a tower alone: the tower's).
        tree: shapes of the parameters, below `vision`, `projector`, `language`.
        names: the tensors' names in a Hugging Face folder.
    """

    settings: dict[str, Any]
    config: Any
    tree: dict[str, Any]
    names: Names

    @property
    def family(self) -> str:
        """`model_type`."""
        return self.settings["model_type"]

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of `PARTS` there are."""
        return tuple(part for part in PARTS if part in self.tree)


def layout(settings: Mapping[str, Any], where: str) -> Layout:
    """The layout of a config.json; InputError for a family that is not known, or fields that are wrong."""
    if not isinstance(settings, Mapping):
        raise InputError(f"{where} is not a mapping of fields; get the model's config.json again")
    kind = settings.get("model_type")
    known = {**multimodal.FAMILIES, **language.FAMILIES, **vision.FAMILIES}
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"{where}: model_type {kind!r} is not supported; known: {', '.join(known)}")
    if kind not in vision.FAMILIES:
        family = multimodal.family_of(settings, where)
        config = family.config(settings, where)
        return Layout(dict(settings), config, multimodal.abstract(family, config, jnp.float32)[1], family.names(config))
    if _has_two_towers(settings):
        raise InputError(f"{where} is of two towers, for images and for texts; --part vision takes the images' one")
    family = vision.FAMILIES[kind]
    config = family.config(settings, where)
    tree = {"vision": vision.abstract(family, config)[1]}
    return Layout(dict(settings), config, tree, family.names(config).within("vision", ""))


def entries(table: Names, tree: Any) -> dict[str, names.Entry]:
    """What a table says about each parameter of a tree, by its path."""
    return {entry.path: entry for leaf in names.leaves(table, tree) for entry in leaf.entries}


def _has_two_towers(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a CLIP or SigLIP for images and texts."""
    return settings.get("model_type") in vision.FAMILIES and "vision_config" in settings


class Held(NamedTuple):
    """One parameter where it is.

    Fields:
        checkpoint, keys: the tensors.
        transform: whose `forward` makes the parameter of them.
        shape: of the parameter.
    """

    checkpoint: Checkpoint
    keys: tuple[str, ...]
    transform: Transform
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A model on disk. A context manager that closes its files.

    Fields:
        path: as given.
        format: of its weights.
        layout: what it is.
        held: every parameter by its path, layers apart.
        folders: where the small files are (tokenizer, image processor); the first that has one counts.
        original: config.json of the LLaVA repository's layout, where it came in that.
        lacks_files: transformers' small files for images are not there yet.
    """

    path: Path
    format: Literal["hf", "llava", "orbax"]
    layout: Layout
    held: dict[str, Held]
    folders: tuple[Path, ...]
    original: Mapping[str, Any] | None = None
    lacks_files: bool = False

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All that are open."""
        return list({id(one.checkpoint): one.checkpoint for one in self.held.values()}.values())

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for checkpoint in self.checkpoints:
            checkpoint.close()


def open_source(path: Path, tower: Path | None = None, images_only: bool = False, hashed: bool = False) -> Source:
    """Opens a model: an Orbax checkpoint, a Hugging Face folder, or a checkpoint of the LLaVA repository.

    Args:
        path: the folder.
        tower: folder of the vision tower, for a checkpoint of the LLaVA repository.
        images_only: of a CLIP or SigLIP with two towers take that for images.
        hashed: the files' SHA-256 will be asked for.

    Raises:
        InputError: it is not whole, of an unknown family, or its tensors do not match its config.
    """
    if model_store.is_model(path):
        model = model_store.open_model(path)
        found = layout(model.settings, str(path))
        held = _held(model, found.names.ours(), found.tree, str(path))
        return Source(path, "orbax", found, held, (model.folder,), model.info.get("original"))
    files.check_links(path)
    settings, where = _settings(path), str(path / folders.CONFIG)
    if isinstance(settings, Mapping) and llava_original.is_original(settings):
        return _open_original(path, settings, tower, hashed)
    if images_only and isinstance(settings, Mapping) and _has_two_towers(settings):
        return _open_tower(path, settings, where, hashed)
    found = layout(settings, where)
    held = _held(tensors.open_checkpoint(path, hashed), found.names, found.tree, str(path))
    return Source(path, "hf", found, held, (path,))


def _settings(folder: Path) -> Any:
    if not (folder / folders.CONFIG).is_file():
        raise InputError(f"{folder} has no {folders.CONFIG}; give the folder of a model")
    return files.read_json(folder / folders.CONFIG)


def _held(checkpoint: Checkpoint, table: Names, tree: Any, where: str) -> dict[str, Held]:
    """All parameters of a tree in one checkpoint, whose names and shapes are compared with the table's first."""
    try:
        found = entries(table, tree)
        real = names.resolve(checkpoint, table, found.values(), where)
        for entry in found.values():
            _check_shape(entry, checkpoint.specs[real[entry.keys[0]]].shape, real[entry.keys[0]], where)
    except BaseException:
        checkpoint.close()
        raise
    return {
        path: Held(checkpoint, tuple(real[key] for key in entry.keys), entry.transform, entry.shape)
        for path, entry in found.items()
    }


def _check_shape(entry: names.Entry, found: tuple[int, ...], name: str, where: str) -> None:
    if found == entry.given:
        return
    if 0 in found:
        raise names.is_empty(name, where)
    raise InputError(f"{where}: {name} has shape {list(found)}; the model's config needs {list(entry.given)}")


def _open_tower(path: Path, settings: Mapping[str, Any], where: str, hashed: bool) -> Source:
    """The image tower of a CLIP or SigLIP that has a text tower too."""
    layout_of_it = layout(llava_original.tower_settings(settings, where), where)
    whole = vision.FAMILIES[settings["model_type"]]
    table = whole.names(layout_of_it.config).within("vision", "")
    held = _held(tensors.open_checkpoint(path, hashed), table, layout_of_it.tree, str(path))
    return Source(path, "hf", layout_of_it, held, (path,))


def _open_original(path: Path, settings: Mapping[str, Any], tower: Path | None, hashed: bool) -> Source:
    """The LLaVA repository's layout; the tower is in the checkpoint or in its own folder, its config always there."""
    where = str(path / folders.CONFIG)
    tower = llava_original.tower_folder(path, settings, tower)
    files.check_links(tower)
    of_tower = llava_original.tower_settings(_settings(tower), str(tower / folders.CONFIG))
    rows = Settings(settings, where).size("vocab_size")
    image_token = llava_original.image_token_of(rows, vocabulary(path))
    made = llava_original.hugging_face_settings(settings, of_tower, image_token, where)
    found = with_image_token(made, image_token, where)
    checkpoint = tensors.open_checkpoint(path, hashed)
    inside = any(name.startswith(llava_original.TOWER) for name in checkpoint)
    table = llava_original.names(found.config, tower=inside)
    table = llava_original.resized(table, found.config.language.vocab_size, rows)
    own = {part: tree for part, tree in found.tree.items() if inside or part != "vision"}
    held = _held(checkpoint, table, own, str(path))
    if not inside:
        held |= fitting(open_source(tower, images_only=True, hashed=hashed), "vision", found)
    return Source(path, "llava", found, held, (path, tower), settings, lacks_files=True)


def with_image_token(settings: Mapping[str, Any], image_token: int, where: str) -> Layout:
    """The layout of a whole model whose vocabulary gets room for the image token."""
    rows = llava_original.hugging_face_rows(settings["text_config"]["vocab_size"], image_token)
    return layout({**settings, "text_config": settings["text_config"] | {"vocab_size": rows}}, where)


def vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their ids; empty where there is no tokenizer."""
    return language.read_tokenizer(folder).get_vocab() if language.has_tokenizer(folder) else {}


def fitting(source: Source, part: str, whole: Layout) -> dict[str, Held]:
    """A part of a source that takes that part's place in a whole model; InputError if it does not fit there."""
    held = below(source.held, part)
    needed = {path: entry.shape for path, entry in below(entries(whole.names, whole.tree), part).items()}
    if held.keys() != needed.keys():
        raise InputError(f"{source.path} does not fit as the model's {part}: {_difference(held, needed)}")
    for path, shape in needed.items():
        if held[path].shape != shape:
            raise InputError(f"{source.path} does not fit as the model's {part}: {path} has shape "
                             f"{list(held[path].shape)}, the model's {list(shape)}")
    return held


def _difference(held: Mapping[str, Any], needed: Mapping[str, Any]) -> str:
    extra, missing = sorted(held.keys() - needed.keys()), sorted(needed.keys() - held.keys())
    said = [f"it has {extra[0]}" if extra else "", f"it has no {missing[0]}" if missing else ""]
    return " and ".join(filter(None, said))


def below(held: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What lies below a part's path."""
    return {path: one for path, one in held.items() if path.startswith(f"{part}/")}


def with_projector(source: Source, path: Path) -> Source:
    """A model with another projector: a checkpoint of pivotjax, `mm_projector.safetensors` or `.bin`."""
    params, _ = read_projector(path)
    return replace(source, held=source.held | fitting(of_projector(path, params), "projector", source.layout))


def of_projector(path: Path, params: projector.Params) -> Source:
    """A projector in memory, as a source of that part."""
    flat, _ = jax.tree.flatten_with_path({"projector": params})
    arrays = {names.path_name(at): np.asarray(leaf) for at, leaf in flat}
    checkpoint = tensors.Memory(path, arrays, "")
    held = {name: Held(checkpoint, (name,), identity, array.shape) for name, array in arrays.items()}
    return Source(path, "orbax", Layout({}, None, {}, Names(())), held, ())


def read_projector(path: Path) -> store.Projector:
    """A projector in any format; InputError if it is something else.

    Its info says what its tensors are called ("tensor_names") where that is not what we call them.
    """
    if not path.exists():
        raise InputError(f"no projector at {path}; give an Orbax checkpoint, a .safetensors or a .bin file")
    found = merge_inputs.open_input(path)
    if found.checkpoint is not None:
        found.checkpoint.close()
    if found.projector is None:
        raise InputError(f"{path} is no projector alone; --part projector takes one out of a model")
    params, info = found.projector
    if found.checkpoint is None or found.checkpoint.keys() == torch_bridge.to_torch(params).keys():
        return found.projector
    return store.Projector(params, info | {"tensor_names": list(found.checkpoint)})


def whole_config(source: Source) -> MultimodalConfig:
    """The config of a model that has all three parts; InputError for others."""
    if source.layout.parts != PARTS:
        raise InputError(f"{source.path} is no whole multimodal model: it has {', '.join(source.layout.parts)} alone")
    return source.layout.config
