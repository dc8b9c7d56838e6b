"""The methods that work entry by entry again, in plain NumPy float64, from their formulas: one tensor, one expert, one
entry at a time. Also the generator of the random masks, from its description. Nothing here is shared with the library.
"""

import hashlib

import numpy as np


def uniform(seed, name, path, shape):
    """Draws for one leaf of one expert, in the leaf's own layout."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{path}".encode(), digest_size=8).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    draws = [(mix((mix(i ^ first) + second) % 2**32) >> 8) / 2**24 for i in range(int(np.prod(shape)))]
    return np.array(draws).reshape(shape)


def drawn(seed, name, path, shape):
    """The same for a matrix `[d_out, d_in]` that the library sees as the kernel `[d_in, d_out]` of a Flax layer."""
    if path.endswith("/weight"):
        return uniform(seed, name, path.replace("/weight", "/kernel"), shape[::-1]).T
    return uniform(seed, name, path, shape)


def tensorwise(function):
    """A method of one tensor -> a method of all. The function takes {expert: update}, the path and options."""

    def method(base, experts, *, scale=None, **options):
        scale = function.scale if scale is None else scale
        return {path: leaf + scale * function({n: e[path] - leaf for n, e in experts.items()}, path, **options)
                for path, leaf in base.items()}

    return method


def default_scale(value):
    def mark(function):
        function.scale = value
        return function

    return mark


def fused(thin, weights, elect, normalize):
    weights = {n: 1.0 for n in thin} if weights is None else weights
    shape = next(iter(thin.values())).shape
    merged = np.zeros(shape)
    for j in np.ndindex(shape):
        values = {n: weights[n] * t[j] for n, t in thin.items()}
        if elect:
            values = {n: v for n, v in values.items() if v != 0 and np.sign(v) == np.sign(sum(values.values()))}
        merged[j] = sum(values.values())
        share = sum(weights[n] for n in values)
        if normalize and share:
            merged[j] /= share
    return merged


def restored(update, thin):
    """As large as the update in sum of magnitudes."""
    return thin * np.abs(update).sum() / np.abs(thin).sum() if np.any(thin) else thin


def rescaled(update, mask, probability, rescale):
    if rescale == "expected":
        return np.where(mask, update / np.maximum(probability, 1e-300), 0)
    return restored(update, update * mask) if rescale == "norm" else update * mask


def value(option, name):
    return option[name] if isinstance(option, dict) else option


def dare(elect):
    @default_scale(1.0 if elect else 0.3)
    def one(updates, path, density=0.5, rescale="expected", weights=None, normalize=elect, seed=0):
        thin = {n: rescaled(d, drawn(seed, n, path, d.shape) < value(density, n), value(density, n), rescale)
                for n, d in updates.items()}
        return fused(thin, weights, elect, normalize)

    return tensorwise(one)


def keep_probabilities(update, density, epsilon):
    """By rank in each row."""
    epsilon = min(epsilon, density, 1 - density)
    rows = update.reshape(-1, update.shape[-1])
    result = np.zeros(rows.shape)
    for i, row in enumerate(rows):
        for j, entry in enumerate(row):
            rank = np.sum(np.abs(row) < abs(entry))
            share = rank / (len(row) - 1) if len(row) > 1 else 0.5
            result[i, j] = density - epsilon + 2 * epsilon * share
    return result.reshape(update.shape)


def della(elect):
    @default_scale(1.0 if elect else 0.3)
    def one(updates, path, density=0.7, epsilon=0.15, rescale="expected", weights=None, normalize=elect, seed=0):
        thin = {}
        for n, d in updates.items():
            probability = keep_probabilities(d, value(density, n), value(epsilon, n))
            thin[n] = rescaled(d, drawn(seed, n, path, d.shape) < probability, probability, rescale)
        return fused(thin, weights, elect, normalize)

    return tensorwise(one)


def window(update, density, gamma):
    """Without the largest and the smallest entries."""
    size = update.size
    target, top = int(density * size), int(gamma * size)
    bottom = max(0, size - target - top)
    thin = np.zeros(size)
    for place, j in enumerate(np.argsort(np.abs(update).ravel())):
        if bottom <= place < bottom + target:
            thin[j] = update.ravel()[j]
    return thin.reshape(update.shape)


def breadcrumbs(elect):
    @default_scale(1.0 if elect else 0.3)
    def one(updates, path, density=0.9, gamma=0.01, weights=None, normalize=elect, rescale="none"):
        thin = {n: window(d, value(density, n), value(gamma, n)) for n, d in updates.items()}
        if rescale == "norm":
            thin = {n: restored(updates[n], t) for n, t in thin.items()}
        return fused(thin, weights, elect, normalize)

    return tensorwise(one)


@default_scale(1.0)
def sce(updates, path, select=0.1, floor=0.0):
    stack = np.stack(list(updates.values()))
    if select < 1:
        variance = np.var(stack, axis=0)
        variance[(stack == stack[0]).all(0)] = 0
        count = int(select * np.count_nonzero(variance) + 1e-6)
        chosen = np.argsort(variance.ravel())[::-1][:count]
        mask = np.zeros(variance.size)
        mask[chosen] = 1
        stack = stack * mask.reshape(variance.shape)
    energy = np.array([np.mean(d**2) for d in stack])
    weights = energy / energy.sum() if energy.sum() > floor else np.full(len(stack), 1 / len(stack))
    merged = np.zeros(stack.shape[1:])
    for j in np.ndindex(merged.shape):
        sign = np.sign(sum(d[j] for d in stack))
        agreeing = [k for k, d in enumerate(stack) if d[j] != 0 and np.sign(d[j]) == sign]
        if sum(weights[k] for k in agreeing) > 0:
            merged[j] = sum(weights[k] * stack[k][j] for k in agreeing) / sum(weights[k] for k in agreeing)
    return merged


def metagpt(base, experts, over="model", scale=1.0):
    def energy(name, path):
        paths = base if over == "model" else [path]
        return sum(np.sum((experts[name][p] - base[p]) ** 2) for p in paths)

    merged = {}
    for path in base:
        all_of_them = sum(energy(n, path) for n in experts)
        share = {n: energy(n, path) / all_of_them if all_of_them else 0 for n in experts}
        merged[path] = base[path] + scale * sum(share[n] * (e[path] - base[path]) for n, e in experts.items())
    return merged


def lines(base, experts, alpha=None, beta=0.5, weights=None, scale=1.0):
    weights = {n: 1.0 for n in experts} if weights is None else weights
    plain = {path: sum(e[path] - base[path] for e in experts.values()) for path in base}
    total = {path: sum(weights[n] * (e[path] - base[path]) for n, e in experts.items()) for path in base}
    if alpha is None:
        below = sum(np.abs(leaf).sum() for leaf in total.values())
        alpha = (sum(np.abs(leaf).sum() for leaf in plain.values()) / below if below else 1) / len(experts)
    layers = list(dict.fromkeys(path.split("/")[0] for path in base))
    depth = {name: i / max(len(layers) - 1, 1) for i, name in enumerate(layers)}
    return {path: base[path] + scale * (alpha + beta * depth[path.split("/")[0]]) * total[path] for path in base}


REFERENCES = {
    "dare_linear": dare(elect=False),
    "dare_ties": dare(elect=True),
    "della_linear": della(elect=False),
    "della": della(elect=True),
    "breadcrumbs": breadcrumbs(elect=False),
    "breadcrumbs_ties": breadcrumbs(elect=True),
    "sce": tensorwise(sce),
    "metagpt": metagpt,
    "lines": lines,
}
