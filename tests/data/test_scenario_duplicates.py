"""Near-duplicates: found, tied together, and never on two sides of a split."""

import io
import re
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from drawn import Drawn, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pivotjax.data.scenarios import columns, duplicates, hashing, splits
from pivotjax.data.scenarios.duplicates import DuplicatesConfig, Groups
from pivotjax.data.scenarios.pool import Pool
from pivotjax.data.scenarios.splits import SplitsConfig
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError

HALVES = SplitsConfig(0.5, 0.2, 0.3)


class Listed:
    """A corpus from items."""

    def __init__(self, items):
        self.items = items
        self.identity = hashing_of(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def caption(self, index):
        return self.items[index].caption


def hashing_of(items) -> str:
    return " ".join(f"{hashing.of_text(item.key + item.caption + str(item.image)):x}" for item in items)


def jpeg(pixels: np.ndarray, quality: int = 92, size: int | None = None) -> bytes:
    image, data = Image.fromarray(pixels), io.BytesIO()
    (image.resize((size, size)) if size else image).save(data, "JPEG", quality=quality)
    return data.getvalue()


def grouped(items, folder, config=None):
    """Groups and splits of items."""
    config = config or DuplicatesConfig()
    pool = Pool({"listed": Listed(items)})
    stored = columns.scan(pool, duplicates.columns(config), folder)
    good = columns.reasons(stored) == columns.GOOD
    groups = duplicates.groups(stored, good, config)
    return groups, splits.by_group(groups, stored["keys"].map(), HALVES, seed=3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60), st.integers(0, 9))
def test_groups_are_connected_components(count, pairs, seed):
    pairs = np.array([(a % count, b % count) for a, b in pairs], int).reshape(-1, 2)
    found = Groups(count)
    for part in np.array_split(np.random.default_rng(seed).permutation(pairs), 3):
        found.tie(part[:, 0], part[:, 1])
    names = np.arange(count)  # the slow way: the smaller name spreads until nothing changes
    for _ in range(count):
        for a, b in pairs:
            names[a] = names[b] = min(names[a], names[b])
    assert np.array_equal(found.all(), names)


def jaccard(a: str, b: str) -> float:
    def shingles(text):
        words = re.findall(r"\w+", text.lower())
        return set(words) | set(pairwise(words))

    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other)


def test_signatures_estimate_the_jaccard_index():
    drawn = Drawn("all", 400)
    captions = [" ".join(drawn.caption(i).split()[:-1]) for i in range(400)]
    signatures = duplicates.signatures(captions)
    pairs = np.random.default_rng(0).integers(0, 400, (3000, 2))
    exact = np.array([jaccard(captions[a], captions[b]) for a, b in pairs])
    estimated = np.mean(signatures[pairs[:, 0]] == signatures[pairs[:, 1]], axis=1)
    # 64 hashes: a standard error of at most 1/16, and no bias
    assert np.abs(estimated - exact).max() < 0.26 and abs(np.mean(estimated - exact)) < 0.005


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A dog, running on the beach!", "a dog running on the beach"),
        ("ＡＢＣ café", "abc CAFÉ"),
        ("¡¡¡", "¡¡¡ "),
        ("海辺の犬", "海辺の犬。"),
    ],
)
def test_captions_that_differ_in_case_and_punctuation_are_the_same(one, other):
    one, other, third = duplicates.signatures([one, other, "something else"])
    assert np.array_equal(one, other) and not np.array_equal(one, third)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 6), st.integers(0, 10**6))
def test_every_pair_of_hashes_within_the_radius_is_tied(radius, seed):
    """Against all pairs by brute force: random hashes, each with copies that differ in 0 to radius + 2 bits."""
    random = np.random.default_rng(seed)
    bits = np.repeat((random.random((12, 128)) < np.linspace(0.05, 0.6, 12)[:, None]).astype(np.uint8), 8, axis=0)
    for row in bits:
        row[random.choice(128, random.integers(0, radius + 3), replace=False)] ^= 1
    hashes = np.packbits(bits, axis=1).view("<u8")
    found, slow = Groups(len(hashes)), Groups(len(hashes))
    duplicates._tie_images(found, hashes, np.ones(len(hashes), bool), radius)
    apart, few = np.sum(bits[:, None] != bits[None], axis=2), bits.sum(axis=1)
    slow.tie(*np.nonzero((apart <= radius) & (apart <= np.minimum(few[:, None], few[None]) / 10)))
    assert np.array_equal(found.all(), slow.all())


def test_planted_duplicates_stay_on_one_side(tmp_path):
    """Sixty images and captions nobody repeats; copies of each with the other half replaced."""
    drawn, items = Drawn("all", 180), []
    for i in range(60):
        item = drawn[i]
        words = item.caption.split()
        pixels = picture(drawn.of(i), i, 160)
        items += [
            Item(f"a{i}", "", item.caption, jpeg(pixels), "picture"),
            Item(f"caption{i}", "", item.caption.upper() + " !", drawn[i + 60].image, "picture"),
            Item(f"words{i}", "", " ".join(["the", *words]), drawn[i + 120].image, "picture"),
            Item(f"small{i}", "", f"unheard of {i} {i * 7}", jpeg(pixels, 60, 90), "picture"),
        ]
    order = np.random.default_rng(1).permutation(len(items))
    groups, split = grouped([items[i] for i in order], tmp_path, DuplicatesConfig(similarity=0.7))
    place = {items[i].key: n for n, i in enumerate(order)}
    for i in range(60):
        for kind in ("caption", "words", "small"):
            assert groups[place[f"a{i}"]] == groups[place[f"{kind}{i}"]], (kind, i)
            assert split[place[f"a{i}"]] == split[place[f"{kind}{i}"]]
    assert len(np.unique(groups)) == 60  # and nothing else is tied
    assert np.all(np.bincount(split, minlength=3) > 0)


def test_what_is_not_asked_for_ties_nothing(tmp_path):
    pixels = picture("food", 5, 96)
    items = [
        Item("1", "", "a bowl of soup", jpeg(pixels), "picture"),
        Item("2", "", "A bowl of soup.", jpeg(picture("food", 6)), "picture"),
        Item("3", "", "the big bowl of soup with bread", jpeg(pixels, 70), "picture"),
        Item("4", "", "the big bowl of soup with bread and", jpeg(picture("food", 7)), "picture"),
    ]

    def sizes(**options):
        return np.bincount(grouped(items, tmp_path, DuplicatesConfig(**options))[0], minlength=4).tolist()

    assert sizes() == [4, 0, 0, 0]
    assert sizes(captions="off") == [2, 1, 0, 1]
    assert sizes(images="off") == [2, 0, 2, 0]
    assert sizes(images="off", captions="same") == [2, 0, 1, 1]
    assert sizes(images="off", captions="off") == [1, 1, 1, 1]
    assert sizes(images="off", captions="same", common=1) == [1, 1, 1, 1]


def test_the_split_depends_on_names_alone():
    """Shuffled samples, and others beside them: every group goes where it went."""
    random = np.random.default_rng(0)
    keys = hashing.mixed(np.arange(500, dtype=np.uint64))
    groups = np.minimum(random.integers(0, 200, 500), np.arange(500))
    groups = np.array([np.flatnonzero(groups == g)[0] for g in groups])  # named by its smallest index
    before = dict(zip(keys.tolist(), splits.by_group(groups, keys, HALVES, 1)))
    order = random.permutation(500)
    names = groups[order]
    renamed = np.array([np.flatnonzero(names == g)[0] for g in names])
    extra = np.arange(500, 520)
    more = np.concatenate([keys[order], hashing.mixed(extra.astype(np.uint64))])
    after = splits.by_group(np.concatenate([renamed, extra]), more, HALVES, 1)
    assert dict(zip(keys[order].tolist(), after)) == before
    other = dict(zip(keys.tolist(), splits.by_group(groups, keys, HALVES, 2)))
    assert other != before


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=61, max_size=61), st.integers(0, 99))
def test_a_group_is_in_one_split(parents, seed):
    found = Groups(61)
    found.tie(np.arange(61), np.array(parents))
    groups = found.all()
    split = splits.by_group(groups, hashing.mixed(np.arange(61, dtype=np.uint64)), HALVES, seed)
    sides = defaultdict(set)
    for group, side in zip(groups, split):
        sides[group].add(side)
    assert all(len(found) == 1 for found in sides.values())


def test_shares_of_the_splits():
    keys = hashing.mixed(np.arange(40_000, dtype=np.uint64))
    split = splits.by_group(np.arange(40_000), keys, SplitsConfig(0.75, 0.1, 0.15), 0)
    np.testing.assert_allclose(np.bincount(split) / 40_000, [0.75, 0.1, 0.15], atol=0.01)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SplitsConfig(0.5, 0.5, 0.5), "must sum to 1, not 1.5"),
        (lambda: DuplicatesConfig(similarity=1.2), "similarity must be at most 1"),
        (lambda: DuplicatesConfig(radius=40), "radius at most 15"),
    ],
)
def test_settings_without_sense(make, said):
    with pytest.raises(InputError, match=said):
        make()
