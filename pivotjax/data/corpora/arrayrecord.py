"""ArrayRecord files of captioned pictures: a layout of our own, for fast random access on local or mounted disks.

A record is a line of JSON, `{"key": ..., "caption": ...}`, and after its newline the picture's file as it was. Files
are written with groups of one record, so that one sample is one read.
"""

import contextlib
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from pivotjax.data.corpora import base
from pivotjax.data.corpora.opened import LocalFile, Opened, is_remote
from pivotjax.data.decode import BAD_LIMIT, BadSample, listed, too_many
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError
from pivotjax.files import atomic_path, output_folder, read_json, write_json
from pivotjax.progress import Bar, say

_SUFFIXES = (".arrayrecord", ".array_record")
_MARK = ".json"
_WRITER = "group_size:1,uncompressed"  # pictures do not compress
_READER = "readahead_buffer_size:0,max_parallelism:0"  # random access
_MOST_OPEN = 64
_LONGEST_LINE = 1 << 18  # bytes
_END = 1 << 17  # bytes of a file that tell where its records are


@dataclass(frozen=True)
class ArrayRecordCorpus:
    """`ends`: how many records there are up to the end of each of `files`."""

    files: tuple[str, ...]
    ends: tuple[int, ...]
    identity: str
    lost: dict[str, int]
    readers: Opened[ArrayRecordReader]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Item:
        key, caption, image = self._record(index)
        return base.make_item(key, caption, image)

    def caption(self, index: int) -> str:
        return self._record(index)[1]

    def _record(self, index: int) -> tuple[str, str, bytes]:
        index = base.checked_index(index, len(self))
        number = bisect_right(self.ends, index)
        place = index - (self.ends[number - 1] if number else 0)
        where = f"record {place} of {self.files[number]}"
        try:
            record = self.readers.get(self.files[number]).read([place])[0]
        except (RuntimeError, IndexError, OSError) as error:
            raise BadSample("unreadable shard", where) from error
        return unpack(record, where)


def pack(item: Item) -> bytes:
    """A record of the layout above."""
    return json.dumps({"key": item.key, "caption": item.caption}).encode() + b"\n" + item.image


def unpack(record: bytes, where: str) -> tuple[str, str, bytes]:
    """Key, caption and picture of a record; BadSample where it has another layout."""
    end = record.find(b"\n", 0, _LONGEST_LINE)
    try:
        about = json.loads(record[: max(end, 0)])
        key = about["key"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadSample("broken record", where) from error
    if not isinstance(key, str):
        raise BadSample("broken record", f"{where}: its key is of type {type(key).__name__}")
    return key, base.checked_caption(about.get("caption"), key), record[end + 1 :]


def write(
    path: Path, corpus: base.Corpus, records_per_file: int = 10_000, bad_limit: float = BAD_LIMIT
) -> dict[str, int]:
    """Writes a corpus of any format as the folder `path` of ArrayRecord files, for fast shuffled reading.

    Returns how many samples were left out, by reason. The folder appears when it is complete; until then its finished
    files are in a folder beside it, `path` with `.unfinished-` and the corpus behind it, and the same call goes on from
    them. `bad_limit`: share of a file's samples that may be bad. InputError where there are more, where no sample can
    be read, or where `path` is there already or cannot be written.
    """
    if path.exists():
        raise InputError(f"{path} exists already; give another name, or remove it")
    work = output_folder(path.with_name(f"{path.name}.unfinished-{corpus.identity[:16]}-{records_per_file}"))
    left_out: Counter[str] = Counter()
    with Bar(len(corpus), f"write {path.name}", unit="sample") as bar:
        for first in range(0, len(corpus), records_per_file):
            numbers = range(first, min(first + records_per_file, len(corpus)))
            file = work / f"{first // records_per_file:05d}{_SUFFIXES[0]}"
            mark = file.with_suffix(_MARK)  # what was left out of it; there when the file is finished
            if mark.exists():
                bar.update(len(numbers))
            else:
                write_json(mark, _write_numbers(file, corpus, numbers, bad_limit, bar))
            left_out.update(read_json(mark))
    if left_out.total() == len(corpus):
        shutil.rmtree(work)  # the same call is to look again
    tell(left_out, len(corpus), path)
    for mark in work.glob(f"*{_MARK}"):
        mark.unlink()
    work.rename(path)
    return dict(left_out)


def _write_numbers(file: Path, corpus: base.Corpus, numbers: range, bad_limit: float, bar: Bar) -> Counter[str]:
    """The file of the samples of these numbers, unless none of them can be read; returns how many cannot."""
    bad: Counter[str] = Counter()
    with atomic_path(file) as temporary:
        records = write_file(temporary, readable(corpus, numbers, bad, bar, bad_limit))
    if not records:
        file.unlink()  # without records it reads as a damaged one
    return bad


def readable(corpus: base.Corpus, numbers: range, bad: Counter[str], bar: Bar, bad_limit: float) -> Iterator[Item]:
    """The samples of these numbers that can be read; the others are counted in `bad`.

    InputError as soon as a share of more than `bad_limit` of them is bad, or at a drawing.
    """
    for number in numbers:
        try:
            item = corpus[number]
        except BadSample as error:
            bad[error.reason] += 1
            if too_many(bad.total(), len(numbers), bad_limit):
                raise InputError(
                    f"over {bad_limit:.0%} of the samples {numbers[0]} to {numbers[-1]} cannot be read "
                    f"({listed(bad.most_common())}); mend the data and start again, or raise bad_limit"
                ) from error
        else:
            if item.kind not in ("picture", "png"):
                raise InputError(f"{item.key} is a drawing ({item.kind}); use its corpus as it is")
            yield item
        bar.update()


def tell(bad: Counter[str], samples: int, path: Path) -> None:
    """Says what was left out of `path`; InputError where that was everything."""
    reasons = listed(bad.most_common())
    if bad.total() == samples:
        raise InputError(f"no sample of the corpus can be read ({reasons}); check its path and format")
    if bad:
        say(f"{path}: {bad.total()} of {samples} samples left out: {reasons}")


def write_file(path: Path, items: Iterator[Item]) -> int:
    """One ArrayRecord file; returns how many records it has. OSError where it cannot be written."""
    records = 0
    with plain_errors():
        writer = ArrayRecordWriter(str(path), _WRITER)
    for item in items:
        with plain_errors():
            writer.write(pack(item))
        records += 1
    with plain_errors():
        writer.close()
    return records


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """The writer of records wraps the operating system's errors (a full disk) in RuntimeError: unwraps them."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).split(";")[0]) from error


def _reader(path: str) -> ArrayRecordReader:
    try:
        return ArrayRecordReader(path, _READER)
    except RuntimeError as error:
        raise OSError(str(error).split(";")[0]) from error


def measure(path: str) -> tuple[int, int, str]:
    """Records and bytes of a file, and the SHA-256 of its end; OSError where it cannot be read.

    Files are filled up to whole blocks of 64 KiB; where each record begins is told at the end.
    """
    if not os.path.isfile(path):  # the reader would wait for ever on a pipe
        raise OSError("no such file")
    records = _reader(path).num_records()
    if not records:  # a file that lost its end has no index and reads as empty
        raise OSError("it has no records: it is empty, or its end is missing")
    size = os.path.getsize(path)
    return records, size, hashlib.sha256(LocalFile(path).read(max(size - _END, 0), _END)).hexdigest()


def _open(config: base.CorpusConfig, cache: Path) -> ArrayRecordCorpus:
    if is_remote(config.path):
        raise InputError(f"ArrayRecord files are not read from {config.path}; copy or mount the bucket (gcsfuse)")
    files = base.find_files(config.path, _SUFFIXES, "ArrayRecord file")
    found, lost = base.survey(files, measure, config)
    identity = base.identity(config, zip(base.short_names(list(found)), found.values()))
    ends = tuple(accumulate(records for records, *_ in found.values()))
    return ArrayRecordCorpus(tuple(found), ends, identity, lost, Opened(_reader, _MOST_OPEN))


FORMAT = base.Format("arrayrecord", _open)
