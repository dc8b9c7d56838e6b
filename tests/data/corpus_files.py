"""Captioned pictures, and corpora of them in every format, written by that format's own libraries."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pivotjax.data.corpora import CorpusConfig


class Picture(NamedTuple):
    """A picture's file and what belongs to it."""

    key: str
    caption: str
    image: bytes


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    """A picture's file."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header names another size."""
    data = encoded(Image.new("RGB", (20, 20)), "PNG")
    size = struct.pack(">II", width, height) + data[24:29]
    return data[:16] + size + struct.pack(">I", zlib.crc32(b"IHDR" + size)) + data[33:]


def noise(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pictures(count: int = 12) -> list[Picture]:
    return [Picture(f"{i:09d}", f"a cat, number {i}", encoded(noise(seed=i))) for i in range(count)]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    archive.addfile(about, io.BytesIO(data))


def write_tar(path: Path, samples: Sequence[Picture], form: int = tarfile.GNU_FORMAT) -> Path:
    """A shard as img2dataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for sample in samples:
            add(archive, f"{sample.key}.jpg", sample.image)
            add(archive, f"{sample.key}.json", json.dumps({"caption": sample.caption, "key": sample.key}).encode())
            add(archive, f"{sample.key}.txt", sample.caption.encode())
    return path


def shards(samples: Sequence[Picture], number: int) -> list[Sequence[Picture]]:
    size = -(-len(samples) // number)
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def webdataset(folder: Path, samples: Sequence[Picture]) -> CorpusConfig:
    for number, part in enumerate(shards(samples, 3)):
        write_tar(folder / f"{number:05d}.tar", part)
    return CorpusConfig("webdataset", str(folder))


def arrayrecord(folder: Path, samples: Sequence[Picture]) -> CorpusConfig:
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    for number, part in enumerate(shards(samples, 3)):
        writer = ArrayRecordWriter(str(folder / f"{number}.arrayrecord"), "group_size:1")
        for sample in part:
            writer.write(json.dumps({"key": sample.key, "caption": sample.caption}).encode() + b"\n" + sample.image)
        writer.close()
    return CorpusConfig("arrayrecord", str(folder))


def llava_json(folder: Path, samples: Sequence[Picture]) -> CorpusConfig:
    entries = []
    for number, sample in enumerate(samples):
        name = f"{number // 4:05d}/{sample.key}.jpg"
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(sample.image)
        turns = [("human", "Describe the image concisely.\n<image>"), ("gpt", sample.caption)]
        turns = [{"from": speaker, "value": value} for speaker, value in turns]
        entries.append({"id": sample.key, "image": name, "conversations": turns})
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(entries))
    return CorpusConfig("llava_json", str(folder / "blip_laion_cc_sbu_558k.json"), images=str(folder / "images"))


def parquet(folder: Path, samples: Sequence[Picture], struct: bool = True) -> CorpusConfig:
    import pyarrow as pa
    from pyarrow import parquet as pq

    folder.mkdir()
    for number, part in enumerate(shards(samples, 3)):
        images = [{"bytes": sample.image, "path": None} for sample in part] if struct else [s.image for s in part]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
        columns = {"image": pa.array(images, kind), "text": [sample.caption for sample in part], "n": [0] * len(part)}
        pq.write_table(pa.table(columns), folder / f"train-{number:05d}-of-00003.parquet", row_group_size=3)
    return CorpusConfig("parquet", str(folder))


def tfds(folder: Path, samples: Sequence[Picture]) -> CorpusConfig:
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Cats(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("2.0.0")
            code_path = None

            def _info(self):
                features = {"image": tfds.features.Image(), "text": tfds.features.Text()}
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for number, sample in enumerate(samples):
                    yield number, {"image": sample.image, "text": sample.caption}

    tfds.disable_progress_bar()
    builder = Cats(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return CorpusConfig("tfds", str(builder.data_path))


WRITERS = {writer.__name__: writer for writer in (webdataset, arrayrecord, llava_json, parquet, tfds)}
