"""The domains of `pivotjax.data.sources`: small pictures out of the package registry."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pivotjax.data import assets
from pivotjax.data.corpora import base
from pivotjax.data.sources import Item, source


@dataclass(frozen=True)
class PackagedCorpus:
    """A domain's items, read from the cache once in each process."""

    domain: str
    cache: Path
    identity: str
    lost: dict[str, int]

    @cached_property
    def _items(self) -> list[Item]:
        wanted = source(self.domain)
        return wanted.items(assets.fetch(wanted.assets, self.cache))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[base.checked_index(index, len(self))]

    def caption(self, index: int) -> str:
        return self[index].caption

    def __reduce__(self):
        return PackagedCorpus, (self.domain, self.cache, self.identity, self.lost)


def _open(config: base.CorpusConfig, cache: Path) -> PackagedCorpus:
    wheels = [assets.asset(name).sha256 for name in source(config.path).assets]
    return PackagedCorpus(config.path, cache, base.identity(config, [config.path, *wheels]), {})


FORMAT = base.Format("packaged", _open)
