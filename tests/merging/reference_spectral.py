"""The spectral baselines again, in plain NumPy float64 with `np.linalg.svd`, from the formulas: one weight at a time.

Weights are `[d_out, d_in]`; biases are averaged. Nothing here is shared with the library, except the random numbers of
`knots_dare`, which are the library's own (their distribution is tested elsewhere).
"""

import math

import numpy as np


def by_weight(one):
    """A reference over flat dicts from one for the updates of a single weight."""

    def reference(base, experts, scale=None, **options):
        merged = {}
        for path in base:
            updates = {name: e[path] - base[path] for name, e in experts.items()}
            if path.endswith("/weight"):
                extra = {"path": path, "names": list(updates)} if one is knots_dare else {}
                update = one(list(updates.values()), **extra, **options)
            else:
                update = sum(updates.values()) / len(updates)
            merged[path] = base[path] + (DEFAULT_SCALES.get(one, 1.0) if scale is None else scale) * update
        return merged

    return reference


def svd(x, rank=None):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank].T


def polar(x):
    """U_r V_r' of the numerical rank."""
    u, s, v = svd(x)
    alive = s > 1e-7 * max(s[0], 1e-300)
    return u[:, alive] @ v[:, alive].T


def triplets(updates, rank, wholes=None):
    """Leading triplets of each update, without directions whose singular value is rounding of the (whole) update."""
    us, ss, vs = [], [], []
    for update, whole in zip(updates, wholes or updates):
        u, s, v = svd(update, rank)
        alive = s > 1e-7 * np.linalg.norm(whole)
        us.append(u * alive)
        ss.append(s * alive)
        vs.append(v * alive)
    return us, ss, vs


def share(updates, rank):
    return rank or max(1, min(updates[0].shape) // len(updates))


def tsv_m(updates, rank=None):
    us, ss, vs = triplets(updates, share(updates, rank))
    return polar(np.hstack(us)) @ np.diag(np.concatenate(ss)) @ polar(np.hstack(vs)).T


def iso_c(updates):
    _, s, _ = svd(sum(updates))
    return s.mean() * polar(sum(updates))


def iso_cts(updates, common=0.8):
    count, size = len(updates), min(updates[0].shape)
    own = min(round((size - int(common * size)) / count), size // count)
    us, ss, vs = triplets([sum(updates)], size - own * count)
    rest = [d - us[0] @ us[0].T @ d for d in updates]
    own_us, own_ss, own_vs = triplets(rest, own, updates) if own else ([], [], [])
    sigma = np.concatenate(ss + own_ss)
    return sigma.sum() / size * polar(np.hstack(us + own_us)) @ polar(np.hstack(vs + own_vs)).T


def elect(entries, count=None):
    """TIES on K arrays; entries within 1e-4 of the smallest kept one are kept too."""
    trimmed = []
    for own in entries:
        size = np.abs(own)
        least = 0 if count is None else np.sort(size.ravel())[-count]
        trimmed.append(np.where(size >= (1 - 1e-4) * least, own, 0))
    merged = np.zeros_like(trimmed[0])
    for place in np.ndindex(merged.shape):
        values = [own[place] for own in trimmed]
        agreeing = [v for v in values if v != 0 and np.sign(v) == np.sign(sum(values))]
        merged[place] = np.mean(agreeing) if agreeing else 0
    return merged


def aligned(updates):
    u, s, v = svd(np.hstack(updates))
    alive = s > 1e-7 * max(s[0], 1e-300)
    return u * alive, [np.diag(s * alive) @ part.T for part in np.split(v, len(updates))], alive.sum()


def knots_ties(updates, density=0.2):
    u, coefficients, rank = aligned(updates)
    return u @ elect(coefficients, max(1, math.floor(density * rank * updates[0].shape[1] + 1e-6)))


def knots_dare(updates, path, names, density=0.9, seed=0):
    from pivotjax.merging.randomness import keys, uniform

    u, coefficients, _ = aligned(updates)
    drawn = keys(seed, names, path.replace("/weight", "/kernel"))  # as the parameters call it
    draws = [np.asarray(uniform(key, coefficients[0].shape), np.float64) for key in drawn]
    return u @ elect([np.where(draw < density, c / density, 0) for draw, c in zip(draws, coefficients)])


def normal_equations(targets, measures, updates):
    grams = [m.T @ m / np.sum(d**2) if d.any() else 0 * m.T @ m for m, d in zip(measures, updates)]
    return sum(grams), sum(t @ g for t, g in zip(targets, grams))


def descend(start, gram, moment, steps, rate, momentum=None):
    """Adam as in its paper (arXiv 1412.6980), or gradient descent with momentum."""
    place, first, second = start.copy(), 0, 0
    for t in range(1, steps + 1):
        slope = 2 * (place @ gram - moment)
        if momentum is not None:
            first = momentum * first + slope
            place = place - rate * first
            continue
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        place = place - rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    return place


def wudi(updates, steps=None, rate=1e-5):
    gram, moment = normal_equations(updates, updates, updates)
    if steps is not None:
        return descend(sum(updates), gram, moment, steps, rate)
    return moment @ np.linalg.pinv(gram, rcond=1e-10, hermitian=True)


def swudi(updates, time=300.0, keep=0.65):
    gram, _ = normal_equations(updates, updates, updates)
    values, vectors = np.linalg.eigh(gram)
    weight = np.zeros(len(values))
    leading = math.ceil(keep * len(values) - 1e-6)
    weight[-leading:] = 1 - np.exp(-time * np.maximum(values[-leading:], 0))
    start = sum(updates)
    return start + (wudi(updates) - start) @ vectors @ np.diag(weight) @ vectors.T


def optmerge(updates, form="full", rank=None, steps=300, rate=None):
    leading, mean = share(updates, rank), sum(updates) / len(updates)
    centre = mean if form == "full" else 0 * mean
    targets, measures = [], []
    for update in updates:
        u, s, v = svd(update - centre, leading)
        targets.append(centre + u @ np.diag(s) @ v.T)
        _, s, v = svd(update, leading)
        measures.append(np.diag(s) @ v.T)
    gram, moment = normal_equations(targets, measures, updates)
    if form == "full":
        return descend(sum(updates), gram, moment, steps, rate or 1e-5)
    return descend(mean, gram, moment, steps, rate or 1e-4, momentum=0.9)


def star(updates, eta=40.0):
    total = 0
    for update in updates:
        u, s, v = svd(update)
        kept = np.concatenate([[True], np.cumsum(s)[:-1] < eta / 100 * s.sum() - 1e-12])
        kept &= s > 0
        factor = s.sum() / s[kept].sum() if kept.any() else 0
        total = total + u[:, kept] @ np.diag(factor * s[kept]) @ v[:, kept].T
    return total / len(updates)


def cart(updates, rank=0.08, strength=1.0):
    mean = sum(updates) / len(updates)
    total = 0
    for update in updates:
        u, s, v = svd(update - mean, max(1, int(rank * min(mean.shape) + 1e-6)))
        total = total + u @ np.diag(s) @ v.T
    return mean + strength * total


def smoothed(s, smoothing, ratio):
    alive = s > 0
    if smoothing == "none" or not alive.any():
        return s
    shape = np.zeros_like(s)
    steepness = min(ratio, s[0] / s[alive][-1]) if smoothing == "linear" else 1
    shape[alive] = np.linspace(steepness, 1, alive.sum())
    return s.sum() * shape / shape.sum()


def dc_merge(updates, density=0.001, smoothing="none", ratio=5.0, rank=None):
    leading = share(updates, rank)
    us, ss, vs = triplets(updates, leading)
    left, right = polar(np.hstack(us)), polar(np.hstack(vs))
    inside = [left.T @ u @ np.diag(smoothed(s, smoothing, ratio)) @ v.T @ right for u, s, v in zip(us, ss, vs)]
    merged = elect(inside, max(1, int(density * inside[0].size + 1e-6)))
    mask = np.kron(np.eye(len(updates)), np.ones((leading, leading)))
    return left @ (merged * mask) @ right.T


def svc(updates, of="sum", alpha=1.0):
    before = {
        "sum": sum,
        "task_arithmetic": lambda d: 0.3 * sum(d),
        "ties": lambda d: elect(d, max(1, int(0.2 * d[0].size))),
        "tsv_m": tsv_m,
        "star": star,
        "wudi": wudi,
    }[of](updates)
    u, s, v = svd(before)
    for r in range(len(s)):
        contained = []
        for update in updates:
            own = u[:, r] @ update
            responds = np.linalg.norm(own) > 1e-6 * np.linalg.norm(update)
            contained.append(max(alpha, s[r] * v[:, r] @ own / (own @ own)) if responds else alpha)
        s[r] *= len(updates) / sum(contained)
    return u @ np.diag(s) @ v.T


DEFAULT_SCALES = {knots_ties: 0.6, knots_dare: 0.6}
REFERENCES = {one.__name__: by_weight(one) for one in (
    tsv_m, iso_c, iso_cts, knots_ties, knots_dare, wudi, swudi, optmerge, star, cart, dc_merge, svc)}  # fmt: skip
