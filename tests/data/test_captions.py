"""Token sequences, against a layout written out by hand."""

import pickle

import numpy as np
import pytest

from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.models.vlm import IMAGE_TOKEN


def test_layout(captioner):
    tokens, targets, weights = captioner.encode("a blue circle")
    i = IMAGE_TOKEN
    assert tokens.tolist() == [i, i, i, 2, 3, 4, 5, 6, 1]
    assert targets.tolist() == [4, 5, 6, 1, 1]
    assert weights.tolist() == [1, 1, 1, 1, 0]
    assert (tokens.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
    assert (captioner.length, captioner.first_position) == (9, 4)


@pytest.mark.parametrize("caption", ["cat", "a cat", "a blue blue circle"])
def test_each_target_is_the_token_after_its_logits(captioner, caption):
    tokens, targets, weights = captioner.encode(caption)
    after = tokens[captioner.first_position + 1 :]
    assert len(tokens) == captioner.length
    assert after.tolist() == targets[: len(after)].tolist()
    assert weights.sum() == len(caption.split()) + 1
    assert targets[int(weights.sum()) - 1] == captioner.eos_id


def test_length_limit_counts_the_end(captioner):
    assert captioner.fits("a blue blue circle") and not captioner.fits("a blue blue blue circle")
    with pytest.raises(InputError, match="has 6 tokens"):
        captioner.encode("a blue blue blue circle")
    items = [Item(str(n), "", " ".join(["cat"] * n), b"", "svg") for n in range(1, 8)]
    kept, dropped = captioner.keep_fitting(items)
    assert [item.key for item in kept] == ["1", "2", "3", "4"] and dropped == 3


def test_travels_to_other_processes(captioner):
    copy = pickle.loads(pickle.dumps(captioner))
    assert copy.encode("a cat").tokens.tolist() == captioner.encode("a cat").tokens.tolist()
