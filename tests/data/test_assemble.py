"""From a config's corpora and scenarios to domains in their splits, and batches of them."""

import contextlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pivotjax import config as configs
from pivotjax import files
from pivotjax.data.corpora import CorpusConfig, open_corpus
from pivotjax.data.decode import BadSample
from pivotjax.data.parts import Part
from pivotjax.data.scenarios import folder as scenario_folder
from pivotjax.data.sources import SOURCES, Source
from pivotjax.errors import InputError
from pivotjax.jobs import assemble, pretrain
from pivotjax.jobs.assemble import DataConfig, Frozen
from pivotjax.jobs.pretrain import PretrainConfig
from pivotjax.models.processors import Normalisation, Processor
from pivotjax.training import hosts

COUNT, CORRUPT, WORDY = 60, (3, 17, 33), (20, 41)


@pytest.fixture
def shard(tmp_path) -> Path:
    """Grey JPEGs, black at the left edge, of which some are corrupt and some have captions of too many words."""
    path = tmp_path / "shards" / "00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number in range(COUNT):
            pixels = np.full((20, 40, 3), 4 * number, np.uint8)
            pixels[:, :8] = 0
            picture = io.BytesIO()
            Image.fromarray(pixels).save(picture, "JPEG", quality=95)
            data = b"\xff\xd8 nothing" if number in CORRUPT else picture.getvalue()
            caption = f"number {number}" + " a" * 9 * (number in WORDY)
            for suffix, part in (("jpg", data), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    return path


@pytest.fixture
def data(shard) -> DataConfig:
    corpora = {"web": CorpusConfig("webdataset", str(shard.parent))}
    return DataConfig(corpora=corpora, train=None, calibration=10, test=12, bad_limit=0.5)


@pytest.fixture
def frozen(encoder, captioner) -> Frozen:
    return Frozen(None, encoder, replace(captioner, num_visual=4))


def numbers(samples) -> set[int]:
    return {int(sample["caption"].split()[1]) for sample in samples}


def batches(data, frozen, domains, count, batch=8) -> list[dict]:
    feed = assemble.feed({name: [name] for name in domains}, domains, data, frozen, batch, 0)
    with feed.start(0) as made:
        return [next(made) for _ in range(count)]


def test_a_corpus_in_its_splits(tmp_path, data, frozen):
    domain = assemble.load_domain("web", data, frozen, tmp_path / "cache")
    assert assemble.domain_names(data, tmp_path) == ("web",) and data.packaged == ()
    held_out = {split: numbers([s[i] for i in range(len(s))]) for split, s in domain.splits.items() if split != "train"}
    train = numbers([{"caption": key} for key in _captions(domain.splits["train"])])
    assert not train & held_out["test"] and not train & held_out["calibration"]
    assert not held_out["test"] & held_out["calibration"]
    assert train | held_out["test"] | held_out["calibration"] | set(CORRUPT) | set(WORDY) == set(range(COUNT))
    assert len(domain.splits["train"]) == COUNT - 22
    assert not (held_out["test"] | held_out["calibration"]) & set(WORDY)  # of what is held out all can be asked
    assert domain.dropped["corrupt image"] == 3
    assert set(assemble.load_domain("web", data, frozen, tmp_path / "cache", held_out_only=True).splits) == {
        "calibration",
        "test",
    }
    other = assemble.load_domain("web", replace(data, split_seed=1, train=5), frozen, tmp_path / "cache")
    assert len(other.splits["train"]) == 5
    assert numbers([other.splits["test"][i] for i in range(len(other.splits["test"]))]) != held_out["test"]
    with pytest.raises(InputError, match=r"domain web has 60 samples, data\.test and data\.calibration"):
        assemble.load_domain("web", replace(data, test=55), frozen, tmp_path / "cache")


def test_online_a_picture_is_decoded_only_where_its_caption_fits(tmp_path, data, frozen):
    everything = replace(data, features="online", calibration=0, test=0)
    train = assemble.load_domain("web", everything, frozen, tmp_path).splits["train"]
    for number in WORDY:
        with pytest.raises(BadSample, match="caption too long"):
            train[number]
    assert train[0]["caption"] == "number 0"


def test_what_is_not_trained_on_is_said(tmp_path, data, frozen, capsys):
    assemble.load_domain("web", data, frozen, tmp_path)
    assert "data.train" not in capsys.readouterr().err
    assemble.load_domain("web", replace(data, train=5), frozen, tmp_path)
    assert "web: 5 of 38 training samples (data.train)" in capsys.readouterr().err


def test_what_is_held_out_and_lost_is_said(tmp_path, data, frozen, capsys):
    """Every sample is held out but one: 3 of them are corrupt and 2 have captions that are too long."""
    domain = assemble.load_domain("web", replace(data, calibration=30, test=29, split_seed=1), frozen, tmp_path)
    said = capsys.readouterr().err
    for split, count in (("calibration", 30), ("test", 29)):
        lost = count - len(domain.splits[split])
        assert f"web-{split}: {lost} of {count} samples left out (" in said
    lost = 59 - len(domain.splits["calibration"]) - len(domain.splits["test"])
    assert lost == sum(domain.dropped.values()) >= 4 and set(domain.dropped) == {"corrupt image", "caption too long"}


def test_nothing_left_of_what_is_held_out(tmp_path, data, frozen):
    short = replace(frozen, captioner=replace(frozen.captioner, max_caption=1))
    with pytest.raises(InputError, match=r"domain web has no calibration samples .* of 10 \(.*too long\); raise"):
        assemble.load_domain("web", data, short, tmp_path)


@pytest.mark.parametrize("large", [True, False])
def test_splits_that_nobody_asks_for(tmp_path, data, frozen, make_items, monkeypatch, large):
    """They are left out, and said where something needs them."""
    monkeypatch.setitem(SOURCES, "greys", Source("greys", (), "none", "none", lambda files: make_items(40)))
    name = "web" if large else "greys"
    asked = replace(data if large else DataConfig(("greys",)), calibration=0, test=0)
    domain = assemble.load_domain(name, asked, frozen, tmp_path)
    assert set(domain.splits) == {"train"}
    batches(asked, frozen, {name: domain}, 1)
    with pytest.raises(InputError, match=rf"domain {name} has no test samples; give it some \(data\.test\)"):
        assemble.feed({name: [name]}, {name: domain}, asked, frozen, 8, 0, "test")


def test_what_comes_after_training_is_asked_for_before(tmp_path, data, frozen, monkeypatch):
    config = PretrainConfig(tmp_path / "out", data=replace(data, test=0), cache=tmp_path)
    monkeypatch.setattr(assemble.assets, "fetch", lambda *args: None)
    monkeypatch.setattr(assemble, "load_frozen", lambda *args: frozen)
    monkeypatch.setattr(pretrain, "initial_projector", lambda *args: pytest.fail("training began"))
    with pytest.raises(InputError, match="domain web has no test samples"):
        pretrain._trained(config, ("calibration", "test"))


def test_weights_are_those_of_domains_that_are_mixed():
    names, weights = ("a", "b"), DataConfig(weights={"a": 3.0, "b": 1.0})
    assemble.check_weights(weights, names, joint=True)
    assemble.check_weights(DataConfig(), names, joint=False)
    for wrong in ((names, False), (("a",), True)):
        with pytest.raises(InputError, match="none are mixed; add --joint"):
            assemble.check_weights(weights, *wrong)
    with pytest.raises(InputError, match=r"data\.weights has a, b, the domains are a, c"):
        assemble.check_weights(weights, ("a", "c"), joint=True)


def test_what_is_encoded_is_not_read_again(tmp_path, data, frozen, monkeypatch):
    """Captions of what is held out come with the features: a disk that fails later changes nothing."""
    first = assemble.load_domain("web", data, frozen, tmp_path)

    def fails(self, index):
        raise BadSample("unreadable shard")

    for method in ("caption", "__getitem__"):
        monkeypatch.setattr(Part, method, fails)
    again = assemble.load_domain("web", data, frozen, tmp_path)
    assert again.dropped == first.dropped
    assert [again.splits["test"].key(i) for i in range(len(again.splits["test"]))] == [
        first.splits["test"].key(i) for i in range(len(first.splits["test"]))
    ]


@pytest.mark.parametrize("large", [True, False])
def test_processes_encode_corpora_together_and_packaged_domains_once(tmp_path, data, frozen, monkeypatch, large):
    """Corpora are opened (an index may be made) while the others wait, and encoded when all of them are there."""
    config = PretrainConfig(tmp_path / "out", data=data if large else DataConfig(), cache=tmp_path)
    seen, waiting, opened = [], [], assemble.open_corpus

    @contextlib.contextmanager
    def guard(cache):
        waiting.append(True)
        yield
        waiting.pop()

    def load_domain(name, *args, corpora=None):
        seen.append(("encode", name, bool(waiting), set(corpora or {})))

    def open_corpus(*args):
        seen.append(("open", bool(waiting)))
        return opened(*args)

    monkeypatch.setattr(hosts, "cache_filled_once", guard)
    monkeypatch.setattr(assemble.assets, "fetch", lambda *args: None)
    monkeypatch.setattr(assemble, "open_corpus", open_corpus)
    monkeypatch.setattr(assemble, "load_frozen", lambda *args: frozen)
    monkeypatch.setattr(assemble, "load_domain", load_domain)
    for part in ("initial_projector", "_state"):
        monkeypatch.setattr(pretrain, part, lambda *args: None)
    assert list(pretrain._trained(config).domains) == (["web"] if large else ["emoji", "icons", "shapes"])
    once = [("encode", name, True, set()) for name in ("emoji", "icons", "shapes")]
    assert seen == ([("open", True), ("encode", "web", False, {"web"})] if large else once)


def test_a_domain_is_known_by_its_samples(tmp_path, shard, data, frozen):
    """A run that goes on on changed data can tell: by the corpus, and by what of it is used."""

    def identity(**changes) -> str:
        domain = assemble.load_domain("web", replace(data, **changes), frozen, tmp_path / "cache", held_out_only=True)
        return domain.identity

    first = identity()
    assert identity(features="online", max_caption=7) == first
    assert len({first, identity(train=5), identity(split_seed=1), identity(test=11)}) == 4
    with tarfile.open(shard, "a") as tar:
        tar.addfile(tarfile.TarInfo("more.txt"))
    assert identity() != first


def _captions(samples) -> list[str]:
    good = []
    for i in range(len(samples)):
        try:
            good.append(samples[i]["caption"])
        except ValueError:
            continue
    return good


def test_online_and_cached_training_see_the_same_samples(tmp_path, data, frozen):
    found = []
    for features in ("cache", "online"):
        config = replace(data, features=features, pack=2)
        found.append(batches(config, frozen, {"web": assemble.load_domain("web", config, frozen, tmp_path)}, 4))
    for cached, online in zip(*found):
        assert all(np.array_equal(cached[key], online[key]) for key in ("ids", "tokens", "segments", "bad"))
        assert cached["features"].shape == (1, 4, 2, 4, 3) and online["images"].shape == (1, 4, 2, 16, 16, 3)
        pixels = online["images"].astype(np.float32).reshape(1, 4, 2, 2, 8, 2, 8, 3).mean((4, 6)) / 255
        np.testing.assert_allclose(cached["features"], pixels.reshape(cached["features"].shape), atol=1e-3)


def test_the_encoders_processor_cuts_the_middle_out(tmp_path, data, frozen):
    config = replace(data, features="online")
    cut = frozen.__class__(None, frozen.encoder, frozen.captioner, Processor(Normalisation(), 3, 16, (16, 16)))
    square, middle = (
        batches(config, one, {"web": assemble.load_domain("web", config, one, tmp_path)}, 1)[0]["images"]
        for one in (frozen, cut)
    )
    assert (square[..., 0, 0, :] == 255).all() and (square[..., 8, 1, :] < 40).all()  # white above, the edge is there
    assert np.ptp(middle[..., 2:14, 2:14, :].astype(int), axis=(3, 4)).max() <= 4  # neither is
    assert len(list((tmp_path / "features").iterdir())) == 4  # two splits each way: they are not taken for each other


def test_a_scenarios_domains(tmp_path, data, frozen):
    cache, folder = tmp_path / "cache", tmp_path / "scenario"
    folder.mkdir()
    corpus = open_corpus(data.corpora["web"], cache)
    thirds = np.arange(COUNT).reshape(2, 3, 10)
    domains = {name: dict(zip(("train", "calibration", "test"), part)) for name, part in zip(("low", "high"), thirds)}
    facts = scenario_folder.write_indices(folder, domains)
    corpora = {"web": {"config": configs.resolved(data.corpora["web"]), "identity": corpus.identity}}
    manifest = {"format": scenario_folder.FORMAT, "corpora": corpora}
    files.write_json(folder / "manifest.json", manifest | {"domains": {n: {"splits": f} for n, f in facts.items()}})
    config = DataConfig(scenario=folder, train=None, calibration=4, bad_limit=1.0)
    assert assemble.domain_names(config, cache) == ("low", "high")
    loaded = {name: assemble.load_domain(name, config, frozen, cache) for name in ("low", "high")}
    assert numbers([loaded["high"].splits["test"][i] for i in range(10)]) == set(range(50, 60))
    drawn = loaded["low"].splits["calibration"]
    assert len(drawn) + loaded["low"].dropped["corrupt image"] - 1 == 4  # 3 is in training, 17 may be among the four
    assert numbers([drawn[i] for i in range(len(drawn))]) < set(range(10, 20))
    batch = batches(config, frozen, loaded, 1)[0]
    assert batch["features"].shape == (2, 8, 1, 4, 3)
    (tmp_path / "shards").rename(tmp_path / "moved")
    moved = replace(config, corpora={"web": replace(data.corpora["web"], path=str(tmp_path / "moved"))})
    there = assemble.load_domain("high", moved, frozen, cache)
    assert numbers([there.splits["test"][i] for i in range(10)]) == set(range(50, 60))
    assert assemble.domain_names(moved, cache) == ("low", "high") and there.identity == loaded["high"].identity
    with pytest.raises(InputError, match="unknown domain 'web'"):  # the scenario's corpora are no domains
        assemble.load_domain("web", moved, frozen, cache)
    with pytest.raises(InputError, match="was made of no corpus other; its corpora are web"):
        assemble.domain_names(replace(moved, corpora={"other": moved.corpora["web"]}), cache)


def test_the_config_reads_corpora_and_weights():
    recipe = {"corpora": {"a": {"format": "parquet", "path": "x"}}, "weights": {"a": 1}, "train": None}
    found = configs.from_dict(DataConfig, recipe, "recipe")
    assert found.corpora == {"a": CorpusConfig("parquet", "x")} and found.weights == {"a": 1.0} and found.train is None
    assert configs.from_dict(DataConfig, configs.resolved(found), "again") == found
    found = configs.overridden(found, ["--pack", "2", "--workers", "3", "--features", "online"], "pivotjax")
    assert (found.pack, found.workers, found.features) == (2, 3, "online") and found.corpora
