"""Training batches: every expert's domains, shuffled for ever, the same whatever else is trained beside them."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Float32, Int32

from pivotjax.data.captions import Captioner
from pivotjax.data.features import FeatureSource, Sample
from pivotjax.errors import InputError

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # whole batches read ahead


class Batch(TypedDict):
    """What a training step takes: K experts, B samples each, V visual tokens, sequences of L, captions of T tokens."""

    features: Float32[np.ndarray, "K B V C"]
    tokens: Int32[np.ndarray, "K B L"]
    targets: Int32[np.ndarray, "K B T"]
    weights: Float32[np.ndarray, "K B T"]


def train_dataset(
    experts: Mapping[str, Sequence[FeatureSource]],
    captioner: Captioner,
    per_domain_batch: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """An endless grain dataset of `Batch`; its iterator's `get_state` and `set_state` resume it exactly.

    `experts` maps an expert's name to its domains, the same number for each; its batch is `per_domain_batch` samples of
    every domain, one domain after the other (this process's contiguous share of them). A domain's stream depends on the
    seed and the domain's name alone: K experts together get the very samples that each would get by itself, and a
    smaller domain starts its next, newly shuffled epoch earlier. InputError on experts without domains or with unequal
    numbers of them, and on a batch that the processes cannot share evenly.
    """
    counts = {name: len(domains) for name, domains in experts.items()}
    if not counts or 0 in counts.values() or len(set(counts.values())) > 1:
        raise InputError(f"every expert needs the same number of domains, at least one; got {counts or 'no experts'}")
    if per_domain_batch < 1 or per_domain_batch % process_count:
        raise InputError(f"a batch of {per_domain_batch} a domain cannot be shared by {process_count} processes evenly")
    share = per_domain_batch // process_count
    streams = [[_stream(domain, seed) for domain in domains] for domains in experts.values()]
    batches = _Batches(streams, captioner, per_domain_batch, process_index * share, share)
    return grain.MapDataset.source(batches).to_iter_dataset(_READ)


def _stream(domain: FeatureSource, seed: int) -> grain.MapDataset:
    """The domain's samples for ever, shuffled anew each epoch."""
    digest = hashlib.sha256(f"stream:{seed}:{domain.name}".encode()).digest()
    return grain.MapDataset.source(domain).shuffle(seed=int.from_bytes(digest[:4], "big")).repeat()


@dataclass(frozen=True)
class _Batches:
    """Random access to whole batches by step: batch i of a domain is the i-th run of `stride` samples of its stream."""

    streams: Sequence[Sequence[grain.MapDataset]]
    captioner: Captioner
    stride: int
    offset: int
    share: int

    def __len__(self) -> int:
        return sys.maxsize // self.stride

    def __getitem__(self, step: int) -> Batch:
        first = step * self.stride + self.offset
        rows = [
            [self._row(stream[place]) for stream in domains for place in range(first, first + self.share)]
            for domains in self.streams
        ]
        return {key: np.stack([np.stack([row[key] for row in expert]) for expert in rows]) for key in rows[0][0]}

    def _row(self, sample: Sample) -> dict[str, np.ndarray]:
        return {"features": sample["features"], **self.captioner.encode(sample["caption"])._asdict()}
