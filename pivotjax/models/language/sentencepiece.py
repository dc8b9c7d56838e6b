"""Llama's `tokenizer.model` (SentencePiece, BPE with byte fallback) as a tokenizer of the `tokenizers` package.

Checkpoints of the LLaVA repository and early Llamas bring no other. The file is a protocol buffer: `ModelProto` of
https://github.com/google/sentencepiece, `src/sentencepiece_model.proto`. Words are marked as Llama's first tokenizers
did: every piece of text between special tokens begins with a space.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from pivotjax.errors import InputError
from pivotjax.files import read_json

FILE = "tokenizer.model"
_SPACE = "▁"
_UNKNOWN, _CONTROL, _OF_USER = 2, 3, 4  # types of a piece; 1: of text
_BPE = 2  # type of a model


class _Piece(NamedTuple):
    text: str
    type: int


def read(path: Path) -> Tokenizer:
    """The tokenizer in a file, which begins texts with `<s>` unless tokenizer_config.json beside it says not to.

    InputError if it is damaged, or of another kind than Llama's.
    """
    try:
        pieces, kind, normalised, prefixed = _parse(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, IndexError, struct.error) as error:
        raise InputError(f"{path} is no SentencePiece model ({error}); get it again") from error
    if kind != _BPE or normalised or not prefixed or _UNKNOWN not in (piece.type for piece in pieces):
        raise InputError(f"{path} is no SentencePiece model of Llama's kind; save the model's fast tokenizer beside it")
    numbers = {piece.text: i for i, piece in enumerate(pieces)}
    unknown = next(piece.text for piece in pieces if piece.type == _UNKNOWN)
    model = BPE(numbers, _merges(numbers), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(p.text, special=True, normalized=False) for p in pieces if p.type in (_UNKNOWN, _CONTROL)]
    )
    tokenizer.add_tokens([AddedToken(p.text, normalized=False) for p in pieces if p.type == _OF_USER])
    around = _around(path.parent / "tokenizer_config.json")
    if around and all(token in numbers for token in around.split() if token != "$A"):
        special = [(token, numbers[token]) for token in around.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return tokenizer


def _around(file: Path) -> str:
    """What stands around a text, as the `tokenizers` package writes it."""
    settings = read_json(file) if file.is_file() else {}
    first = "<s> " if settings.get("add_bos_token", True) else ""
    return f"{first}$A{' </s>' if settings.get('add_eos_token', False) else ''}"


def _merges(numbers: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the earlier piece first: pieces are numbered in the order of their merging."""
    return [
        (piece[:i], piece[i:])
        for piece in numbers
        for i in range(1, len(piece))
        if piece[:i] in numbers and piece[i:] in numbers
    ]


def _parse(data: bytes) -> tuple[list[_Piece], int, bool, bool]:
    """The pieces, the model's type, whether text is changed before it is cut, whether it begins with a space."""
    pieces, kind, normalised, prefixed = [], 1, False, True
    for number, value in _fields(data):
        if number == 1:
            fields = dict(_fields(value))
            pieces.append(_Piece(fields[1].decode(), fields.get(3, 1)))
        elif number == 2:  # trainer_spec
            kind = dict(_fields(value)).get(3, 1)
        elif number == 3:  # normalizer_spec
            fields = dict(_fields(value))
            normalised, prefixed = bool(fields.get(2)), bool(fields.get(3, 1))
    if not pieces:
        raise ValueError("it holds no pieces")
    return pieces, kind, normalised, prefixed


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The numbers and values of a message's fields: integers, floats, or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 5:
            (value,) = struct.unpack_from("<f", data, at)
            at += 4
        elif wire == 1:
            (value,) = struct.unpack_from("<d", data, at)
            at += 8
        elif wire == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
            if len(value) != length:
                raise ValueError("it is cut off")
        else:
            raise ValueError(f"it has a field of kind {wire}")
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
