"""The feature cache: order, reuse, and files that are damaged or were never finished."""

import os
import pickle
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pivotjax.data import features
from pivotjax.data.decode import BadSample
from pivotjax.data.features import FeatureSource, ShardedFeatures, build, build_shards
from pivotjax.data.images import render
from pivotjax.data.pictures import Pictures
from pivotjax.data.pipeline import Feed
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.models import vision


@pytest.fixture
def built(tmp_path, encoder, make_items):
    return build("greys", make_items(11), encoder, tmp_path / "features", batch=4)


def test_samples_come_back_in_order(built, make_items):
    source = FeatureSource(built, "greys")
    assert len(source) == 11
    for i, item in enumerate(make_items(11)):
        sample = source[i]
        assert (sample["key"], sample["concept"], sample["caption"]) == (item.key, item.concept, item.caption)
        assert sample["features"].shape == (4, 3) and sample["features"].dtype == np.float32
        np.testing.assert_allclose(sample["features"], i / 255, atol=2e-5)  # float16 below .05
    assert source[-1]["key"] == "greys/10"
    with pytest.raises(IndexError):
        source[11]


def test_every_batch_has_one_shape(built, encoder):
    assert encoder.params["calls"] == [4, 4, 4]


def test_a_whole_file_is_reused_and_anything_else_is_not(built, encoder, make_items, tmp_path):
    calls, folder, items = encoder.params["calls"], tmp_path / "features", make_items(11)
    assert build("greys", items, encoder, folder, batch=4) == built and len(calls) == 3
    other = [Item(item.key, item.concept, item.caption + "!", item.image, item.kind) for item in items]
    assert build("greys", other, encoder, folder, batch=4) != built and len(calls) == 6
    assert build("greys", items, encoder._replace(identity="another"), folder, batch=4) != built and len(calls) == 9
    built.write_bytes(built.read_bytes()[:-100])
    assert build("greys", items, encoder, folder, batch=4) == built and len(calls) == 12
    assert len(FeatureSource(built, "greys")) == 11


@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_truncated_file(built, keep):
    data = built.read_bytes()
    built.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(InputError, match="truncated or damaged"):
        len(FeatureSource(built, "greys"))


def test_damaged_file(tmp_path, encoder, make_items):
    path = build("greys", make_items(64), encoder, tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(b"number 30")] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match="truncated or damaged"):
        source = FeatureSource(path, "greys")
        [source[i] for i in range(len(source))]


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no features at"):
        len(FeatureSource(tmp_path / "none", "greys"))


def test_nothing_half_written(tmp_path, encoder, make_items, monkeypatch):
    items, folder = make_items(11), tmp_path / "features"
    broken = [*items[:9], Item("greys/broken", "x", "x", b"<svg", "svg")]
    with pytest.raises(InputError, match="greys/broken"):
        build("greys", broken, encoder, folder, batch=4)
    assert list(folder.iterdir()) == []

    def interrupted(encoder, images):
        raise KeyboardInterrupt

    monkeypatch.setattr(vision, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build("greys", items, encoder, folder, batch=4)
    assert list(folder.iterdir()) == []


def test_no_space_left(tmp_path, encoder, make_items):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match="free some space") as caught:
            build("greys", make_items(150), encoder, tmp_path / "features")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and list((tmp_path / "features").iterdir()) == []


def test_an_output_below_a_file(tmp_path, encoder, make_items):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        build("greys", make_items(3), encoder, tmp_path / "file" / "features")


def test_no_items(tmp_path, encoder):
    with pytest.raises(InputError, match="greys has no items"):
        build("greys", [], encoder, tmp_path)


def test_an_open_source_travels_to_other_processes(built):
    source = FeatureSource(built, "greys")
    assert source[3]["key"] == "greys/3"
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source and np.array_equal(copy[3]["features"], source[3]["features"])


@pytest.mark.assets
def test_stored_features_are_the_encoders(assets, tmp_path):
    """Rendered, encoded and stored: float16 keeps three digits of what the encoder gives directly."""
    from pivotjax.data.images import render
    from pivotjax.data.sources import source

    network = vision.load_encoder(assets("efficientnet-lite0")["efficientnet-lite0"])
    domain = source("icons")
    items = domain.items(assets(*domain.assets))[::1500]
    stored = FeatureSource(build("icons", items, network, tmp_path, batch=4), "icons")
    direct = np.asarray(vision.encode(network, np.stack([render(item) for item in items])))
    assert len(stored) == len(items) == 4
    for i in range(4):
        np.testing.assert_allclose(stored[i]["features"], direct[i], rtol=1e-3, atol=1e-3)


@dataclass(frozen=True)
class Corpus:
    """Items as a corpus; the `bad` ones cannot be had."""

    items: tuple[Item, ...]
    bad: dict[int, str]
    identity: str = "identity-of-corpus"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        if index in self.bad:
            raise BadSample(self.bad[index])
        return self.items[index]


BAD = {0: "missing image", 7: "corrupt image", 8: "corrupt image", 22: "empty caption"}


@pytest.fixture
def corpus(make_items) -> Corpus:
    return Corpus(tuple(make_items(23)), BAD)


def shards(corpus, encoder, folder, **options):
    return build_shards("greys", corpus, encoder, folder, render, **{"batch": 4, "shard": 8} | options)


def test_shards_keep_the_corpus_numbers_and_know_its_bad_samples(tmp_path, encoder, corpus):
    stored = ShardedFeatures(shards(corpus, encoder, tmp_path), "greys")
    assert len(stored) == 23 and stored.dropped() == {"missing image": 1, "corrupt image": 2, "empty caption": 1}
    assert sorted(file.name for file in stored.path.glob("*.arrayrecord")) == [f"0000{n}.arrayrecord" for n in range(3)]
    for source in (stored, pickle.loads(pickle.dumps(stored))):
        for i in range(23):
            if i in BAD:
                with pytest.raises(BadSample, match=BAD[i]):
                    source[i]
            else:
                assert source[i]["key"] == source.key(i) == f"greys/{i}"
                np.testing.assert_allclose(source[i]["features"], i / 255, rtol=1e-3)
    usable = stored.usable()
    assert usable.name == "greys" and [usable.key(i) for i in range(len(usable))] == [
        f"greys/{i}" for i in range(23) if i not in BAD
    ]
    with pytest.raises(IndexError):
        stored[23]


def test_few_of_many_shards_are_open(tmp_path, encoder, make_items):
    stored = ShardedFeatures(shards(Corpus(tuple(make_items(90)), {}), encoder, tmp_path, shard=1), "greys")
    before = len(os.listdir("/proc/self/fd"))
    assert [stored.key(i) for i in range(90)] == [f"greys/{i}" for i in range(90)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    assert stored.key(0) == "greys/0"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_shard_of_bad_samples_alone(tmp_path, encoder, make_items, number):
    bad = dict.fromkeys(range(8 * number, 8 * number + 8), "corrupt image")
    stored = ShardedFeatures(shards(Corpus(tuple(make_items(24)), bad), encoder, tmp_path), "greys")
    assert len(stored) == 24 and stored.dropped() == {"corrupt image": 8}
    assert [stored.usable().key(i) for i in range(16)] == [f"greys/{i}" for i in range(24) if i not in bad]


@pytest.mark.parametrize(
    "count, fails, what",
    [
        (300, range(220, 300), "300 samples of greys"),
        (12, range(12), "12 samples of greys"),
        (1000, range(940, 1000), "the samples 900 to 999 of greys"),  # 6 % of all are no outage, 60 of a shard are
    ],
)
def test_a_disk_that_fails_for_a_while_leaves_no_trace(tmp_path, encoder, make_items, count, fails, what):
    """Samples that cannot be read now are not written down as bad for ever."""
    corpus, options = Corpus(tuple(make_items(count)), {}), {"shard": 100, "batch": 50}
    away = dict.fromkeys(fails, "unreadable shard")
    told = rf"{len(fails)} of {what} are bad \({len(fails)} unreadable shard\)"
    with pytest.raises(InputError, match=told):
        shards(Corpus(corpus.items, away), encoder, tmp_path, **options)
    assert len(list(tmp_path.rglob("*.*"))) == 2 * (fails.start // 100)  # the shards before, with what is told of them
    stored = ShardedFeatures(shards(corpus, encoder, tmp_path, **options), "greys")
    assert len(stored) == count and stored.dropped() == {} and stored.key(count - 1) == f"greys/{count - 1}"


def test_cached_and_online_samples_are_the_same_stream(tmp_path, encoder, make_items, captioner):
    """Bad ones included: what replaces them does not depend on where they are met."""
    corpus = Corpus(tuple(make_items(23)), BAD)
    stored = ShardedFeatures(shards(corpus, encoder, tmp_path), "greys")
    pictures = Pictures(corpus, "greys", encoder.image_size)
    cached, online = (Feed({"a": [one]}, captioner, 8, seed=3, bad_limit=1).start(0) for one in (stored, pictures))
    for _ in range(4):
        left, right = next(cached), next(online)
        assert all(np.array_equal(left[key], right[key]) for key in ("ids", "tokens", "targets", "bad"))
        np.testing.assert_allclose(left["features"][..., 0, 0], right["images"][..., 8, 8, 0] / 255, atol=1e-3)


def test_bfloat16_goes_through_as_it_is(tmp_path, encoder, corpus, captioner):
    stored = ShardedFeatures(shards(corpus, encoder, tmp_path, dtype="bfloat16"), "greys")
    assert stored[9]["features"].dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(stored[9]["features"].astype(np.float32), 9 / 255, rtol=2**-8)
    batch = next(Feed({"a": [stored]}, captioner, 4, seed=0, bad_limit=1).start(0))
    assert batch["features"].dtype == ml_dtypes.bfloat16 and batch["features"].shape == (1, 4, 1, 4, 3)


def test_an_interrupted_cache_goes_on_at_its_shard(tmp_path, encoder, corpus, monkeypatch):
    whole = shards(corpus, encoder, tmp_path / "whole")
    sound, seen = vision.encode, []

    def stops(encoder, images):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(images))
        return sound(encoder, images)

    monkeypatch.setattr(vision, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        shards(corpus, encoder, tmp_path / "again")
    monkeypatch.setattr(vision, "encode", sound)
    made = len(encoder.params["calls"])
    path = shards(corpus, encoder, tmp_path / "again")
    assert len(encoder.params["calls"]) - made == 4  # the two batches of each shard that was not finished
    assert path.name == whole.name
    files = sorted(file.name for file in path.iterdir())
    assert files == sorted(file.name for file in whole.iterdir())  # and nothing half-written beside them
    assert all((path / file).read_bytes() == (whole / file).read_bytes() for file in files)
    shards(corpus, encoder, tmp_path / "again")
    assert len(encoder.params["calls"]) - made == 4


def test_the_next_batch_runs_while_one_is_fetched(tmp_path, encoder, make_items, monkeypatch):
    log, sound = [], vision.encode

    class Running:
        def __init__(self, features):
            self.features = features
            log.append("dispatched")

        def __array__(self, *args, **kwargs):
            log.append("fetched")
            return self.features

    monkeypatch.setattr(vision, "encode", lambda *args: Running(sound(*args)))
    stored = FeatureSource(build("greys", make_items(11), encoder, tmp_path, batch=4), "greys")
    assert log == ["dispatched", "dispatched", "fetched", "dispatched", "fetched", "fetched"]
    assert [stored.key(i) for i in range(11)] == [f"greys/{i}" for i in range(11)]


FOUR_DEVICES = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from test_features import Corpus

from pivotjax.data.features import build_shards
from pivotjax.data.sources.base import Item
from pivotjax.models import vision

means = jax.jit(lambda scale, images: scale * images.reshape(len(images), 4, -1, 3).mean(2))


def encode(encoder, images):
    scale = encoder.params["scale"]
    print(len(images), len(images.sharding.device_set), images.is_fully_replicated, len(scale.sharding.device_set))
    return means(scale, images)


vision.encode = encode
items = tuple(Item(f"greys/{n}", "", f"number {n}", b"", "picture") for n in range(23))
encoder = vision.Encoder("means", None, {"scale": jnp.float32(1 / 255)}, 16, 4, 3, "identity")
grey = lambda item, size: np.full((size, size, 3), int(item.key[6:]), np.uint8)
print(build_shards("greys", Corpus(items, {7: "corrupt image"}), encoder, Path(sys.argv[1]), grey, batch=2, shard=20))
"""


def test_all_devices_of_a_host_share_a_batch(tmp_path):
    """Batches of 2 on each of four; the last ones of a shard are filled up. What is stored is what one would give."""
    here = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": here}
    command = [sys.executable, "-c", FOUR_DEVICES, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    *batches, path = done.stdout.splitlines()
    assert batches == ["8 4 False 4"] * 4
    stored = ShardedFeatures(Path(path), "greys")
    assert len(stored) == 23 and stored.dropped() == {"corrupt image": 1}
    for i in set(range(23)) - {7}:
        assert stored.key(i) == f"greys/{i}"
        np.testing.assert_allclose(stored[i]["features"], i / 255, atol=5e-5)  # float16 below .1


def test_processes_share_the_shards(tmp_path, encoder, corpus, monkeypatch):
    """The second of two begins in the middle; the first makes what that one has left."""
    sound, whole = vision.encode, shards(corpus, encoder, tmp_path / "alone", shard=4)
    made = []

    def stops(encoder, images):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return sound(encoder, images)

    monkeypatch.setattr(features.jax, "process_count", lambda: 2)
    monkeypatch.setattr(features.jax, "process_index", lambda: 1)
    monkeypatch.setattr(vision, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        shards(corpus, encoder, tmp_path / "shared", shard=4)
    path = tmp_path / "shared" / whole.name
    assert sorted(file.name for file in path.glob("*.arrayrecord")) == ["00003.arrayrecord", "00004.arrayrecord"]
    monkeypatch.setattr(features.jax, "process_index", lambda: 0)
    made.extend([1] * 3)
    assert shards(corpus, encoder, tmp_path / "shared", shard=4) == path
    assert len(made) == 3 + 3 + 4  # 6 shards, 2 there
    for file in whole.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()


def test_a_cache_that_the_disk_has_no_room_for(tmp_path, encoder, corpus, monkeypatch, capsys):
    shards(corpus, encoder, tmp_path)
    assert "encode greys: 23 images, 0.00 GB to write in" in capsys.readouterr().err
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 5000))
    shards(corpus, encoder, tmp_path)  # there already
    with pytest.raises(
        InputError, match=r"room for 0\.0 GB; give a larger disk by `cache`, or set data.features to online"
    ):
        shards(corpus, encoder._replace(identity="other"), tmp_path)
