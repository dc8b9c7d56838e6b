"""What is known of every sample is computed once; a scenario on disk reads as it was written, or says what is wrong."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from drawn import FORMAT, THEMES, Drawn

from pivotjax import files
from pivotjax.data import corpora
from pivotjax.data.corpora import CorpusConfig
from pivotjax.data.decode import BadSample
from pivotjax.data.domains import SPLITS
from pivotjax.data.scenarios import columns, folder, hashing, load, manifest, source
from pivotjax.data.scenarios.base import Request
from pivotjax.data.scenarios.columns import Simple
from pivotjax.data.scenarios.pool import Pool
from pivotjax.errors import InputError
from pivotjax.models import vision

LENGTHS = Simple("lengths", lambda rows: np.array([len(caption) for caption in rows.captions], np.int32))
MEANS = Simple("means", lambda rows: rows.pictures.mean((1, 2)).astype(np.float32), "means", -1)


@pytest.fixture
def pool() -> Pool:
    return Pool({theme: Drawn(theme, 50, bad=9) for theme in THEMES})


def test_a_pool_is_its_corpora_one_after_the_other(pool):
    assert len(pool) == 150
    parts = [pool.corpora[theme][i].key for theme in THEMES for i in range(50)]
    assert [pool[i].key for i in range(150)] == parts and pool.caption(120) == pool[120].caption
    assert pool.number(np.array([0, 49, 50, 149])).tolist() == [0, 0, 1, 2]
    for outside in (-1, 150):
        with pytest.raises(IndexError):
            pool[outside]
    assert pickle.loads(pickle.dumps(pool))[77].key == pool[77].key
    assert pool.identity != Pool(dict(reversed(pool.corpora.items()))).identity


def test_columns_hold_a_row_a_sample(pool, tmp_path, monkeypatch):
    """Blocks of 64 and batches of 32: the last ones are not full."""
    monkeypatch.setattr(columns, "BLOCK", 64)
    stored = columns.scan(pool, [LENGTHS, MEANS], tmp_path)
    from pivotjax.data.decode import decode

    good = columns.reasons(stored) == columns.GOOD
    assert good.tolist() == [i % 50 % 9 != 0 for i in range(150)]
    assert columns.bad(columns.reasons(stored)) == {"corrupt image": 18}
    assert stored["keys"].map().tolist() == [hashing.of_text(pool.corpora[t][i].key) for t in THEMES for i in range(50)]
    assert stored["lengths"].map().tolist() == [len(pool.caption(i)) for i in range(150)]
    order = np.random.default_rng(0).permutation(150)
    means = np.stack([decode(pool[i], 64).mean((0, 1)) if good[i] else np.zeros(3) for i in order])
    np.testing.assert_allclose(stored["means"].take(order), means, rtol=1e-5)
    assert [len(block) for block in stored["means"].blocks()] == [64, 64, 22]


def test_columns_are_computed_once_and_a_pass_goes_on(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "BLOCK", 64)
    seen = []

    def lengths(rows):
        seen.append(len(rows.keys))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return LENGTHS(rows)

    column = Simple("lengths", lengths)
    with pytest.raises(KeyboardInterrupt):
        columns.scan(pool, [column], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("lengths*/*")) == ["0.npy", "0.reasons.npy"]
    stored = columns.scan(pool, [column], tmp_path)
    assert len(seen) == 4 + 3  # two batches of the second block, one of the third
    assert stored["lengths"].map().tolist() == [len(pool.caption(i)) for i in range(150)]
    columns.scan(pool, [column], tmp_path)
    assert len(seen) == 7
    columns.scan(Pool({**pool.corpora, "food": Drawn("food", 49)}), [column], tmp_path)
    assert len(seen) > 7  # another corpus


def test_bad_samples_without_a_look_at_pictures(tmp_path):
    stored = columns.scan(Pool({"x": Drawn("food", 13), "y": Drawn("food", 20, bad=2)}), [LENGTHS], tmp_path)
    assert columns.bad(columns.reasons(stored)) == {"unreadable shard": 13}


@dataclass(frozen=True)
class Away(Drawn):
    """Cannot be read in `gone`."""

    gone: range = range(0)

    def __getitem__(self, index):
        if index in self.gone:
            raise BadSample("unreadable shard", "the disk is away")
        return super().__getitem__(index)


def test_a_disk_that_was_away_is_not_remembered_as_bad_samples(tmp_path, monkeypatch):
    """30 of a block's 256 samples: at a limit of 5 % at most 26 are chance, at 10 % up to 44."""
    monkeypatch.setattr(columns, "BLOCK", 256)
    away = Pool({"food": Away("food", 600, gone=range(300, 330))})
    few = columns.scan(away, [LENGTHS], tmp_path / "few", bad_limit=0.1)
    assert columns.bad(columns.reasons(few)) == {"unreadable shard": 30}
    with pytest.raises(InputError, match=r"over 5% of the samples 256 to 511 .* \(30 unreadable shard\)") as caught:
        columns.scan(away, [LENGTHS], tmp_path / "kept", bad_limit=0.05)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.glob("kept/*/[0-9].npy")) == ["0.npy"] * 2
    stored = columns.scan(Pool({"food": Away("food", 600)}), [LENGTHS], tmp_path / "kept", bad_limit=0.05)
    assert columns.bad(columns.reasons(stored)) == {}


@pytest.mark.parametrize("passes", [([LENGTHS], [MEANS]), ([MEANS], [LENGTHS])])
def test_a_sample_is_good_where_it_was_good_in_every_pass(tmp_path, passes):
    """Some could not be read when one column was computed: their rows of it say nothing, whatever the other says."""
    away, back = (Pool({"food": Away("food", 40, gone=range(*gone))}) for gone in ((7, 10), (0,)))
    first, second = passes
    columns.scan(away, first, tmp_path)
    stored = columns.scan(back, [*first, *second], tmp_path)
    assert np.flatnonzero(columns.reasons(stored) != columns.GOOD).tolist() == [7, 8, 9]
    late = Pool({"food": Away("food", 40, gone=range(20, 22))})
    stored = columns.scan(late, [*first, *second, Simple("more", LENGTHS.of)], tmp_path)
    assert np.flatnonzero(columns.reasons(stored) != columns.GOOD).tolist() == [7, 8, 9, 20, 21]


def test_what_a_caption_says_does_not_depend_on_pictures(tmp_path, monkeypatch):
    """Two of the pictures are broken: only where pictures count; and captions alone need no picture decoded."""
    pool = Pool({"food": Drawn("food", 40, bad=20)})
    columns.scan(pool, [LENGTHS, MEANS], tmp_path)
    assert columns.bad(columns.reasons(columns.scan(pool, [LENGTHS], tmp_path))) == {}
    monkeypatch.setattr(columns, "decode", None)
    stored = columns.scan(pool, [MEANS, Simple("more", LENGTHS.of)], tmp_path)
    assert columns.bad(columns.reasons(stored)) == {"corrupt image": 2}
    np.testing.assert_array_equal(stored["more"].map(), [len(pool.caption(i)) for i in range(40)])


def test_what_cannot_be_read_any_more_at_the_end_is_passed_over(pool):
    """Samples 1 to 7 of each theme could be read when they were scanned."""
    prefix = Simple("prefix", source._prefixes)
    late = Pool({name: Away(name, 50, gone=range(8)) for name in THEMES})
    rows = columns.Rows([pool[i].key for i in range(150)], [], None, None)
    known = type("Known", (), {"map": lambda self: prefix(rows)})()
    request = Request(late, {"prefix": known}, None, np.ones(150, bool), 0, 0, None)
    assigned = source.assign(source.SourceConfig("key"), request)
    assert assigned.names == tuple(sorted(THEMES)) and np.bincount(assigned.domains).tolist() == [50] * 3
    nothing = Pool({name: Away(name, 50, gone=range(50)) for name in THEMES})
    with pytest.raises(InputError, match="cannot be any more"):
        source.assign(source.SourceConfig("key"), request._replace(pool=nothing))
    order, splits = {"x": np.arange(20)}, {"x": {"train": np.arange(20)}}
    told = manifest.domains(Pool({"food": Unread("food", 50)}), splits, {"x": {}}, order, {"x": []})
    assert told["x"]["corpora"] == {"food": 20}


class Unread(Drawn):
    """Its even captions cannot be read."""

    def caption(self, index):
        if index % 2 == 0:
            raise BadSample("unreadable shard", "the disk is away")
        return super().caption(index)


def test_a_full_disk_leaves_no_half_column(pool, tmp_path, small_disk):
    with small_disk(256), pytest.raises(InputError, match="free some space") as caught:
        columns.scan(pool, [LENGTHS], tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*/*"))
    columns.scan(pool, [LENGTHS], tmp_path)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A scenario of two corpora and two domains in `tmp_path/scenario`."""
    monkeypatch.setitem(corpora.FORMATS, "drawn", FORMAT)
    configs = {"a": CorpusConfig("drawn", "food 30 0"), "b": CorpusConfig("drawn", "cities 20 0")}
    opened = {name: corpora.open_corpus(config, tmp_path) for name, config in configs.items()}
    parts = np.array_split(np.random.default_rng(0).permutation(50), 6)
    indices = {n: {split: np.sort(parts[3 * k + s]) for s, split in enumerate(SPLITS)} for k, n in enumerate("xy")}
    path = tmp_path / "scenario"
    path.mkdir()
    facts = folder.write_indices(path, indices)
    about = {n: {"config": vars(configs[n]), "identity": opened[n].identity} for n in configs}
    files.write_json(path / folder.MANIFEST, {"format": folder.FORMAT, "corpora": about,
                                              "domains": {n: {"splits": facts[n]} for n in indices}})  # fmt: skip
    return path, indices, Pool(opened)


def test_a_scenario_reads_as_it_was_written(written, tmp_path):
    path, indices, pool = written
    scenario = load(path, tmp_path)
    assert list(scenario.domains) == ["x", "y"]
    for name, splits in indices.items():
        assert list(scenario.domains[name]) == list(SPLITS)
        for split, expected in splits.items():
            subset = scenario.domains[name][split]
            assert isinstance(subset.indices, np.memmap) and subset.indices.dtype == np.int64
            assert [subset[i].key for i in range(len(subset))] == [pool[int(i)].key for i in expected]
            assert subset.caption(1) == subset[1].caption
    identities = {s.identity for of in scenario.domains.values() for s in of.values()}
    assert len(identities) == 6
    train = scenario.domains["x"]["train"]
    copy = pickle.loads(pickle.dumps(train))
    assert copy[2].key == train[2].key and len(pickle.dumps(train)) < 2000  # the indices stay behind


def test_corpora_that_have_moved(written, tmp_path):
    path, indices, pool = written
    about = files.read_json(path / folder.MANIFEST)
    about["corpora"]["a"]["config"]["path"] = "gone 30 0"
    files.write_json(path / folder.MANIFEST, about)
    scenario = load(path, tmp_path, {"a": CorpusConfig("drawn", "food 30 0")})
    train = scenario.domains["x"]["train"]
    assert [train[i].key for i in range(len(train))] == [pool[int(i)].key for i in indices["x"]["train"]]
    with pytest.raises(InputError, match=r"the corpus a of .* is another at food 29 0"):
        load(path, tmp_path, {"a": CorpusConfig("drawn", "food 29 0")})
    with pytest.raises(InputError, match=r"was made of no corpus c; its corpora are a, b"):
        load(path, tmp_path, {"c": CorpusConfig("drawn", "food 30 0")})


def test_scenarios_that_cannot_be_read(written, tmp_path, monkeypatch):
    path, *_ = written

    def said() -> str:
        with pytest.raises(InputError) as caught:
            load(path, tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    file = path / "x.test.npy"
    before = file.read_bytes()
    file.write_bytes(before[:-8])
    assert "x.test.npy is missing or damaged" in said()
    file.unlink()
    assert "x.test.npy is missing or damaged" in said()
    file.write_bytes(before)
    about = files.read_json(path / folder.MANIFEST)
    files.write_json(path / folder.MANIFEST, about | {"format": 99})
    assert "has scenario format 99" in said()
    changed = about["corpora"] | {"a": {"config": about["corpora"]["a"]["config"], "identity": "other"}}
    files.write_json(path / folder.MANIFEST, about | {"corpora": changed})
    assert "the corpus a of" in said() and "has changed" in said()
    (path / folder.MANIFEST).unlink()
    assert "holds no scenario" in said()


@pytest.mark.assets
@pytest.mark.slow
def test_real_images_are_told_apart_by_the_frozen_encoder(assets, tmp_path):
    """Emoji, icons and shapes mixed: three clusters agree with the three sources far beyond chance (adjusted Rand)."""
    from pivotjax.data.assets import cache_folder
    from pivotjax.data.scenarios import clustering, embeddings
    from pivotjax.data.scenarios.clustering import ClusteringConfig

    names = ("emoji", "icons", "shapes")
    items = {n: corpora.open_corpus(CorpusConfig("packaged", n), cache_folder()) for n in names}
    pool = Pool({name: Some(corpus, 100) for name, corpus in items.items()})
    weights = assets("efficientnet-lite0")
    stored = columns.scan(pool, [embeddings.column(ClusteringConfig(), weights.__getitem__)], tmp_path)
    encoder = vision.load_encoder(weights["efficientnet-lite0"])
    from pivotjax.data.decode import decode

    direct = np.asarray(vision.encode(encoder, np.stack([decode(pool[i], 224) for i in (0, 150, 299)]))).mean(1)
    np.testing.assert_allclose(stored["embedding"].take([0, 150, 299]), direct, rtol=2e-3, atol=2e-3)
    fitted = clustering.fit(stored["embedding"], np.arange(300), 3, 0, ClusteringConfig())
    assert adjusted_rand(clustering.assign(stored["embedding"], fitted), np.repeat(np.arange(3), 100)) > 0.4


class Some(Drawn):
    """The first samples of a corpus."""

    def __init__(self, corpus, count):
        object.__setattr__(self, "corpus", corpus)
        super().__init__("some", count)

    def __getitem__(self, index):
        return self.corpus[index]


def adjusted_rand(a: np.ndarray, b: np.ndarray) -> float:
    """Agreement of two partitions over that of chance, 1 where they are equal (Hubert and Arabie 1985)."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)

    def pairs(n):
        return np.sum(n * (n - 1) / 2)

    both, rows, across = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = rows * across / pairs(np.array(float(len(a))))
    return (both - chance) / ((rows + across) / 2 - chance)


@pytest.mark.assets
@pytest.mark.slow
def test_captions_are_embedded_by_the_frozen_llm(assets, tmp_path):
    """The mean over a caption's own tokens, one caption at a time without padding."""
    import jax.numpy as jnp
    from flax import nnx

    from pivotjax.data.scenarios import embeddings
    from pivotjax.data.scenarios.clustering import ClusteringConfig
    from pivotjax.models.language import load_language

    weights = assets("smollm2-135m")
    language = load_language(weights["smollm2-135m"])
    network = nnx.merge(language.graphdef, language.params)
    pool = Pool({"food": Drawn("food", 3)})
    for states in ("tokens", "hidden"):
        config = ClusteringConfig(of="caption", caption_states=states, caption_tokens=6)
        stored = columns.scan(pool, [embeddings.column(config, weights.__getitem__)], tmp_path)
        for index in range(3):
            ids = jnp.array(language.tokenizer.encode(pool.caption(index), add_special_tokens=False).ids[:6])[None]
            x = network.embed(ids)
            if states == "hidden":
                x, _ = network(x, jnp.arange(ids.shape[1])[None], None)
            direct = np.asarray(x.mean(1))[0]
            np.testing.assert_allclose(stored["embedding"].take([index])[0], direct, rtol=2e-3, atol=2e-3)
