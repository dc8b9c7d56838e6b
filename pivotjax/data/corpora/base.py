"""What a corpus is, and what every format needs: lists of files, captions as text, tables of strings on disk."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from etils import epath

from pivotjax.data import concepts
from pivotjax.data.corpora import opened
from pivotjax.data.decode import BadSample
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.progress import Bar, say

T = TypeVar("T")

LONGEST_CAPTION = 1 << 16  # bytes
_MOST_FILES = 1_000_000
_THREADS = 8
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class CorpusConfig:
    """Where captioned pictures are."""

    format: str
    """webdataset, arrayrecord, tfds, llava_json, parquet or packaged."""
    path: str
    """File, folder, glob or {a..b} braces (webdataset and llava_json also gs://); packaged: the name of a domain."""
    images: str | None = None
    """Folder of the pictures of a llava_json; by default the folder that the JSON is in."""
    caption: str | None = None
    """Which field has the caption, where it is not the format's usual one."""
    image: str | None = None
    """Which field has the picture (tfds, parquet), where it is not the usual one."""
    split: str = "train"
    """Split of a tfds dataset."""


class Corpus(Protocol):
    """Random access to captioned pictures. Picklable: files are opened where they are read.

    Fields:
        identity: SHA-256 over what it is made of: names and sizes of its files, and its config.
        lost: samples or shards known to be unusable when it was opened, by reason.
    """

    identity: str
    lost: dict[str, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """Sample `index`, its picture as it is stored. BadSample where it cannot be had, IndexError past the end."""

    def caption(self, index: int) -> str:
        """Its caption, without its picture where the format allows that. BadSample as above."""


class Format(NamedTuple):
    """A registration: `open(config, cache)` opens a corpus, with its index (if any) below `cache`."""

    name: str
    open: Callable[[CorpusConfig, Path], Corpus]


def make_item(key: str, caption: str, image: bytes) -> Item:
    """A picture's item; its concept is the caption's."""
    return Item(key, concepts.normalise(caption), caption, image, "picture")


def checked_caption(value: Any, key: str) -> str:
    """Text of a caption (str or UTF-8 bytes) without space around it; BadSample where it is none, or empty."""
    if value is None:
        raise BadSample("empty caption", key)
    if not isinstance(value, str | bytes):
        raise BadSample("broken record", f"{key}: its caption is of type {type(value).__name__}")
    if len(value) > LONGEST_CAPTION:
        raise BadSample("broken record", f"{key}: its caption has {len(value)} bytes")
    data = value.encode("utf-8", "replace") if isinstance(value, str) else value  # lone surrogates go
    text = data.decode("utf-8", "replace").strip()
    if not text:
        raise BadSample("empty caption", key)
    return text


def checked_index(index: int, length: int) -> int:
    """`index` counted from the start; IndexError where there is none."""
    if not -length <= index < length:
        raise IndexError(f"{index} is outside the {length} samples of the corpus")
    return int(index) % length


def find_files(path: str, suffixes: Sequence[str], what: str) -> list[str]:
    """The files that `path` stands for: one file, a .txt list of files (one a line), a folder's files with one of
    `suffixes`, a glob, or {a,b} and {000..999} braces; sorted but for lists and braces. InputError where there are
    none, or some are in a bucket and some on a disk."""
    found = [file for one in _expand(path) for file in _matching(one, suffixes)]
    if not found:
        raise InputError(f"there is no {what} at {path}; give a file, a folder, a glob or {{000..999}}")
    if len({opened.is_remote(file) for file in found}) > 1:
        raise InputError(f"{path} names files of a bucket and of a disk; give them as two corpora, or copy some")
    return found


def _matching(path: str, suffixes: Sequence[str]) -> list[str]:
    if any(letter in path for letter in "*?[") and not opened.is_remote(path):
        return sorted(glob.glob(path))  # of epath only the last part may be a pattern
    try:
        with opened.plain_errors(path):
            return _looked_up(path, suffixes)
    except (OSError, ValueError) as error:  # a list that is no text is a ValueError
        raise InputError(f"cannot look into {path}: {opened.why(error)}; check the path and its permissions") from error


def _looked_up(path: str, suffixes: Sequence[str]) -> list[str]:
    place = epath.Path(path)
    if any(letter in path for letter in "*?["):
        folder, _, pattern = path.rpartition("/")
        return sorted(os.fspath(file) for file in epath.Path(folder).glob(pattern))
    if path.endswith(".txt") and place.is_file():
        return [file for line in place.read_text().splitlines() if line.strip() for file in _expand(line.strip())]
    if place.is_dir():
        return sorted(os.fspath(file) for file in place.iterdir() if file.name.endswith(tuple(suffixes)))
    return [path]


def _expand(path: str) -> Iterator[str]:
    """Braces as a shell expands them: {a,b}, {0..12}, {000..012}."""
    match = _BRACES.search(path)
    if match is None:
        yield path
        return
    for part in _alternatives(match[1]):
        yield from _expand(path[: match.start()] + part + path[match.end() :])


def _alternatives(inside: str) -> Iterable[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if not 0 <= last - first < _MOST_FILES:
        raise InputError(f"{{{inside}}} stands for no files or for too many; count upwards, to at most {_MOST_FILES}")
    width = len(numbers[1])
    return (f"{number:0{width}d}" for number in range(first, last + 1))


def identity(config: CorpusConfig, parts: Iterable[Any]) -> str:
    """SHA-256 over a config, without where on this machine its files are, and what else makes up a corpus."""
    settings = {**asdict(config), "path": "", "images": ""}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in parts:
        digest.update(b"\0" + str(part).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def short_names(files: Sequence[str]) -> list[str]:
    """Files by their paths below the folder that all of them share: the same wherever that folder is."""
    files = [file if opened.is_remote(file) else os.path.abspath(file) for file in files]
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    return [os.path.relpath(file, root) for file in files]


def survey(files: Sequence[str], look: Callable[[str], T], config: CorpusConfig) -> tuple[dict[str, T], dict[str, int]]:
    """What `look` finds in every file, in threads, and how many files it could not read (OSError), by reason.

    Those are said, and left out of the result; InputError where no file can be read.
    """
    found: dict[str, T] = {}
    failed: list[str] = []
    pool = ThreadPoolExecutor(_THREADS)
    try:
        with Bar(len(files), f"open {config.format}", unit="file") as bar:
            for file, looked in zip(files, pool.map(partial(_looked, look), files)):
                if isinstance(looked, OSError):
                    failed.append(f"{file}: {opened.why(looked)}")
                else:
                    found[file] = looked
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    if failed and not found:
        raise InputError(f"no file of {config.path} can be read ({failed[0]}); check the path and the files")
    if failed:
        say(f"{len(failed)} of {len(files)} files of {config.path} cannot be read and are left out; {failed[0]}")
    return found, {"unreadable shard": len(failed)} if failed else {}


def _looked(look: Callable[[str], T], file: str) -> T | OSError:
    try:
        return look(file)
    except OSError as error:
        return error
