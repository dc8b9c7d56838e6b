"""A TFDS dataset of captioned pictures out of any corpus, prepared as ArrayRecord without TensorFlow.

`pivotjax prepare --into tfds`, or in Python `prepare(open_corpus(...), data_dir)`, gives `captioned_images`, which
`tfds.data_source("captioned_images", data_dir=...)` and the corpus format `tfds` read.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pivotjax.data.corpora import Corpus, arrayrecord
from pivotjax.data.decode import BAD_LIMIT
from pivotjax.errors import InputError
from pivotjax.files import output_folder
from pivotjax.progress import Bar

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    raise InputError('TFDS needs tensorflow-datasets: pip install "pivotjax[tfds]"') from error


class CaptionedImages(tfds.core.GeneratorBasedBuilder):
    """`image` (the file as it was), `caption` and `key` of every sample of a corpus that can be read."""

    name = "captioned_images"
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # no folder with checksums of downloads; tfds 4.9 needs importlib_resources to look for one

    def __init__(self, corpus: Corpus | None = None, bad_limit: float = BAD_LIMIT, **settings):
        self._corpus, self._bad_limit, self.bad = corpus, bad_limit, Counter()
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Captioned pictures, prepared by pivotjax.",
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(), "caption": tfds.features.Text(), "key": tfds.features.Text()}
            ),
            disable_shuffling=True,  # the corpus' order stays; training shuffles
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        if self._corpus is None:
            raise InputError("captioned_images is prepared from a corpus: pivotjax.data.tfds_builder.prepare")
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        everything = range(len(self._corpus))
        with Bar(len(everything), "prepare captioned_images", unit="sample") as bar:
            items = arrayrecord.readable(self._corpus, everything, self.bad, bar, self._bad_limit)
            for number, item in enumerate(items):
                yield number, {"image": item.image, "caption": item.caption, "key": item.key}


def prepare(corpus: Corpus, data_dir: Path, bad_limit: float = BAD_LIMIT) -> Path:
    """Prepares `captioned_images` below `data_dir` and returns its folder, for `CorpusConfig("tfds", folder)`.

    Samples that cannot be read are left out, counted and said. InputError where too many samples (a share of
    `bad_limit`) or all cannot be read, where the dataset is there already, or where it cannot be written.
    """
    builder = CaptionedImages(corpus, bad_limit, data_dir=output_folder(Path(data_dir)), file_format="array_record")
    folder = Path(builder.data_path)
    if folder.exists():
        raise InputError(f"{folder} exists already; choose another folder or remove it")
    tfds.disable_progress_bar()  # there is one of ours
    try:
        builder.download_and_prepare()
    except AssertionError:  # there were no examples
        arrayrecord.tell(builder.bad, len(corpus), folder)
        raise
    except (OSError, RuntimeError) as error:  # the record writer's are RuntimeErrors
        raise InputError(f"cannot write {folder}: {str(error).splitlines()[0]}; free some space") from error
    arrayrecord.tell(builder.bad, len(corpus), folder)
    return folder
