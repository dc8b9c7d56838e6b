"""Each expert's loss on captions that it is not trained on, inside the training loop."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from pivotjax.data.pipeline import HOST_KEYS, Batch, Feed
from pivotjax.training import hosts
from pivotjax.training.parallel import Layout


class HeldOut:
    """Caption loss on the first `count` batches of `feed`, the same each time.

    `evaluate` is what `pivotjax.training.step.make_evaluation` gives.
    """

    def __init__(self, evaluate: Callable, feed: Feed, layout: Layout, count: int):
        self._evaluate, self._layout = layout.compile_evaluation(evaluate), layout
        self._feed, self._count = feed, count
        self._batches: list[Batch] = []

    def __call__(self, params: Any, frozen: Any) -> Float[np.ndarray, " K"]:
        """Mean loss a caption token of each expert, in nats; NaN for one without any token."""
        if not self._batches:
            self._read()
        sums = [self._evaluate(params, frozen, self._layout.put_batch(batch)) for batch in self._batches]
        nll, tokens = (np.sum(column, axis=0, dtype=np.float64) for column in zip(*hosts.fetch(sums), strict=True))
        with np.errstate(invalid="ignore", divide="ignore"):
            return nll / tokens

    def _read(self) -> None:
        with contextlib.closing(self._feed.start(0)) as batches:
            for _ in range(self._count):
                batch = next(batches)
                self._batches.append({key: a for key, a in batch.items() if key not in HOST_KEYS})


def mean_loss(losses: Float[np.ndarray, " K"]) -> float:
    """Over the experts whose loss is finite; infinite where none is."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if finite.size else float("inf")
