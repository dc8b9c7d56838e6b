"""Speed of the merge methods: pivotjax beside torch (and mergekit, fusion-bench), in one run on one machine.

    python benchmarks/merge.py                        # 4 experts of the LLaVA-1.5-7B projector, every method
    python benchmarks/merge.py --methods pivot iso_c
    python benchmarks/merge.py --growth pivot         # cost as K grows 2 to 16 and the width 1k to 8k
    PIVOTJAX_MERGEKIT=.../python PIVOTJAX_FUSION_BENCH=.../python python benchmarks/merge.py   # these too

Times are of the merge alone, from arrays in memory to arrays in memory, after one call that compiles; the best of
`--repeat` for calls under ten seconds. The last column says how far the two results lie apart, relative to the largest
merged update: both sides computed the same thing. The torch side is `torch_methods.py`.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import numpy as np
import torch
from torch_methods import RANDOM, TORCH, TWO

import pivotjax
from pivotjax.merging import METHODS


def experts_of(shapes: list[tuple[int, int]], count: int, seed: int = 0) -> tuple[dict, list[dict]]:
    """A base and experts whose updates have decaying spectra, as trained ones do, and something in common."""
    rng = np.random.default_rng(seed)
    base, experts = {}, [{} for _ in range(count)]
    for i, (d_in, d_out) in enumerate(shapes):
        name = f"linear_{i}"
        base[name] = {"kernel": _normal(rng, d_in, d_out), "bias": _normal(rng, d_out)}
        common = _decaying(rng, d_in, d_out)
        for expert in experts:
            update = common + 2 * _decaying(rng, d_in, d_out) + 0.05 * _normal(rng, d_in, d_out)
            expert[name] = {"kernel": base[name]["kernel"] + update,
                            "bias": base[name]["bias"] + 0.1 * _normal(rng, d_out)}  # fmt: skip
    return base, experts


def _normal(rng, *shape):
    return (rng.standard_normal(shape, np.float32) * 0.02).astype(np.float32)


def _decaying(rng, d_in, d_out):
    rank = min(d_in, d_out) // 8
    strength = np.geomspace(1, 0.01, rank, dtype=np.float32)
    return 5 * (_normal(rng, d_in, rank) * strength) @ _normal(rng, rank, d_out)


def torch_dict(params: dict) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{'weight' if leaf == 'kernel' else leaf}": torch.tensor(value.T if leaf == "kernel" else value)
        for name, layer in params.items()
        for leaf, value in layer.items()
    }


def best(function, repeat: int) -> tuple[float, object]:
    """Seconds of the best call after a first one, and its result."""
    started = time.perf_counter()
    result = function()
    first = time.perf_counter() - started
    times = []
    for _ in range(repeat if first < 10 else 1):
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
    return min(times), result


def ours(base, experts, method, options):
    result = pivotjax.merge(base, experts, method, diagnose="nothing", **options).params
    return jax.block_until_ready(result)


def compare(method: str, base, experts, repeat: int) -> dict:
    experts = experts[:2] if method in TWO else experts
    name, *words = method.split()
    options = dict(word.split("=") for word in words)
    place = jax.devices("cpu")[0]
    jax_base, jax_experts = jax.device_put(base, place), [jax.device_put(e, place) for e in experts]
    seconds, merged = best(lambda: ours(jax_base, jax_experts, name, options), repeat)
    row = {"method": method, "pivotjax": seconds}
    if method in TORCH:
        state, states = torch_dict(base), [torch_dict(e) for e in experts]
        # What torch computes needs no first call: nothing is compiled.
        row["torch"], theirs = best(lambda: TORCH[method](state, states), repeat) if seconds < 3 else once(
            lambda: TORCH[method](state, states))  # fmt: skip
        row["ratio"] = row["torch"] / seconds
        if method not in RANDOM:
            row["apart"] = apart(torch_dict(jax.device_get(merged)), theirs, state)
    return row


def told_of(row: dict) -> str:
    if "torch" not in row:
        return ""
    apart = f"apart {row['apart']:.1e}" if "apart" in row else "other masks"
    return f"torch {row['torch']:8.3f} s   {row['ratio']:6.2f} x   {apart}"


def once(function) -> tuple[float, object]:
    started = time.perf_counter()
    return_value = function()
    return time.perf_counter() - started, return_value


def apart(mine, theirs, base) -> float:
    size = max(float((theirs[key] - base[key]).abs().max()) for key in base)
    return max(float((mine[key] - theirs[key]).abs().max()) for key in base) / size


def growth(method: str) -> list[dict]:
    """Seconds as K and the width grow, one square layer; beside them the time of reading it once and of one product."""
    rows = []
    for count, width in [(2, 2048), (4, 2048), (8, 2048), (16, 2048), (4, 1024), (4, 4096), (4, 8192)]:
        base, experts = experts_of([(width, width)], count)
        place = jax.devices("cpu")[0]
        base, experts = jax.device_put(base, place), [jax.device_put(e, place) for e in experts]
        seconds, _ = best(lambda b=base, e=experts: ours(b, e, method, {}), 3)
        read = (count + 1) * width * width * 4
        rows.append({"method": method, "K": count, "width": width, "seconds": seconds, "read_mb": read / 1e6,
                     "floor_read": read / memory_rate(), "product_seconds": 2 * width**3 / flop_rate()})  # fmt: skip
        print(f"{method:24s} K {count:2d}  width {width:5d}  {seconds:8.2f} s   reading once "
              f"{rows[-1]['floor_read']:.3f} s   one matrix product {rows[-1]['product_seconds']:.3f} s", flush=True)
    return rows


@functools.cache
def memory_rate() -> float:
    """Bytes a second that one jitted pass over memory reads here."""
    x = jax.numpy.ones((16, 2**23))
    total = jax.jit(lambda x: sum(x[i] for i in range(16)))
    return x.nbytes / best(lambda: jax.block_until_ready(total(x)), 3)[0]


@functools.cache
def flop_rate() -> float:
    """FLOPs a second of a 4096 x 4096 float32 matrix product here."""
    x = jax.numpy.ones((4096, 4096))
    product = jax.jit(lambda x: jax.numpy.matmul(x, x, precision="highest"))
    return 2 * 4096**3 / best(lambda: jax.block_until_ready(product(x)), 3)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="default: all that need no data")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--widths", type=int, nargs=2, default=(1024, 4096), metavar=("D_IN", "D"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--growth", nargs="+", metavar="METHOD", help="cost as K and the width grow, instead")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    chosen = parser.parse_args()
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
          f"memory {memory_rate() / 1e9:.1f} GB/s, matrix product {flop_rate() / 1e9:.0f} GFLOP/s")  # fmt: skip
    if chosen.growth:
        rows = [row for method in chosen.growth for row in growth(method)]
    else:
        d_in, width = chosen.widths
        base, experts = experts_of([(d_in, width), (width, width)], chosen.experts)
        free = [name for name, m in sorted(METHODS.items()) if "calibration" not in m.needs]
        methods = chosen.methods or ["pivot gram=none basis=energy", *free]
        rows = []
        for method in methods:
            row = compare(method, base, experts, chosen.repeat)
            rows.append(row)
            print(f"{method:30s} {row['pivotjax']:8.3f} s   {told_of(row)}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
