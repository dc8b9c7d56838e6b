"""k-means of embeddings that do not fit in memory: cosine distances, k-means++ seeding, Lloyd's iterations in batches.

Embeddings of a network share a large mean, which would make all of them look alike: it is subtracted, then each is
scaled to length 1. Seeds are drawn from a small sample, with restarts (Arthur and Vassilvitskii 2007); Lloyd's
iterations (Lloyd 1982) stream over up to `fit_samples` samples; at last every sample goes to its nearest centre.
Memory: one batch, and the small sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int16

from pivotjax.config import check_least
from pivotjax.data.scenarios import hashing
from pivotjax.data.scenarios.columns import Stored
from pivotjax.errors import InputError
from pivotjax.progress import Bar

_BATCH = 4096  # rows
_SEEDING = 8192  # samples that seeds are drawn from
_RESTARTS = 8
_SHORT = 10  # iterations of a restart
_STILL = 1e-4  # relative improvement below which the fit ends


@dataclass(frozen=True)
class ClusteringConfig:
    """Which embeddings of the frozen models, and how they are clustered."""

    of: Literal["image", "caption"] = "image"
    """The frozen vision encoder's features, averaged over an image; or the frozen LLM's states over a caption."""
    vision: str = "efficientnet-lite0"
    """Vision encoder of the images: the name of a packaged one, or a path."""
    language: str = "smollm2-135m"
    """LLM of the captions: the name of a packaged one, or a path."""
    caption_states: Literal["tokens", "hidden"] = "hidden"
    """Of a caption: the token embeddings (cheap), or the hidden states after the last layer."""
    caption_tokens: int = 32
    """Longer captions are judged by so many of their first tokens."""
    iterations: int = 50
    """At most so many passes of Lloyd's algorithm."""
    fit_samples: int = 262_144
    """At most so many samples, chosen by hash, decide where the centres are."""

    def __post_init__(self) -> None:
        check_least(self, caption_tokens=1, iterations=1, fit_samples=1)


class Clusters(NamedTuple):
    """The fit: embeddings minus `mean`, at length 1, belong to the nearest of `centres`; `spread` is the mean squared
    distance to it (0 to 4; about 1 for unrelated directions)."""

    mean: Float32[np.ndarray, " D"]
    centres: Float32[np.ndarray, "K D"]
    spread: float


def fit(stored: Stored, rows: Int[np.ndarray, " N"], count: int, seed: int, config: ClusteringConfig) -> Clusters:
    """Clusters of those rows of a column.

    Args:
        stored: embeddings [samples, D].
        rows: which of them; in the order in which samples are preferred (see `order`).
        count: clusters, K.
        seed: of the seeding.
        config: how many rows, how many iterations.

    Raises:
        InputError: there are fewer different samples than clusters.
    """
    rows = np.sort(rows[: config.fit_samples])
    mean = sum(np.sum(x, axis=0, dtype=np.float64) for x in _batches(stored, rows)) / max(len(rows), 1)
    mean = np.asarray(mean, np.float32)
    chosen = rows[:: max(1, -(-len(rows) // _SEEDING))]
    small = np.asarray(_unit(stored.take(chosen).astype(np.float32), mean))
    if len(np.unique(small, axis=0)) < count:
        raise InputError(f"{len(rows)} samples have fewer than {count} different embeddings; ask for fewer domains")
    centres, before = _seeded(small, count, np.random.default_rng(seed)), np.inf
    with Bar(config.iterations, "k-means", "pass") as bar:
        for _ in range(config.iterations):
            sums, sizes, spread = _pass(stored, rows, mean, centres)
            centres = _moved(centres, sums, sizes)
            bar.update(note=f"spread {spread:.4f}")
            if spread > before * (1 - _STILL):
                break
            before = spread
    return Clusters(mean, centres, spread)


def assign(stored: Stored, clusters: Clusters) -> Int16[np.ndarray, " samples"]:
    """The cluster of every sample of the column, the largest cluster being 0."""
    labels = np.empty(stored.count, np.int16)
    for rows in np.array_split(np.arange(stored.count), max(1, -(-stored.count // _BATCH))):
        nearest, _ = _nearest(_padded(stored.take(rows)), clusters.mean, clusters.centres)
        labels[rows] = np.asarray(nearest)[: len(rows)]
    return labels


def order(keys: np.ndarray, good: np.ndarray, seed: int) -> Int[np.ndarray, " N"]:
    """The good samples, in a hashed order."""
    rows = np.flatnonzero(good)
    return rows[np.argsort(hashing.ordered(keys[rows], "fit", seed), kind="stable")]


def by_size(labels: Int16[np.ndarray, " N"], good: np.ndarray, count: int) -> Int16[np.ndarray, " N"]:
    """The labels renamed so that 0 is the largest cluster among the good samples."""
    sizes = np.bincount(labels[good], minlength=count)
    place = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    return place.astype(np.int16)[labels]


def _seeded(x: Float32[np.ndarray, "N D"], count: int, random: np.random.Generator) -> Float32[np.ndarray, "K D"]:
    """The best of several short runs on the sample."""
    best, least = None, np.inf
    for _ in range(_RESTARTS):
        centres = _plus_plus(x, count, random)
        for _ in range(_SHORT):
            sums, sizes, spread = (np.asarray(a, np.float64) for a in _accumulate(x, np.ones(len(x), np.float32),
                                                                                 centres))  # fmt: skip
            centres = _moved(centres, sums, sizes)
        if spread < least:
            best, least = centres, spread
    return best


def _plus_plus(x: Float32[np.ndarray, "N D"], count: int, random: np.random.Generator) -> Float32[np.ndarray, "K D"]:
    """Each next seed is drawn with a probability that grows with its squared distance to those there are."""
    chosen = [int(random.integers(len(x)))]
    distance = np.full(len(x), np.inf)
    for _ in range(count - 1):
        distance = np.minimum(distance, np.sum(np.square(x - x[chosen[-1]]), axis=1, dtype=np.float64))
        chosen.append(int(random.choice(len(x), p=distance / distance.sum())))
    return x[chosen]


def _pass(stored: Stored, rows, mean, centres) -> tuple[np.ndarray, np.ndarray, float]:
    """Sums, sizes and mean squared distance of the clusters around `centres`."""
    sums, sizes, total = np.zeros(centres.shape), np.zeros(len(centres)), 0.0
    for x in _batches(stored, rows):
        weights = (np.arange(_BATCH) < len(x)).astype(np.float32)
        parts = _accumulate(_unit(_padded(x), mean), weights, centres)
        sums, sizes, total = (a + np.asarray(part, np.float64) for a, part in zip((sums, sizes, total), parts))
    return sums, sizes, float(total / len(rows))


def _moved(centres, sums, sizes) -> Float32[np.ndarray, "K D"]:
    """The clusters' means; an empty one stays where it is."""
    means = sums / np.maximum(sizes, 1)[:, None]
    return np.where(sizes[:, None] > 0, means, centres).astype(np.float32)


def _batches(stored: Stored, rows) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _BATCH):
        yield stored.take(rows[start : start + _BATCH])


def _padded(x: np.ndarray) -> Float32[np.ndarray, "batch D"]:
    return np.pad(x.astype(np.float32), ((0, _BATCH - len(x)), (0, 0)))


@jax.jit
def _unit(x: Float[Array, "B D"], mean: Float[Array, " D"]) -> Float[Array, "B D"]:
    x = x - mean
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _distances(x: Float[Array, "B D"], centres: Float[Array, "K D"]) -> Float[Array, "B K"]:
    """Squared, of vectors of length 1; the matrix product in full float32 on TPU too."""
    products = jnp.dot(x, centres.T, precision="highest")
    return jnp.sum(jnp.square(x), axis=1)[:, None] - 2 * products + jnp.sum(jnp.square(centres), axis=1)


@jax.jit
def _accumulate(x: Float[Array, "B D"], weights: Float[Array, " B"], centres: Float[Array, "K D"]):
    distances = _distances(x, centres)
    member = jax.nn.one_hot(jnp.argmin(distances, axis=1), len(centres)) * weights[:, None]
    total = jnp.sum(weights * jnp.maximum(jnp.min(distances, axis=1), 0))
    return jnp.dot(member.T, x, precision="highest"), jnp.sum(member, axis=0), total


@jax.jit
def _nearest(x: Float[Array, "B D"], mean: Float[Array, " D"], centres: Float[Array, "K D"]):
    distances = _distances(_unit(x, mean), centres)
    return jnp.argmin(distances, axis=1), jnp.min(distances, axis=1)
