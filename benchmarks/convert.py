"""Memory and speed of converting a whole model, beside reading and writing the same bytes.

Makes a synthetic LLaVA-1.5 (CLIP ViT-L/14-336, two linear layers, a Llama with the widths of 7B and as many layers as
`--size` asks for; bfloat16, safetensors shards with an index), converts it with the command line in each direction, and
prints: the peak of anonymous memory (RssAnon of the converting process, sampled), seconds (the start of Python
included), bytes a second; and in the same run the seconds that `dd` takes to read the inputs and to write as many bytes
as the output has (conv=fsync). All files are dropped from the page cache before each measurement, so both sides read
from the disk.

    python benchmarks/convert.py                # 6 GB, and as much again for each format: 30 GB of disk
    python benchmarks/convert.py --size 200MB   # a small one: narrower, too
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import disk
import ml_dtypes
import numpy as np

from pivotjax.checkpoints.tensors import ShardedWriter, Spec, sharded
from pivotjax.config import size as parse_size
from pivotjax.jobs import model_source

LIMIT = 1_500_000_000  # bytes of anonymous memory
DTYPE = np.dtype(ml_dtypes.bfloat16)
VISION = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "hidden_size": 1024,
          "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768}
TEXT = {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
SMALL = {"vocab_size": 8064, "hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16,
         "num_key_value_heads": 16}  # fmt: skip


def settings(nbytes: int) -> dict:
    """config.json of a model of about so many bytes."""
    small = nbytes < 2_000_000_000
    text = TEXT | (SMALL if small else {})
    tower = VISION | ({"num_hidden_layers": 4} if small else {})
    width, hidden, entries = text["hidden_size"], text["intermediate_size"], nbytes // DTYPE.itemsize
    layer = 4 * width * width + 3 * width * hidden + 2 * width
    around = 2 * text["vocab_size"] * width + 12_600_000 * tower["num_hidden_layers"] + width * (width + 1024)
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
        "projector_hidden_act": "gelu", "torch_dtype": "bfloat16", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vision_config": tower,
        "text_config": text | {"num_hidden_layers": max(1, round((entries - around) / layer))},
    }  # fmt: skip


def make(folder: Path, nbytes: int) -> int:
    """The model's folder; the bytes of its tensors. Its numbers come from one random block, shifted from tensor to
    tensor, as drawing so many would take longer than converting them."""
    folder.mkdir()
    config = settings(nbytes)
    (folder / "config.json").write_text(json.dumps(config))
    layout = model_source.layout(config, "the benchmark's model")
    specs = {entry.keys[0]: Spec(DTYPE, entry.given) for entry in
             model_source.entries(layout.names, layout.tree).values()}  # fmt: skip
    block = (0.02 * np.random.default_rng(0).standard_normal(1 << 24, np.float32)).astype(DTYPE)
    with ShardedWriter(folder, sharded(specs, 5_000_000_000), {"format": "pt"}) as writer:
        for i, (name, spec) in enumerate(specs.items()):
            writer.write(name, np.resize(np.roll(block, 7919 * i), spec.shape))
    return sum(spec.nbytes for spec in specs.values())


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="6GB", help="of the model")
    parser.add_argument("--folder", type=Path, help="where to make it (default: a temporary folder)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        nbytes = make(folder / "hf", parse_size(args.size))
        print(f"made a LLaVA-1.5 of {nbytes / 1e9:.2f} GB, bfloat16", flush=True)
        disk.measured(["convert", str(folder / "hf"), str(folder / "tower"), "--part", "vision", "--to", "hf"])
        disk.write_seconds(folder / "written", nbytes)  # a disk may be slower at what was never written before
        ways = {"hf -> orbax": ("hf", "orbax", []), "orbax -> hf": ("orbax", "hf", []),
                "hf -> llava": ("hf", "llava", ["--vision", "openai/clip-vit-large-patch14-336"]),
                "llava -> hf": ("llava", "hf", ["--vision", str(folder / "tower")])}  # fmt: skip
        print(f"{'':12s} {'peak GB':>8s} {'limit GB':>8s} {'seconds':>8s} {'GB/s':>6s} "
              f"{'dd read':>8s} {'dd write':>8s} {'of dd':>6s}")
        for way, (source, to, options) in ways.items():
            inputs, out = files_of(folder / source), folder / (to if to != "hf" else "again")
            read, write = disk.read_seconds(inputs), disk.write_seconds(folder / "written", nbytes)
            disk.forget(inputs)
            seconds, peak = disk.measured(["convert", str(folder / source), str(out), "--to", to, *options])
            print(f"{way:12s} {peak / 1e9:8.2f} {LIMIT / 1e9:8.2f} {seconds:8.1f} {2 * nbytes / seconds / 1e9:6.2f} "
                  f"{read:8.1f} {write:8.1f} {(read + write) / seconds:6.0%}", flush=True)
            if to == "hf":
                shutil.rmtree(out)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
