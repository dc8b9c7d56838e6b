"""The merge methods again, in plain NumPy float64, from the formulas: one layer, one expert, one direction at a time.

Matrices are `[d_out, d_in]`; the bias is their last column. Nothing here is shared with the library.
"""

import numpy as np


def average(base, experts, weights=None):
    weights = np.ones(len(experts)) if weights is None else np.asarray(weights, float)
    return sum(w * e for w, e in zip(weights, experts)) / weights.sum()


def task_arithmetic(base, experts, scale=0.3, weights=None, normalize=False):
    weights = np.ones(len(experts)) if weights is None else np.asarray(weights, float)
    if normalize:
        weights = weights / weights.sum()
    return base + scale * sum(w * (e - base) for w, e in zip(weights, experts))


def ties(base, experts, density=0.2, scale=1.0, weights=None, normalize=True):
    """On one tensor."""
    weights = np.ones(len(experts)) if weights is None else np.asarray(weights, float)
    trimmed = []
    for w, expert in zip(weights, experts):
        update = (expert - base).ravel()
        keep = max(1, int(density * update.size))
        threshold = np.sort(np.abs(update))[-keep]
        trimmed.append(w * np.where(np.abs(update) >= threshold, update, 0))
    merged = np.zeros(base.size)
    for j in range(base.size):
        sign = np.sign(sum(t[j] for t in trimmed))
        agreeing = [k for k, t in enumerate(trimmed) if t[j] != 0 and np.sign(t[j]) == sign]
        if agreeing:
            merged[j] = sum(trimmed[k][j] for k in agreeing)
            merged[j] /= sum(weights[k] for k in agreeing) if normalize else 1
    return base + scale * merged.reshape(base.shape)


def shrink(gram, rho):
    return rho * gram + (1 - rho) * np.diag(np.diag(gram))


def regmean(base, experts, grams, rho=0.9, scale=1.0):
    shrunk = [shrink(g, rho) for g in grams]
    update = sum((e - base) @ g for e, g in zip(experts, shrunk)) @ np.linalg.inv(sum(shrunk))
    return base + scale * update


def square_root(gram):
    values, vectors = np.linalg.eigh(gram)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def directions(effects, basis, energy, rank):
    """Left directions [d, r] of effects, and the spectrum."""
    if len(effects) == 1:
        basis, energy, rank = ("energy" if basis == "cross" else basis), 1.0, None
    if basis in ("energy", "average"):
        left, singular, _ = np.linalg.svd(np.hstack(effects) if basis == "energy" else sum(effects), full_matrices=True)
        spectrum = np.zeros(left.shape[0])
        spectrum[: len(singular)] = singular**2
    else:
        moment = sum(a @ b.T for i, a in enumerate(effects) for j, b in enumerate(effects) if i != j)
        values, vectors = np.linalg.eigh(moment)
        spectrum, left = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if rank is None:
        enough = np.cumsum(spectrum) >= energy * spectrum.sum() - 1e-12
        rank = len(spectrum) if energy >= 1 else int(np.argmax(enough)) + 1
    return left[:, :rank]


def one_by_one(rows, shares, conflict):
    """The K rows of one direction after conflict handling."""
    count = len(rows)
    if conflict == "project" and count > 1:
        changed = []
        for k in range(count):
            others = sum(shares[j] * rows[j] for j in range(count) if j != k) / (1 - shares[k])
            product, square = rows[k] @ others, others @ others
            changed.append(rows[k] - product / square * others if product < 0 else rows[k])
        return changed
    if conflict == "elect":
        elected = np.sign(sum(p * r for p, r in zip(shares, rows)))
        agreeing = sum(p * (np.sign(r) == elected) for p, r in zip(shares, rows))
        return [np.where(np.sign(r) == elected, r, 0) / np.where(agreeing > 0, agreeing, 1) for r in rows]
    return rows


def filtered(effects, metric=None, *, shares, side="output", basis="cross", energy=0.9, rank=None, unit=False,
             residual="keep", conflict="project", gate="none", grain="direction", tau=None, gamma=1.0):
    """Steps 1 to 3 of PivotMerge: filtered effects and the share of energy inside the space.

    With a `metric` M the effects are `E M^(1/2)`, but rows keep the coordinates of `E` (what an entry means)."""
    count = len(effects)
    root = np.eye(effects[0].shape[1]) if metric is None else square_root(metric)
    seen = [e @ root for e in effects]
    sizes = [np.linalg.norm(s) for s in seen] if unit else [1.0] * count
    effects, seen = [e / n for e, n in zip(effects, sizes)], [s / n for s, n in zip(seen, sizes)]
    if side != "output" and metric is not None:
        effects, root = seen, np.eye(root.shape[0])
    left = directions(seen, basis, energy, rank) if side != "input" else None
    right = directions([s.T for s in seen], basis, energy, rank) if side != "output" else None
    if side == "output":
        inside, back = [left.T @ e for e in effects], lambda c: left @ c
    elif side == "input":
        inside, back = [right.T @ e.T for e in effects], lambda c: (right @ c).T
    else:
        inside, back = [left.T @ e @ right for e in effects], lambda c: left @ c @ right.T
    rest = [e - back(c) for e, c in zip(effects, inside)]
    weigh = root if side == "output" else np.eye(inside[0].shape[1])
    kept = [np.sum((c @ weigh) ** 2) / np.sum(s**2) for c, s in zip(inside, seen)]
    coefficients = [c.copy() for c in inside]
    for i in range(inside[0].shape[0]):
        rows = [c[i] for c in inside]
        if conflict == "project":  # in the metric; mixing weights are the same for the rows themselves
            changed = one_by_one([r @ weigh for r in rows], shares, conflict)
            rows = [c @ np.linalg.inv(weigh) for c in changed]
        else:
            rows = one_by_one(rows, shares, conflict)
        length = [np.linalg.norm(r @ weigh) for r in rows]
        pattern = sum(p * r for p, r in zip(shares, rows))
        consensus = np.linalg.norm(pattern @ weigh) / sum(p * n for p, n in zip(shares, length))
        if grain == "coordinate":
            size = sum(p * np.abs(r) for p, r in zip(shares, rows))
            consensus = np.abs(pattern) / np.where(size > 0, size, 1)
        factor = 1.0
        if gate == "hard":
            factor = (consensus >= (count**-0.5 if tau is None else tau)) * 1.0
        if gate == "soft":
            factor = consensus**gamma
        for k in range(count):
            coefficients[k][i] = factor * rows[k]
    extra = {"drop": [0] * count, "keep": rest, "keep_mean": [sum(rest) / count] * count}[residual]
    merged = [n * (back(c) + x) for c, x, n in zip(coefficients, extra, sizes)]
    if side != "output" and metric is not None:
        merged = [m @ np.linalg.inv(square_root(metric)) for m in merged]
    return merged, np.array(kept)


def softmax(scores, temperature=1.0):
    e = np.exp((np.asarray(scores) - np.max(scores)) / temperature)
    return e / e.sum()


def pivot_cosine(effects):
    scores = []
    for k, e in enumerate(effects):
        others = sum(f for j, f in enumerate(effects) if j != k)
        scores.append(np.sum(e * others) / np.linalg.norm(e) / np.linalg.norm(others))
    return np.array(scores)


def layer_weights(effects, kept, shares, scores, temperature, gains=None):
    values = {"uniform": np.zeros(len(effects)), "energy": kept, "loss_gain": gains, "alignment": gains}
    values["pivot_cosine"] = pivot_cosine(effects) if scores == "pivot_cosine" else None
    alpha = shares * softmax(values[scores], temperature)
    return alpha / alpha.sum(), values[scores]


def guessed_gram(update):
    """(D'D)^2 with a mean diagonal of 1."""
    gram = np.linalg.matrix_power(update.T @ update, 2)
    return gram / np.mean(np.diag(gram))


def pivot(base, experts, *, gram="updates", grams=None, cross=None, student=None, scores="uniform", gains=None,
          temperature=1.0, rho=None, metric="pooled", rescale="expert_norm", scale=1.0, weights=None, **filtering):
    """One layer; `grams` for `own` and `merged`, `student` (H'H) and `cross` (X'H) for `merged`."""
    updates = [e - base for e in experts]
    shares = np.ones(len(experts)) if weights is None else np.asarray(list(weights.values()), float)
    shares = shares / shares.sum()
    rho = rho or {"updates": 0.15}.get(gram, 0.9)
    if gram == "updates":
        grams = [guessed_gram(d) for d in updates]
    if gram == "none":
        tilde, kept = filtered(updates, shares=shares, **filtering)
        effects = updates
    else:
        shrunk = [shrink(g, rho) for g in grams]
        pooled = sum(shrunk) / len(shrunk)
        roots = [square_root(g if metric == "own" else pooled) for g in shrunk]
        effects = [d @ r for d, r in zip(updates, roots)]
        if metric == "own":
            tilde, kept = filtered(effects, shares=shares, **filtering)
            tilde = [t @ np.linalg.inv(r) for t, r in zip(tilde, roots)]
        else:
            tilde, kept = filtered(updates, pooled, shares=shares, **filtering)
    alpha, _ = layer_weights(effects, kept, shares, scores, temperature, gains)
    merged = sum(a * t for a, t in zip(alpha, tilde))
    factor = np.mean([np.linalg.norm(d) for d in updates]) / np.linalg.norm(merged) if rescale == "expert_norm" else 1.0
    if gram == "none":
        return base + scale * factor * merged
    if gram == "merged":
        targets = [(base + t) @ s - base @ h for t, s, h in zip(tilde, cross, student)]
        grams = student
    else:
        targets = [t @ g for t, g in zip(tilde, grams)]
    moment = sum(a * (rho * y + (1 - rho) * factor * t @ np.diag(np.diag(g)))
                 for a, y, t, g in zip(alpha, targets, tilde, grams))
    return base + scale * moment @ np.linalg.inv(sum(a * shrink(g, rho) for a, g in zip(alpha, grams)))
