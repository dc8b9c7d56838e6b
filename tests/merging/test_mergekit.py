"""Agreement with mergekit 0.1.5, which is run as a separate program in an environment of its own.

The variable PIVOTJAX_MERGEKIT names that environment's Python. Everything is merged in float32 on random safetensors;
results must agree within 1e-5 of each tensor's largest entry. Where the two programs mean different things:

- Rescaling. mergekit's DARE and DELLA restore each tensor's sum of magnitudes (`rescale: true`; here `rescale="norm"`);
  the papers divide by the probability of keeping (`rescale="expected"`, the default here, which mergekit lacks).
- Absolute thresholds. mergekit's SCE weighs experts equally where the mean squares of the updates sum to less than
  1e-6, and its Model Stock divides by products of norms of at least 1e-6; here both are the option `floor`, by
  default 0.
- Randomness. The random methods get the same draws: the program below replaces `torch.bernoulli` by a comparison with
  given uniform numbers.
- Exact ties. Where the sum of the votes is exactly 0 mergekit elects plus, here nobody is elected. Where several
  entries are as large as the smallest kept one, mergekit keeps as many as fit, here all are kept.
- SLERP. mergekit's `base_model` is its first model; here both are experts and no base is needed.
- Opposite vectors. mergekit's multislerp refuses more than two whose directions cancel; here their mean is taken.
- Nearly parallel vectors. mergekit's Karcher mean of weights that differ by 1e-4 is 3e-5 off the float64 formula (its
  float32 inner products exceed 1); the one here is not.
"""

import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from reference_spherical import karcher
from safetensors.numpy import load_file, save_file

import pivotjax
from pivotjax.merging import randomness

PYTHON = os.environ.get("PIVOTJAX_MERGEKIT")
pytestmark = [
    pytest.mark.mergekit,
    pytest.mark.skipif(not PYTHON, reason="PIVOTJAX_MERGEKIT does not name the Python of an environment with mergekit"),
]

NAMES = ("emoji", "icons", "shapes")
# No two tensors of one size: the draws are told apart by it.
SHAPES = {"0.weight": (12, 9), "0.bias": (12,), "2.weight": (10, 12), "2.bias": (10,), "norm.weight": (7,)}
SEED = 5

PROGRAM = '''
import importlib, json, sys, traceback
import torch
from safetensors.torch import load_file

jobs, draws = json.load(open(sys.argv[1])), load_file(sys.argv[2])
calls = {}


def bernoulli(probability):
    """The next expert's draws for the tensor of this size."""
    size = probability.numel()
    expert = calls[size] = calls.get(size, -1) + 1
    return (draws[f"{size}.{expert % 3}"].reshape(probability.shape) < probability).to(probability.dtype)


torch.bernoulli = bernoulli
torch.set_num_threads(1)
failed = {}
for job in jobs:
    calls.clear()
    try:
        program = importlib.import_module("mergekit.scripts." + job["script"]).main
        program([job["config"], job["out"], *job["options"]], standalone_mode=False)
    except Exception:
        failed[job["name"]] = traceback.format_exc(limit=-2)
json.dump(failed, open(sys.argv[3], "w"))
'''


def case(method, ours=None, *, parameters=None, each=None, experts=NAMES, base=True, world="plain", **options):
    """One merge: mergekit's method and parameters (`each`: by model), and what it is here."""
    return {"method": method, "ours": ours or method, "parameters": parameters or {}, "each": each or {},
            "experts": experts, "base": base, "world": world, "options": options}  # fmt: skip


def values(*numbers):
    return dict(zip(NAMES, numbers))


WEIGHTS, DENSITY = values(0.5, 1.2, 0.9), values(0.3, 0.55, 0.8)
WEIGHTED = {"weights": WEIGHTS}
ONE = {"weight": values(1, 1, 1)}
CASES = {
    "linear": case("linear", "average", each={"weight": WEIGHTS}, base=False, **WEIGHTED),
    "task arithmetic": case("task_arithmetic", each={"weight": WEIGHTS}, parameters={"lambda": 0.7},
                            scale=0.7, **WEIGHTED),
    "task arithmetic, normalized": case("task_arithmetic", each={"weight": WEIGHTS}, parameters={"normalize": True},
                                        scale=1.0, normalize=True, **WEIGHTED),
    "ties": case("ties", each={"weight": WEIGHTS, "density": DENSITY}, density=DENSITY, **WEIGHTED),
    "ties, defaults": case("ties", each=ONE, density=1.0),
    "ties, summed": case("ties", each={"weight": WEIGHTS}, density=0.4, normalize=False, scale=0.6, **WEIGHTED,
                         parameters={"density": 0.4, "normalize": False, "lambda": 0.6}),
    "ties, rescaled": case("ties", each=ONE, parameters={"density": 0.4, "rescale": True}, density=0.4, rescale="norm"),
    "ties, a negative weight": case("ties", each={"weight": values(1, -0.7, 1)}, parameters={"density": 0.6},
                                    density=0.6, weights=values(1, -0.7, 1)),
    **{f"{name}, defaults": case(name, each=ONE, parameters={"density": 0.5}, rescale="norm", normalize=False,
                                 scale=1.0, seed=SEED) for name in ("dare_linear", "dare_ties")},
    **{f"{name}, by model": case(name, each={"weight": WEIGHTS, "density": DENSITY},
                                 parameters={"rescale": False, "normalize": True, "lambda": 0.8}, density=DENSITY,
                                 rescale="none", normalize=True, scale=0.8, seed=SEED, **WEIGHTED)
       for name in ("dare_linear", "dare_ties")},
    **{f"{name}, defaults": case(name, each=ONE, parameters={"density": 0.7}, rescale="norm", normalize=name == "della",
                                 scale=1.0, seed=SEED) for name in ("della_linear", "della")},
    **{f"{name}, by model": case(name, each={"weight": WEIGHTS, "density": DENSITY, "epsilon": values(0.1, 0.3, 0.05)},
                                 parameters={"rescale": False, "normalize": name != "della", "lambda": 0.8},
                                 density=DENSITY, epsilon=values(0.1, 0.3, 0.05), rescale="none",
                                 normalize=name != "della", scale=0.8, seed=SEED, **WEIGHTED)
       for name in ("della_linear", "della")},
    **{f"{name}, defaults": case(name, each=ONE, parameters={"density": 0.8}, density=0.8, normalize=False, scale=1.0)
       for name in ("breadcrumbs", "breadcrumbs_ties")},
    **{f"{name}, by model": case(name, each={"weight": WEIGHTS, "density": DENSITY, "gamma": values(0.1, 0.5, 0.2)},
                                 parameters={"rescale": True, "normalize": True}, density=DENSITY,
                                 gamma=values(0.1, 0.5, 0.2), rescale="norm", normalize=True, scale=1.0, **WEIGHTED)
       for name in ("breadcrumbs", "breadcrumbs_ties")},
    "sce, defaults": case("sce", select=1.0, floor=1e-6),
    "sce": case("sce", parameters={"select_topk": 0.4}, select=0.4, floor=1e-6),
    "sce, tiny updates": case("sce", parameters={"select_topk": 0.4}, world="tiny", select=0.4, floor=1e-6),
    "model_stock": case("model_stock", floor=1e-6),
    "model_stock, filters": case("model_stock", parameters={"filter_wise": True}, filter_wise=True, floor=1e-6),
    "model_stock, tiny updates": case("model_stock", world="tiny", floor=1e-6),
    "slerp": case("slerp", parameters={"t": 0.3}, experts=NAMES[:2], base="emoji", t=0.3),
    "slerp, nearly parallel": case("slerp", parameters={"t": 0.3}, experts=NAMES[:2], base="emoji", world="tiny",
                                   t=0.3),
    "nuslerp": case("nuslerp", each={"weight": WEIGHTS}, experts=NAMES[:2], weights=values(0.5, 1.2)),
    "nuslerp, no base": case("nuslerp", each={"weight": WEIGHTS}, experts=NAMES[:2], base=False,
                             weights=values(0.5, 1.2)),
    "nuslerp, outputs": case("nuslerp", each={"weight": WEIGHTS}, parameters={"nuslerp_flatten": False},
                             experts=NAMES[:2], weights=values(0.5, 1.2), along="outputs"),
    "nuslerp, inputs": case("nuslerp", each={"weight": WEIGHTS}, experts=NAMES[:2], weights=values(0.5, 1.2),
                            parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}, along="inputs"),
    "multislerp": case("multislerp", each={"weight": WEIGHTS}, **WEIGHTED),
    "multislerp, no base": case("multislerp", each={"weight": WEIGHTS}, base=False,
                                parameters={"normalize_weights": False}, normalize=False, **WEIGHTED),
    "karcher": case("karcher", base=False),
    "karcher, few steps": case("karcher", parameters={"max_iter": 1, "tol": 1e-3}, base=False,
                               iterations=1, tolerance=1e-3),
}  # fmt: skip
TIES = {"votes cancel": {"density": 1.0}, "equal magnitudes": {"density": 0.5}}


def make_world(spread):
    rng = np.random.default_rng(3)

    def one(spread, origin=None):
        noise = {name: (spread * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}
        return noise if origin is None else {name: origin[name] + leaf for name, leaf in noise.items()}

    base = one(1.0)
    common = one(0.5 * spread, base)
    return {"base": base} | {name: one(spread, common) for name in NAMES}


WORLDS = {
    "plain": make_world(0.5),
    "tiny": make_world(1e-4),
    "ties": {
        "base": {"x": np.zeros(4, np.float32)},
        "emoji": {"x": np.float32([1, 2, 2, 5])},
        "icons": {"x": np.float32([-1, 2, 2, 5])},
    },
}

# A Llama of four blocks, for the program that knows architectures.
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
         "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
         "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
         "torch_dtype": "float32"}  # fmt: skip
GRADIENTS = {
    "density": {"emoji": [1.0, 0.3], "icons": [0.2, 0.9, 0.5], "shapes": 0.6},
    "weight": {
        "emoji": 1.0,
        "icons": [{"filter": "mlp", "value": [0.2, 0.8]}, {"filter": "self_attn", "value": 0.7}, {"value": 0.4}],
        "shapes": [0.1, 1.1],
    },
}


def llama(seed):
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16), "model.norm.weight": (16,)}
    for i in range(4):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{p}_proj.weight": (16, 16) for p in "qkvo"}
        shapes |= {f"{block}mlp.{p}_proj.weight": (24, 16) for p in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj.weight": (16, 24)}
        shapes |= {f"{block}{p}_layernorm.weight": (16,) for p in ("input", "post_attention")}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def recipe(folder, names, base, method, parameters, each, ending=".safetensors"):
    """mergekit's YAML."""

    def path(name):
        return str(folder / f"{name}{ending}")

    models = [{"model": path(n), "parameters": {p: by_model[n] for p, by_model in each.items()}} for n in names]
    written = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "float32"}
    return yaml.safe_dump(written | ({"base_model": path(base)} if base else {}))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """What mergekit makes of all cases, in one run: `{case: merged state dict}`, or what it said instead."""
    folder = tmp_path_factory.mktemp("mergekit")
    for world, trees in WORLDS.items():
        (folder / world).mkdir()
        for name, tree in trees.items():
            save_file(tree, folder / world / f"{name}.safetensors")
    for seed, name in enumerate(("base", *NAMES)):
        (folder / "llama" / name).mkdir(parents=True)
        save_file(llama(seed), folder / "llama" / name / "model.safetensors", {"format": "pt"})
        (folder / "llama" / name / "config.json").write_text(json.dumps(LLAMA))
    draws = {f"{int(np.prod(shape))}.{k}": np.asarray(
        randomness.uniform(jnp.asarray(randomness.keys(SEED, [name], path))[0], shape))
        for path, shape in SHAPES.items() for k, name in enumerate(NAMES)}  # fmt: skip
    save_file(draws, folder / "draws.safetensors")

    jobs = []

    def add(name, text, script="merge_raw_pytorch", options=()):
        config, out = folder / f"{len(jobs)}.yaml", folder / "merged" / str(len(jobs))
        config.write_text(text)
        jobs.append({"name": name, "script": script, "config": str(config), "out": str(out), "options": list(options)})

    for name, c in CASES.items():
        base = {True: "base", False: None}.get(c["base"], c["base"])
        add(name, recipe(folder / c["world"], c["experts"], base, c["method"], c["parameters"], c["each"]))
    for name, parameters in TIES.items():
        add(name, recipe(folder / "ties", NAMES[:2], "base", "ties", parameters, {"weight": values(1, 1)}))
    add("nearly parallel", recipe(folder / "tiny", NAMES, None, "karcher", {}, {}))
    whole = recipe(folder / "llama", NAMES, "base", "ties", {}, GRADIENTS, ending="")
    add("gradients", whole, "run_yaml", ["--no-copy-tokenizer"])
    return run_jobs(folder, jobs)


def run_jobs(folder, jobs):
    (folder / "program.py").write_text(PROGRAM)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [PYTHON, "program.py", "jobs.json", "draws.safetensors", "failed.json"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    failed = json.loads((folder / "failed.json").read_text())
    return {job["name"]: failed.get(job["name"]) or read(Path(job["out"])) for job in jobs}


def read(out):
    return {name: leaf for file in sorted(out.glob("*.safetensors")) for name, leaf in load_file(file).items()}


def assert_agree(ours, theirs):
    assert isinstance(theirs, dict), theirs
    assert set(ours) == set(theirs)
    for name, leaf in theirs.items():
        bound = 1e-5 * np.abs(leaf).max()
        np.testing.assert_allclose(ours[name], leaf, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_agreement(theirs, name):
    c = CASES[name]
    world = WORLDS[c["world"]]
    base = world["base"] if c["base"] is True else None
    experts = {n: world[n] for n in c["experts"]}
    assert_agree(pivotjax.merge(base, experts, c["ours"], **c["options"]).params, theirs[name])


def test_layer_gradients_and_filters(theirs):
    """A whole model by the program that reads architectures, with densities and weights that differ a tensor."""
    base, *experts = (llama(seed) for seed in range(4))
    options = {"density": GRADIENTS["density"], "weights": GRADIENTS["weight"]}
    ours = pivotjax.merge(base, dict(zip(NAMES, experts)), "ties", **options).params
    assert_agree(ours, theirs["gradients"])


def test_karcher_mean_of_nearly_parallel_vectors(theirs):
    """Both against the float64 formula, see the module."""
    world = WORLDS["tiny"]
    ours = pivotjax.merge(None, {n: world[n] for n in NAMES}, "karcher").params
    for name in SHAPES:
        want = karcher([world[n][name].astype(np.float64) for n in NAMES], NAMES)
        for got, tolerance in ((ours, 1e-6), (theirs["nearly parallel"], 1e-4)):
            np.testing.assert_allclose(got[name], want, rtol=0, atol=tolerance * np.abs(want).max(), err_msg=name)


def test_where_the_programs_differ(theirs):
    """Exact ties, see the module: votes of 1 and -1; magnitudes of 2, 2 at the end of the kept half."""
    world = WORLDS["ties"]
    experts = {n: world[n] for n in NAMES[:2]}
    cancelled = pivotjax.merge(world["base"], experts, "ties", density=1.0).params["x"]
    np.testing.assert_array_equal(cancelled, [0, 2, 2, 5])
    np.testing.assert_array_equal(theirs["votes cancel"]["x"], [1, 2, 2, 5])
    equal = pivotjax.merge(world["base"], experts, "ties", density=0.5).params["x"]
    np.testing.assert_array_equal(equal, [0, 2, 2, 5])
    assert sorted(theirs["equal magnitudes"]["x"]) == [0, 0, 2, 5]
