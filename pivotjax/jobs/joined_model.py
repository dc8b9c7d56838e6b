"""A whole LLaVA made of its parts: a trained projector, a vision tower, a language model."""

from pathlib import Path
from typing import Any

from pivotjax.checkpoints import store
from pivotjax.checkpoints.names import Transform
from pivotjax.errors import InputError
from pivotjax.jobs import model_source
from pivotjax.jobs.model_source import Held, Layout, Source
from pivotjax.models.multimodal import llava_original
from pivotjax.progress import say


def join(path: Path, found: store.Projector, vision: Path, language: Path) -> Source:
    """A whole LLaVA of a projector (from `path`) and the folders of a vision tower and a language model.

    Its vocabulary gets a row for the image token where it has none to spare. InputError if the parts do not fit.
    """
    tower, text = model_source.open_source(vision, images_only=True), model_source.open_source(language)
    if tower.layout.parts != ("vision",) or text.layout.parts != ("language",):
        raise InputError("--vision must be the folder of a CLIP or SigLIP, and --language that of a language model")
    rows = text.layout.config.language.vocab_size
    image_token = llava_original.image_token_of(rows, model_source.vocabulary(text.folders[0]))
    settings = _joined_settings(text.layout, tower.layout, found, image_token)
    whole = model_source.with_image_token(settings, image_token, str(path))
    held = _with_rows(text, whole)
    held |= model_source.fitting(tower, "vision", whole)
    held |= model_source.fitting(model_source.of_projector(path, found.params), "projector", whole)
    return Source(path, "hf", whole, held, (*text.folders[:1], *tower.folders[:1]), lacks_files=True)


def _with_rows(text: Source, whole: Layout) -> dict[str, Held]:
    """A language model's parameters with as many rows of the vocabulary as the whole model has."""
    ours, theirs = whole.config.language.vocab_size, text.layout.config.language.vocab_size
    if ours == theirs:
        return dict(text.held)
    tree = {"language": whole.tree["language"]}
    plain = model_source.entries(text.layout.names, tree)
    grown = model_source.entries(llava_original.resized(text.layout.names, ours, theirs), tree)

    def one(path: str, held: Held) -> Held:
        if grown[path].transform is plain[path].transform:
            return held
        read, back, there = held.transform.forward, plain[path].transform.inverse, grown[path].transform.forward
        return held._replace(shape=grown[path].shape, transform=Transform(lambda *t: there(back(read(*t))), None))

    return {path: one(path, held) for path, held in text.held.items()}


def _joined_settings(text: Layout, tower: Layout, found: store.Projector, image_token: int) -> dict[str, Any]:
    """config.json of a LLaVA, from those of its parts and what the projector's checkpoint says of its features."""
    trained = (found.info.get("config") or {}).get("model") or {}
    depth = len(found.params)
    kind = (trained.get("projector") or {}).get("kind") or ("linear" if depth == 1 else f"mlp{depth}x_gelu")
    drop_first = tower.config.has_class_token and trained.get("select_features", "patch") == "patch"
    made = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": tower.config.num_patches + tower.config.has_class_token - drop_first,
        "image_token_index": image_token,
        "model_type": "llava",
        "multimodal_projector_bias": "bias" in found.params["linear_0"],
        "projector_hidden_act": "gelu",
        "text_config": {key: value for key, value in text.settings.items() if key != "architectures"},
        "tie_word_embeddings": text.config.language.tie_embeddings,
        "vision_config": {key: value for key, value in tower.settings.items() if key != "architectures"},
        "vision_feature_layer": trained.get("select_layer", -2),
        "vision_feature_select_strategy": "default" if drop_first else "full",
    }
    if kind != "mlp2x_gelu":
        say(f"note: transformers' LLaVA has a projector of two layers, this one is {kind}: pivotjax reads it")
        made["mm_projector_type"] = kind
    return made | {key: text.settings[key] for key in ("torch_dtype", "dtype") if key in text.settings}
