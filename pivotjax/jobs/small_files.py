"""What lies beside a converted model's weights: tokenizer, image processor, templates."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pivotjax import files
from pivotjax.checkpoints import folders
from pivotjax.jobs.model_source import Source
from pivotjax.models import language
from pivotjax.models.processors import FILE as PROCESSOR
from pivotjax.models.processors import WHOLE_FILE as WHOLE_PROCESSOR
from pivotjax.progress import say

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_OF_IMAGES = (PROCESSOR, WHOLE_PROCESSOR, "video_preprocessor_config.json")
_IMAGE = "<image>"


def write(source: Source, folder: Path) -> None:
    """Copies the files of the parts that a model has, and makes those that transformers wants where they are lacking:
    the image token in the tokenizer, a processor for images and text."""
    parts = source.layout.parts

    def wanted(name: str) -> bool:
        if name == folders.CONFIG:
            return False
        return "language" in parts if name not in _OF_IMAGES else "vision" in parts

    first, *others = source.folders
    if not isinstance(first, Path):  # in a bucket, where only our own files are
        for file in first.iterdir() if first.exists() else ():
            if wanted(file.name):
                (folder / file.name).write_bytes(file.read_bytes())
        return
    for note in folders.copy_small_files(first, folder, wanted=wanted):
        say(f"note: {note}")
    for other in others:  # a vision tower's: its tokenizer, if it has one, is another
        folders.copy_small_files(other, folder, wanted=lambda name: name == PROCESSOR)
    if source.lacks_files:
        _add_image_token(folder, source.layout.config.image_token)
        _write_processor(source, folder)


def _add_image_token(folder: Path, number: int) -> None:
    if not language.has_tokenizer(folder):
        say(f"note: there is no tokenizer; copy the language model's here, and add the token {_IMAGE} (id {number})")
        return
    if not (folder / _TOKENIZER).is_file():  # a SentencePiece model, to which nothing can be added
        language.read_tokenizer(folder).save(str(folder / _TOKENIZER))
    tokenizer = files.read_json(folder / _TOKENIZER)
    added = {"content": _IMAGE, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
             "special": True}  # fmt: skip
    if all(token["content"] != _IMAGE for token in tokenizer["added_tokens"]):
        tokenizer["added_tokens"].append({"id": number, **added})
        _write(folder / _TOKENIZER, tokenizer)
    if (folder / _TOKENIZER_CONFIG).is_file():
        config = files.read_json(folder / _TOKENIZER_CONFIG)
        config.setdefault("added_tokens_decoder", {})[str(number)] = added
        _write(folder / _TOKENIZER_CONFIG, config)


def pads_to_squares(places: Iterable[Path]) -> bool:
    """Whether transformers' image processor of a LLaVA does what LLaVA calls `image_aspect_ratio: pad`."""
    for file in (folder / name for folder in places for name in (WHOLE_PROCESSOR, PROCESSOR)):
        fields = files.read_json(file) if file.is_file() else {}
        fields = fields.get("image_processor") or fields
        if "image_processor_type" in fields:
            return fields["image_processor_type"].startswith("LlavaImage") and bool(fields.get("do_pad"))
    return False


def _write_processor(source: Source, folder: Path) -> None:
    """The tower's image processor, with what the LLaVA repository does to an image before it."""
    config, settings, original = source.layout.config, source.layout.settings, source.original or {}
    name = "LlavaNext" if settings["model_type"] == "llava_next" else "Llava"
    if (folder / PROCESSOR).is_file():
        images = files.read_json(folder / PROCESSOR)
        crops = "Siglip" not in str(images.get("image_processor_type") or images.get("feature_extractor_type"))
        own: dict[str, Any] = {"image_processor_type": f"{name}ImageProcessor"}
        own |= {} if crops or "do_center_crop" in images else {"do_center_crop": False}
        if config.grids:
            own["image_grid_pinpoints"] = settings["image_grid_pinpoints"]
        if config.grids or original.get("image_aspect_ratio") == "pad":
            own["do_pad"] = True
            _write(folder / PROCESSOR, images | own)
    else:
        say(f"note: the vision tower's folder has no {PROCESSOR}; copy it from where the tower came from")
    _write(folder / WHOLE_PROCESSOR, {
        "processor_class": f"{name}Processor",
        "image_token": _IMAGE,
        "num_additional_image_tokens": int(config.vision.has_class_token),
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": settings["vision_feature_select_strategy"],
    })  # fmt: skip


def _write(path: Path, value: Any) -> None:
    files.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
