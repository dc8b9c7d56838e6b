"""Memory and speed of merging whole models out of core, beside reading and writing the same bytes.

Makes a base and K synthetic models (safetensors shards with an index, shapes of a Llama), merges them with the command
line, and prints for each method: the peak of anonymous memory (RssAnon of the merging process, sampled), the bound that
the merge keeps (K + 2 chunks, or K + 2 times the largest tensor, + 1 GB), seconds, bytes a second; and in the same run
the seconds that `dd` takes to read the inputs and to write the output (conv=fsync). All files are dropped from the page
cache before each measurement, so both sides read from the disk.

    python benchmarks/merge_memory.py                # 4 models of 3 GB each and a base: 15 GB, and 3 GB of results
    python benchmarks/merge_memory.py --size 200MB   # a small one
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import disk
import ml_dtypes
import numpy as np

from pivotjax.checkpoints.tensors import ShardedWriter, Spec, sharded
from pivotjax.jobs.merge import size as parse_size

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


def shapes(entries: int) -> dict[str, tuple[int, ...]]:
    """A Llama of about so many parameters."""
    width, vocabulary = (2048, 32000) if entries > 400_000_000 else (1024, 8000)
    hidden = 4 * width
    layer = 4 * width * width + 3 * width * hidden + 2 * width
    depth = max(1, round((entries - 2 * vocabulary * width) / layer))
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(depth):
        stem = f"model.layers.{i}."
        found |= {f"{stem}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        found |= {f"{stem}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        found |= {f"{stem}mlp.down_proj.weight": (width, hidden)}
        found |= {f"{stem}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def make(folder: Path, name: str, seed: int, specs: dict[str, Spec], shard: int) -> Path:
    """One model: weights of spread .02, experts another .002 away. Its numbers come from one random block, shifted from
    tensor to tensor, as drawing so many would take longer than the merge."""
    common, own = (np.random.default_rng(s).standard_normal(1 << 24, np.float32) for s in (0, seed))
    path = folder / name
    path.mkdir()
    with ShardedWriter(path, sharded(specs, shard), {"format": "pt"}) as writer:
        for i, (tensor, spec) in enumerate(specs.items()):
            values = 0.02 * np.resize(np.roll(common, 7919 * i), spec.shape)
            if seed:
                values += 0.002 * np.resize(np.roll(own, 104729 * i), spec.shape)
            writer.write(tensor, values.astype(spec.dtype))
    (path / "config.json").write_text("{}")
    return path


def merged(method: str, base: Path, experts: list[Path], out: Path, chunk: str) -> tuple[float, int]:
    """Seconds and peak RssAnon of one merge by the command line."""
    return disk.measured(["merge", "--method", method, "--experts", *map(str, experts), "--out", str(out),
                          "--chunk", chunk, *([] if method == "linear" else ["--base", str(base)])])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3GB", help="of each model")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--chunk", default="256MB")
    parser.add_argument("--methods", nargs="+", default=["linear", "task_arithmetic", "ties"])
    parser.add_argument("--folder", type=Path, help="where to make the models (default: a temporary folder)")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    specs = {name: Spec(dtype, shape) for name, shape in shapes(parse_size(args.size) // dtype.itemsize).items()}
    nbytes = sum(spec.nbytes for spec in specs.values())
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        print(f"making {args.experts} models and a base of {nbytes / 1e9:.2f} GB, {args.dtype}", flush=True)
        base, *experts = [make(folder, "base" if not k else f"expert_{k}", k, specs, max(nbytes // 3, 1))
                          for k in range(args.experts + 1)]
        bound = (args.experts + 2) * max(parse_size(args.chunk), max(s.nbytes for s in specs.values())) + 10**9
        print(f"{'method':16s} {'peak GB':>8s} {'bound GB':>8s} {'seconds':>8s} {'GB/s':>6s} "
              f"{'dd read':>8s} {'dd write':>8s} {'of dd':>6s}")
        for method in args.methods:
            inputs = [path for model in (experts if method == "linear" else [base, *experts])
                      for path in sorted(model.glob("*.safetensors"))]
            read, write = disk.read_seconds(inputs), disk.write_seconds(folder / "written", nbytes)
            disk.forget(inputs)
            seconds, peak = merged(method, base, experts, folder / "out", args.chunk)
            shutil.rmtree(folder / "out")
            moved = nbytes + sum(path.stat().st_size for path in inputs)
            print(f"{method:16s} {peak / 1e9:8.2f} {bound / 1e9:8.2f} {seconds:8.1f} {moved / seconds / 1e9:6.2f} "
                  f"{read:8.1f} {write:8.1f} {(read + write) / seconds:6.0%}", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
