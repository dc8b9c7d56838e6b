"""The merge methods as a straightforward torch program writes them: one tensor after another, torch.linalg's SVD.

What `benchmarks/merge.py` measures pivotjax against. State dicts `linear_0.weight` [d_out, d_in], `linear_0.bias`;
every function takes `(base, experts)`, experts in a list, and returns the merged state dict. Options are pivotjax's
defaults.
"""

import torch

Tensors = dict[str, torch.Tensor]


def updates(base: Tensors, experts: list[Tensors], key: str) -> list[torch.Tensor]:
    return [expert[key] - base[key] for expert in experts]


def elementwise(method):
    """A merged state dict from `method(updates of one tensor) -> merged update`."""

    def merge(base, experts):
        return {key: base[key] + method(updates(base, experts, key)) for key in base}

    return merge


def average(base, experts):
    return {key: torch.stack([expert[key] for expert in experts]).mean(0) for key in base}


@elementwise
def task_arithmetic(deltas):
    return 0.3 * sum(deltas)


@elementwise
def ties(deltas):
    stacked = torch.stack(deltas).reshape(len(deltas), -1)
    keep = max(1, int(0.2 * stacked.shape[1]))
    threshold = stacked.abs().kthvalue(stacked.shape[1] - keep + 1, dim=1, keepdim=True).values
    trimmed = torch.where(stacked.abs() >= threshold, stacked, 0)
    agrees = (trimmed != 0) & (trimmed.sign() == trimmed.sum(0).sign())
    merged = torch.where(agrees, trimmed, 0).sum(0) / agrees.sum(0).clamp(min=1)
    return merged.reshape(deltas[0].shape)


def joined(base, experts, layer):
    """Updates with the bias as one more input column."""
    weights = updates(base, experts, f"{layer}.weight")
    return [torch.cat([w, b[:, None]], 1) for w, b in zip(weights, updates(base, experts, f"{layer}.bias"))]


def pivot(base, experts, guess):
    """PivotMerge's SVD route. `guess`: the data-free default; else without a metric, energy basis."""
    merged = {}
    for layer in ("linear_0", "linear_1"):
        deltas = joined(base, experts, layer)
        combined = _fitted(deltas) if guess else _plain(deltas)
        merged[f"{layer}.weight"] = base[f"{layer}.weight"] + combined[:, :-1]
        merged[f"{layer}.bias"] = base[f"{layer}.bias"] + combined[:, -1]
    return merged


def _plain(deltas):
    filtered = _filtered(deltas, _energy_space(deltas))
    mean = sum(filtered) / len(filtered)
    return mean * sum(d.norm() for d in deltas) / len(deltas) / mean.norm()


def _energy_space(effects):
    left, sigma, _ = torch.linalg.svd(torch.cat(effects, 1), full_matrices=False)
    share = (sigma**2).cumsum(0) / (sigma**2).sum()
    return left[:, : int((share < 0.9).sum()) + 1]


def _cross_space(effects):
    total = sum(effects)
    values, vectors = torch.linalg.eigh(total @ total.T - sum(e @ e.T for e in effects))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return vectors[:, : int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1]


def _filtered(effects, space):
    inside = [space.T @ e for e in effects]
    result = []
    for e, c in zip(effects, inside):
        others = (sum(inside) - c) / (len(inside) - 1)
        product = (c * others).sum(1, keepdim=True)
        change = -(product.clamp(max=0) / (others * others).sum(1, keepdim=True)) * others
        result.append(e + space @ change)
    return result


def _fitted(deltas, rho=0.15):
    grams = []
    for d in deltas:
        gram = d.T @ d
        gram = gram / gram.diagonal().mean()
        gram = gram @ gram
        grams.append(gram / gram.diagonal().mean())
    shrunk = [rho * g + (1 - rho) * g.diagonal().diag() for g in grams]
    u, s, _ = torch.linalg.svd(sum(shrunk) / len(shrunk))
    root, inverse = (u * s.sqrt()) @ u.T, (u / s.sqrt()) @ u.T
    effects = [d @ root for d in deltas]
    filtered = [d + (f - e) @ inverse for d, f, e in zip(deltas, _filtered(effects, _cross_space(effects)), effects)]
    mean = sum(filtered) / len(filtered)
    factor = sum(d.norm() for d in deltas) / len(deltas) / mean.norm()
    moment = sum(rho * f @ g + (1 - rho) * factor * f * g.diagonal() for f, g in zip(filtered, grams))
    return torch.linalg.solve(sum(shrunk), moment, left=False)


TORCH = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "pivot": lambda base, experts: pivot(base, experts, guess=True),
    "pivot gram=none basis=energy": lambda base, experts: pivot(base, experts, guess=False),
}
