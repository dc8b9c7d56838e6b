"""Intervals against closed forms, pairing, and the tables made of them."""

import numpy as np
import pytest

from pivotjax.evaluation.metrics import Outcome, Scores, compare, default_pairs, difference, estimate, summarise

ONES = np.ones(400)


def test_interval_of_a_mean_is_the_normal_one():
    """For the mean of 400 normal values the bootstrap interval is mean +- 1.96 s/sqrt(n), within 6 %."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    got = estimate(Scores(values, ONES), resamples=8000)
    half = 1.959964 * values.std(ddof=1) / np.sqrt(400)
    assert got["mean"] == pytest.approx(values.mean(), abs=1e-12)
    assert got["mean"] - got["low"] == pytest.approx(half, rel=0.06)
    assert got["high"] - got["mean"] == pytest.approx(half, rel=0.06)
    assert got["n"] == 400


def test_interval_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        got = estimate(Scores(generator.normal(1.0, 1.0, 48), np.ones(48)), resamples=500)
        hits += got["low"] <= 1.0 <= got["high"]
    assert 0.90 <= hits / 300 <= 0.98  # binomial sd .013


def test_interval_of_a_ratio_is_the_delta_methods():
    """Loss a token is sum/sum: its variance is var(total - ratio * count) / (n mean(count)^2)."""
    generator = np.random.default_rng(2)
    count = generator.integers(2, 12, 400).astype(float)
    total = count * 2.5 + generator.normal(0, 2.0, 400)
    got = estimate(Scores(total, count), resamples=8000)
    ratio = total.sum() / count.sum()
    half = 1.959964 * (total - ratio * count).std(ddof=1) / np.sqrt(400) / count.mean()
    assert got["mean"] == pytest.approx(ratio, abs=1e-12)
    assert (got["high"] - got["low"]) / 2 == pytest.approx(half, rel=0.06)


def test_pairing_narrows_the_interval_on_correlated_items():
    generator = np.random.default_rng(3)
    hard = generator.normal(5.0, 2.0, 100)
    a, b = (Scores(hard + shift + generator.normal(0, 0.3, 100), np.ones(100)) for shift in (0.0, 0.3))
    paired = difference(a, b)
    alone = [estimate(scores) for scores in (a, b)]
    unpaired = np.hypot(*[(one["high"] - one["low"]) / 2 for one in alone])
    assert paired["mean"] == pytest.approx(alone[0]["mean"] - alone[1]["mean"], abs=1e-12)
    assert (paired["high"] - paired["low"]) / 2 < 0.3 * unpaired
    assert paired["high"] < 0 < paired["mean"] + unpaired  # seen by the pair, hidden without


def test_domains_count_equally_and_are_resampled_apart():
    small, large = Scores(np.full(4, 1.0), np.ones(4)), Scores(np.full(400, 3.0), ONES)
    assert estimate([small, large]) == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 404}


def test_seeds_show_their_values_and_spread():
    total = np.array([[1.0, 1, 1], [2, 2, 2], [3, 3, 3]])
    got = estimate(Scores(total, np.ones(3)))
    assert got["seeds"] == [1.0, 2.0, 3.0] and got["spread"] == pytest.approx(1.0) and got["mean"] == 2.0


def test_same_seed_same_interval():
    scores = Scores(np.random.default_rng(4).normal(size=30), np.ones(30))
    assert estimate(scores, seed=5) == estimate(scores, seed=5) != estimate(scores, seed=6)


def test_unlike_items_cannot_be_paired_and_nothing_cannot_be_measured():
    with pytest.raises(ValueError, match="same items"):
        difference(Scores(np.ones(3), np.ones(3)), Scores(np.ones(4), np.ones(4)))
    with pytest.raises(ValueError, match="no items"):
        estimate(Scores(np.ones(0), np.ones(0)))


def _outcome(generator, projectors: int, items: int, control: int) -> Outcome:
    tokens = generator.integers(2, 8, items)
    nll = tokens * generator.gamma(3.0, 1.0, (projectors, items))
    correct = generator.integers(0, 2, (projectors, items)).astype(float)
    return Outcome(nll, tokens, correct, 8, nll[:, :control] + 1.0, tokens[:control])


def test_tables_hold_the_plain_ratios():
    generator = np.random.default_rng(6)
    names = ["w0", "expert:emoji", "pivot", "pivot:tuned"]
    outcomes = [{d: _outcome(generator, 4, 20, 6) for d in ("emoji", "icons", "outlines")} for _ in range(2)]
    table = summarise(names, outcomes, ["emoji", "icons"])
    assert list(table) == names and list(table["w0"]) == ["emoji", "icons", "outlines", "trained"]
    losses = [[run[d].nll[2].sum() / run[d].tokens.sum() for d in ("emoji", "icons")] for run in outcomes]
    assert table["pivot"]["trained"]["loss"]["mean"] == pytest.approx(np.mean(losses))
    assert table["pivot"]["trained"]["loss"]["seeds"] == pytest.approx(np.mean(losses, axis=1))
    accuracy = np.mean([run["icons"].correct[1] for run in outcomes])
    assert table["expert:emoji"]["icons"]["retrieval"]["mean"] == pytest.approx(accuracy)
    gain = np.mean([6 / run["icons"].tokens[:6].sum() for run in outcomes])  # one nat a caption more
    assert table["w0"]["icons"]["image_gain"]["mean"] == pytest.approx(gain)

    pairs = default_pairs(names)
    assert pairs == [
        ("pivot", "w0"),
        ("pivot", "expert:emoji"),
        ("pivot:tuned", "w0"),
        ("pivot:tuned", "expert:emoji"),
        ("pivot:tuned", "pivot"),
    ]
    rows = compare(names, outcomes, ["emoji", "icons"])
    assert len(rows) == len(pairs) * 4 * 2
    row = next(r for r in rows if (r["a"], r["b"], r["domain"], r["metric"]) == ("pivot", "w0", "trained", "loss"))
    expected = table["pivot"]["trained"]["loss"]["mean"] - table["w0"]["trained"]["loss"]["mean"]
    assert row["difference"]["mean"] == pytest.approx(expected)


def test_a_diverged_projector_is_not_a_number_and_others_stay():
    generator = np.random.default_rng(7)
    outcome = _outcome(generator, 2, 10, 0)
    outcome.nll[0], outcome.correct[0] = np.nan, np.nan
    table = summarise(["expert:emoji", "pivot"], [{"emoji": outcome}], ["emoji"])
    assert np.isnan(table["expert:emoji"]["emoji"]["loss"]["mean"])
    assert np.isfinite(table["pivot"]["emoji"]["loss"]["high"])
    assert "shuffled_loss" not in table["pivot"]["emoji"]
