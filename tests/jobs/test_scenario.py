"""`pivotjax scenario`: a folder, whole or not at all, the same bytes wherever it is made."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from drawn import FORMAT, THEMES, picture, png
from processes import on_hosts

from pivotjax import files
from pivotjax.data import corpora
from pivotjax.data.scenarios import columns, embeddings, load
from pivotjax.data.scenarios.columns import Simple

COLOURS = Simple("embedding", lambda rows: rows.pictures.mean((1, 2)).astype(np.float16), "colours", -1)
TESTS = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """180 drawn samples of three themes, clustered by their mean colours."""
    monkeypatch.setitem(corpora.FORMATS, "drawn", FORMAT)
    monkeypatch.setattr(embeddings, "column", lambda config, weights: COLOURS)
    monkeypatch.setenv("PIVOTJAX_CACHE", str(tmp_path / "cache"))
    return written(tmp_path / "recipe.yaml", tmp_path / "out")


def written(path: Path, out: Path) -> Path:
    corpora = {theme: {"format": "drawn", "path": f"{theme} 60 {bad}"} for theme, bad in zip(THEMES, (0, 20, 30))}
    domains = {"by": "kmeans", "count": 3}
    path.write_text(yaml.safe_dump({"out": str(out), "corpora": corpora, "domains": domains, "seed": 3}))
    return path


@pytest.fixture
def stopped(command):
    """Runs a command that must end in status 2, after whatever progress; returns its last line."""

    def run(*args) -> str:
        ended = command(*args)
        assert (ended.status, ended.out) == (2, ""), ended
        return ended.err.splitlines()[-1]

    return run


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def test_a_scenario(recipe, done, tmp_path):
    ended, out = done("scenario", recipe), tmp_path / "out"
    assert f"scenario: {out}" in ended.err and "5 of 180 samples left out: 5 corrupt image" in ended.err
    manifest, scenario = files.read_json(out / "manifest.json"), load(out)
    assert manifest["samples"] == {"in domains": 175, "in no domain": 0, "bad": {"corrupt image": 5}}
    assert list(scenario.domains) == ["cluster0", "cluster1", "cluster2"] and len(arrays(out)) == 9
    everything = np.concatenate([s.indices for of in scenario.domains.values() for s in of.values()])
    assert len(np.unique(everything)) == len(everything) == 175
    for name, domain in manifest["domains"].items():
        (theme,) = [theme for theme, count in domain["corpora"].items() if count]  # each cluster is one theme
        assert set(domain["words"][:6]) <= set(THEMES[theme])
        for split, facts in domain["splits"].items():
            file = out / f"{name}.{split}.npy"
            assert facts == {"count": len(scenario.domains[name][split]), "sha256": files.sha256(file)}
        keys = {scenario.domains[name]["train"][i].key for i in range(domain["splits"]["train"]["count"])}
        assert {example["key"] for example in domain["examples"]} <= keys and len(domain["examples"]) == 8
    assert manifest["recipe"]["domains"]["count"] == 3 and manifest["seed"] == 3


def test_the_sheet_needs_nothing_else(recipe, done, tmp_path):
    done("scenario", recipe)
    page = (tmp_path / "out" / "sheet.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:|#)[^\"'> ]+", page) and "<script" not in page
    assert page.count("data:image/jpeg;base64,") == 3 * 24 + 6 * 3  # of domains, and of the largest groups
    for word in ("cluster0", "cluster2", "corrupt image", "Telling words", "animals"):
        assert word in page


def test_the_same_seed_gives_the_same_bytes(recipe, done, tmp_path, monkeypatch):
    """Whatever the cache, the blocks, the threads; another seed gives another split."""
    done("scenario", recipe)
    monkeypatch.setattr(columns, "BLOCK", 32)
    done("scenario", recipe, "--out", tmp_path / "again", "--cache", tmp_path / "other", "--workers", 3)
    assert arrays(tmp_path / "out") == arrays(tmp_path / "again")
    one, other = (files.read_json(tmp_path / name / "manifest.json") for name in ("out", "again"))
    assert one == other and (tmp_path / "out/sheet.html").read_bytes() == (tmp_path / "again/sheet.html").read_bytes()
    done("scenario", recipe, "--out", tmp_path / "third", "--seed", 4)
    assert arrays(tmp_path / "out") != arrays(tmp_path / "third")


def test_a_finished_scenario_stays_and_another_is_not_mixed_in(recipe, done, refused, tmp_path):
    done("scenario", recipe)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "(was there)" in done("scenario", recipe, "--workers", 2).err
    assert "domains.count = 3, now it is 2" in refused("scenario", recipe, "--domains.count", 2)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "holds other files" in refused("scenario", recipe, "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_corpus_that_changed(recipe, done, refused, tmp_path, monkeypatch):
    done("scenario", recipe)
    monkeypatch.setattr(type(FORMAT.open(corpora.CorpusConfig("drawn", "food 9 0"), None)), "identity", "new")
    assert "was made of another animals than is there now" in refused("scenario", recipe)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--domains.by", "kmeens"], "did you mean kmeans"),
        (["--domains.count", "170"], "has no"),
        (["--splits.train", "0.9"], "must sum to 1"),
        (["--corpora.food.format", "webdatasets"], "did you mean webdataset"),
        (["--corpora.food.path", "food 40 1", "--corpora.animals.path", "animals 40 1", "--corpora.cities.path",
          "cities 40 1", "--bad-limit", "1"], "none of 120 samples can be used"),
        (["--domains.by", "keywords"], "needs topics"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_leaves_nothing(recipe, stopped, tmp_path, args, said):
    assert said in stopped("scenario", recipe, *args)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_half_scenario(recipe, done, stopped, small_disk, tmp_path):
    done("scenario", recipe, "--out", tmp_path / "first")  # what is in the cache is whole
    with small_disk(1000):
        assert "free some space" in stopped("scenario", recipe)
    assert not (tmp_path / "out").exists()
    done("scenario", recipe)


def test_a_mixture_of_llava_by_the_data_sets_in_it(done, tmp_path):
    """llava_v1_5_mix665k.json names pictures by their data set and says nothing of it in `id`."""
    homes = {"coco/train2017": 20, "ocr_vqa/images": 12, "vg/VG_100K": 16}
    entries = []
    for home, count in homes.items():
        (tmp_path / "images" / home).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "images" / home / f"{number}.png").write_bytes(png(picture("food", len(entries))))
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"caption {len(entries)}"}]
            entries.append({"id": f"{number:012}", "image": f"{home}/{number}.png", "conversations": turns})
    (tmp_path / "mix.json").write_text(json.dumps(entries))
    corpus = {"format": "llava_json", "path": str(tmp_path / "mix.json"), "images": str(tmp_path / "images")}
    recipe = {
        "out": str(tmp_path / "out"),
        "corpora": {"mix": corpus},
        "domains": {"by": "source", "source": {"field": "key"}},
        "duplicates": {"captions": "off", "images": "off"},
        "splits": {"train": 1, "calibration": 0, "test": 0},
    }
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(recipe))
    done("scenario", tmp_path / "mix.yaml", "--cache", tmp_path / "cache")
    domains = load(tmp_path / "out", tmp_path / "cache").domains
    assert {name: len(splits["train"]) for name, splits in domains.items()} == {"coco": 20, "ocr_vqa": 12, "vg": 16}
    assert domains["vg"]["train"][1].key == "vg/VG_100K/1.png/33"


PROCESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import jax
import numpy as np
from drawn import FORMAT
from pivotjax import cli
from pivotjax.data import corpora
from pivotjax.data.scenarios import columns, embeddings
def opened(config, cache):
    index = cache / (config.path + ".index")
    if jax.process_index() == 0:
        time.sleep(0.2)
        index.touch()
    assert index.exists(), "the first process was not waited for"
    return FORMAT.open(config, cache)
corpora.FORMATS["drawn"] = FORMAT._replace(open=opened)
columns.BLOCK = 32
of = lambda rows: rows.pictures.mean((1, 2)).astype(np.float16)
embeddings.column = lambda config, weights: columns.Simple("embedding", of, "colours", -1)
for _ in range(2):
    cli.main(["scenario", *sys.argv[1:], "--out", str(Path({out!r}, sys.argv[-1]))])
"""


def test_two_processes_write_what_one_writes(recipe, done, tmp_path):
    """Over loopback, each with an `out` of its own: each reads half of the blocks, the first writes; the second time it
    finds what is there, and the other, which has nothing, ends with it."""
    done("scenario", recipe)
    process = [sys.executable, "-c", PROCESS.format(tests=str(TESTS), out=str(tmp_path / "two"))]
    said = on_hosts(2, [*process, recipe, "--cache", tmp_path / "shared"])
    assert arrays(tmp_path / "two/0") == arrays(tmp_path / "out") and not (tmp_path / "two/1").exists()
    assert files.read_json(tmp_path / "two/0/manifest.json") == files.read_json(tmp_path / "out/manifest.json")
    assert said[0].count("(was there)") == 1
    assert "sample" in said[0] and "sample" not in said[1]  # the first alone speaks
