"""From items to numbers with intervals: loss a token, retrieval accuracy, paired differences.

Every number is a ratio over items (`sum of totals / sum of counts`), its 95 % interval the percentile bootstrap over
items (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3). Items are resampled within their
domain, and two projectors are compared on the same resamples, so what is hard about an item cancels in a difference.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
TRAINED = "trained"  # the name of the mean over the domains that experts were trained on


class Scores(NamedTuple):
    """One domain's items under one projector: what is summed, and what it is divided by.

    total: float [N], or [seeds, N] where several runs met the same items.  count: the same shape, or [N].
    For loss: nats and tokens a caption.  For retrieval: 1 or 0 and one.
    """

    total: np.ndarray
    count: np.ndarray


class Outcome(NamedTuple):
    """What P projectors did on one domain's N test items; NaN where a projector is not finite."""

    nll: np.ndarray  # float64 [P, N]: negative log-likelihood of each item's own caption (with EOS), in nats
    tokens: np.ndarray  # int64 [N]: tokens of that caption
    correct: np.ndarray  # float64 [P, N]: 1 where the own caption was the likeliest candidate
    choices: int  # the largest number of candidates an item had
    control_nll: np.ndarray  # float64 [P, M]: as nll, for the first M items shown another item's image
    control_tokens: np.ndarray  # int64 [M]


def estimate(scores: Scores | Sequence[Scores], *, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """Mean, 95 % interval and number of items of a ratio.

    Args:
        scores: one domain's, or a list of domains whose values are averaged with equal weight.
        resamples: bootstrap resamples of the items.
        seed: of the resamples.

    Returns:
        `{"mean", "low", "high", "n"}`; with several seeds (totals [seeds, N]) also `"seeds"`, the value of each, and
        `"spread"`, their standard deviation. The interval speaks of the items, the spread of the seeds.
    """
    domains = _domains(scores)
    return _summary(_values(domains), _resampled(domains, resamples, seed), domains)


def difference(
    a: Scores | Sequence[Scores], b: Scores | Sequence[Scores], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict:
    """The paired difference `a - b` of two projectors on the same items, as `estimate` describes it."""
    first, second = _domains(a), _domains(b)
    if [x.total.shape for x in first] != [x.total.shape for x in second]:
        raise ValueError("a paired difference needs the same items on both sides")
    draws = _resampled(first, resamples, seed) - _resampled(second, resamples, seed)
    return _summary(_values(first) - _values(second), draws, first)


def summarise(
    names: Sequence[str],
    outcomes: Sequence[Mapping[str, Outcome]],
    trained: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict]]]:
    """`report["projectors"]`: every projector on every domain and on the mean of the trained domains.

    Args:
        names: of the P projectors, in the order of the outcomes' first axis.
        outcomes: for each seed, domain -> Outcome; every seed has the same domains and numbers of items.
        trained: the domains that experts were trained on.

    Returns:
        name -> domain -> `loss`, `retrieval`; with control items also `shuffled_loss` (another item's image) and
        `image_gain` (how much it is above the loss with the right image, on the same items).
    """
    table: dict[str, dict] = {}
    for p, name in enumerate(names):
        columns = table[name] = {}
        for column, domains in _columns(outcomes, trained).items():
            cell = columns[column] = {}
            for metric in ("loss", "retrieval"):
                scores = [_scores(outcomes, domain, p, metric) for domain in domains]
                cell[metric] = estimate(scores, resamples=resamples, seed=seed)
            if all(seed_outcome[d].control_nll.size for seed_outcome in outcomes for d in domains):
                shuffled = [_scores(outcomes, domain, p, "shuffled") for domain in domains]
                shown = [_scores(outcomes, domain, p, "shown") for domain in domains]
                cell["shuffled_loss"] = estimate(shuffled, resamples=resamples, seed=seed)
                cell["image_gain"] = difference(shuffled, shown, resamples=resamples, seed=seed)
    return table


def compare(
    names: Sequence[str],
    outcomes: Sequence[Mapping[str, Outcome]],
    trained: Sequence[str],
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict]:
    """`report["comparisons"]`: paired differences `a - b` of loss and retrieval, for every domain and the trained mean.

    Args:
        names, outcomes, trained: as in `summarise`.
        pairs: (a, b) names; by default every PivotMerge projector against every other projector.
    """
    index = {name: p for p, name in enumerate(names)}
    found = []
    for a, b in default_pairs(names) if pairs is None else pairs:
        for column, domains in _columns(outcomes, trained).items():
            for metric in ("loss", "retrieval"):
                sides = [[_scores(outcomes, d, index[name], metric) for d in domains] for name in (a, b)]
                value = difference(*sides, resamples=resamples, seed=seed)
                found.append({"a": a, "b": b, "domain": column, "metric": metric, "difference": value})
    return found


def default_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every PivotMerge projector against every projector that is none, and the later PivotMerges against the first."""
    pivots = [name for name in names if name.split(":")[0] == "pivot"]
    others = [name for name in names if name not in pivots]
    return [(a, b) for a in pivots for b in others] + [(a, pivots[0]) for a in pivots[1:]]


def _columns(outcomes: Sequence[Mapping[str, Outcome]], trained: Sequence[str]) -> dict[str, list[str]]:
    """Column of the table -> the domains it averages."""
    columns = {domain: [domain] for domain in outcomes[0]}
    return {**columns, TRAINED: list(trained)} if trained else columns


def _scores(outcomes: Sequence[Mapping[str, Outcome]], domain: str, p: int, metric: str) -> Scores:
    """One projector's scores on one domain, [seeds, N]."""
    runs = [outcome[domain] for outcome in outcomes]
    if metric == "retrieval":
        return Scores(np.stack([run.correct[p] for run in runs]), np.ones(runs[0].tokens.shape))
    if metric == "shuffled":
        return Scores(np.stack([run.control_nll[p] for run in runs]), np.stack([run.control_tokens for run in runs]))
    items = slice(runs[0].control_tokens.size if metric == "shown" else None)
    return Scores(np.stack([run.nll[p, items] for run in runs]), np.stack([run.tokens[items] for run in runs]))


def _domains(scores: Scores | Sequence[Scores]) -> list[Scores]:
    """A list of domains with float64 arrays [seeds, N]."""
    found = []
    for total, count in [scores] if isinstance(scores, Scores) else scores:
        total = np.atleast_2d(np.asarray(total, np.float64))
        found.append(Scores(total, np.broadcast_to(np.asarray(count, np.float64), total.shape)))
    if not found or any(item.total.shape[1] == 0 for item in found):
        raise ValueError("no items to measure")
    return found


def _values(domains: list[Scores]) -> np.ndarray:
    """The value of each seed, [seeds]: the mean over the domains of each domain's ratio."""
    return np.mean([total.sum(1) / count.sum(1) for total, count in domains], axis=0)


def _resampled(domains: list[Scores], resamples: int, seed: int) -> np.ndarray:
    """Bootstrap values averaged over seeds, [resamples].

    Item i stands for the same item in every seed, so a draw takes its whole column; where the runs' items differ the
    columns are still independent of each other, which is all the bootstrap needs.
    """
    values = []
    for position, (total, count) in enumerate(domains):
        times_drawn = _times_drawn(total.shape[1], resamples, seed, position)
        values.append((times_drawn @ total.T) / (times_drawn @ count.T))
    return np.mean(values, axis=(0, 2))


@functools.lru_cache(maxsize=32)
def _times_drawn(items: int, resamples: int, seed: int, position: int) -> np.ndarray:
    """How often each resample draws each item, float64 [resamples, items]; one set serves all that is compared."""
    generator = np.random.default_rng([seed, position])
    return generator.multinomial(items, np.full(items, 1 / items), size=resamples).astype(np.float64)


def _summary(values: np.ndarray, draws: np.ndarray, domains: list[Scores]) -> dict:
    low, high = np.quantile(draws, [0.025, 0.975])
    items = sum(item.total.shape[1] for item in domains)
    result = {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": items}
    if len(values) > 1:
        result |= {"seeds": [float(v) for v in values], "spread": float(values.std(ddof=1))}
    return result
