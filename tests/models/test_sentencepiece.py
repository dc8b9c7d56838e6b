"""Llama's tokenizer.model against transformers' tokenizer of the same pieces."""

import itertools
import json

import pytest
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import sentencepiece_model_pb2_new as proto

from pivotjax.errors import InputError
from pivotjax.models.language import read_tokenizer
from pivotjax.models.language.sentencepiece import _merges

TEXT = "the cat sat on the mat and the hat, that is all; ASSISTANT: USER: what is in the image? 12 34 a  b"


def learned(count=120):
    """Pieces as BPE finds them: the most frequent pair of neighbours again and again."""
    words, pieces = [list("▁" + word) for word in TEXT.split()], []
    for _ in range(count):
        pairs = [pair for word in words for pair in itertools.pairwise(word)]
        if not pairs:
            break
        best = max(dict.fromkeys(pairs), key=pairs.count)
        pieces.append("".join(best))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [pieces[-1]]
                i += 1
    return list(dict.fromkeys(pieces))


def model(kind=2, prefix=True, charsmap=b""):
    made = proto.ModelProto()
    made.trainer_spec.model_type = kind
    made.normalizer_spec.add_dummy_prefix = prefix
    if charsmap:
        made.normalizer_spec.precompiled_charsmap = charsmap
    letters = sorted({letter for letter in TEXT.replace(" ", "▁")})
    normal = [piece for piece in learned() if piece not in letters]
    all_of = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256)),
              *((piece, 1) for piece in normal + letters)]  # fmt: skip
    for i, (text, of) in enumerate(all_of):
        piece = made.pieces.add()
        piece.piece, piece.score, piece.type = text, float(-max(i - 258, 0)), of
    return made


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model().SerializeToString())
    return tmp_path


def theirs():
    vocab = {piece.piece: i for i, piece in enumerate(model().pieces)}
    return LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, None), legacy=True)


@pytest.mark.parametrize(
    "text",
    ["the cat sat", "the  mat", "", "naïve 日本 🍎", "what is in the image?\nASSISTANT:", "a</s>the hat",
     "<s>all", "\n\n", TEXT],
)  # fmt: skip
def test_ids_and_text_are_those_of_transformers(folder, text):
    ours, reference = read_tokenizer(folder), theirs()
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == reference.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert ours.encode(text).ids == [1, *ids]


def test_a_space_comes_before_one_that_is_there(folder):
    """As SentencePiece has it (`add_dummy_prefix`)."""
    assert read_tokenizer(folder).encode(" that").tokens == ["<s>", "▁", "▁that"]


def test_merges_are_those_of_transformers():
    vocab = {piece.piece: i for i, piece in enumerate(model().pieces)}
    assert _merges(vocab) == generate_merges(vocab, None) and len(_merges(vocab)) > 50


def test_pieces_between_special_tokens_begin_with_a_space(folder):
    """As LLaVA's code does, which cuts a prompt at `<image>` and tokenises each piece."""
    tokenizer = read_tokenizer(folder)
    tokenizer.add_special_tokens(["<image>"])
    before, after = ("USER: ", "\nwhat is in the image?")
    first, second = (tokenizer.encode(text, add_special_tokens=False).ids for text in (before, after))
    assert tokenizer.encode(f"{before}<image>{after}").ids == [1, *first, tokenizer.token_to_id("<image>"), *second]


def test_beginning_and_end_as_tokenizer_config_says(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "add_eos_token": True}))
    tokenizer = read_tokenizer(folder)
    plain = tokenizer.encode("the cat", add_special_tokens=False).ids
    assert tokenizer.encode("the cat").ids == [*plain, 2]


@pytest.mark.parametrize(
    "data, words",
    [
        (model().SerializeToString()[:-3], "no SentencePiece model"),
        (b"", "no pieces"),
        (b"\xff" * 40, "no SentencePiece model"),
        (b"not a model at all", "no SentencePiece model"),
        (model(kind=1).SerializeToString(), "Llama's kind"),
        (model(prefix=False).SerializeToString(), "Llama's kind"),
        (model(charsmap=b"abc").SerializeToString(), "Llama's kind"),
    ],
)
def test_other_files_are_one_clear_line(tmp_path, data, words):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(InputError, match=words) as error:
        read_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and "tokenizer.model" in str(error.value)
