"""Federated clients: each has its own mixture of clusters, drawn from a Dirichlet distribution.

Source: Hsu, Qi and Brown 2019 (arXiv 1909.06335): q ~ Dir(alpha * p) for each client, with p the shares of the clusters
in the corpus; clients take as many samples each, without replacement; where a cluster is used up, a client takes from
the others in proportion to its mixture.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from pivotjax.config import check_least
from pivotjax.data.scenarios import hashing
from pivotjax.data.scenarios.base import OUT, Assignment, Request, Splitter
from pivotjax.data.scenarios.kmeans import clustered
from pivotjax.errors import InputError


@dataclass(frozen=True)
class DirichletConfig:
    """The clients' mixtures."""

    alpha: float = 1.0
    """Concentration: 0.1 gives most clients one cluster or two, 100 gives all nearly the corpus's own mixture."""
    clusters: int = 20
    """Clusters that are mixed."""
    share: float = 1.0
    """Share of the samples that is handed out. Below 1 clusters last longer, and clients come nearer to their draw."""

    def __post_init__(self) -> None:
        check_least(self, clusters=2)
        if self.alpha <= 0 or not 0 < self.share <= 1:
            raise InputError("alpha must be above 0, and share above 0 and at most 1")


def assign(options: DirichletConfig, request: Request) -> Assignment:
    """A domain a client."""
    labels, facts = clustered(request, options.clusters)
    supply = np.bincount(labels[request.good], minlength=options.clusters)
    drawn = mixtures(supply / supply.sum(), request.count, options.alpha, request.seed)
    taken = shared_out(drawn, supply, int(supply.sum() * options.share) // request.count)
    domains = np.full(len(labels), OUT, np.int16)
    for cluster in range(options.clusters):
        members = np.flatnonzero(request.good & (labels == cluster))
        members = members[np.argsort(hashing.ordered(request.keys[members], "dirichlet", request.seed), kind="stable")]
        domains[members[: taken[:, cluster].sum()]] = np.repeat(np.arange(request.count), taken[:, cluster])
    facts |= {"alpha": options.alpha, "drawn mixtures": drawn.tolist(), "samples by cluster": taken.tolist()}
    return Assignment(tuple(f"client{number}" for number in range(request.count)), domains, facts)


def mixtures(prior: Float64[np.ndarray, " C"], count: int, alpha: float, seed: int) -> Float64[np.ndarray, "K C"]:
    """q ~ Dir(alpha * prior) for each of `count` clients."""
    drawn = np.zeros((count, len(prior)))
    present = prior > 0
    drawn[:, present] = np.random.default_rng(seed).dirichlet(alpha * prior[present], size=count)
    return drawn


def shared_out(
    drawn: Float64[np.ndarray, "K C"], supply: Int64[np.ndarray, " C"], size: int
) -> Int64[np.ndarray, "K C"]:
    """How many samples of each cluster each client takes, one client after the other, `size` in all."""
    left, taken = supply.copy(), []
    for mixture in drawn:
        mine = np.zeros_like(left)
        while (wanted := size - mine.sum()) > 0:
            available = np.where(left > 0, mixture, 0)
            available = available if available.sum() > 0 else left  # nothing of the mixture is left: of all there is
            more = np.minimum(_whole(wanted * available / available.sum()), left)
            mine, left = mine + more, left - more
        taken.append(mine)
    return np.stack(taken)


def _whole(amounts: Float64[np.ndarray, " C"]) -> Int64[np.ndarray, " C"]:
    """Whole numbers of the same sum, by largest remainder."""
    floor = np.floor(amounts).astype(np.int64)
    missing = round(amounts.sum()) - floor.sum()
    floor[np.argsort(floor - amounts, kind="stable")[:missing]] += 1
    return floor


SPLITTER = Splitter("clients that mix clusters as Dirichlet(alpha) says", assign, embeds=True)
