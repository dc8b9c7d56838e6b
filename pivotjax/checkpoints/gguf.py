"""Weights, metadata and tokenizer from a GGUF file (llama.cpp's format), through the `gguf` package."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pivotjax.errors import InputError

_CONTROL, _USER_DEFINED = 3, 4  # token types of llama.cpp

# How text is cut before the merges, by GGUF's name of the pre-tokenizer.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


class GGUF(Mapping[str, np.ndarray]):
    """A GGUF file: a lazy mapping from tensor name to float32 array `[d_out, d_in]`, and its header's fields."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._gguf = _package()
        try:
            self._reader = _reader_class(self._gguf)(self.path)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from error
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise InputError(f"{self.path} is not a whole GGUF file ({_first_line(error)}); get it again") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def metadata(self, key: str, default: Any = None) -> Any:
        """The value of a header field; InputError if it is absent and no default is given."""
        field = self._reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default is None:
            raise InputError(f"{self.path}: the GGUF header has no field {key!r}; convert the model again")
        return default

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            return self._gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise InputError(f"{self.path}: cannot read {name}, quantised as {kind}; use another file") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE tokenizer that the header describes."""
        kind, pre = self.metadata("tokenizer.ggml.model"), self.metadata("tokenizer.ggml.pre", "none")
        if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
            known = ", ".join(f"gpt2/{name}" for name in _PRE_TOKENIZERS)
            raise InputError(f"{self.path}: tokenizer {kind}/{pre} is unknown (known: {known}); use a HF folder")
        tokens = self.metadata("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self.metadata("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
        tokenizer.decoder = decoders.ByteLevel()
        types = self.metadata("tokenizer.ggml.token_type")
        special = {_CONTROL: True, _USER_DEFINED: False}
        for token, kind in zip(tokens, types):
            if kind in special:
                added = AddedToken(token, normalized=False, special=special[kind])
                (tokenizer.add_special_tokens if special[kind] else tokenizer.add_tokens)([added])
        return tokenizer


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """A query or key matrix `[heads*head_dim, d_in]`, rows from llama.cpp's order (pairs together) to rotate-half's."""
    rows, d_in = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, d_in).swapaxes(1, 2).reshape(rows, d_in)


def _package():
    try:
        import gguf
    except ImportError as error:
        raise InputError('reading a .gguf file needs the gguf package: pip install "pivotjax[demo]"') from error
    return gguf


def _reader_class(gguf):
    """The package's reader on a plain array: it slices the file 10^5 times for a vocabulary, slowly on a `memmap`."""

    class Reader(gguf.GGUFReader):
        @property
        def data(self):
            return self._plain

        @data.setter
        def data(self, mapped):
            self._plain = mapped.view(np.ndarray)

    return Reader


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
