"""mergekit's recipes, unchanged, through both command lines: gradients, filters, slices, values a model, its defaults.

The variable PIVOTJAX_MERGEKIT names the Python of an environment with mergekit 0.1.5, which is run as a separate
program. A random Llama of four blocks; results agree within 1e-5.
"""

import json
import os
import subprocess

import numpy as np
import pytest
import tiny_models
from safetensors.numpy import save_file

PYTHON = os.environ.get("PIVOTJAX_MERGEKIT")
pytestmark = [
    pytest.mark.mergekit,
    pytest.mark.skipif(not PYTHON, reason="PIVOTJAX_MERGEKIT does not name the Python of an environment with mergekit"),
]

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32",
    "hidden_act": "silu",
}  # fmt: skip
PROGRAM = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for recipe, out in json.load(open(sys.argv[1])):
    config = MergeConfiguration.model_validate(yaml.safe_load(open(recipe)))
    run_merge(config, out, MergeOptions(copy_tokenizer=False, quiet=True))
"""

RECIPES = {
    "linear, gradients and filters that fall back": """
models:
  - model: {a}
    parameters:
      weight:
        - {{filter: mlp, value: [0.1, 0.9]}}
        - {{filter: norm, value: 0.3}}
  - model: {b}
    parameters: {{weight: [1, 0.2, 0.5]}}
merge_method: linear
parameters: {{weight: 2.0}}
""",
    "linear with a base, not normalized": """
models: [{{model: {a}}}, {{model: {b}}}]
merge_method: linear
base_model: {base}
parameters: {{weight: [0.2, 1], normalize: false}}
""",
    "ties, a density for each model": """
models:
  - model: {base}
  - model: {a}
    parameters: {{weight: 0.5, density: [0.2, 0.9]}}
  - model: {b}
    parameters: {{weight: [0.3, 0.7], density: 0.5}}
base_model: {base}
merge_method: ties
parameters: {{normalize: true, int8_mask: true}}
dtype: float32
""",
    "ties, its defaults, rescaled": """
models: [{{model: {a}}}, {{model: {b}}}]
base_model: {base}
merge_method: ties
parameters: {{weight: 0.5, density: 0.6, rescale: true}}
""",
    "task arithmetic, a model taken away": """
models:
  - model: {a}
    parameters: {{weight: -0.5}}
  - model: {b}
    parameters: {{weight: 0.3, density: 0.1}}
base_model: {base}
merge_method: task_arithmetic
parameters: {{lambda: [0.2, 0.7]}}
out_dtype: float32
""",
    "slerp of slices": """
slices:
  - sources:
      - model: {b}
        layer_range: [0, 4]
      - model: {base}
        layer_range: [0, 4]
merge_method: slerp
base_model: {base}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
    "karcher with numbers that YAML reads as text": """
models: [{{model: {a}}}, {{model: {b}}}]
merge_method: karcher
parameters: {{max_iter: 20, tol: 1e-6}}
""",
    "karcher with a base": """
models: [{{model: {a}}}, {{model: {b}}}]
base_model: {base}
merge_method: karcher
""",
    "nuslerp of rows": """
models:
  - model: {a}
    parameters: {{weight: [0.2, 0.8]}}
  - model: {b}
    parameters: {{weight: 0.5}}
merge_method: nuslerp
parameters: {{nuslerp_flatten: false}}
""",
    "nuslerp of columns of task vectors": """
models:
  - model: {a}
    parameters: {{weight: [0.2, 0.8]}}
  - model: {b}
    parameters: {{weight: 0.5}}
base_model: {base}
merge_method: nuslerp
parameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}
""",
    "multislerp": """
models:
  - model: {a}
    parameters: {{weight: 0.2}}
  - model: {b}
    parameters: {{weight: 0.5}}
base_model: {base}
merge_method: multislerp
""",
    "sce": """
models: [{{model: {a}}}, {{model: {b}}}]
base_model: {base}
merge_method: sce
parameters: {{select_topk: [0.3, 0.6]}}
""",
    "sce, its defaults": """
models: [{{model: {a}}}, {{model: {b}}}]
base_model: {base}
merge_method: sce
""",
    "model stock": """
models: [{{model: {a}}}, {{model: {b}}}]
base_model: {base}
merge_method: model_stock
parameters: {{filter_wise: true}}
""",
    "breadcrumbs with ties": """
models:
  - model: {a}
    parameters: {{weight: 0.5, density: 0.8, gamma: 0.1}}
  - model: {b}
    parameters: {{weight: 0.5}}
base_model: {base}
merge_method: breadcrumbs_ties
parameters: {{density: 0.6}}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, the recipes, and what mergekit makes of them."""
    folder = tmp_path_factory.mktemp("mergekit")
    paths = {name: str(llama(folder / name, seed)) for seed, name in enumerate(("base", "a", "b"))}
    jobs = []
    for i, text in enumerate(RECIPES.values()):
        (folder / f"{i}.yaml").write_text(text.format(**paths))
        jobs.append((str(folder / f"{i}.yaml"), str(folder / f"theirs_{i}")))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([PYTHON, "-c", PROGRAM, folder / "jobs.json"], capture_output=True, text=True,
                           env={key: value for key, value in environment.items() if key != "PYTHONPATH"})
    assert ended.returncode == 0, ended.stderr
    return folder


def llama(path, seed):
    shapes = {"model.embed_tokens.weight": (50, 16), "model.norm.weight": (16,), "lm_head.weight": (50, 16)}
    for i in range(4):
        stem = f"model.layers.{i}."
        shapes |= {f"{stem}self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"}
        shapes |= {f"{stem}mlp.{name}_proj.weight": (32, 16) for name in ("gate", "up")}
        shapes |= {f"{stem}mlp.down_proj.weight": (16, 32)}
        shapes |= {f"{stem}{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
    rng = np.random.default_rng(seed)
    path.mkdir()
    held = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_means_the_same(command, folder, tmp_path, name):
    number = list(RECIPES).index(name)
    ended = command("merge", folder / f"{number}.yaml", "--out", tmp_path / "out")
    assert ended.status == 0, ended.err
    ours, theirs = tiny_models.read(tmp_path / "out"), tiny_models.read(folder / f"theirs_{number}")
    assert set(ours) == set(theirs)
    for tensor, expected in theirs.items():
        np.testing.assert_allclose(ours[tensor], expected, rtol=1e-5, atol=1e-5, err_msg=tensor)
