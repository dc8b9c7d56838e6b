"""TFDS datasets prepared as ArrayRecord, read by `tfds.data_source` without TensorFlow; pictures stay as stored.

`path` is a prepared dataset's folder (`.../captioned_images/1.0.0`). `pivotjax.data.tfds_builder` prepares one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pivotjax.data.corpora import arrayrecord, base
from pivotjax.data.decode import BadSample
from pivotjax.data.sources.base import Item
from pivotjax.errors import InputError

_IMAGES, _CAPTIONS = ("image",), ("caption", "text")


@dataclass(frozen=True)
class TfdsCorpus:
    """`image` and `caption_field` name features of the dataset in `folder`."""

    folder: str
    split: str
    image: str
    caption_field: str
    identity: str
    lost: dict[str, int]

    @cached_property
    def _source(self) -> Sequence[dict[str, Any]]:
        tfds = _tfds()
        builder = tfds.builder_from_directory(self.folder)
        return builder.as_data_source(self.split, decoders={self.image: tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Item:
        key, record = self._record(index)
        caption, image = base.checked_caption(record[self.caption_field], key), record[self.image]
        if not isinstance(image, bytes):
            raise BadSample("broken record", f"{key}: its picture is {type(image).__name__}")
        return base.make_item(key, caption, image)

    def caption(self, index: int) -> str:
        key, record = self._record(index)
        return base.checked_caption(record[self.caption_field], key)

    def _record(self, index: int) -> tuple[str, dict[str, Any]]:
        """Key (the dataset's own where it has one) and features of an example."""
        index = base.checked_index(index, len(self))
        where = f"{self.split}/{index}"
        try:
            record = self._source[index]
            key = record.get("key")
            return key.decode("utf-8", "replace") if isinstance(key, bytes) else where, record
        except (RuntimeError, OSError) as error:  # the reader's
            raise BadSample("unreadable shard", f"{where}: {error}") from error
        except Exception as error:  # the parser of tf.Example has as many kinds as there are ways to be none
            raise BadSample("broken record", f"{where}: {error}") from error

    def __reduce__(self):
        fields = (self.folder, self.split, self.image, self.caption_field, self.identity, self.lost)
        return TfdsCorpus, fields  # open readers stay behind


def _tfds():
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise InputError('TFDS needs tensorflow-datasets: pip install "pivotjax[tfds]"') from error
    return tensorflow_datasets


def _open(config: base.CorpusConfig, cache: Path) -> TfdsCorpus:
    tfds = _tfds()
    try:
        info = tfds.builder_from_directory(config.path).info
        split = info.splits[config.split]
        parts = [info.full_name, split.num_examples, *(file.examples_in_shard for file in split.file_instructions)]
    except Exception as error:  # tfds raises its own kinds, and whatever the files' parsers do
        why = str(error).replace("\n", " ")[:200]
        advice = "give a prepared dataset's folder (it has dataset_info.json)"
        raise InputError(f"no split {config.split} of a TFDS dataset at {config.path}: {why}; {advice}") from error
    if (info.file_format and info.file_format.value) != "array_record":
        raise InputError(f"{config.path} is not ArrayRecord; prepare it with file_format=array_record")
    image = _chosen(config.image, _IMAGES, info.features, config.path)
    caption = _chosen(config.caption, _CAPTIONS, info.features, config.path)
    found, lost = base.survey([file.filename for file in split.file_instructions], arrayrecord.measure, config)
    identity = base.identity(config, [*parts, *found.values()])
    return TfdsCorpus(config.path, config.split, image, caption, identity, lost)


def _chosen(wanted: str | None, usual: Sequence[str], features: Any, where: str) -> str:
    found = [name for name in ([wanted] if wanted else usual) if name in features]
    if not found:
        raise InputError(f"{where} has no feature {wanted or ' or '.join(usual)}; name one of {', '.join(features)}")
    return found[0]


FORMAT = base.Format("tfds", _open)
