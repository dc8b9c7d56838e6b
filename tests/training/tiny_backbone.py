"""A tiny random backbone and random batches: everything that the training room needs, in a second."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pivotjax.models import projector
from pivotjax.models.language import FAMILIES, DecoderConfig, abstract
from pivotjax.models.vlm import IMAGE_TOKEN
from pivotjax.training.optimizer import TrainingConfig, adamw, per_expert
from pivotjax.training.step import Network, init_state, make_step

VISUAL, PROMPT, CAPTION, FEATURE = 4, 1, 5, 12
CONFIG = DecoderConfig(
    vocab_size=50, dim=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, tie_embeddings=True
)


class Tiny(NamedTuple):
    """A backbone with its step, and W0."""

    graphdef: nnx.GraphDef
    frozen: dict  # {"language": parameters}
    w0: projector.Params
    training: TrainingConfig
    first_position: int = VISUAL + PROMPT - 1
    sight: tuple = ()  # the encoder's part of the network, where batches bring images

    @property
    def network(self):
        return Network(self.graphdef, *self.sight)

    def step(self, layout=None, **changes):
        return make_step(self.network, self.optimizer, dataclasses.replace(self.training, **changes), layout)

    @property
    def optimizer(self):
        return per_expert(adamw(self.training))

    def state(self, experts):
        return init_state(self.w0, experts, self.optimizer)

    def batch(self, seed, experts=3, size=4, dtype=np.float32):
        rng = np.random.default_rng(seed)
        shape = (experts, size)
        targets = rng.integers(0, CONFIG.vocab_size, (*shape, CAPTION))
        lengths = rng.integers(2, CAPTION + 1, shape)
        image = np.full((*shape, VISUAL), IMAGE_TOKEN)
        prompt = np.full((*shape, PROMPT), 7)
        return {
            "features": rng.normal(size=(*shape, 1, VISUAL, FEATURE)).astype(dtype),
            "tokens": np.concatenate([image, prompt, targets[..., :-1]], axis=-1).astype(np.int32),
            "targets": targets.astype(np.int32),
            "places": np.broadcast_to(self.first_position + np.arange(CAPTION, dtype=np.int32), targets.shape),
            "weights": (np.arange(CAPTION) < lengths[..., None]).astype(dtype),
        }

    def packed(self, seed, experts=3, size=4, samples=2, spare=3):
        """The batch of `samples * size` rows of `batch` with `samples` of them in one row, and `spare` of padding."""
        plain, shape = self.batch(seed, experts, samples * size), (experts, size)
        length = plain["tokens"].shape[-1]
        first = self.first_position + np.arange(CAPTION) + length * np.arange(samples)[:, None]

        def padded(array):
            array = np.broadcast_to(array, (*shape, samples * length))
            return np.pad(array, [(0, 0), (0, 0), (0, spare)]).astype(np.int32)

        return {
            "features": plain["features"].reshape(*shape, samples, VISUAL, FEATURE),
            "tokens": padded(plain["tokens"].reshape(*shape, -1)),
            "targets": plain["targets"].reshape(*shape, -1),
            "places": np.broadcast_to(first.reshape(-1), (*shape, samples * CAPTION)).astype(np.int32),
            "weights": plain["weights"].reshape(*shape, -1),
            "segments": padded(np.repeat(np.arange(1, samples + 1), length)),
            "positions": padded(np.tile(np.arange(length), samples)),
        }


def build(dtype=jnp.float32, config=CONFIG, **training) -> Tiny:
    """Random weights: norms 1, the rest normal with the spread that keeps activations near 1."""
    graphdef, shapes = abstract(FAMILIES["llama"], config, dtype)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, dtype)
        return jnp.asarray(rng.normal(scale=leaf.shape[-2] ** -0.5, size=leaf.shape), dtype)

    frozen = jax.tree_util.tree_map_with_path(fill, shapes)
    w0 = projector.init("mlp2x_gelu", FEATURE, config.dim, jax.random.key(1), 0.1)
    w0 = jax.tree.map(lambda a: a.astype(dtype), w0)
    settings = TrainingConfig(**{"steps": 20, "learning_rate": 1e-2} | training)
    return Tiny(graphdef, {"language": frozen}, w0, settings)
