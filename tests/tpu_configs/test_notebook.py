"""The Colab notebook from top to bottom on a CPU, with its quick setting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def first_cell():
    cells = json.loads((ROOT / "tpu_configs" / "colab.ipynb").read_text())["cells"]
    return next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize(("quick", "installs"), [("", True), ("1", False)])
def test_it_installs_what_the_package_needs(monkeypatch, quick, installs):
    """Also where Python finds the package's source in the working folder, as it does in a notebook's session there."""
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append((command, check)))
    monkeypatch.setenv("PIVOTJAX_QUICK", quick)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend("")
    exec(first_cell(), {})
    assert ran == [([sys.executable, "-m", "pip", "install", "--quiet", ".[tpu,demo]"], True)] * installs


def test_it_says_where_it_wants_to_be_opened(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="open this notebook's session in its folder"):
        exec(first_cell(), {})


@pytest.mark.slow
@pytest.mark.assets
def test_it_runs_from_top_to_bottom(assets, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    assets("smollm2-135m", "efficientnet-lite0", "easy-vqa", "material-icons")
    for name, value in {"PIVOTJAX_QUICK": "1", "PIVOTJAX_OUT": str(tmp_path), "JAX_PLATFORMS": "cpu"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    book = nbformat.read(ROOT / "tpu_configs" / "colab.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells)  # what is in git has not been run
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    folder = tmp_path / "colab" / "projectors"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"icons", "shapes", "w0"}
    assert (tmp_path / "colab" / "merged").is_dir() and (tmp_path / "colab" / "metrics.jsonl").is_file()
