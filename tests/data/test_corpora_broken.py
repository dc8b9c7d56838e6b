"""Broken and hostile corpora: what is whole is used, the rest is counted and said, a broken whole is one line."""

import io
import json
import os
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from corpus_files import (
    WRITERS,
    add,
    encoded,
    llava_json,
    noise,
    parquet,
    pictures,
    png_that_says,
    webdataset,
    write_tar,
)
from PIL import Image

from pivotjax.data import tfds_builder
from pivotjax.data.corpora import CorpusConfig, open_corpus
from pivotjax.data.corpora import arrayrecord as records
from pivotjax.data.decode import REASONS, BadSample, decode_noted
from pivotjax.errors import InputError
from pivotjax.jobs import prepare
from pivotjax.jobs.prepare import PrepareConfig


def reasons(corpus) -> list[str]:
    """What reading and decoding each sample ends in."""
    found = []
    for index in range(len(corpus)):
        try:
            found.append("converted" if decode_noted(corpus[index], 16).converted else "whole")
        except BadSample as error:
            assert "\n" not in str(error)
            found.append(error.reason)
    return found


BROKEN = {
    "corrupt image": lambda s: s._replace(image=s.image[: len(s.image) // 2]),
    "empty caption": lambda s: s._replace(caption=" \n"),
    "absurd size": lambda s: s._replace(image=encoded(Image.new("RGB", (1, 1)))),
    "converted": lambda s: s._replace(image=encoded(Image.new("L", (20, 20)))),
    "decompression bomb": lambda s: s._replace(image=png_that_says(40_000, 40_000)),
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_five_percent_of_bad_samples(tmp_path, name):
    """Every reason has its name in every format, and its neighbours are read."""
    samples = pictures(100)
    expected = ["whole"] * 100
    for place, (reason, spoil) in zip((3, 20, 41, 60, 99), BROKEN.items()):
        samples[place], expected[place] = spoil(samples[place]), reason
    assert reasons(open_corpus(WRITERS[name](tmp_path / "data", samples), tmp_path / "cache")) == expected


def test_a_sample_without_picture_or_caption(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.txt", b"no picture")
        add(archive, "b.jpg", encoded(noise()))
        add(archive, "c.jpg", encoded(noise()))
        add(archive, "c.txt", b"x" * 100_000)
        add(archive, "d.jpg", b"")
        add(archive, "d.txt", b"\xff\xfe not utf-8")
    corpus = open_corpus(CorpusConfig("webdataset", str(tmp_path / "x.tar")), tmp_path / "cache")
    assert reasons(corpus) == ["missing image", "empty caption", "broken record", "corrupt image"]
    assert corpus.caption(3) == "\N{REPLACEMENT CHARACTER}" * 2 + " not utf-8"


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_truncated_tar_keeps_its_whole_samples(tmp_path, capsys, share):
    samples = pictures(10)
    whole = write_tar(tmp_path / "whole.tar", samples).read_bytes()
    end = int(share * whole.rindex(samples[-1].caption.encode()))
    (tmp_path / "cut.tar").write_bytes(whole[:end])
    with tarfile.open(tmp_path / "whole.tar") as archive:  # Python's own reader says what lies before the cut
        left = [member.name for member in archive if member.offset_data + member.size <= end]
    complete = [s for s in samples if {f"{s.key}.jpg", f"{s.key}.txt"} <= set(left)]
    corpus = open_corpus(CorpusConfig("webdataset", str(tmp_path / "cut.tar")), tmp_path / "cache")
    assert [corpus[i].image for i in range(len(corpus))] == [sample.image for sample in complete]
    assert 0 < len(corpus) < 10 and corpus.lost == {"unreadable shard": 1}
    assert f"it ends at byte {end}" in capsys.readouterr().err
    again = open_corpus(CorpusConfig("webdataset", str(tmp_path / "cut.tar")), tmp_path / "cache")
    assert again.lost == corpus.lost and "have lost their ends" in capsys.readouterr().err  # out of the index, too


def test_a_tar_without_its_end_mark_is_said(tmp_path, capsys):
    data = write_tar(tmp_path / "x.tar", pictures(2)).read_bytes()
    last = data.rindex(pictures(2)[1].caption.encode())
    (tmp_path / "x.tar").write_bytes(data[: last - last % 512 + 512])
    corpus = open_corpus(CorpusConfig("webdataset", str(tmp_path / "x.tar")), tmp_path / "cache")
    assert len(corpus) == 2 and corpus.lost == {"unreadable shard": 1}
    assert "without an end mark" in capsys.readouterr().err


def header(name: bytes = b"a.jpg", size: bytes = b"00000000010\0", kind: bytes = b"0") -> bytes:
    """A tar header written by hand, its sum right."""
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + size + b"00000000000\0" + b" " * 8 + kind)
    block += b"\0" * (257 - len(block)) + b"ustar\x0000" + b"\0" * 248
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block[:512])


@pytest.mark.parametrize(
    "bad",
    [
        header(size=b"77777777777\0"),
        header(size=b"\x80" + b"\xff" * 11),
        header(size=b"\xff" * 12),
        header(size=b"zzzzzzzzzzz\0"),
        header(size=b"-0000000010\0"),
        header()[:148] + b"0000000\0" + header()[156:],
        header(kind=b"L", size=b"00100000000\0"),
        header(kind=b"x", size=b"00000000010\0") + b"99999999999999 path=a.jpg\n".ljust(512, b"\0"),
        header(kind=b"x", size=b"00000000012\0") + b"0 path=a\n-1".ljust(512, b"\0"),
        header(kind=b"x", size=b"00000000012\0") + b"11 size=-1\n".ljust(512, b"\0"),
        b"\xff" * 512,
        os.urandom(2048),
    ],
    ids=range(12),
)
def test_hostile_headers_end_the_shard_and_nothing_else(tmp_path, bad, capsys):
    whole = write_tar(tmp_path / "x.tar", pictures(3)).read_bytes()
    end = whole.rindex(pictures(3)[2].caption.encode())
    end = end - end % 512 + 512
    (tmp_path / "x.tar").write_bytes(whole[:end] + bad + whole[end:])
    corpus = open_corpus(CorpusConfig("webdataset", str(tmp_path / "x.tar")), tmp_path / "cache")
    assert reasons(corpus) == ["whole"] * 3 and corpus.lost == {"unreadable shard": 1}
    (tmp_path / "y.tar").write_bytes(bad)
    with pytest.raises(InputError, match=r"no file of .*y\.tar can be read"):
        open_corpus(CorpusConfig("webdataset", str(tmp_path / "y.tar")), tmp_path / "cache")


def spoil_file(path: Path, how: str) -> None:
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "empty":
        path.touch()
    elif how == "text":
        path.write_text("404 not found\n" * 1000)


@pytest.mark.parametrize("how", ["folder", "dangling link", "pipe", "empty", "text"])
@pytest.mark.parametrize("name", ["webdataset", "arrayrecord", "parquet", "tfds"])
def test_an_unreadable_shard_is_counted_and_said(tmp_path, capsys, name, how):
    config = WRITERS[name](tmp_path / "data", pictures())
    files = sorted(path for path in Path(config.path).iterdir() if path.suffix != ".json")
    if name == "tfds":  # one file: it is fatal
        spoil_file(files[0], how)
        with pytest.raises(InputError, match="can be read"):
            open_corpus(config, tmp_path / "cache")
        return
    spoil_file(files[1], how)
    corpus = open_corpus(config, tmp_path / "cache")
    assert reasons(corpus) == ["whole"] * 8 and corpus.lost == {"unreadable shard": 1}
    said = capsys.readouterr().err
    assert f"1 of 3 files of {config.path} cannot be read and are left out; {files[1]}: " in said
    for file in (files[0], files[2]):
        spoil_file(file, how)
    with pytest.raises(InputError, match="no file of") as caught:
        open_corpus(config, tmp_path / "cache2")
    assert "\n" not in str(caught.value)


def test_a_shard_that_vanishes_after_it_was_indexed_keeps_its_place(tmp_path, capsys):
    """The other samples keep their numbers; its own are counted one by one."""
    config = webdataset(tmp_path / "data", pictures())
    before = open_corpus(config, tmp_path / "cache")
    (tmp_path / "data/00001.tar").unlink()
    (tmp_path / "data/00001.tar").symlink_to("nowhere")
    corpus = open_corpus(config, tmp_path / "cache")
    assert reasons(corpus) == ["whole"] * 4 + ["unreadable shard"] * 4 + ["whole"] * 4
    assert corpus.identity == before.identity and corpus.lost == {"unreadable shard": 1}
    said = capsys.readouterr().err
    assert f"1 shards of {config.path} cannot be read now, their samples count as bad; " in said
    assert "00001.tar: No such file or directory (4 samples)" in said and "lost their ends" not in said


@pytest.mark.parametrize("name", ["webdataset", "parquet", "arrayrecord"])
def test_an_error_of_the_disk_while_reading(tmp_path, monkeypatch, name):
    """At the lowest level: the system call, or the reader that makes it."""
    from pivotjax.data.corpora import opened, parquet

    corpus = open_corpus(WRITERS[name](tmp_path / "data", pictures()), tmp_path / "cache")
    error = OSError(5, "Input/output error")

    def fail(*args, **kwargs):
        raise error

    if name == "webdataset":
        monkeypatch.setattr(opened.os, "pread", fail)
    elif name == "parquet":
        monkeypatch.setattr(parquet._File, "column", fail)
    else:
        monkeypatch.setattr(records, "ArrayRecordReader", fail)
    assert reasons(corpus) == ["unreadable shard"] * 12


def test_an_error_of_the_disk_while_the_headers_are_read(tmp_path, monkeypatch, capsys):
    from pivotjax.data.corpora import webdataset as module

    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    config, real = webdataset(tmp_path / "data", pictures()), module.open_stream
    monkeypatch.setattr(module, "open_stream", lambda path: Failing() if path.endswith("1.tar") else real(path))
    assert len(open_corpus(config, tmp_path / "cache")) == 8
    assert "00001.tar: Input/output error" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(open_corpus(config, tmp_path / "cache")) == 12  # nothing wrong was remembered


def test_a_full_disk_leaves_no_half_of_an_index(tmp_path, small_disk):
    config = webdataset(tmp_path / "data", pictures(300))
    with small_disk(2000), pytest.raises(InputError, match=r"cannot write .*free some space"):
        open_corpus(config, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(open_corpus(config, tmp_path / "cache")) == 300
    corpus = open_corpus(config, tmp_path / "cache")
    with small_disk(2000), pytest.raises(InputError, match=r"cannot write .*free some space"):
        records.write(tmp_path / "records", corpus)
    assert not (tmp_path / "records").exists()
    with small_disk(2000), pytest.raises(InputError, match=r"cannot write .*free some space"):
        tfds_builder.prepare(corpus, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("write", [records.write, lambda path, corpus: tfds_builder.prepare(corpus, path)])
def test_a_corpus_of_bad_samples_only_is_not_prepared(tmp_path, write):
    config = webdataset(tmp_path / "data", [sample._replace(caption=" ") for sample in pictures(3)])
    with pytest.raises(InputError, match=r"no sample of the corpus can be read \(3 empty caption\)"):
        write(tmp_path / "out", open_corpus(config, tmp_path / "cache"))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("into", ["arrayrecord", "tfds"])
def test_a_copy_of_a_corpus_whose_disk_is_away_is_not_made(tmp_path, capsys, into):
    config = webdataset(tmp_path / "data", pictures(60))
    open_corpus(config, tmp_path / "cache")
    for name in ("00001.tar", "00002.tar"):
        (tmp_path / "data" / name).unlink()
        (tmp_path / "data" / name).symlink_to("nowhere")
    wanted = PrepareConfig(config, tmp_path / "out", into, cache=tmp_path / "cache")
    told = r"over 5% of the samples 0 to 59 cannot be read \(23 unreadable shard\).*raise bad_limit"
    with pytest.raises(InputError, match=told):
        prepare.run(wanted)
    assert not [path for path in tmp_path.glob("out*/**/*") if path.is_file()]
    folder = prepare.run(replace(wanted, bad_limit=1.0))
    assert "40 of 60 samples left out: 40 unreadable shard" in capsys.readouterr().err
    assert len(open_corpus(CorpusConfig(into, str(folder)), tmp_path / "cache")) == 20


def test_a_damaged_parquet_file(tmp_path):
    config = parquet(tmp_path / "data", pictures())
    path = tmp_path / "data/train-00001-of-00003.parquet"
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 3] = os.urandom(len(data) // 3 - 4)
    path.write_bytes(data)
    found = Counter(reasons(open_corpus(config, tmp_path / "cache")))
    assert found["whole"] >= 8 and found["whole"] < 12 and found.total() == 12


def test_parquet_cells_without_a_picture(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet as pq

    cells = [{"bytes": None, "path": "/etc/passwd"}, None, {"bytes": b"", "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, kind), "caption": ["a", "b", None]}), tmp_path / "x.parquet")
    corpus = open_corpus(CorpusConfig("parquet", str(tmp_path / "x.parquet")), tmp_path / "cache")
    assert reasons(corpus) == ["missing image", "missing image", "empty caption"]


@pytest.mark.parametrize(
    "record",
    [b"", b"\n", b"{}\n", b"[]\n", b"7\n", b'"key"\n', b'{"key": 3, "caption": "x"}\n',
     b'{"key": "k", "caption": [1]}\n',
     b'{"key": "k", "caption": "x"', b"[" * 100_000 + b"\n", b"\xff\xfe\n", os.urandom(500)],
    ids=range(12),
)  # fmt: skip
def test_hostile_records(tmp_path, record):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "x.arrayrecord"), "group_size:1")
    writer.write(record)
    writer.close()
    corpus = open_corpus(CorpusConfig("arrayrecord", str(tmp_path / "x.arrayrecord")), tmp_path / "cache")
    assert reasons(corpus) == ["broken record"]


def test_hostile_entries_of_llava_json(tmp_path):
    """Paths and links that leave the folder, and JSON of every wrong type."""
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.jpg").write_bytes(encoded(noise()))
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "fine.jpg").write_bytes(encoded(noise()))
    (folder / "inner.jpg").symlink_to(folder / "fine.jpg")
    os.mkfifo(folder / "pipe.jpg")
    said = [{"from": "gpt", "value": "a cat"}]

    def entry(image, conversations=said):
        return {"id": "x", "image": image, "conversations": conversations}

    wrong = {
        "whole": [entry("fine.jpg"), entry("inner.jpg"), entry("./fine.jpg")],
        "missing image": [
            *(entry(name) for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "no.jpg", "a\0b")),
            *(entry(name) for name in ("pipe.jpg", "", None, ".", "x" * 5000)),
            {"id": 1, "conversations": said},
        ],
        "broken record": [
            *(None, 7, "x", [], entry(7), entry(["fine.jpg"]), entry("fine.jpg", "gpt"), entry("fine.jpg", [])),
            *(entry("fine.jpg", [3]), entry("fine.jpg", [{"from": "human", "value": "x"}])),
            entry("fine.jpg", [{"from": "gpt", "value": {"a": 1}}]),
        ],
        "empty caption": [entry("fine.jpg", [{"from": "gpt", "value": " "}])],
    }
    (tmp_path / "x.json").write_text(json.dumps([one for group in wrong.values() for one in group]))
    config = CorpusConfig("llava_json", str(tmp_path / "x.json"), images=str(folder))
    expected = [reason for reason, group in wrong.items() for _ in group]
    assert reasons(open_corpus(config, tmp_path / "cache")) == expected


def test_lone_surrogates_become_question_marks(tmp_path):
    config = llava_json(tmp_path, pictures(1))
    path = tmp_path / "blip_laion_cc_sbu_558k.json"
    path.write_text(path.read_text().replace("a cat", "a \\ud800 cat"))
    assert open_corpus(config, tmp_path / "cache").caption(0) == "a ? cat, number 0"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CorpusConfig("webdatset", "x"), "unknown corpus format 'webdatset'; did you mean webdataset"),
        (CorpusConfig("webdataset", "{T}"), "no tar shard at"),
        (CorpusConfig("webdataset", "{T}/*.tar"), "no tar shard at"),
        (CorpusConfig("webdataset", "{T}/none.tar"), "no file of .* can be read .*No such file"),
        (CorpusConfig("webdataset", "{T}/{{9..0}}.tar"), "stands for no files or for too many"),
        (CorpusConfig("webdataset", "{T}/{{0..99999999999}}.tar"), "stands for no files or for too many"),
        (CorpusConfig("arrayrecord", "gs://b/x"), "copy or mount the bucket"),
        (CorpusConfig("arrayrecord", "{T}"), "no ArrayRecord file at"),
        (CorpusConfig("parquet", "{T}/x.json"), "not a whole parquet file"),
        (CorpusConfig("llava_json", "{T}/x.json"), "holds no list of conversations"),
        (CorpusConfig("llava_json", "{T}/deep.json"), "is not valid JSON"),
        (CorpusConfig("llava_json", "{T}/list.json"), "has no samples"),
        (CorpusConfig("llava_json", "{T}/none.json"), "cannot read .*No such file"),
        (
            CorpusConfig("llava_json", "{T}/list.json", images="{T}/none"),
            "no folder of pictures at .*unpack images.zip",
        ),
        (CorpusConfig("tfds", "{T}"), "no split train of a TFDS dataset at .*dataset_info.json"),
        (CorpusConfig("packaged", "emojis"), "unknown domain 'emojis'; did you mean emoji"),
    ],
)
def test_a_broken_corpus_is_one_line(tmp_path, config, message):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    folders = {name: getattr(config, name) for name in ("path", "images") if getattr(config, name)}
    folders = {name: value.replace("{T}", str(tmp_path)).replace("{{", "{").replace("}}", "}")
               for name, value in folders.items()}  # fmt: skip
    with pytest.raises(InputError, match=message) as caught:
        open_corpus(replace(config, **folders), tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "parquet"), ("tensorflow_datasets", "tfds")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, name):
    config = WRITERS[name](tmp_path / "data", pictures(2))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"pivotjax\[{name}\]"):
        open_corpus(config, tmp_path / "cache")


def test_all_reasons_have_a_place():
    assert len(set(REASONS)) == len(REASONS) and "unreadable shard" in REASONS
    assert str(BadSample("corrupt image", "k")) == "corrupt image: k"
