"""A small projector world: three experts of three layers (two of equal shape), and features of three domains."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from pivotjax.merging.calibration import FeatureCalibration, agreement

SIZES = (7, 6, 6, 6)


def layer_inputs(params, x):
    """Linear layers with tanh between them."""
    seen = {}
    for i in range(len(params)):
        seen[f"linear_{i}"] = x
        x = jnp.tanh(x @ params[f"linear_{i}"]["kernel"] + params[f"linear_{i}"]["bias"])
    return seen


def output(params, x):
    """What comes out of the last layer."""
    last = f"linear_{len(params) - 1}"
    return jnp.tanh(layer_inputs(params, x)[last] @ params[last]["kernel"] + params[last]["bias"])


def numpy_inputs(matrices, x):
    """The same in NumPy float64: `{layer: [rows, d_in + 1]}` with the input of 1 last; matrices are `[W | b]`."""
    seen = {}
    for name, matrix in matrices.items():
        seen[name] = np.hstack([x, np.ones((len(x), 1))])
        x = np.tanh(seen[name] @ matrix.T)
    return seen


def numpy_output(matrices, x):
    last = list(matrices)[-1]
    return np.tanh(numpy_inputs(matrices, x)[last] @ matrices[last].T)


def random_params(rng, sizes=SIZES, spread=0.4, dtype=np.float32):
    return {
        f"linear_{i}": {
            "kernel": (spread * rng.normal(size=(a, b))).astype(dtype),
            "bias": (spread * rng.normal(size=b)).astype(dtype),
        }
        for i, (a, b) in enumerate(pairwise(sizes))
    }


def matrices(params):
    """`{layer: [W | b]}` in float64."""
    return {
        name: np.hstack([np.asarray(p["kernel"], np.float64).T, np.asarray(p["bias"], np.float64)[:, None]])
        for name, p in params.items()
    }


def flat(params):
    """`{linear_0/weight: [d_out, d_in], linear_0/bias: [d_out]}` in float64."""
    turned = {}
    for name, p in params.items():
        turned[f"{name}/weight"] = np.asarray(p["kernel"], np.float64).T
        turned[f"{name}/bias"] = np.asarray(p["bias"], np.float64)
    return turned


def from_flat(leaves):
    """The inverse of `flat`, in float64."""
    names = dict.fromkeys(path.split("/")[0] for path in leaves)
    return {n: {"kernel": leaves[f"{n}/weight"].T, "bias": leaves[f"{n}/bias"]} for n in names}


def shifted(base, rng, spread):
    other = random_params(rng, _sizes(base), spread, base["linear_0"]["kernel"].dtype)
    return {n: {leaf: base[n][leaf] + other[n][leaf] for leaf in base[n]} for n in base}


def _sizes(params):
    kernels = [layer["kernel"] for layer in params.values()]
    return (kernels[0].shape[0], *(kernel.shape[1] for kernel in kernels))


@dataclass
class World:
    """`features` are each domain's own, a pair a row: an image of one visual token; `captions` are the mean embeddings
    of their captions. The caption loss is any function of a projector."""

    base: dict
    experts: dict
    features: list

    @property
    def captions(self):
        width = _sizes(self.base)[-1]
        return [caption(x, width) for x in self.features]

    @property
    def calibration(self):
        return FeatureCalibration(
            layer_inputs,
            self.features,
            caption_loss,
            caption_gradient=loss_gradient,
            caption_fisher=partial(fisher, self.features, self.captions),
            caption_alignment=partial(alignment, self.features, self.captions),
            chunk=16,
        )


def caption(x, width):
    """The mean caption embedding that belongs to each row of x, `[rows, width]`: any fixed function."""
    mixer = np.random.default_rng(99).normal(size=(x.shape[-1], width))
    return np.sin(x @ mixer).astype(x.dtype)


def caption_loss(stacked):
    """[P]: the spread of the weights; any function of the parameters will do for the arithmetic of `loss_gain`."""
    return sum(jnp.square(p["kernel"]).mean((-1, -2)) + jnp.abs(p["bias"]).mean(-1) for p in stacked.values())


def smooth_loss(stacked, objective):
    """[P]: two more such functions, without kinks: on one, hundreds of steps in float32 and float64 would part."""
    shape = {"caption": lambda x: x**2, "entropy": lambda x: jnp.log1p(x**4)}[objective]
    return sum(shape(p["kernel"]).mean((-1, -2)) + shape(p["bias"]).mean(-1) for p in stacked.values())


@partial(jax.jit, static_argnums=1)
def loss_gradient(stacked, objective):
    return smooth_loss(stacked, objective), jax.grad(lambda p: smooth_loss(p, objective).sum())(stacked)


@jax.jit
def fisher(features, captions, stacked):
    """The loss of a pair is half the squared distance of its visual token to its caption."""

    def loss(params, x, target):
        return 0.5 * jnp.sum((output(params, x) - target) ** 2)

    def one(k):
        params = jax.tree.map(lambda leaf: leaf[k], stacked)
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, features[k], captions[k])
        return jax.tree.map(lambda g: (g**2).mean(0), gradients)

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(one, range(len(features))))


@partial(jax.jit, static_argnums=3)
def alignment(features, captions, stacked, measure):
    visual = jax.vmap(output, (0, None))(stacked, jnp.concatenate(features))
    return jax.vmap(lambda one: agreement(one, jnp.concatenate(captions), measure))(visual)


def make_world(count=3, sizes=SIZES, dtype=np.float32, seed=0, spread=0.4):
    rng = np.random.default_rng(seed)
    base = random_params(rng, sizes, dtype=dtype)
    common = shifted(base, rng, 0.25)  # experts have something in common
    experts = {name: shifted(common, rng, spread) for name in ("emoji", "icons", "shapes", "symbols")[:count]}
    mixers = [rng.normal(size=(sizes[0], sizes[0])) for _ in experts]
    features = []
    for k, mixer in enumerate(mixers):
        own = rng.normal(size=(40 + 10 * k, sizes[0])) @ mixer / 4 + 0.5 * rng.normal(size=sizes[0])
        features.append(own.astype(np.float32))
    return World(base, experts, features)
