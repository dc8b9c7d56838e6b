"""Agreement with fusion-bench (https://github.com/tanganke/fusion_bench), run as a separate program.

`PIVOTJAX_FUSION_BENCH` names the Python interpreter of an environment that has it; without it these tests are skipped.
Experts are a flat torch state dict of a tall, a wide and a square weight and of biases, float32. Results are compared
within 1e-4 of the largest entry of each tensor, or better where a test says so.

Experts have full rank: of a rank-deficient matrix fusion-bench takes arbitrary singular vectors, and we take none.
"""

import os
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pivotjax
from pivotjax.merging.calibration import FeatureCalibration
from pivotjax.merging.methods.iso import isotropic_ranks

PYTHON = os.environ.get("PIVOTJAX_FUSION_BENCH")
pytestmark = [
    pytest.mark.fusion_bench,
    pytest.mark.skipif(not PYTHON, reason="PIVOTJAX_FUSION_BENCH does not name a Python that has fusion-bench"),
]
SHAPES = {"0.weight": (24, 16), "0.bias": (24,), "2.weight": (20, 24), "2.bias": (20,), "4.weight": (20, 20)}
COUNT = 3

# What runs there: reads parameters and statistics, calls its functions, writes what they return.
PROGRAM = """
import torch
from safetensors.torch import load_file, save_file

from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.singular_value_calibration.utils import subspace_consistency_spectral_calibration
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.wudi.wudi import wudi_merging

tensors = load_file("in.safetensors")


def tree(prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


base, experts = tree("base/"), [tree(f"expert {k}/") for k in range(COUNT)]
updates = [{name: e[name] - base[name] for name in e} for e in experts]
columns = {name: [e[name] for e in experts] for name in base}


def knots(name):
    u, s, vs = subspace_alignment([update[name] for update in updates])
    flat = torch.stack([(s[:, None] * v).flatten() for v in vs])
    return u @ ties_merging(flat, reset_thresh=30, merge_func="mean").reshape(len(s), -1)


def svc(name):
    total = base[name] + sum(update[name] for update in updates)
    weights = [e[name] for e in experts]
    return subspace_consistency_spectral_calibration(base[name], weights, total, alpha=0.8) - base[name]


def wudi(steps, names):
    small = [{name: 1e-2 * update[name] for name in names} for update in updates]
    return wudi_merging(small, accelerator="cpu", iter_num=steps)


matrices = [name for name in base if base[name].dim() == 2]
fishers = [tree(f"fisher {k}/") for k in range(COUNT)]
grams = [{"4": tensors[f"gram {k}"]} for k in range(COUNT)]
merged = {
    "tsv_m": compute_and_sum_svd_mem_reduction(updates, accelerator="cpu"),
    "iso_c": iso_c(updates, accelerator="cpu"),
    "iso_cts": iso_cts(updates, common_space_fraction=0.7, accelerator="cpu"),
    "knots_ties": {name: knots(name) for name in matrices},
    "svc": {name: svc(name) for name in matrices},
    "wudi": wudi(300, list(base)),
    "wudi at length": wudi(5000, ["4.weight"]),
    "regmean": merging_with_regmean_weights({"4.weight": columns["4.weight"]}, grams, reduce_non_diagonal_ratio=0.9),
    "fisher": merging_with_fisher_weights(columns, fishers, torch.ones(COUNT), normalize_fisher_weight=False),
}
flat = {f"{method}/{name}": t.detach().contiguous() for method, one in merged.items() for name, t in one.items()}
save_file(flat, "out.safetensors")
""".replace("COUNT", str(COUNT))


@pytest.fixture(scope="module")
def world():
    """A base, experts that have something in common, each expert's features and Fisher information."""
    rng = np.random.default_rng(0)

    def draw(spread):
        return {name: (spread * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}

    base, common = draw(0.5), draw(0.1)
    experts = [{name: base[name] + common[name] + own[name] for name in base} for own in (draw(0.2) for _ in range(3))]
    features = [(rng.normal(size=(200, 20)) @ rng.normal(size=(20, 20)) / 4).astype(np.float32) for _ in experts]
    fishers = [{name: rng.uniform(0.5, 2, size=shape).astype(np.float32) for name, shape in SHAPES.items()}
               for _ in experts]
    return base, experts, features, fishers


@pytest.fixture(scope="module")
def theirs(world, tmp_path_factory):
    """`{method: {tensor: merged update}}` (of RegMean and Fisher: merged parameters)."""
    base, experts, features, fishers = world
    folder = tmp_path_factory.mktemp("fusion_bench")
    tensors = {f"gram {k}": x.T @ x / len(x) for k, x in enumerate(features)}
    trees = {"base": base} | {f"expert {k}": e for k, e in enumerate(experts)}
    trees |= {f"fisher {k}": fisher for k, fisher in enumerate(fishers)}
    tensors |= {f"{what}/{name}": t for what, tree in trees.items() for name, t in tree.items()}
    save_file(tensors, folder / "in.safetensors")
    done = subprocess.run([PYTHON, "-c", PROGRAM], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    merged = {}
    for path, tensor in load_file(folder / "out.safetensors").items():
        method, name = path.split("/")
        merged.setdefault(method, {})[name] = tensor
    return merged


def ours(world, method, only=None, scale=1.0, **options):
    """The merged update (of one tensor)."""
    base, experts = world[:2]
    names = [only] if only else list(base)
    merged = pivotjax.merge({n: base[n] for n in names}, [{n: e[n] for n in names} for e in experts], method,
                            scale=scale, **options).params  # fmt: skip
    return {n: merged[n] - base[n] for n in names}


def agree(got, want, tolerance=1e-4):
    assert want
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor, rtol=0, atol=tolerance * np.abs(tensor).max(), err_msg=name)


def test_tsv_m(world, theirs):
    """The same definition, biases averaged in both. 1e-5."""
    agree(ours(world, "tsv_m"), theirs["tsv_m"], 1e-5)


def test_iso_c(world, theirs):
    """The same definition (they by SVD, we by a polar factor). 1e-5."""
    agree(ours(world, "iso_c"), theirs["iso_c"], 1e-5)


def test_iso_cts(world, theirs):
    """The same definition and rounding of the ranks. 1e-5."""
    assert isotropic_ranks((3, 24, 16), 0.7) == (10, 2)
    agree(ours(world, "iso_cts", common=0.7), theirs["iso_cts"], 1e-5)


def test_knots_ties(world, theirs):
    """Their alignment and their TIES on its coefficients. They keep one coefficient more than the share says (`>=` the
    k-th smallest, counted from below), so we are asked for that share. Entries whose sum is exactly 0 get the
    majority's sign there and none here: there are none."""
    for name, tensor in theirs["knots_ties"].items():
        size = min(SHAPES[name][0], COUNT * SHAPES[name][1]) * SHAPES[name][1]
        agree(ours(world, "knots_ties", name, density=(int(0.3 * size) + 1) / size), {name: tensor}, 1e-5)


def test_svc(world, theirs):
    """The same definition, on the sum of the updates; they leave vectors to the merge that is calibrated. 1e-5."""
    agree(ours(world, "svc", alpha=0.8), theirs["svc"], 1e-5)


def test_wudi_by_adam(world, theirs):
    """Theirs is the paper's procedure, 300 steps of Adam at 1e-5 from the sum: ours with `steps`. Updates are small, as
    they are meant for: 1 % of the world's."""
    agree(ours(shrunk(world), "wudi", steps=300), theirs["wudi"])


def test_wudi_closed_form(world, theirs):
    """5000 of their steps end at our closed form."""
    agree(ours(shrunk(world), "wudi", "4.weight"), theirs["wudi at length"])


def shrunk(world):
    """A zero base and 1 % of the updates."""
    base, experts = world[:2]
    small = [{name: np.float32(1e-2) * (e[name] - base[name]) for name in base} for e in experts]
    return {name: np.zeros_like(t) for name, t in base.items()}, small


def layer_inputs(params, features):
    return {"4": features}


def test_regmean(world, theirs):
    """Their fit of one weight from given Gram matrices; they leave biases out of it, so the layer has none."""
    calibration = FeatureCalibration(layer_inputs, world[2])
    got = ours(world, "regmean", "4.weight", calibration=calibration, rho=0.9)
    agree({"4.weight": got["4.weight"] + world[0]["4.weight"]}, theirs["regmean"])


class GivenFishers:
    """A calibration that has its Fisher information already."""

    def __init__(self, fishers):
        self.given = fishers

    def fisher(self, params):
        return {name: np.stack([fisher[name] for fisher in self.given]) for name in self.given[0]}


def test_fisher(world, theirs):
    """Their average with given Fisher weights, not normalised (they divide by a norm, we by a mean). They add 1e-6 to
    each weight, we floor it at 1e-6 of the mean weight: neither shows here. 1e-5."""
    got = ours(world, "fisher", calibration=GivenFishers(world[3]))
    agree({name: update + world[0][name] for name, update in got.items()}, theirs["fisher"], 1e-5)
