"""Token sequences, against a layout written out by hand."""

import dataclasses
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, processors

from pivotjax.data.captions import Captioner
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


def llama_like() -> Tokenizer:
    """Words with Llama's manners: `<s>` before a text, a marked space before each word, bytes for what is no word."""
    words = ["<unk>", "<s>", "</s>", "<0x0A>", "▁a", "▁blue", "▁cat"]
    letters = {letter: len(words) + i for i, letter in enumerate("▁abluect")}
    merges = [("▁", "a"), ("b", "l"), ("bl", "u"), ("blu", "e"), ("▁", "blue"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    parts = ["bl", "blu", "blue", "ca", "cat"]
    vocabulary = {w: i for i, w in enumerate(words)} | letters
    vocabulary |= {part: len(vocabulary) + i for i, part in enumerate(parts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def preprocess_plain(tokenizer: Tokenizer, caption: str) -> tuple[list[int], list[int]]:
    """`input_ids` and `labels` of one sample as LLaVA's `preprocess_plain` describes them: the text is the image token,
    the caption and the separator "\\n"; each side of the image token is tokenised by itself, of the begin tokens the
    first alone stays; the labels of all that the image's own text has (begin and image) are -100."""
    sides = [tokenizer.encode(text).ids for text in f"<image>{caption}\n".split("<image>")]
    bos = sides[0][:1]
    ids = [*bos, IMAGE_TOKEN, *sides[1][len(bos) :]]
    masked = len(bos) + 1
    return ids, [-100] * masked + ids[masked:]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("caption", ["a blue cat", "cat"])
def test_the_plain_template_is_llavas(begins, caption):
    tokenizer = llama_like()
    if not begins:  # as Qwen's
        tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    captioner = Captioner(tokenizer, 2, num_visual=3, max_caption=6, template="plain")
    ids, labels = preprocess_plain(tokenizer, caption)
    place = ids.index(IMAGE_TOKEN)
    assert ids[:place] == ([1] if begins else []) and ids[-1] == 3  # the new line, and no end of sequence
    spread = ids[:place] + [IMAGE_TOKEN] * 3 + ids[place + 1 :]
    tokens, targets, weights = captioner.encode(caption)
    count = sum(label != -100 for label in labels)
    assert weights.tolist() == [1] * count + [0] * (6 - count)
    assert targets[:count].tolist() == [label for label in labels if label != -100]
    assert tokens[: len(spread) - 1].tolist() == spread[:-1]
    # Every label is predicted one position before its own.
    assert [captioner.first_position + t + 1 for t in range(count)] == list(range(len(spread) - count, len(spread)))
    assert captioner.identity == "plain"


def test_long_captions_can_be_cut(captioner):
    cutting = dataclasses.replace(captioner, long_captions="truncate")
    assert (
        cutting.fits("a blue blue blue circle") and cutting.keep_fitting([Item("1", "", "a " * 9, b"", "svg")])[1] == 0
    )
    _, targets, weights = cutting.encode("a blue blue blue blue circle")
    assert targets.tolist() == [4, 5, 5, 5, 5] and weights.tolist() == [1] * 5  # the end goes with the rest
    assert cutting.encode("a cat").targets.tolist() == captioner.encode("a cat").targets.tolist()


def test_what_a_model_wrote_ends_where_its_template_ends(captioner):
    plain = dataclasses.replace(captioner, template="plain")
    assert plain.own(" a cat\na cat again") == "a cat" and plain.own("\n a cat ") == "a cat"
    assert captioner.own(" a cat\nby two lines ") == "a cat\nby two lines"
