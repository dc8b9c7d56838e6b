"""The spherical methods again, in plain NumPy float64, from their formulas, tensor by tensor, with whole vectors where
the library works on inner products. Nothing here is shared with the library.
"""

import numpy as np


def unit(v):
    norm = np.linalg.norm(v)
    return v / norm if norm else v


def arc(a, b, t, nearly):
    """From a to b; along the chord where |cos| is above `nearly`."""
    cosine = np.clip(np.sum(unit(a) * unit(b)), -1, 1)
    if abs(cosine) > nearly:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def merged(function):
    """A method of one tensor's vectors -> a method of all tensors, on updates or on weights."""

    def method(base, experts, *, on=function.on, scale=1.0, **options):
        result = {}
        for path, leaf in base.items():
            origin = leaf if on == "updates" else 0 * leaf
            vector = origin + function([e[path] - origin for e in experts.values()], list(experts), **options)
            result[path] = leaf + scale * (vector - leaf)
        return result

    return method


def on(which):
    def mark(function):
        function.on = which
        return function

    return mark


@on("weights")
def slerp(vectors, names, t=0.5):
    return arc(*vectors, t, 0.9995)


@on("updates")
def nuslerp(vectors, names, weights=None, along="tensor"):
    first, second = (1.0, 1.0) if weights is None else [weights[n] for n in names]
    t = second / (first + second)
    a, b = vectors
    if along == "tensor" or a.ndim < 2:
        return arc(a, b, t, 1 - 1e-16)
    if along == "inputs":
        return np.stack([arc(x, y, t, 1 - 1e-16) for x, y in zip(a.T, b.T)]).T
    return np.stack([arc(x, y, t, 1 - 1e-16) for x, y in zip(a, b)])


def shares(names, weights, normalize=True):
    values = np.array([1.0 if weights is None else weights[n] for n in names])
    return values / values.sum() if normalize else values


@on("updates")
def multislerp(vectors, names, weights=None, normalize=True):
    """With the step in the plane that touches the sphere at the mean direction, as it is defined."""
    w = shares(names, weights, normalize)
    units = [unit(v) for v in vectors]
    mean = sum(x * u for x, u in zip(w, units))
    if np.linalg.norm(mean) < 1e-8:
        return sum(x * v for x, v in zip(w, vectors))
    mean = unit(mean)
    tangent = sum(x * (u - np.sum(u * mean) * mean) for x, u in zip(w, units))
    size = np.linalg.norm(tangent)
    point = np.cos(size) * mean + np.sinc(size / np.pi) * tangent
    return point * sum(x * np.linalg.norm(v) for x, v in zip(w, vectors))


@on("weights")
def karcher(vectors, names, weights=None, iterations=10, tolerance=1e-5):
    w = shares(names, weights)
    length = sum(x * np.linalg.norm(v) for x, v in zip(w, vectors))
    some = [(x, unit(v)) for x, v in zip(w, vectors) if np.linalg.norm(v) > tolerance]
    if not some:
        return 0 * vectors[0]
    some = [(x / sum(y for y, _ in some), u) for x, u in some]
    mean = sum(x * u for x, u in some)
    mean = unit(mean) if np.linalg.norm(mean) >= tolerance else some[0][1]
    for _ in range(iterations):
        tangent = 0 * mean
        for x, u in some:
            away = u - np.sum(u * mean) * mean
            if np.linalg.norm(away) > 1e-12:
                tangent = tangent + x * np.arccos(np.clip(np.sum(u * mean), -1, 1)) * unit(away)
        size = np.linalg.norm(tangent)
        if size < tolerance:
            break
        mean = unit(np.cos(size) * mean + np.sin(size) * unit(tangent))
    return length * mean


@on("updates")
def model_stock(vectors, names, filter_wise=False, floor=0.0):
    if filter_wise and vectors[0].ndim > 1:
        return np.stack([model_stock([v[i] for v in vectors], names, floor=floor) for i in range(len(vectors[0]))])
    count = len(vectors)
    mean = sum(vectors) / count
    if count == 1:
        return mean
    cosines = []
    for j in range(count):
        for k in range(j + 1, count):
            below = max(np.linalg.norm(vectors[j]) * np.linalg.norm(vectors[k]), floor)
            cosines.append(np.sum(vectors[j] * vectors[k]) / below if below else 0)
    below = 1 + (count - 1) * np.mean(cosines)
    return count * np.mean(cosines) / below * mean if abs(below) >= 1e-6 else 0 * mean


REFERENCES = {f.__name__: merged(f) for f in (slerp, nuslerp, multislerp, karcher, model_stock)}
