"""Ways to split: every one is a partition, k-means finds what is there, mixtures and sizes are those asked for."""

import numpy as np
import pytest
from drawn import THEMES, Drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from pivotjax.data.domains import SPLITS
from pivotjax.data.scenarios import (
    SPLITTERS,
    DomainsConfig,
    clustering,
    columns,
    dirichlet,
    hashing,
    splits,
    words,
)
from pivotjax.data.scenarios.base import OUT, Request
from pivotjax.data.scenarios.clustering import ClusteringConfig
from pivotjax.data.scenarios.columns import BLOCK, Simple
from pivotjax.data.scenarios.dirichlet import DirichletConfig
from pivotjax.data.scenarios.keywords import KeywordsConfig
from pivotjax.data.scenarios.pool import Pool
from pivotjax.data.scenarios.sizes import SizesConfig
from pivotjax.data.scenarios.source import SourceConfig
from pivotjax.errors import InputError

COUNT = 240
COLOURS = Simple("embedding", lambda rows: rows.pictures.mean((1, 2)).astype(np.float16), "colours", -1)


@pytest.fixture(scope="module")
def pool():
    return Pool({theme: Drawn(theme, COUNT // 3, bad=20) for theme in THEMES})


@pytest.fixture(scope="module")
def request_for(pool, tmp_path_factory):
    """`request_for(config)`: what its splitter works on."""
    folder = tmp_path_factory.mktemp("columns")

    def make(config: DomainsConfig, seed: int = 0) -> Request:
        stored = columns.scan(pool, [COLOURS, *SPLITTERS[config.by].columns(config.options)], folder)
        good = columns.reasons(stored) == columns.GOOD
        return Request(pool, stored, stored["keys"].map(), good, config.count, seed, config.clustering)

    return make


def assign(request_for, config: DomainsConfig, seed: int = 0):
    return SPLITTERS[config.by].assign(config.options, request_for(config, seed))


TOPICS = {theme: tuple(found[:4]) for theme, found in THEMES.items()}
CONFIGS = {
    "kmeans": DomainsConfig("kmeans", 3),
    "keywords": DomainsConfig("keywords", keywords=KeywordsConfig(TOPICS)),
    "keywords with a rest": DomainsConfig("keywords", keywords=KeywordsConfig(TOPICS, "domain")),
    "source": DomainsConfig("source"),
    "source by key": DomainsConfig("source", source=SourceConfig("key")),
    "iid": DomainsConfig("iid", 5),
    "dirichlet": DomainsConfig("dirichlet", 4, dirichlet=DirichletConfig(0.5, 3)),
    "dirichlet of a part": DomainsConfig("dirichlet", 4, dirichlet=DirichletConfig(0.5, 3, share=0.5)),
    "sizes": DomainsConfig("sizes", sizes=SizesConfig((0.5, 0.2, 0.1))),
    "sizes by power": DomainsConfig("sizes", 4),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_way_is_a_partition_of_the_good_samples(name, seed, request_for):
    """Each sample in at most one domain and one split, bad ones in none, all others where nothing is to be left out."""
    config = CONFIGS[name]
    assigned = assign(request_for, config, seed)
    request = request_for(config, seed)
    split = splits.by_group(np.arange(COUNT), request.keys, splits.SplitsConfig(), seed)
    indices = splits.indices(assigned, split)
    everything = np.concatenate([part for of in indices.values() for part in of.values()])
    assert len(np.unique(everything)) == len(everything)
    assert list(indices) == list(assigned.names) and all(list(of) == list(SPLITS) for of in indices.values())
    assert request.good[everything].all() and request.good.sum() == COUNT - 12
    complete = name not in ("keywords", "dirichlet of a part", "sizes")
    # a client's share is a whole number of samples: up to one less a client
    assert len(everything) > COUNT - 12 - config.count if complete else len(everything) < COUNT - 12
    assert np.array_equal(assigned.domains, assign(request_for, config, seed).domains)


def test_kmeans_finds_the_themes_by_their_colours(request_for):
    assigned, truth = assign(request_for, CONFIGS["kmeans"]), np.repeat(np.arange(3), COUNT // 3)
    good = assigned.domains != OUT
    table = np.zeros((3, 3), int)
    np.add.at(table, (assigned.domains[good], truth[good]), 1)
    assert np.all(np.sort(table, axis=1)[:, :2].sum(axis=1) == 0), table


def stored_as(tmp_path, values: np.ndarray) -> columns.Stored:
    for number, start in enumerate(range(0, len(values), BLOCK)):
        np.save(tmp_path / f"{number}.npy", values[start : start + BLOCK])
    return columns.Stored(tmp_path, len(values))


def test_kmeans_in_batches_is_lloyds_fixed_point(tmp_path):
    """20,000 samples over several blocks and batches: nearest centres and means, as NumPy has them in float64."""
    random = np.random.default_rng(0)
    truth = random.choice(5, 20_000, p=[0.4, 0.25, 0.2, 0.1, 0.05])
    values = (random.normal(size=(5, 24))[truth] + 0.35 * random.normal(size=(20_000, 24)) + 3).astype(np.float16)
    stored, config = stored_as(tmp_path, values), ClusteringConfig(fit_samples=20_000)
    clusters = clustering.fit(stored, np.arange(20_000), 5, 0, config)
    labels = clustering.by_size(clustering.assign(stored, clusters), np.ones(20_000, bool), 5)
    assert np.mean(labels == truth) > 0.999  # named by size, as the truth is
    x = values.astype(np.float64) - values.astype(np.float64).mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    distances = np.square(x[:, None] - clusters.centres[None]).sum(-1)
    nearest = distances.argmin(1)
    assert np.mean(nearest == clustering.assign(stored, clusters)) > 0.9999
    np.testing.assert_allclose(distances.min(1).mean(), clusters.spread, rtol=1e-3)
    means = np.stack([x[nearest == k].mean(0) for k in range(5)])
    np.testing.assert_allclose(means, clusters.centres, atol=2e-3)


def test_kmeans_fits_on_a_part_and_does_not_depend_on_the_batch(tmp_path, monkeypatch):
    random = np.random.default_rng(1)
    truth = random.integers(0, 3, 3000)
    stored = stored_as(tmp_path, random.normal(size=(3, 8))[truth] + 0.1 * random.normal(size=(3000, 8)))
    config = ClusteringConfig(fit_samples=500)
    rows = clustering.order(hashing.mixed(np.arange(3000, dtype=np.uint64)), np.ones(3000, bool), 0)
    labels = clustering.assign(stored, clustering.fit(stored, rows, 3, 0, config))
    assert len(np.unique(np.stack([labels, truth]), axis=1).T) == 3
    monkeypatch.setattr(clustering, "_BATCH", 700)
    assert np.array_equal(labels, clustering.assign(stored, clustering.fit(stored, rows, 3, 0, config)))


def test_more_clusters_than_samples(tmp_path):
    with pytest.raises(InputError, match="fewer than 3 different embeddings"):
        clustering.fit(stored_as(tmp_path, np.eye(8)[[0, 0, 1]]), np.arange(3), 3, 0, ClusteringConfig())


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_drawn_mixtures_have_the_moments_of_the_dirichlet(alpha):
    """Mean p, variance p (1 - p) / (alpha + 1): the concentration of alpha * p is alpha."""
    prior = np.array([0.5, 0.3, 0.0, 0.15, 0.05])
    drawn = dirichlet.mixtures(prior, 200_000, alpha, 0)
    np.testing.assert_allclose(drawn.sum(1), 1)
    np.testing.assert_allclose(drawn.mean(0), prior, atol=0.005)
    np.testing.assert_allclose(drawn.var(0), prior * (1 - prior) / (alpha + 1), rtol=0.05, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), st.floats(0.05, 50), st.floats(0.1, 1.0), st.integers(0, 10**6))
def test_clients_take_what_there_is(clients, clusters, alpha, share, seed):
    """Same size each, no sample twice; exactly their mixture while no cluster runs out."""
    random = np.random.default_rng(seed)
    supply = random.integers(clients, 400, clusters)
    drawn = dirichlet.mixtures(supply / supply.sum(), clients, alpha, seed)
    size = int(supply.sum() * share) // clients
    taken = dirichlet.shared_out(drawn, supply, size)
    assert np.all(taken >= 0) and np.all(taken.sum(0) <= supply) and np.all(taken.sum(1) == size)
    if np.all(np.ceil(drawn * size).sum(0) <= supply):
        assert np.all(np.abs(taken - drawn * size) <= 1)


def test_clients_of_the_dirichlet_have_the_mixtures_of_the_manifest(request_for):
    config = CONFIGS["dirichlet of a part"]
    assigned = assign(request_for, config)
    request = request_for(config)
    labels = SPLITTERS["kmeans"].assign(None, request._replace(count=3)).domains
    found = np.array([[np.sum((assigned.domains == k) & (labels == c)) for c in range(3)] for k in range(4)])
    assert found.tolist() == assigned.facts["samples by cluster"]


def test_sizes_are_exact(request_for):
    good = COUNT - 12
    by_share = assign(request_for, CONFIGS["sizes"]).domains
    assert [np.sum(by_share == k) for k in range(3)] == [114, 46, 22]  # ends at 0.5, 0.7 and 0.8 of 228
    weights = 1 / np.arange(1, 5)
    by_power = assign(request_for, CONFIGS["sizes by power"]).domains
    np.testing.assert_allclose(np.bincount(by_power[by_power != OUT]) / good, weights / weights.sum(), atol=1 / good)
    iid = assign(request_for, CONFIGS["iid"]).domains
    assert np.ptp(np.bincount(iid[iid != OUT])) <= 1


def test_keywords(request_for, pool):
    options = KeywordsConfig({"pets": ("dog", "cat"), "wild": ("tig*", "whale", "cat")}, "domain")
    assigned = assign(request_for, DomainsConfig("keywords", keywords=options))
    for index in np.flatnonzero(assigned.domains != OUT):
        said = set(pool.caption(int(index)).split())
        pets, wild = len(said & {"dog", "cat"}), len(said & {"tiger", "whale", "cat"})
        expected = "rest" if not pets + wild else ("pets" if pets >= wild else "wild")
        assert assigned.names[assigned.domains[index]] == expected
    assert assigned.facts["captions without a topic"] == np.sum(assigned.domains == 2) > 100


def test_sources_bear_their_names(request_for):
    by_corpus, by_key = assign(request_for, CONFIGS["source"]), assign(request_for, CONFIGS["source by key"])
    assert by_corpus.names == tuple(THEMES) and by_key.names == tuple(sorted(THEMES))
    named = [[one.names[k] if k != OUT else "" for k in one.domains] for one in (by_corpus, by_key)]
    assert named[0] == named[1]


def test_too_many_sources(tmp_path):
    class Unique(Drawn):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return type(item)(f"{index}/x", "", item.caption, item.image, item.kind)

    pool, config = Pool({"many": Unique("food", 300)}), DomainsConfig("source", source=SourceConfig("key"))
    stored = columns.scan(pool, SPLITTERS["source"].columns(config.options), tmp_path)
    request = Request(pool, stored, stored["keys"].map(), np.ones(300, bool), 1, 0, config.clustering)
    with pytest.raises(InputError, match="300 different beginnings"):
        SPLITTERS["source"].assign(config.options, request)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DomainsConfig("kmean"), "unknown way to split 'kmean'; did you mean kmeans"),
        (lambda: DomainsConfig(count=0), "count must be at least 1"),
        (lambda: SizesConfig((0.7, 0.7)), "sum to at most 1"),
        (lambda: DirichletConfig(alpha=0), "alpha must be above 0"),
        (lambda: ClusteringConfig(iterations=0), "iterations must be at least 1"),
        (lambda: SPLITTERS["keywords"].columns(KeywordsConfig()), "needs topics with words"),
        (lambda: SPLITTERS["keywords"].columns(KeywordsConfig({"rest": ("a",)})), "no topic can be named rest"),
    ],
)
def test_settings_without_sense(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_telling_words():
    """Words of one domain come first there; words of all are nowhere; the formula, for one word by hand."""
    captions = {
        theme: [f"the photo of a {found[i % 8]} {found[i % 3]}" for i in range(200)] for theme, found in THEMES.items()
    }
    telling = words.telling(captions)
    for theme, found in THEMES.items():
        assert set(telling[theme][:8]) == set(found) and not {"photo", "the"} & set(telling[theme])
