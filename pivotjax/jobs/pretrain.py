"""`pivotjax pretrain RECIPE`: K domain experts (or one joint projector) in one program over one frozen backbone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax import config as configs
from pivotjax.checkpoints import store, torch_bridge
from pivotjax.data import assets, pipeline
from pivotjax.jobs import assemble, output
from pivotjax.jobs.assemble import DataConfig, ModelConfig
from pivotjax.models import projector
from pivotjax.progress import say
from pivotjax.training import parallel
from pivotjax.training.loop import CheckpointConfig, train
from pivotjax.training.optimizer import TrainingConfig, adamw, per_expert
from pivotjax.training.step import TrainState, init_state, make_step


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-trains one projector a domain, all in one program; `--joint` trains one projector on all domains instead."""

    out: Path
    """Folder for projectors, checkpoints and metrics."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: parallel.MeshConfig = field(default_factory=parallel.MeshConfig)
    joint: bool = False
    """Train one projector on all domains, at the samples a step that the experts have together."""
    seed: int = 0
    """Seed of W0 and of the order of the samples."""
    cache: Path | None = None
    """Folder for downloads and features (default: $PIVOTJAX_CACHE, else ~/.cache/pivotjax)."""


def main(args: Sequence[str]) -> None:
    """Command line."""
    run(configs.parse(PretrainConfig, args, "pivotjax pretrain"))


def run(config: PretrainConfig) -> Path:
    """Trains (or goes on training) and writes `out/projectors/<name>` and `<name>.safetensors`, W0 included."""
    needed = assemble.asset_names(config.model, config.data.domains)
    output.claim(config.out, config)
    cache = assets.cache_folder(config.cache)
    assets.fetch(needed, cache)
    frozen = assemble.load_frozen(config.model, config.data.prompt, config.data.max_caption, cache)
    domains = {name: assemble.load_domain(name, config.data, frozen, cache) for name in config.data.domains}
    experts = {"joint": list(domains)} if config.joint else {name: [name] for name in domains}

    w0 = initial_projector(config, frozen)
    state = _train(config, frozen, {name: [domains[d].splits["train"] for d in of] for name, of in experts.items()}, w0)
    info = {
        "init_id": projector.fingerprint(w0),
        "backbone": frozen.identity,
        "config": configs.resolved(config),
        "versions": assemble.versions(),
        "samples": {name: {split: len(s) for split, s in d.splits.items()} for name, d in domains.items()},
    }
    _save(config.out, "w0", w0, info | {"name": "w0", "domains": [], "alive": True})
    for name, params, alive in zip(experts, projector.unstack(state.params), np.asarray(state.alive), strict=True):
        title = name if config.joint else f"expert:{name}"
        _save(config.out, name, params, info | {"name": title, "domains": experts[name], "alive": bool(alive)})
    say(f"projectors: {config.out / 'projectors'}")
    return config.out / "projectors"


def initial_projector(config: PretrainConfig, frozen: assemble.Frozen) -> projector.Params:
    """The W0 of a seed: outputs start with the spread of the LLM's token embeddings."""
    embedding = frozen.language.params["embedding"]
    key = jax.random.key(config.seed)
    return projector.init(
        config.model.projector.kind, frozen.encoder.dim, frozen.language.config.dim, key, float(jnp.std(embedding))
    )


def _train(
    config: PretrainConfig, frozen: assemble.Frozen, experts: dict[str, list], w0: projector.Params
) -> TrainState:
    captioner = frozen.captioner
    samples = config.training.batch * (len(config.data.domains) if config.joint else 1)
    mesh = parallel.make_mesh(config.mesh, len(experts), samples)
    optimizer = per_expert(adamw(config.training))
    step = make_step(
        frozen.language.graphdef, optimizer, first_position=captioner.first_position, remat=config.training.remat
    )
    batches: Any = pipeline.train_dataset(
        experts, captioner, config.training.batch, config.seed, jax.process_index(), jax.process_count()
    )
    return train(
        step,
        init_state(w0, len(experts), optimizer),
        frozen.language.params,
        iter(batches),
        mesh=mesh,
        names=list(experts),
        config=config.training,
        checkpoints=config.checkpoints,
        folder=config.out,
    )


def _save(out: Path, name: str, params: projector.Params, info: dict[str, Any]) -> None:
    store.save_projector(out / "projectors" / name, params, info)
    torch_bridge.save_torch(out / "projectors" / f"{name}.safetensors", params, info)
