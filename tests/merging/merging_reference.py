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
        keep = max(1, int(np.floor(density * update.size + 1e-6)))
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


def shared_space(effects, basis, energy, rank):
    if len(effects) == 1:
        basis, energy, rank = "energy", 1.0, None
    if basis == "energy":
        left, singular, _ = np.linalg.svd(np.hstack(effects), full_matrices=True)
        spectrum = np.zeros(left.shape[0])
        spectrum[: len(singular)] = singular**2
    else:
        moment = sum(a @ b.T for i, a in enumerate(effects) for j, b in enumerate(effects) if i != j)
        values, vectors = np.linalg.eigh(moment)
        spectrum, left = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if rank is None:
        enough = np.cumsum(spectrum) >= energy * spectrum.sum() - 1e-12
        rank = len(spectrum) if energy >= 1 else int(np.argmax(enough)) + 1
    return left[:, :rank], spectrum


def filtered(effects, *, basis="cross", energy=0.9, rank=None, residual="keep", conflict=True, gate="none",
             tau=None, gamma=1.0):
    """Steps 1 to 3 of PivotMerge: filtered effects, share of energy inside the space, consensus a direction."""
    count = len(effects)
    space, _ = shared_space(effects, basis, energy, rank)
    inside = [space.T @ e for e in effects]
    rest = [e - space @ c for e, c in zip(effects, inside)]
    kept = [np.sum(c**2) / np.sum(e**2) for c, e in zip(inside, effects)]
    coefficients = [c.copy() for c in inside]
    consensus = np.zeros(space.shape[1])
    for i in range(space.shape[1]):
        rows = [c[i] for c in inside]
        if conflict and count > 1:
            changed = []
            for k in range(count):
                others = sum(rows[j] for j in range(count) if j != k) / (count - 1)
                product = rows[k] @ others
                changed.append(rows[k] - product / (others @ others) * others if product < 0 else rows[k])
            rows = changed
        consensus[i] = np.linalg.norm(sum(rows) / count) / np.mean([np.linalg.norm(r) for r in rows])
        factor = 1.0
        if gate == "hard":
            factor = float(consensus[i] >= (count**-0.5 if tau is None else tau))
        if gate == "soft":
            factor = consensus[i] ** gamma
        for k in range(count):
            coefficients[k][i] = factor * rows[k]
    extra = {"drop": [0] * count, "keep": rest, "keep_mean": [sum(rest) / count] * count}[residual]
    return [space @ c + x for c, x in zip(coefficients, extra)], np.array(kept), consensus


def softmax(scores, temperature=1.0):
    e = np.exp((np.asarray(scores) - np.max(scores)) / temperature)
    return e / e.sum()


def pivot_cosine(effects):
    scores = []
    for k, e in enumerate(effects):
        others = sum(f for j, f in enumerate(effects) if j != k)
        scores.append(np.sum(e * others) / np.linalg.norm(e) / np.linalg.norm(others))
    return np.array(scores)


def layer_weights(effects, kept, scores, temperature, gains=None):
    values = {"uniform": np.zeros(len(effects)), "energy": kept, "loss_gain": gains}
    values["pivot_cosine"] = pivot_cosine(effects) if scores == "pivot_cosine" else None
    return softmax(values[scores], temperature)


def guessed_gram(update):
    """(D'D)^2 with a mean diagonal of 1."""
    gram = np.linalg.matrix_power(update.T @ update, 2)
    return gram / np.mean(np.diag(gram))


def pivot(base, experts, *, gram="updates", grams=None, cross=None, student=None, scores="uniform", gains=None,
          temperature=1.0, rho=None, metric="pooled", rescale="expert_norm", scale=1.0, **filtering):
    """One layer; `grams` for `own` and `merged`, `student` (H'H) and `cross` (X'H) for `merged`."""
    updates = [e - base for e in experts]
    rho = rho or {"updates": 0.15}.get(gram, 0.9)
    if gram == "updates":
        grams = [guessed_gram(d) for d in updates]
    if gram == "none":
        roots = [np.eye(base.shape[1])] * len(experts)
    else:
        shrunk = [shrink(g, rho) for g in grams]
        roots = [square_root(g if metric == "own" else sum(shrunk) / len(shrunk)) for g in shrunk]
    effects = [d @ r for d, r in zip(updates, roots)]
    changed, kept, _ = filtered(effects, **filtering)
    alpha = layer_weights(effects, kept, scores, temperature, gains)
    tilde = [c @ np.linalg.inv(r) for c, r in zip(changed, roots)]
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
