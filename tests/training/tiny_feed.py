"""Batches for the tiny backbone, addressed by step: what `pivotjax.data.pipeline.Feed` is to the loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from tiny_backbone import Tiny

from pivotjax.data.pipeline import COUNTED, Share


@dataclass(frozen=True)
class TinyFeed:
    """`experts` x `rows` random samples a step; `change(step, batch)` may spoil one, or stop the run by raising."""

    tiny: Tiny
    experts: int = 2
    rows: int = 4
    change: Callable[[int, dict], None] = lambda step, batch: None
    share: Share | None = None
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"e{k}" for k in range(self.experts))

    def part(self, share: Share) -> "TinyFeed":
        return replace(self, share=share)

    def start(self, step: int) -> Iterator[dict]:
        share = self.share or Share(range(self.experts), range(self.rows))
        while True:
            batch = self.tiny.batch(self.seed + step, self.experts, self.rows)
            first = np.arange(self.experts * self.rows).reshape(self.experts, self.rows, 1)
            batch["ids"] = step * first.size + first
            batch = {
                key: a[share.experts.start : share.experts.stop, share.rows.start : share.rows.stop]
                for key, a in batch.items()
            }
            batch["bad"] = np.zeros(len(COUNTED), np.int64)
            self.change(step, batch)
            yield batch
            step += 1

    def keys(self, expert: str, ids: np.ndarray) -> list[str]:
        return [f"{expert}-{id_}" for id_ in np.ravel(ids)]
