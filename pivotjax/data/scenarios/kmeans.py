"""Domains by k-means on embeddings of the frozen models: what looks, or reads, alike is together."""

from pivotjax.data.scenarios import clustering
from pivotjax.data.scenarios.base import OUT, Assignment, Request, Splitter


def assign(options: None, request: Request) -> Assignment:
    """A domain a cluster, the largest first."""
    labels, facts = clustered(request, request.count)
    labels[~request.good] = OUT
    return Assignment(tuple(f"cluster{number}" for number in range(request.count)), labels, facts)


def clustered(request: Request, count: int):
    """Every sample's cluster, and what the manifest says of the fit."""
    stored = request.columns["embedding"]
    rows = clustering.order(request.keys, request.good, request.seed)
    clusters = clustering.fit(stored, rows, count, request.seed, request.clustering)
    labels = clustering.by_size(clustering.assign(stored, clusters), request.good, count)
    return labels, {"fit on": min(len(rows), request.clustering.fit_samples), "mean squared distance": clusters.spread}


SPLITTER = Splitter("k-means on caption or image embeddings of the frozen models", assign, embeds=True)
