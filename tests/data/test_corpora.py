"""Every corpus format: written by its own library, read back to the byte, in another process, in any order."""

import importlib
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from corpus_files import WRITERS, add, encoded, noise, parquet, pictures, webdataset, write_tar

from pivotjax.cli import run
from pivotjax.data.corpora import FORMATS, Corpus, CorpusConfig, arrayrecord, open_corpus
from pivotjax.data.corpora.opened import Opened
from pivotjax.data.decode import BadSample, decode
from pivotjax.data.parts import split
from pivotjax.errors import InputError


@pytest.fixture(params=list(WRITERS))
def written(request, tmp_path):
    """(config, pictures) of each format."""
    samples = pictures()
    return WRITERS[request.param](tmp_path / "data", samples), samples


def test_every_sample_comes_back_as_it_was_written(written, tmp_path):
    config, samples = written
    corpus = open_corpus(config, tmp_path / "cache")
    order = np.random.default_rng(0).permutation(len(samples))
    assert len(corpus) == len(samples) and corpus.lost == {}
    for index in order:
        item = corpus[index]
        assert (item.image, item.caption, item.kind) == (samples[index].image, samples[index].caption, "picture")
        assert corpus.caption(index) == samples[index].caption
        assert decode(item, 16).shape == (16, 16, 3)
    assert len({corpus[i].key for i in range(len(corpus))}) == len(samples)
    assert corpus[-1] == corpus[len(samples) - 1]
    for outside in (len(samples), -len(samples) - 1):
        with pytest.raises(IndexError):
            corpus[outside]


def test_it_travels_small_and_gives_the_same_elsewhere(written, tmp_path):
    config, samples = written
    corpus = open_corpus(config, tmp_path / "cache")
    items = [corpus[i] for i in range(len(corpus))]
    parcel = pickle.dumps(corpus)
    assert len(parcel) < 5000 and samples[0].image not in parcel  # neither open files nor what was read
    other = pickle.loads(parcel)
    assert [other[i] for i in range(len(other))] == items and other.identity == corpus.identity
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pickle.loads(parcel).__getitem__, list(range(len(items))) * 20)) == items * 20


def test_a_worker_process_reads_the_same(tmp_path):
    corpora = [open_corpus(WRITERS[name](tmp_path / name, pictures()), tmp_path / "cache") for name in sorted(WRITERS)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for corpus in corpora:
            assert pool.apply(corpus.__getitem__, (5,)) == corpus[5]


def test_identity_is_of_the_data_not_of_the_place(written, tmp_path):
    config, samples = written
    here = open_corpus(config, tmp_path / "cache").identity
    assert open_corpus(config, tmp_path / "another").identity == here
    moved = tmp_path / "moved"
    os.rename(tmp_path / "data", moved)
    paths = {name: value.replace(str(tmp_path / "data"), str(moved)) for name, value in
             (("path", config.path), ("images", config.images)) if value}  # fmt: skip
    config = replace(config, **paths)
    assert open_corpus(config, tmp_path / "cache").identity == here
    fewer = WRITERS[config.format](tmp_path / "fewer", samples[:-1])
    assert open_corpus(fewer, tmp_path / "cache").identity != here


def test_identity_is_of_what_the_files_hold(written, tmp_path):
    """As many samples in files of the same names, one caption longer."""
    config, samples = written
    other = [*samples[:5], samples[5]._replace(caption=f"{samples[5].caption}, asleep"), *samples[6:]]
    changed = WRITERS[config.format](tmp_path / "other", other)
    first, second = (open_corpus(one, tmp_path / "cache") for one in (config, changed))
    assert len(first) == len(second) and first.identity != second.identity


@pytest.mark.parametrize("name", ["webdataset", "llava_json"])
def test_an_index_that_another_process_made_meanwhile_stays(tmp_path, monkeypatch, name):
    """It may be mapped there already."""
    module = importlib.import_module(f"pivotjax.data.corpora.{name}")
    config, write, made = WRITERS[name](tmp_path / "data", pictures()), module.write_column, []

    def late(*args) -> None:
        monkeypatch.setattr(module, "write_column", write)
        other = open_corpus(config, tmp_path / "cache")
        made.append((other.table.folder, other.table.folder.stat().st_ino))
        write(*args)

    monkeypatch.setattr(module, "write_column", late)
    corpus = open_corpus(config, tmp_path / "cache")
    assert [(corpus.table.folder, corpus.table.folder.stat().st_ino)] == made
    assert [corpus[i].image for i in range(12)] == [sample.image for sample in pictures()]
    assert list((tmp_path / "cache/corpora").glob(".*")) == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_headers_of_every_kind(tmp_path, form):
    """Long names, folders, links and what is no sample, against Python's tarfile."""
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as archive:
        for number, folder in enumerate(["", "deep/" * 25, "ü/" if form == tarfile.PAX_FORMAT else "u/"]):
            key = f"{folder}{'k' * 60}{number}"
            for name in (f"{key}.seg.png", f"{key}.JPG", f"{key}.png", f"{key}.txt"):
                add(archive, name, name.encode())
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            about = tarfile.TarInfo("link.jpg")
            about.type, about.linkname = kind, "/etc/passwd"
            archive.addfile(about)
        add(archive, "README", b"no extension, no sample")
    corpus = open_corpus(CorpusConfig("webdataset", str(tmp_path / "x.tar")), tmp_path / "cache")
    with tarfile.open(tmp_path / "x.tar") as archive:
        names = [member.name for member in archive if member.name.endswith(".JPG")]
    assert [corpus[i].image.decode() for i in range(len(corpus))] == names and len(names) == 3
    assert [corpus[i].key for i in range(3)] == [f"x/{name.removesuffix('.JPG')}" for name in names]
    assert [corpus.caption(i) for i in range(3)] == [name.replace(".JPG", ".txt") for name in names]


def test_captions_out_of_the_json(tmp_path):
    config = webdataset(tmp_path / "data", pictures(3))
    corpus = open_corpus(replace(config, caption="json.key"), tmp_path / "cache")
    assert [corpus.caption(i) for i in range(3)] == [sample.key for sample in pictures(3)]


@pytest.mark.parametrize("path", ["", "*.tar", "{00000..00002}.tar", "0000{0,1,2}.tar", "list.txt"])
def test_ways_to_name_the_shards(tmp_path, path):
    webdataset(tmp_path / "data", pictures())
    (tmp_path / "data/list.txt").write_text(f"{tmp_path}/data/{{00000..00001}}.tar\n\n{tmp_path}/data/00002.tar\n")
    corpus = open_corpus(CorpusConfig("webdataset", str(tmp_path / "data" / path)), tmp_path / "cache")
    assert [corpus[i].key for i in (0, 4, 11)] == ["00000/000000000", "00001/000000004", "00002/000000011"]


@pytest.mark.parametrize("name", ["webdataset", "arrayrecord", "parquet"])
def test_a_list_of_absolute_and_relative_paths(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    whole = WRITERS[name](tmp_path / "data", pictures())
    first, *others = sorted(path.name for path in (tmp_path / "data").iterdir())
    (tmp_path / "list.txt").write_text("\n".join([f"{tmp_path}/data/{first}", *(f"data/{other}" for other in others)]))
    listed = replace(whole, path="list.txt")
    assert open_corpus(listed, tmp_path / "cache").identity == open_corpus(whole, tmp_path / "cache").identity
    (tmp_path / "list.txt").write_text(f"data/{first}\ngs://bucket/{others[0]}")
    with pytest.raises(InputError, match=r"list\.txt names files of a bucket and of a disk"):
        open_corpus(listed, tmp_path / "cache")


@pytest.mark.parametrize("path", ["gs://bucket/*.tar", "gs://bucket", "gs://bucket/{0..3}.tar", "gs://bucket/x.tar"])
def test_a_bucket_needs_its_client(tmp_path, path, no_gcsfs):
    with pytest.raises(InputError, match=r"gs://bucket.* needs gcsfs: pip install \"pivotjax\[gcs\]\""):
        open_corpus(CorpusConfig("webdataset", path), tmp_path / "cache")


def test_a_bucket(tmp_path, bucket):
    """gs:// through etils and fsspec."""
    samples = pictures()
    webdataset(tmp_path / "data", samples)
    bucket.mkdir("bucket")
    for file in (tmp_path / "data").iterdir():
        bucket.pipe_file(f"bucket/{file.name}", file.read_bytes())
    for path in ("gs://bucket/{00000..00002}.tar", "gs://bucket/*.tar", "gs://bucket"):
        corpus = open_corpus(CorpusConfig("webdataset", path), tmp_path / "cache")
        corpus = pickle.loads(pickle.dumps(corpus))
        assert [(corpus[i].image, corpus.caption(i)) for i in range(12)] == [(s.image, s.caption) for s in samples]
    bucket.rm("bucket/00001.tar")
    with pytest.raises(BadSample, match=r"unreadable shard.*00001\.tar"):
        corpus[5]


def test_an_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    config = webdataset(tmp_path / "data", pictures())
    first = open_corpus(config, tmp_path / "cache")
    opened = []
    from pivotjax.data.corpora import webdataset as module

    real = module.open_stream
    monkeypatch.setattr(module, "open_stream", lambda path: opened.append(path) or real(path))
    assert open_corpus(config, tmp_path / "cache").identity == first.identity and not opened
    other = pictures(5)
    write_tar(tmp_path / "data/00001.tar", other)
    changed = open_corpus(config, tmp_path / "cache")
    assert [os.path.basename(path) for path in opened] == ["00001.tar"]
    assert len(changed) == 4 + 5 + 4 and changed[4].image == other[0].image and changed.identity != first.identity


def test_parquet_of_plain_bytes_and_named_columns(tmp_path):
    config = parquet(tmp_path / "data", pictures(), struct=False)
    corpus = open_corpus(replace(config, image="image", caption="text"), tmp_path / "cache")
    assert corpus[7].image == pictures()[7].image
    with pytest.raises(InputError, match=r"no column words; name one of image \(binary\), text \(string\)"):
        open_corpus(replace(config, caption="words"), tmp_path / "cache")
    with pytest.raises(InputError, match=r"column n of .* is int64; pictures must be binary"):
        open_corpus(replace(config, image="n"), tmp_path / "cache")


def test_row_groups_are_read_once_while_they_are_kept(tmp_path, monkeypatch):
    from pivotjax.data.corpora import parquet as module

    corpus = open_corpus(parquet(tmp_path / "data", pictures()), tmp_path / "cache")
    read, real = [], module._File.column
    monkeypatch.setattr(module._File, "column", lambda self, *what: read.append(what) or real(self, *what))
    for index in np.random.default_rng(0).integers(0, 12, 200):
        corpus[index]
    assert len(read) == 12  # two columns of six row groups


def test_a_part_reads_each_row_group_once(tmp_path, monkeypatch):
    from pivotjax.data.corpora import parquet as module

    corpus = open_corpus(parquet(tmp_path / "data", pictures()), tmp_path / "cache")
    corpus.groups._most = corpus.captions._most = 1
    read, real = [], module._File.column
    monkeypatch.setattr(module._File, "column", lambda self, *what: read.append(what) or real(self, *what))
    train = split("x", corpus, {"train": None, "calibration": 1, "test": 1}, seed=0)["train"]
    assert len({train[i].key for i in range(len(train))}) == 10
    assert len(read) == 12


def test_threads_that_ask_for_one_thing_open_it_once():
    tried, together = [], threading.Barrier(8)

    def load(key):
        tried.append(key)
        time.sleep(0.05)
        if len(tried) == 1:
            raise OSError("away")
        return object()

    def get(_):
        together.wait()
        try:
            return opened.get("x")
        except OSError as error:
            return str(error)

    opened = Opened(load, 2)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(get, range(8))) == ["away"] * 8 and len(tried) == 1
        assert len(set(pool.map(get, range(8)))) == 1 and len(tried) == 2  # an error is not kept
    kept = opened.get("x")
    assert opened.get("y") is not kept and opened.get("x") is kept and opened.get("z") and opened.get("x") is kept
    assert tried == ["x", "x", "y", "z"]


def test_large_row_groups_are_said(tmp_path, capsys, monkeypatch):
    from pivotjax.data.corpora import parquet as module

    monkeypatch.setattr(module, "_LARGE", 1000)
    open_corpus(parquet(tmp_path / "data", pictures()), tmp_path / "cache")
    assert "reading it shuffled is slow; write it as ArrayRecord first" in capsys.readouterr().err


@pytest.mark.parametrize("into", ["arrayrecord", "tfds"])
def test_prepare_makes_a_copy_that_is_the_same(tmp_path, capsys, into):
    """Through the command, from tar; TFDS' own reader finds what it wrote."""
    samples = pictures()
    config = webdataset(tmp_path / "data", [*samples[:6], samples[6]._replace(caption=" "), *samples[7:]])
    args = ["--corpus.format", "webdataset", "--corpus.path", config.path, "--out", str(tmp_path / "out")]
    run("prepare", [*args, "--into", into, "--cache", str(tmp_path / "cache")])
    printed = capsys.readouterr()
    assert "1 of 12 samples left out: 1 empty caption" in printed.err
    folder = printed.out.splitlines()[-1].removeprefix("wrote ")
    source = open_corpus(config, tmp_path / "cache")
    copy = open_corpus(CorpusConfig(into, folder), tmp_path / "cache")
    assert [copy[i] for i in range(11)] == [source[i] for i in range(12) if i != 6]
    if into == "tfds":
        import tensorflow_datasets as tfds

        theirs = tfds.data_source("captioned_images", data_dir=tmp_path / "out", split="train",
                                  decoders={"image": tfds.decode.SkipDecoding()})  # fmt: skip
        assert [row["image"] for row in theirs] == [copy[i].image for i in range(11)]
        assert theirs[3]["caption"] == samples[3].caption.encode()
    with pytest.raises(SystemExit):
        run("prepare", [*args, "--into", into, "--cache", str(tmp_path / "cache")])
    assert "exists already" in capsys.readouterr().err


def test_a_file_of_which_no_sample_can_be_read_is_not_written(tmp_path):
    samples = pictures()
    blank = [sample._replace(caption=" ") for sample in samples[4:8]]
    source = open_corpus(webdataset(tmp_path / "data", [*samples[:4], *blank, *samples[8:]]), tmp_path / "cache")
    assert arrayrecord.write(tmp_path / "out", source, records_per_file=4) == {"empty caption": 4}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["00000.arrayrecord", "00002.arrayrecord"]
    copy = open_corpus(CorpusConfig("arrayrecord", str(tmp_path / "out")), tmp_path / "cache")
    assert copy.lost == {} and [copy[i].image for i in range(8)] == [s.image for s in samples[:4] + samples[8:]]


@dataclass
class Watched:
    """A corpus that notes what is read, and is interrupted at one of its samples."""

    corpus: Corpus
    stop: int
    read: list[int] = field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.corpus, name)

    def __len__(self):
        return len(self.corpus)

    def __getitem__(self, index):
        if index == self.stop:
            raise KeyboardInterrupt
        self.read.append(index)
        return self.corpus[index]


def test_an_interrupted_copy_goes_on_after_its_last_file(tmp_path):
    samples = pictures()
    samples[1] = samples[1]._replace(caption=" ")
    corpus = open_corpus(webdataset(tmp_path / "data", samples), tmp_path / "cache")
    arrayrecord.write(tmp_path / "whole", corpus, records_per_file=4)
    with pytest.raises(KeyboardInterrupt):
        arrayrecord.write(tmp_path / "out", Watched(corpus, 9), records_per_file=4)
    assert not (tmp_path / "out").exists()
    again = Watched(corpus, -1)
    assert arrayrecord.write(tmp_path / "out", again, records_per_file=4) == {"empty caption": 1}
    assert again.read == [8, 9, 10, 11]
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert written == {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert not list(tmp_path.glob("*unfinished*"))


def test_tfds_needs_no_tensorflow(tmp_path):
    open_corpus(WRITERS["tfds"](tmp_path / "data", pictures(2)), tmp_path / "cache")[0]
    assert "tensorflow" not in sys.modules


@pytest.mark.assets
def test_packaged_domains_are_corpora():
    from pivotjax.data.assets import cache_folder

    corpus = open_corpus(CorpusConfig("packaged", "icons"), cache_folder())
    item = pickle.loads(pickle.dumps(corpus))[3]
    assert item == corpus[3] and item.kind == "svg" and decode(item, 32).min() < 128


def test_every_format_is_registered():
    assert set(FORMATS) == {*WRITERS, "packaged"}
    assert all(name == form.name for name, form in FORMATS.items())


def test_chat_json_and_odd_entries(tmp_path):
    """Text before the picture, several turns, numbers as ids: the first that the model says counts."""
    (tmp_path / "a.png").write_bytes(encoded(noise(), "PNG"))
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " first\n"}, {"from": "gpt", "value": "2"}]
    entry = {"id": 7, "image": "a.png", "conversations": turns}
    (tmp_path / "chat.json").write_text(json.dumps([entry, entry]))
    corpus = open_corpus(CorpusConfig("llava_json", str(tmp_path / "chat.json")), tmp_path / "cache")
    assert corpus.caption(0) == corpus[1].caption == "first" and corpus[0].key != corpus[1].key
