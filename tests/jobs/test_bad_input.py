"""Bad input through the real command line: one clear line, exit status 2, nothing half-written."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file
from tiny_projectors import tiny

from pivotjax.checkpoints import store, torch_bridge

ROOT = Path(__file__).parents[2]
PRETRAIN = ("pretrain", ROOT / "train/mini.yaml")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_unknown_command(refused, command):
    assert "unknown command 'marge'; one of: demo, prepare, scenario, pretrain," in refused("marge")
    nothing = command()
    assert nothing.status == 2 and nothing.out.startswith("usage: pivotjax COMMAND")


def test_unknown_override(refused, tmp_path):
    assert "did you mean --training.steps?" in refused(*PRETRAIN, "--training.step", 3, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_domain(refused, tmp_path):
    out = tmp_path / "out"
    for line in (
        refused("demo", "--domains", "emojis", "icons", "--out", out),
        refused("demo", "--unseen", "emojis", "--out", out),
        refused(*PRETRAIN, "--data.domains", "emojis", "--out", out),
    ):
        assert "unknown domain 'emojis'; did you mean emoji?" in line
    assert not out.exists() or [path.name for path in out.iterdir()] == ["config.yaml"]


def test_one_domain_or_one_that_is_seen_and_unseen(refused, tmp_path):
    assert "two or more different domains, not emoji" in refused("demo", "--domains", "emoji", "--out", tmp_path / "o")
    assert "icons: trained on and yet unseen" in refused("demo", "--unseen", "icons", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_corrupt_image(refused, family, tmp_path, damage):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(picture)
    if damage == "missing":
        picture.unlink()
    elif damage == "cut":
        cut(picture)
    else:
        picture.write_text({"empty": "", "text": "a picture"}[damage])
    assert f"cannot read the image {picture}" in refused("generate", picture, "--model", family.folder / "cats")


def test_truncated_orbax_checkpoint(refused, family, tmp_path):
    """Whichever file of it is cut or gone."""
    whole, broken = family.folder / "cats", family.folder / "broken"
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.stat().st_size]
    damages = [(cut, file) for file in files] + [(Path.unlink, file) for file in files if file.name != "sizes.json"]
    for damage, file in damages:
        shutil.copytree(whole, broken)
        damage(broken / file)
        assert str(broken) in refused("inspect", broken), (damage, file)
        shutil.rmtree(broken)
    cut(family.folder / "dogs" / "state/manifest.ocdbt")
    assert f"{family.folder / 'dogs'} is not a whole Orbax checkpoint" in refused("merge", family.recipe)
    assert not (tmp_path / "out").exists()


def test_changed_bytes_in_an_orbax_checkpoint(refused, family):
    data = max((family.folder / "cats" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert "is not a whole Orbax checkpoint" in refused("inspect", family.folder / "cats")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "state/d/*"])
def test_truncated_checkpoint_in_a_process_of_its_own(family, file):
    """Orbax, TensorStore and asyncio would have things to say on stderr as well; the user sees one line."""
    cut(next((family.folder / "cats").glob(file)))
    command = [sys.executable, "-m", "pivotjax.cli", "inspect", family.folder / "cats"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (2, "")
    line = f"pivotjax inspect: {family.folder / 'cats'} is not a whole Orbax checkpoint"
    assert ended.stderr.startswith(line) and ended.stderr.count("\n") == 1


def test_truncated_safetensors(refused, command, family):
    path = family.folder / "cats.safetensors"
    torch_bridge.save_torch(path, tiny(1), {"init_id": "one"})
    assert command("inspect", path).status == 0
    cut(path)
    assert "is not a whole safetensors file" in refused("inspect", path)
    path.write_bytes(path.read_bytes()[:5])
    assert "is not a whole safetensors file" in refused("inspect", path)


def test_what_is_no_checkpoint(refused, family, tmp_path):
    assert "no checkpoint at" in refused("inspect", tmp_path / "nowhere")
    assert "no checkpoint at" in refused("inspect", tmp_path / "nowhere.safetensors")
    assert "holds no checkpoint" in refused("inspect", tmp_path)
    save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    line = refused("convert", tmp_path / "other.safetensors", tmp_path / "out")
    assert "cannot be converted: tensors alone" in line


def test_experts_of_different_shapes(refused, family, tmp_path):
    family.write("dogs", tiny(2, d_out=5))
    line = refused("merge", family.recipe)
    assert "dogs" in line and "linear_0" in line
    family.write("dogs", tiny(2, kind="mlp3x_gelu"))
    line = refused("merge", family.recipe)
    assert "dogs" in line and "linear_2" in line


def test_different_init_id(refused, command, family, tmp_path):
    family.write("dogs", tiny(2), init_id="two")
    line = refused("merge", family.recipe)
    assert "dogs have different init_id" in line and "--allow-different-init" in line
    assert not (tmp_path / "out").exists()
    assert command("merge", family.recipe, "--allow-different-init").status == 0
    assert (tmp_path / "out" / "projector").is_dir()


def test_different_backbones(refused, family, tmp_path):
    for name, language in (("w0", "a"), ("cats", "a"), ("dogs", "b")):
        family.write(name, tiny(1), backbone={"vision": "v", "language": language, "prompt": "\n"})
    assert "different backbone" in refused("merge", family.recipe, "--allow-different-init")


def test_nan_in_an_expert(refused, family, tmp_path):
    family.write("dogs", jax.tree.map(lambda leaf: leaf.at[0].set(np.nan), tiny(2)))
    line = refused("merge", family.recipe)
    assert "dogs" in line and "linear_0" in line and "NaN" in line
    assert not (tmp_path / "out" / "projector").exists()


def test_unknown_method_and_options(refused, family, tmp_path):
    assert "'pivt' (did you mean 'pivot'?)" in refused("merge", family.recipe, "--merge-method", "pivt")
    assert "'basi' (did you mean 'basis'?)" in refused("merge", family.recipe, "--parameters.basi", "cross")
    assert "--parameters.basis has no value" in refused("merge", family.recipe, "--parameters.basis")
    assert "basis" in refused("merge", family.recipe, "--parameters.basis", "sideways")
    assert "calibration" in refused("merge", family.recipe, "--merge-method", "regmean")
    assert "calibration" in refused("merge", family.recipe, "--tune")
    assert "did you mean --tune?" in refused("merge", family.recipe, "--tne")
    ties = ("merge", family.recipe, "--method", "ties")
    assert "merge method 'ties' has no option --densty; did you mean --density?" in refused(*ties, "--densty", 0.2)
    assert "'dense' must be a number" in refused(*ties, "--density", "dense")
    assert "2 must be in (0, 1]" in refused(*ties, "--density", 2)
    assert "no expert is called 'cat' (did you mean 'cats'?)" in refused(*ties, "--weights", "cat=1", "dogs=1")
    assert "--method has no value" in refused("merge", family.recipe, "--method")
    assert "'lots' is no size; write 256MB" in refused("merge", family.recipe, "--chunk", "lots")
    assert "did you mean 'ties'?" in refused("merge", "--method", "tise", "--help")
    assert not (tmp_path / "out").exists()


def test_override_that_is_no_yaml(refused, family):
    assert "--parameters.scale" in refused("merge", family.recipe, "--parameters.scale", "[1")


def test_recipes_that_go_in_circles(refused, family, tmp_path):
    """A recipe is no model, and an output folder is not one of its own inputs."""
    model = f"{family.folder / 'cats'}"
    family.recipe.write_text(family.recipe.read_text().replace(model, str(family.recipe)))
    assert "is a recipe, not a model; merge it first" in refused("merge", family.recipe)
    one = ("merge", "--method", "average", "--experts", model)
    assert "is or holds one of the models" in refused(*one, "--out", model)
    assert "is or holds one of the models" in refused(*one, "--out", family.folder)


def test_output_folder_of_something_else(refused, family, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("three years of work")
    assert "holds what no merge wrote (thesis.tex); give another --out" in refused("merge", family.recipe)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "three years of work"


def test_experts_without_a_base(refused, family, tmp_path):
    line = refused("merge", "--method", "ties", "--experts", family.folder / "cats", "--out", tmp_path / "out")
    assert "give base_model (a path; mean or zero where nobody has" in line
    assert "no checkpoint at" in refused("merge", "--base", "men", "--experts", family.folder / "cats", "--out", "o")


def test_projector_files_that_are_broken(refused, family, tmp_path):
    """Truncated, with a header that lies, or with code in the pickle: one line, and nothing is left."""
    safe = family.folder / "cats.safetensors"
    torch_bridge.save_torch(safe, tiny(1), {})
    data = safe.read_bytes()
    evil = family.folder / "mm_projector.bin"
    evil.write_bytes(pickle.dumps({"weight": Evil(tmp_path / "ran")}, protocol=2))
    for path, content, said in (
        (safe, data[:-8], "is not a whole safetensors file"),
        (safe, data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1), "is not a whole safetensors file"),
        (evil, evil.read_bytes(), "mm_projector.bin"),
    ):
        path.write_bytes(content)
        assert said in refused("merge", "--method", "average", "--experts", path, "--out", tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


class Evil:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_evaluate_without_projectors(refused, tmp_path):
    assert "no projectors to evaluate" in refused("evaluate", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_config_in_the_same_folder(refused, command, family, tmp_path):
    assert command("merge", family.recipe).status == 0
    before = store.load_projector(tmp_path / "out/projector").info
    line = refused("merge", family.recipe, "--merge-method", "average")
    assert "holds output made with recipe.merge_method = 'pivot', now it is 'average'; give another --out" in line
    assert store.load_projector(tmp_path / "out/projector").info == before
    assert command("merge", family.recipe).status == 0  # the same config goes on


def test_a_config_alone_is_no_output(command, family, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.yaml").write_text("tune: true\n")
    assert command("merge", family.recipe).status == 0


def test_output_below_a_file(refused, family, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    for args in (("merge", family.recipe), PRETRAIN, ("demo",)):
        assert f"cannot write to {out}: Not a directory; choose another folder" in refused(*args, "--out", out)
    assert (tmp_path / "file").read_text() == "in the way"


def test_no_space_left_for_a_merge(refused, command, family, small_disk, tmp_path):
    """Files may grow to the size of the config and no further."""
    with small_disk(700):
        line = refused("merge", family.recipe)
    assert "cannot write" in line and "space" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["family", "recipe.yaml"]
    assert command("merge", family.recipe).status == 0  # and once there is space, it works


def test_no_network_on_first_run(command, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    ended = command(*PRETRAIN, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    lines = ended.err.splitlines()
    assert ended.status == 2 and "cannot fetch" in lines[-1] and str(tmp_path / "cache") in lines[-1]
    assert sum(line.startswith("pivotjax pretrain:") for line in lines) == 1 and "Traceback" not in ended.err
    assert list((tmp_path / "cache").iterdir()) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"domains": []}, "training needs different domains, not none; see data.domains"),
        ({"domains": ["icons", "icons"]}, "training needs different domains, not icons, icons"),
        ({"weights": {"emoji": 3.0, "icons": 1.0}}, "data.weights mixes domains of a joint projector"),
        ({"corpora": {"mfu": {"format": "parquet", "path": "x"}}}, "'mfu' cannot name a domain: a run's own output"),
        ({"corpora": {"W0": {"format": "parquet", "path": "x"}}}, "'W0' cannot name a domain: a run's own output"),
        ({"corpora": {"../x": {"format": "parquet", "path": "x"}}}, "'../x' cannot name a domain; use letters"),
        ({"train": 0}, "train must be at least 1, or null for all, not 0"),
    ],
)
def test_domains_that_cannot_be_trained_on(refused, tmp_path, data, said):
    """Before anything is fetched."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": data, "cache": str(tmp_path / "cache")}))
    assert said in refused("pretrain", recipe, "--out", tmp_path / "out")
    assert not list((tmp_path / "cache").rglob("*.whl"))


@pytest.mark.assets
def test_empty_dataset(command, assets, tmp_path):
    assets("smollm2-135m", "efficientnet-lite0", "easy-vqa")
    data = ("--data.domains", "shapes", "--data.max-caption", 1)
    ended = command(*PRETRAIN, *data, "--out", tmp_path / "out")
    assert ended.status == 2 and "fits data.max_caption = 1 tokens" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]


@pytest.mark.assets
def test_projector_of_other_weights(refused, family, assets, tmp_path):
    assets("smollm2-135m", "efficientnet-lite0")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    generate = ("generate", tmp_path / "picture.png", "--model")
    assert "does not say which models" in refused(*generate, family.folder / "cats")
    saved = {"model": {}, "data": {}}
    foreign = family.write("foreign", tiny(0), config=saved, backbone={"vision": "?", "language": "?", "prompt": "\n"})
    assert "was trained between other weights (vision, language differ)" in refused(*generate, foreign)
