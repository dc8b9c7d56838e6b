"""Splits: by concept, stable, of the promised shares."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivotjax.data.concepts import normalise
from pivotjax.data.domains import SPLITS, check_names, select, split_of
from pivotjax.data.sources import source
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.training.metrics import Meter, Work


def things(n: int) -> list[Item]:
    return [Item(f"things/{i}", f"thing {i}", f"thing {i}", b"", "svg") for i in range(n)]


@pytest.mark.parametrize(
    ("variants", "concept"),
    [
        (["woman running", "man running: dark skin tone", "person running facing right", "running"], "running"),
        (["account-outline", "account", "Account variant"], "account"),
        (["down arrow", "arrow-down", "Arrow Down"], "arrow down"),
        (["man", "woman: medium-light skin tone", "person", "girl"], "person"),
        (["man’s shoe", "shoe"], "shoe"),
        (["old woman", "older person"], "old"),
        (["couple with heart: woman, man", "couple with heart"], "couple heart"),
        (["family: man, woman, girl, boy", "family"], "family"),
        (["piñata", "Pinata"], "pinata"),
        (["outline"], "outline"),
        (["#"], "#"),
    ],
)
def test_variants_share_a_concept(variants, concept):
    assert {normalise(text) for text in variants} == {concept}


def test_different_things_keep_apart():
    names = [
        "cat",
        "cat face",
        "lighthouse",
        "light bulb",
        "dark mode",
        "1st place medal",
        "2nd place medal",
        "human-queue",
    ]
    assert len({normalise(name) for name in names}) == len(names)


@settings(max_examples=50)
@given(st.text())
def test_normal_form_is_stable(text):
    assert normalise(normalise(text)) == normalise(text)


def test_shares_are_as_promised():
    counts = Counter(split_of(f"thing {i}", seed=0) for i in range(20_000))
    for split, share in SPLITS.items():
        spread = (share * (1 - share) / 20_000) ** 0.5
        assert abs(counts[split] / 20_000 - share) < 4 * spread


def test_split_is_frozen():
    """Caches and published results depend on it: these were drawn once and must not move."""
    words = ("running", "arrow down", "cat", "person", "apple", "house")
    assert [split_of(word, 0) for word in words] == ["train", "train", "train", "train", "test", "train"]


def test_seed_moves_the_split():
    assert any(split_of(f"thing {i}", 0) != split_of(f"thing {i}", 1) for i in range(20))


def test_select_keeps_concepts_apart_and_larger_limits_only_extend():
    items = things(400)
    small = select("things", items, train=50, calibration=10, test=20, seed=3)
    large = select("things", list(reversed(items)), train=None, calibration=None, test=40, seed=3)
    assert [len(small[split]) for split in SPLITS] == [50, 10, 20]
    for split in SPLITS:
        assert large[split][: len(small[split])] == small[split]
        assert all(split_of(item.concept, 3) == split for item in large[split])
    keys = [item.key for split in SPLITS for item in large[split]]
    assert len(keys) == len(set(keys))


def test_a_domain_without_items_is_refused():
    with pytest.raises(InputError, match="domain things has no train items"):
        select("things", [], train=10, calibration=10, test=10, seed=0)
    assert select("things", [], train=0, calibration=0, test=0, seed=0)["train"] == []


def test_a_run_uses_no_name_that_a_domain_may_have():
    """All columns of metrics.jsonl and held_out.jsonl but the domains' own."""
    columns = {*Meter(Work(), None, None, lambda: 0.0).row(), "step", "learning_rate", "bad", "mean"}
    for name in (*columns, "w0", "W0", "", "a/b", "..", ".hidden", "two words"):
        with pytest.raises(InputError, match="cannot name a domain"):
            check_names(["animals", name])
    check_names(["animals", "cluster0", "web-2.0", "été", "joint"])


def test_unknown_domain_names_the_nearest():
    with pytest.raises(InputError, match="did you mean emoji"):
        source("emojis")
    with pytest.raises(InputError, match="known: emoji, icons"):
        source("xyz")
