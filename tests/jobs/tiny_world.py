"""A world to pre-train in within seconds: small towers, a small language model, plain pictures with captions."""

import io
import json

import torch
import transformers
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from pivotjax.data.sources import Item

SIDE = 18  # no multiple of the patch
SIZES = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=4
)
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
WORDS = ("[?]", "<end>", "a", "picture", *COLOURS)


def make_tower(kind, folder):
    torch.manual_seed(0)
    if kind == "clip":
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES))
        processor = transformers.CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES))
        processor = transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def make_language(folder, seed=0):
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1
    )
    config = transformers.LlamaConfig(**sizes, vocab_size=len(WORDS), eos_token_id=1, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # so that what stands before a caption matters
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[?]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def pictures(count=48, stride=1):
    """Plain ones of several sizes and of every `stride`-th of the six colours."""
    found = []
    for number in range(count):
        colour, png = COLOURS[stride * number % len(COLOURS)], io.BytesIO()
        Image.new("RGB", (10 + number, 30), colour).save(png, "PNG")
        found.append(Item(f"plain/{number}", f"picture {number}", f"a {colour} picture", png.getvalue(), "png"))
    return found


def llava_corpus(folder, count=48, stride=1):
    """They as files, their captions in LLaVA's JSON; returns the corpus' config."""
    folder.mkdir()
    entries = []
    for number, item in enumerate(pictures(count, stride)):
        name = f"{number}.png"
        (folder / name).write_bytes(item.image)
        says = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": item.caption}]
        entries.append({"id": name, "image": name, "conversations": says})
    (folder / "captions.json").write_text(json.dumps(entries))
    return {"format": "llava_json", "path": str(folder / "captions.json"), "images": str(folder)}


def recipe(folder, corpora, data, **sections):
    """Writes the models and a recipe that trains on corpora; `data` and `sections` are added to it."""
    make_language(folder / "language")
    make_tower("clip", folder / "vision")
    written = {
        "model": {"vision": str(folder / "vision"), "language": str(folder / "language")},
        "data": {"corpora": corpora, "prompt": "a", "max_caption": 4, "features": "online", **data},
        "cache": str(folder / "cache"),
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(written))
    return path
