"""Fisher merging, AdaMerging and agreement with captions again, in plain NumPy float64.

Gradients are central differences, one parameter or coefficient at a time; nothing here is shared with the library.
"""

import numpy as np
from small_world import from_flat, matrices, numpy_output

_STEP = 1e-6


def example_losses(flat, features, captions):
    """Half the squared distance of every visual token to its caption, `[rows]`."""
    got = numpy_output(matrices(from_flat(flat)), features.astype(np.float64))
    return 0.5 * np.sum((got - captions.astype(np.float64)) ** 2, axis=1)


def fisher_of(flat, features, captions):
    """E[g^2] of every parameter, from one slope an example."""
    found = {}
    for path, leaf in flat.items():
        squares = np.zeros(leaf.size)
        for j in range(leaf.size):
            ends = []
            for sign in (1, -1):
                moved = leaf.copy()
                moved.flat[j] += sign * _STEP
                ends.append(example_losses(flat | {path: moved}, features, captions))
            squares[j] = np.mean(((ends[0] - ends[1]) / (2 * _STEP)) ** 2)
        found[path] = squares.reshape(leaf.shape)
    return found


def fisher(base, experts, *, world, normalize=False, floor=1e-6, weights=None, scale=1.0):
    found = [fisher_of(e, *own) for e, own in zip(experts.values(), zip(world.features, world.captions))]
    means = [sum(f.sum() for f in one.values()) / sum(f.size for f in one.values()) for one in found]
    if not normalize:
        means = [np.mean(means)] * len(means)
    merged = {}
    for path in base:
        top = bottom = 0
        for name, expert, one, mean in zip(experts, experts.values(), found, means):
            importance = (1 if weights is None else weights[name]) * np.maximum(one[path] / mean, floor)
            top, bottom = top + importance * expert[path], bottom + importance
        merged[path] = base[path] + scale * (top / bottom - base[path])
    return merged


def smooth_loss(flat, objective):
    return sum(np.mean(leaf**2 if objective == "caption" else np.log1p(leaf**4)) for leaf in flat.values())


def adamerging(base, experts, *, world=None, objective="caption", per="layer", init=0.3, lr=1e-3, steps=500, scale=1.0):
    layers = list(dict.fromkeys(path.split("/")[0] for path in base)) if per == "layer" else [None]
    lambdas = np.full((len(layers), len(experts)), init)

    def merge(values):
        merged = {}
        for path in base:
            row = values[0] if per == "task" else values[layers.index(path.split("/")[0])]
            merged[path] = base[path] + sum(v * (e[path] - base[path]) for v, e in zip(row, experts.values()))
        return merged

    first, second = np.zeros_like(lambdas), np.zeros_like(lambdas)
    for t in range(1, steps + 1):
        slopes = np.zeros_like(lambdas)
        for place in np.ndindex(lambdas.shape):
            move = np.zeros_like(lambdas)
            move[place] = _STEP
            ends = [smooth_loss(merge(lambdas + sign * move), objective) for sign in (1, -1)]
            slopes[place] = (ends[0] - ends[1]) / (2 * _STEP)
        first = 0.9 * first + 0.1 * slopes
        second = 0.999 * second + 0.001 * slopes**2
        lambdas -= lr * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    merged = merge(lambdas)
    return {path: base[path] + scale * (merged[path] - base[path]) for path in base}


def agreement(visual, captions, measure):
    if measure == "cosine":
        return np.mean([v @ c / np.linalg.norm(v) / np.linalg.norm(c) for v, c in zip(visual, captions)])
    x, y = visual - visual.mean(0), captions - captions.mean(0)
    return np.sum((x.T @ y) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def alignment(flat, features, captions, measure):
    """Of one projector, over the pairs of all domains."""
    visual = [numpy_output(matrices(from_flat(flat)), x.astype(np.float64)) for x in features]
    return agreement(np.concatenate(visual), np.concatenate(captions).astype(np.float64), measure)


REFERENCES = {"fisher": fisher, "adamerging": adamerging}
