"""The stream of batches: its promises about neighbours, epochs, processes, mixing, packing and bad samples."""

import itertools
from collections import Counter

import numpy as np
import pytest
from greys import Greys

from pivotjax.data.decode import BadSample, Decoded, too_many
from pivotjax.data.features import FeatureSource, build
from pivotjax.data.pictures import Pictures
from pivotjax.data.pipeline import COUNTED, Batches, Feed, Share
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.models.vlm import IMAGE_TOKEN

FEW, MANY, SOME = Greys("few", 3), Greys("many", 40), Greys("some", 11)


def take(feed: Feed, count: int, start: int = 0) -> list[dict]:
    with feed.start(start) as batches:
        return list(itertools.islice(batches, count))


def pictured(batch: dict) -> np.ndarray:
    """Which sample each row's pictures show, [K, B, I]."""
    return batch["images"][..., 0, 0, 0].astype(int)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def counted(batches: list[dict]) -> dict[str, int]:
    total = sum(batch["bad"] for batch in batches)
    return {reason: int(count) for reason, count in zip(COUNTED, total, strict=True) if count}


def test_shapes_and_the_match_of_image_and_caption(captioner):
    feed = Feed({"a": [MANY, FEW], "b": [SOME, FEW]}, captioner, batch=4, seed=0)
    (batch,) = take(feed, 1)
    shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
    assert shapes == {
        "images": ((2, 8, 1, 4, 4, 3), np.uint8),
        "tokens": ((2, 8, captioner.length), np.int32),
        "targets": ((2, 8, 5), np.int32),
        "places": ((2, 8, 5), np.int32),
        "weights": ((2, 8, 5), np.float32),
        "ids": ((2, 8, 1), np.int64),
        "bad": ((len(COUNTED),), np.int64),
    }
    assert feed.rows == 8
    assert (batch["places"] == captioner.first_position + np.arange(5)).all()
    for expert, row in np.ndindex(2, 8):
        caption = captioner.encode(f"number {pictured(batch)[expert, row, 0]}")
        assert np.array_equal(batch["tokens"][expert, row], caption.tokens)
        assert np.array_equal(batch["targets"][expert, row], caption.targets)
        assert np.array_equal(batch["weights"][expert, row], caption.weights)


def test_features_from_a_cache(tmp_path, encoder, make_items, captioner):
    """The same samples as with pictures, whichever of the two is fed."""
    stored = FeatureSource(build("some", make_items(11, "some"), encoder, tmp_path), "some")
    (batch,) = take(Feed({"a": [stored]}, captioner, 4, seed=0), 1)
    (online,) = take(Feed({"a": [SOME]}, captioner, 4, seed=0), 1)
    assert batch["features"].shape == (1, 4, 1, 4, 3) and batch["features"].dtype == np.float32
    assert np.array_equal(np.rint(batch["features"][..., 0, 0] * 255), pictured(online))
    assert np.array_equal(batch["tokens"], online["tokens"])


def test_ids_name_the_samples(captioner):
    feed = Feed({"a": [MANY, FEW], "b": [SOME, FEW]}, captioner, 4, seed=0)
    (batch,) = take(feed, 1)
    for expert, domains in (("a", ("many", "few")), ("b", ("some", "few"))):
        place = feed.names.index(expert)
        shown = [f"{domains[row // 4]}/{number}" for row, number in enumerate(pictured(batch)[place, :, 0])]
        assert feed.keys(expert, batch["ids"][place]) == shown


def test_neighbours_change_nothing(captioner):
    """Experts together, in any order, and as the domains of one: always the samples that each gets alone."""
    domains = [SOME, FEW, MANY]
    alone = {domain.name: take(Feed({domain.name: [domain]}, captioner, 4, seed=7), 12) for domain in domains}
    together = take(Feed({domain.name: [domain] for domain in domains}, captioner, 4, seed=7), 12)
    joint = take(Feed({"joint": domains}, captioner, 4, seed=7), 12)
    for step in range(12):
        for place, domain in enumerate(domains):
            for key in ("images", "tokens", "targets", "weights"):
                value = alone[domain.name][step][key]
                assert np.array_equal(together[step][key][place], value[0])
                assert np.array_equal(joint[step][key][0, place * 4 : place * 4 + 4], value[0])


def test_every_epoch_is_a_new_shuffle_of_all(captioner):
    batches = take(Feed({"few": [SOME]}, captioner, 4, seed=1), 22)
    order = np.concatenate([pictured(batch).ravel() for batch in batches]).reshape(8, 11)
    assert all(sorted(epoch) == list(range(11)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 8


def test_a_domain_smaller_than_a_batch(captioner):
    (batch,) = take(Feed({"few": [FEW]}, captioner, 9, seed=1), 1)
    assert Counter(pictured(batch).ravel().tolist()) == {0: 3, 1: 3, 2: 3}


def test_one_sample(captioner):
    (batch,) = take(Feed({"one": [Greys("one", 1)]}, captioner, 4, seed=1), 1)
    assert pictured(batch).tolist() == [[[0]] * 4]


def test_seed_and_name_decide_the_order(captioner):
    def order(domain, seed):
        return np.concatenate(
            [pictured(batch).ravel() for batch in take(Feed({"e": [domain]}, captioner, 10, seed), 4)]
        )

    assert np.array_equal(order(MANY, 0), order(MANY, 0))
    assert not np.array_equal(order(MANY, 0), order(MANY, 1))
    assert not np.array_equal(order(MANY, 0), order(Greys("renamed", 40), 0))


@pytest.mark.parametrize("stop", [0, 1, 5])
@pytest.mark.parametrize("pack", [1, 2])
def test_any_step_is_the_same_wherever_a_run_begins(captioner, stop, pack):
    feed = Feed({"a": [MANY], "b": [Greys("some", 11, bad=frozenset({2}))]}, captioner, 4, seed=5, pack=pack)
    whole = take(feed, 10)
    assert all(same(*pair) for pair in zip(take(feed, 10 - stop, start=stop), whole[stop:], strict=True))


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("pack", [1, 2])
def test_processes_share_each_batch(captioner, count, pack):
    domain = Greys("some", 50, bad=frozenset({2, 7, 40}))
    feed = Feed({"a": [MANY, FEW], "b": [domain, FEW]}, captioner, 12, seed=2, pack=pack)
    share = feed.rows // count
    parts = [take(feed.part(Share(range(2), range(i * share, (i + 1) * share))), 3) for i in range(count)]
    for step, whole in enumerate(take(feed, 3)):
        for key in whole.keys() - {"bad"}:
            assert np.array_equal(np.concatenate([part[step][key] for part in parts], axis=1), whole[key])
        assert np.array_equal(sum(part[step]["bad"] for part in parts), whole["bad"])


def test_processes_share_the_experts(captioner):
    feed = Feed({"a": [MANY], "b": [SOME], "c": [FEW]}, captioner, 4, seed=2)
    parts = [take(feed.part(Share(range(k, k + 1), range(4))), 3) for k in range(3)]
    for step, whole in enumerate(take(feed, 3)):
        assert all(
            np.array_equal(np.concatenate([part[step][key] for part in parts]), whole[key]) for key in ("images", "ids")
        )


def test_weights_mix_the_domains_of_a_joint_projector(captioner):
    domains = [Greys("a", 30), Greys("b", 50)]
    weighted = Feed({"joint": domains}, captioner, 4, seed=0, weights={"a": 3.0, "b": 1.0})
    ids = np.concatenate([batch["ids"].ravel() for batch in take(weighted, 20)])
    assert weighted.rows == 8 and len(ids) == 160
    assert (ids < 30).sum() == 120
    assert sorted(ids[ids < 30][:30]) == list(range(30))  # each domain epoch by epoch
    alone = np.concatenate([batch["ids"].ravel() for batch in take(Feed({"b": domains[1:]}, captioner, 4, seed=0), 10)])
    assert (ids[ids >= 30] - 30).tolist() == alone.tolist()  # the very order that it has without the other
    for weights in ({"a": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0, "c": 1.0}):
        with pytest.raises(InputError, match=r"data\.weights"):
            Feed({"joint": domains}, captioner, 4, seed=0, weights=weights)


def test_packed_rows_hold_the_samples_of_unpacked_ones(captioner):
    """Row r holds samples 2r and 2r + 1 of the batch that is not packed: their pictures, tokens and targets."""
    packed, plain = (take(Feed({"a": [MANY]}, captioner, 8, seed=0, pack=pack), 3) for pack in (2, 1))
    for two, one in zip(packed, plain):
        assert two["images"].shape == (1, 4, 2, 4, 4, 3)
        assert np.array_equal(two["images"].reshape(1, 8, 1, 4, 4, 3), one["images"])
        assert two["ids"].ravel().tolist() == one["ids"].ravel().tolist()
        for row, segment in np.ndindex(4, 2):
            inside = two["segments"][0, row] == segment + 1
            sample = 2 * row + segment
            caption = one["weights"][0, sample].sum().astype(int)
            length = captioner.first_position + caption
            assert two["tokens"][0, row, inside].tolist() == one["tokens"][0, sample, :length].tolist()
            assert two["positions"][0, row, inside].tolist() == list(range(length))
            own = (two["weights"][0, row] == 1) & inside[two["places"][0, row]]
            assert two["targets"][0, row, own].tolist() == one["targets"][0, sample, :caption].tolist()
            start = np.flatnonzero(inside)[0]
            assert two["places"][0, row, own].tolist() == (start + one["places"][0, sample, :caption]).tolist()
        assert (two["tokens"] == IMAGE_TOKEN).sum() == 8 * captioner.num_visual
        assert two["weights"].sum() == one["weights"].sum()


def test_bad_samples_give_way_to_others_and_are_counted(captioner):
    bad = frozenset({1, 5, 6})
    feed = Feed({"a": [Greys("some", 11, bad=bad)]}, captioner, 11, seed=0, bad_limit=1.0)
    healthy = take(Feed({"a": [SOME]}, captioner, 11, seed=0), 4)
    batches = take(feed, 4)
    assert all(same(*pair) for pair in zip(batches, take(feed, 4)))
    for batch, sound in zip(batches, healthy):
        kept = ~np.isin(sound["ids"], list(bad))
        assert np.array_equal(batch["ids"][kept], sound["ids"][kept])
        assert not np.isin(batch["ids"], list(bad)).any()
    assert set(counted(batches)) == {"corrupt image"} and counted(batches)["corrupt image"] >= 12


def test_captions_that_are_too_long_are_dropped_or_cut(captioner):
    from dataclasses import replace

    class Wordy(Greys):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"caption": "a " * (1 + index % 6)}

    wordy = Wordy("wordy", 12)
    dropped = take(Feed({"a": [wordy]}, captioner, 12, seed=0), 2)
    assert all((batch["ids"] % 6 < 4).all() for batch in dropped)
    assert set(counted(dropped)) == {"caption too long"}
    cut = take(Feed({"a": [wordy]}, replace(captioner, long_captions="truncate"), 12, seed=0), 2)
    assert sorted(cut[0]["ids"].ravel()) == list(range(12)) and counted(cut) == {}
    packed = Feed({"a": [wordy]}, replace(captioner, long_captions="truncate"), 12, seed=0, pack=2, row_tokens=15)
    (batch,) = take(packed, 1)
    assert batch["tokens"].shape == (1, 6, 15) and counted([batch]).keys() == {"caption cut to fit its row"}


def test_too_many_bad_samples_end_the_run_with_a_line(captioner):
    bad = Greys("some", 100, bad=frozenset(range(10)))
    with pytest.raises(
        InputError, match=r"of \d+ samples read are bad \(\d+ corrupt image\), over data.bad_limit = 0.05"
    ):
        take(Feed({"a": [bad]}, captioner, 50, seed=0), 20)
    assert len(take(Feed({"a": [bad]}, captioner, 50, seed=0, bad_limit=0.15), 20)) == 20
    with pytest.raises(InputError, match="domain none: 200 samples in a row"):
        take(Feed({"a": [Greys("none", 5, bad=frozenset(range(5)))]}, captioner, 2, seed=0), 1)


def test_chance_stops_no_run(captioner):
    """Eleven of the first 211 samples are bad: over 5 %, but not for certain. Corpora of 4 % bad samples pass at every
    length in 500 processes; where all is bad, 23 samples are enough."""
    spotted = Greys("some", 200, bad=frozenset(range(11)))
    assert len(take(Feed({"a": [spotted]}, captioner, 50, seed=0), 8)) == 8
    draws = np.cumsum(np.random.default_rng(0).random((500, 5000)) < 0.04, axis=1)
    assert not any(too_many(draws[:, n - 1].max(), n, 0.05) for n in range(200, 5001, 16))
    assert too_many(23, 23, 0.05) and not too_many(22, 22, 0.05)


class Counts:
    """Batches of 64 samples of which only the number of bad ones is made up."""

    def __init__(self, bad: list[int]):
        self.bad = iter(bad)

    def __next__(self) -> dict:
        counts = np.zeros(len(COUNTED), np.int64)
        counts[COUNTED.index("unreadable shard")] = next(self.bad)
        return {"ids": np.zeros((1, 64, 1), np.int64), "bad": counts}

    def close(self) -> None:
        self.bad = iter(())


def test_an_outage_late_in_a_run_ends_it():
    """After 64,000 good samples a quarter cannot be read: 5 % of all would be 3,200 of them."""
    batches = Batches(Counts([0] * 1000 + [21] * 200), 0.05)
    with pytest.raises(InputError, match=r"of the last \d+ samples read are bad \(\d+ unreadable shard\)"):
        list(batches)
    assert batches.counts.sum() < 2 * 320
    steady = np.random.default_rng(0).binomial(64, 0.045, 3000)
    assert len(list(Batches(Counts(steady.tolist()), 0.05))) == 3000


def test_no_picture_is_decoded_for_a_caption_that_is_too_long(captioner, capsys):
    """The same batches, and a line where most captions are too long."""

    class Corpus(list):
        def __getitem__(self, index):
            caption = "a " * (1 if index % 4 == 0 else 9) + str(index)
            return Item(f"x/{index}", "", caption, b"", "picture")

        def caption(self, index):
            return self[index].caption

    def decode(item, size):
        decoded.append(item.key)
        return Decoded(np.full((size, size, 3), int(item.key[2:]), np.uint8), False)

    found = []
    for fits in (captioner.fits, None):
        decoded = []
        batches = take(Feed({"a": [Pictures(Corpus(range(99)), "x", 4, decode, fits)]}, captioner, 50, seed=0), 4)
        found.append((batches, len(decoded)))
    (asked, few), (unasked, many) = found
    assert all(same(*pair) for pair in zip(asked, unasked, strict=True))
    assert many > 2 * few
    assert "captions are longer than data.max_caption and left out" in capsys.readouterr().err
    take(Feed({"a": [MANY]}, captioner, 50, seed=0), 12)
    assert capsys.readouterr().err == ""


def test_names_need_no_picture(captioner):
    """A sample is named for the log even where its picture, or all of it, cannot be read any more."""

    class Corpus(list):
        def __getitem__(self, index):
            if index == 2:
                raise BadSample("unreadable shard", "record 2 of x.tar")
            return Item(f"x/{index}", "", "", b"no picture", "picture")

    feed = Feed({"a": [FEW, Pictures(Corpus(range(4)), "x", 8)]}, captioner, 4, seed=0)
    assert feed.keys("a", np.array([[4], [1], [5]])) == ["x/1", "few/1", "unreadable shard: record 2 of x.tar"]


def test_bad_requests(captioner):
    for experts in ({}, {"a": []}, {"a": [FEW], "b": [FEW, MANY]}):
        with pytest.raises(InputError, match="same number of domains"):
            Feed(experts, captioner, 4, seed=0)
    with pytest.raises(InputError, match="cannot be packed in rows of 3"):
        Feed({"a": [FEW]}, captioner, 4, 0, pack=3)
    with pytest.raises(InputError, match="give at least 12"):
        Feed({"a": [FEW]}, captioner, 4, 0, pack=2, row_tokens=11).start(0)
    with pytest.raises(InputError, match="row_tokens is for packed rows"):
        Feed({"a": [FEW]}, captioner, 4, 0, row_tokens=11).start(0)


def test_a_damaged_file_stops_the_stream_with_its_name(tmp_path, encoder, make_items, captioner):
    path = build("many", make_items(40, "many"), encoder, tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="truncated or damaged"):
        take(Feed({"a": [FeatureSource(path, "many")]}, captioner, 4, seed=0), 1)
