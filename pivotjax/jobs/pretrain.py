"""`pivotjax pretrain RECIPE`: K domain experts (or one joint projector) in one program over one frozen backbone."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pivotjax import config as configs
from pivotjax.checkpoints import store, torch_bridge
from pivotjax.checkpoints.training import CheckpointConfig, prepare_folder
from pivotjax.data import assets
from pivotjax.data.domains import Split
from pivotjax.data.pipeline import Feed
from pivotjax.errors import InputError
from pivotjax.jobs import assemble, output
from pivotjax.jobs.assemble import DataConfig, ModelConfig
from pivotjax.models import projector, vision
from pivotjax.progress import say
from pivotjax.tpu import flops
from pivotjax.training import hosts, parallel
from pivotjax.training.evaluation import HeldOut
from pivotjax.training.hosts import HostsConfig
from pivotjax.training.loop import train
from pivotjax.training.metrics import MetricsConfig, Work
from pivotjax.training.optimizer import TrainingConfig, adamw, per_expert
from pivotjax.training.step import Network, TrainState, init_state, make_evaluation, make_step
from pivotjax.versions import versions

_LATER = ("merges", "export", "unseen", "calibration", "measure")  # of `pivotjax pipeline`, after training
# What the errors of a run advise to change, and paths of models, for which their hashes stand.
_FREE = ("training.guard", "data.bad_limit", "model.vision", "model.language")
_DECIDES = ("model", "data", "training", "joint", "seed")  # sections that the numbers of a run depend on


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-trains one projector a domain, all in one program; `--joint` trains one projector on all domains instead."""

    out: Path
    """Folder for projectors, checkpoints and metrics."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    mesh: parallel.MeshConfig = field(default_factory=parallel.MeshConfig)
    parallel: Literal["jit", "pmap"] = "jit"
    """jit: one program over the mesh. pmap: data parallelism over one host's devices (mesh.data); the same numbers."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    joint: bool = False
    """Train one projector on all domains, at the samples a step that the experts have together."""
    seed: int = 0
    """Seed of W0 and of the order of the samples."""
    cache: Path | None = None
    """Folder for downloads and features (default: $PIVOTJAX_CACHE, else ~/.cache/pivotjax)."""


@dataclass(frozen=True)
class Trained:
    """The outcome of a training run, still on its devices.

    Fields:
        config, cache: of the run.
        frozen: the frozen models; the LLM's weights are on the mesh.
        domains: what was trained on, by name.
        sources: expert -> names of its domains.
        w0: the projector that all experts started from, on the host.
        state: parameters `[K, ...]` and optimizer state, on the mesh.
        layout: the mesh.
    """

    config: PretrainConfig
    cache: Path
    frozen: assemble.Frozen
    domains: dict[str, assemble.Domain]
    sources: dict[str, list[str]]
    w0: projector.Params
    state: TrainState
    layout: parallel.Layout

    @property
    def names(self) -> list[str]:
        """The experts, in the order of the leading axis of `state.params`."""
        return list(self.sources)

    def base(self) -> store.Projector:
        """W0 with its provenance."""
        return self._projector(self.w0, "w0", [], True)

    def experts(self, dead: bool = False) -> dict[str, store.Projector]:
        """Each expert on the host with its provenance, by name; those that were retired only with `dead`."""
        alive = hosts.fetch(self.state.alive)
        each = zip(self.sources.items(), projector.unstack(hosts.fetch(self.state.params)), alive, strict=True)
        return {
            name: self._projector(params, name if self.config.joint else f"expert:{name}", domains, bool(lives))
            for (name, domains), params, lives in each
            if lives or dead
        }

    def load_domain(self, name: str) -> assemble.Domain:
        """Another domain for the same frozen models."""
        frozen = _with_encoder(self.frozen, jax.device_put)
        with hosts.cache_filled_once(self.cache):
            return assemble.load_domain(name, self.config.data, frozen, self.cache, held_out_only=True)

    def _projector(self, params: projector.Params, name: str, domains: list[str], alive: bool) -> store.Projector:
        info = self._info | {"fingerprint": projector.fingerprint(params)}
        return store.Projector(params, info | {"name": name, "domains": domains, "alive": alive})

    @functools.cached_property
    def _info(self) -> dict[str, Any]:
        return {
            "format": store.FORMAT,
            "init_id": projector.fingerprint(self.w0),
            "backbone": self.frozen.identity,
            "config": configs.resolved(self.config),
            "versions": versions(),
            "samples": {name: {split: len(s) for split, s in d.splits.items()} for name, d in self.domains.items()},
        }


def main(args: Sequence[str]) -> None:
    """Command line."""
    run(configs.parse(PretrainConfig, args, "pivotjax pretrain"))


def run(config: PretrainConfig) -> Path:
    """Trains (or goes on training) and writes `out/projectors/<name>` and `<name>.safetensors`, W0 included."""
    with trained(config) as outcome:
        return write(outcome)


@contextlib.contextmanager
def trained(config: PretrainConfig, needs: Sequence[Split] = ()) -> Iterator[Trained]:
    """Trains, or goes on training. The processes of the run are joined until the context is left.

    `needs` are held-out splits that every domain must have for what comes after training.
    """
    _check(config)
    with hosts.joined(config.hosts):
        if jax.process_index() == 0:
            output.claim(config.out, config, (*_LATER, *_FREE))
        if config.checkpoints.folder or jax.process_count() > 1:  # what may fail is found before minutes of loading
            prepare_folder(config.out, config.checkpoints)
        yield _trained(config, needs)


def _check(config: PretrainConfig) -> None:
    """InputError for options that would do nothing."""
    if config.checkpoints.keep_best and not config.metrics.evaluate_every:
        raise InputError("checkpoints.keep_best goes by the held-out loss; give metrics.evaluate_every as well")
    if config.metrics.profile_from > config.training.steps:
        raise InputError(
            f"metrics.profile_from is {config.metrics.profile_from}, but training.steps {config.training.steps}; give "
            "a step of the run"
        )


def write(outcome: Trained) -> Path:
    """Process 0 writes W0 and every expert to `out/projectors`, whose path is returned."""
    folder, experts = outcome.config.out / "projectors", outcome.experts(dead=True)
    if jax.process_index() == 0:
        for name, one in ({"w0": outcome.base()} | experts).items():
            store.save_projector(folder / name, one.params, one.info)
            torch_bridge.save_torch(folder / f"{name}.safetensors", one.params, one.info)
    say(f"projectors: {folder}")
    return folder


def _trained(config: PretrainConfig, needs: Sequence[Split] = ()) -> Trained:
    cache = assets.cache_folder(config.cache)
    with hosts.cache_filled_once(cache):
        names = assemble.domain_names(config.data, cache)
        assemble.check_weights(config.data, names, config.joint)
        assets.fetch(assemble.asset_names(config.model, config.data.packaged), cache)
        corpora = assemble.open_corpora(config.data, cache)
    sources = {"joint": list(names)} if config.joint else {name: [name] for name in names}
    rows = config.training.batch // config.data.pack * len(next(iter(sources.values())))
    layout = parallel.layout(config.parallel, parallel.make_mesh(config.mesh, len(sources), rows))
    with hosts.cache_filled_once(cache):
        frozen = assemble.load_frozen(
            config.model, config.data, cache, lambda shapes: parallel.shardings(layout.mesh, "frozen/language", shapes)
        )
        domains = {name: assemble.load_domain(name, config.data, frozen, cache) for name in config.data.packaged}
    for name in names[len(domains) :]:  # the processes share the encoding of what is large
        domains[name] = assemble.load_domain(name, config.data, frozen, cache, corpora=corpora)
    for domain in domains.values():
        for split in needs:
            domain.samples(split)
    # What was to be encoded is: from here on only the step's own copy of the encoder is on the devices.
    frozen = _with_encoder(frozen, jax.device_get)
    w0 = initial_projector(config, frozen)
    state = _state(config, frozen, domains, sources, w0, layout)
    return Trained(config, cache, frozen, domains, sources, w0, state, layout)


def _with_encoder(frozen: assemble.Frozen, change: Callable[[Any], Any]) -> assemble.Frozen:
    encoder = frozen.encoder._replace(params=change(frozen.encoder.params))
    return dataclasses.replace(frozen, encoder=encoder)


def _state(
    config: PretrainConfig,
    frozen: assemble.Frozen,
    domains: dict[str, assemble.Domain],
    sources: dict[str, list[str]],
    w0: projector.Params,
    layout: parallel.Layout,
) -> TrainState:
    """The state after the last step."""

    def feed(split: str, seed: int):
        whole = assemble.feed(sources, domains, config.data, frozen, config.training.batch, seed, split)
        return whole.part(parallel.local_share(layout.mesh, len(sources), whole.rows))

    encoder, online = vision.in_dtype(frozen.encoder, jnp.dtype(config.model.dtype)), config.data.features == "online"
    network = Network(frozen.language.graphdef, encoder.graphdef, encoder.features, encoder.normalise)
    weights = {"language": frozen.language.params} | ({"vision": encoder.params} if online else {})
    optimizer, training = per_expert(adamw(config.training)), feed("train", config.seed)
    held_out = None
    if config.metrics.evaluate_every:
        evaluate = make_evaluation(network, config.training, layout)
        held_out = HeldOut(evaluate, feed(config.metrics.evaluate_split, 0), layout, config.metrics.evaluate_batches)
    return train(
        make_step(network, optimizer, config.training, layout),
        init_state(w0, len(sources), optimizer),
        weights,
        training,
        layout=layout,
        config=config.training,
        checkpoints=config.checkpoints,
        metrics=config.metrics,
        folder=config.out,
        held_out=held_out,
        work=_work(config, frozen, training, w0),
        belongs=_belongs(config, frozen, domains),
    )


def initial_projector(config: PretrainConfig, frozen: assemble.Frozen) -> projector.Params:
    """The W0 of a seed: outputs start with the spread of the LLM's token embeddings. The same bits on any mesh."""
    embedding = jnp.asarray(hosts.fetch(frozen.language.params["embedding"]))
    key = jax.random.key(config.seed)
    return projector.init(
        config.model.projector.kind, frozen.encoder.dim, frozen.language.config.dim, key, float(jnp.std(embedding))
    )


def _belongs(
    config: PretrainConfig, frozen: assemble.Frozen, domains: dict[str, assemble.Domain]
) -> dict[str, Any]:
    """What a checkpoint of the run is made of. InputError where the processes do not see the same data."""
    settings = {key: value for key, value in output.compared(config, _FREE).items() if key.split(".")[0] in _DECIDES}
    made_of = {f"backbone.{part}": identity for part, identity in frozen.identity.items()}
    made_of |= {f"data of {name}": domain.identity for name, domain in domains.items()}
    hosts.agree(made_of)
    return settings | made_of


def _work(config: PretrainConfig, frozen: assemble.Frozen, feed: Feed, w0: projector.Params) -> Work:
    """The least FLOPs of a token, an image and a caption token, as `pivotjax compile` counts them."""
    encoder, rows, online = frozen.encoder, feed.layout, config.data.features == "online"
    parts = encoder.graphdef, encoder.params, encoder.features, encoder.normalise, encoder.image_size
    row = flops.Work(1, 1, rows.images, encoder.num_tokens, rows.length, rows.targets, online)
    least = flops.minimum(row, frozen.language.config, w0, flops.of_image(*parts) if online else 0.0)
    return Work(
        token=(least.decoder + least.attention) / rows.length,
        image=(least.projector + least.vision) / rows.images,
        target=least.head / rows.targets,
    )
