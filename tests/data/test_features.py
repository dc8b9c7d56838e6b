"""The feature cache: order, reuse, and files that are damaged or were never finished."""

import pickle
import resource

import numpy as np
import pytest

from pivotjax.data.features import FeatureSource, build
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
