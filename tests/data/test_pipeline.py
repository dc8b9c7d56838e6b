"""The stream of batches: its promises about neighbours, epochs, processes and resuming."""

import itertools
from collections import Counter

import numpy as np
import pytest

from pivotjax.data.features import FeatureSource, build
from pivotjax.data.pipeline import train_dataset
from pivotjax.errors import InputError

SIZES = {"few": 3, "many": 40, "some": 11}


@pytest.fixture
def domains(tmp_path, encoder, make_items) -> dict[str, FeatureSource]:
    """Three domains of unequal size whose features are constant: sample i is i / 255."""
    return {name: FeatureSource(build(name, make_items(n, name), encoder, tmp_path), name) for name, n in SIZES.items()}


def take(dataset, count: int) -> list[dict]:
    return list(itertools.islice(iter(dataset), count))


def identities(features: np.ndarray) -> np.ndarray:
    """Which sample each row of a batch is."""
    return np.rint(features[..., 0, 0] * 255).astype(int)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def test_shapes_and_the_match_of_image_and_caption(domains, captioner):
    experts = {"a": [domains["many"], domains["few"]], "b": [domains["some"], domains["few"]]}
    (batch,) = take(train_dataset(experts, captioner, per_domain_batch=4, seed=0), 1)
    shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
    assert shapes == {
        "features": ((2, 8, 4, 3), np.float32),
        "tokens": ((2, 8, captioner.length), np.int32),
        "targets": ((2, 8, 5), np.int32),
        "weights": ((2, 8, 5), np.float32),
    }
    for expert, row in np.ndindex(2, 8):
        caption = captioner.encode(f"number {identities(batch['features'])[expert, row]}")
        assert np.array_equal(batch["tokens"][expert, row], caption.tokens)
        assert np.array_equal(batch["targets"][expert, row], caption.targets)
        assert np.array_equal(batch["weights"][expert, row], caption.weights)


def test_neighbours_change_nothing(domains, captioner):
    """Experts together, in any order, and as the domains of one: always the samples that each gets alone."""
    alone = {name: take(train_dataset({name: [source]}, captioner, 4, seed=7), 12) for name, source in domains.items()}
    together = take(
        train_dataset({name: [domains[name]] for name in ("some", "few", "many")}, captioner, 4, seed=7), 12
    )
    joint = take(
        train_dataset({"joint": [domains[name] for name in ("some", "few", "many")]}, captioner, 4, seed=7), 12
    )
    for step in range(12):
        for place, name in enumerate(("some", "few", "many")):
            for key, value in alone[name][step].items():
                assert np.array_equal(together[step][key][place], value[0])
                assert np.array_equal(joint[step][key][0, place * 4 : place * 4 + 4], value[0])


def test_every_epoch_is_a_new_shuffle_of_all(domains, captioner):
    batches = take(train_dataset({"few": [domains["some"]]}, captioner, 4, seed=1), 22)
    order = np.concatenate([identities(batch["features"])[0] for batch in batches]).reshape(8, 11)
    assert all(sorted(epoch) == list(range(11)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 8


def test_a_domain_smaller_than_a_batch(domains, captioner):
    (batch,) = take(train_dataset({"few": [domains["few"]]}, captioner, 9, seed=1), 1)
    assert Counter(identities(batch["features"])[0].tolist()) == {0: 3, 1: 3, 2: 3}


def test_one_sample(tmp_path, encoder, make_items, captioner):
    single = FeatureSource(build("one", make_items(1), encoder, tmp_path), "one")
    (batch,) = take(train_dataset({"one": [single]}, captioner, 4, seed=1), 1)
    assert identities(batch["features"]).tolist() == [[0, 0, 0, 0]]


def test_seed_and_name_decide_the_order(domains, captioner):
    def order(source, seed):
        batches = take(train_dataset({"e": [source]}, captioner, 10, seed), 4)
        return np.concatenate([identities(batch["features"])[0] for batch in batches]).tolist()

    many = domains["many"]
    assert order(many, 0) == order(many, 0)
    assert order(many, 0) != order(many, 1)
    assert order(many, 0) != order(FeatureSource(many.path, "renamed"), 0)


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_resumes_exactly(domains, captioner, stop):
    experts = {name: [source] for name, source in domains.items()}
    dataset = train_dataset(experts, captioner, 4, seed=5)
    whole = take(dataset, 10)
    iterator = iter(dataset)
    for _ in range(stop):
        next(iterator)
    state = iterator.get_state()
    next(iterator)  # going on must not change the state that was taken
    fresh = iter(train_dataset(experts, captioner, 4, seed=5))
    fresh.set_state(state)
    assert all(same(next(fresh), whole[step]) for step in range(stop, 10))


def test_processes_share_each_batch(domains, captioner):
    experts = {"a": [domains["many"], domains["few"]], "b": [domains["some"], domains["few"]]}
    whole = take(train_dataset(experts, captioner, 6, seed=2), 5)
    parts = [take(train_dataset(experts, captioner, 6, 2, process, 3), 5) for process in range(3)]
    for step in range(5):
        for key, value in whole[step].items():
            by_domain = value.reshape(2, 2, 6, *value.shape[2:])
            shared = [part[step][key].reshape(2, 2, 2, *value.shape[2:]) for part in parts]
            assert np.array_equal(np.concatenate(shared, axis=2), by_domain)


def test_bad_requests(domains, captioner):
    for experts in ({}, {"a": []}, {"a": [domains["few"]], "b": [domains["few"], domains["many"]]}):
        with pytest.raises(InputError, match="same number of domains"):
            train_dataset(experts, captioner, 4, seed=0)
    with pytest.raises(InputError, match="shared by 3 processes"):
        train_dataset({"a": [domains["few"]]}, captioner, 4, 0, process_index=0, process_count=3)


def test_a_damaged_file_stops_the_stream_with_its_name(domains, captioner):
    path = domains["many"].path
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="truncated or damaged"):
        take(train_dataset({"a": [FeatureSource(path, "many")]}, captioner, 4, seed=0), 1)
