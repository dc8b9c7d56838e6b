"""Parts of a corpus: drawn by a seed, read in the corpus' own order."""

import grain
import pytest

from pivotjax.data.parts import Part, limited, split
from pivotjax.errors import InputError


class Corpus(list):
    identity = "identity"

    def caption(self, index):
        return f"caption {self[index]}"


@pytest.mark.parametrize("places", [range(0), range(5), range(3, 40), range(40, 97), range(90, 97), range(97)])
def test_the_shuffle_decides_what_is_in_a_part_and_not_its_order(places):
    corpus = Corpus(range(97))
    order = grain.MapDataset.range(97).shuffle(seed=5)
    part = Part(corpus, 5, places)
    assert [part[i] for i in range(len(part))] == sorted(order[place] for place in places)
    assert [part.caption(i) for i in range(len(part))] == [f"caption {part[i]}" for i in range(len(part))]
    for outside in (len(places), -len(places) - 1):
        with pytest.raises(IndexError):
            part[outside]


def test_splits_share_a_corpus_out():
    corpus, limits = Corpus(range(97)), {"train": None, "calibration": 7, "test": 11}
    splits = split("x", corpus, limits, seed=1)
    held = {name: {part[i] for i in range(len(part))} for name, part in splits.items()}
    assert {name: len(samples) for name, samples in held.items()} == {"train": 79, "calibration": 7, "test": 11}
    assert set().union(*held.values()) == set(range(97))
    fewer = split("x", corpus, limits | {"train": 20}, seed=1)
    assert {fewer["train"][i] for i in range(20)} < held["train"]
    assert fewer["test"].identity == splits["test"].identity and fewer["train"].identity != splits["train"].identity
    assert limited(corpus, 97, 0) is limited(corpus, None, 0) is corpus and len(limited(corpus, 96, 0)) == 96
    with pytest.raises(InputError, match="lower those"):
        split("x", corpus, limits | {"test": 90}, seed=1)
