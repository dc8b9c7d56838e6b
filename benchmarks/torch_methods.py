"""The merge methods as a straightforward torch program writes them: one tensor after another, torch.linalg's SVD.

What `benchmarks/merge.py` measures pivotjax against. State dicts `linear_0.weight` [d_out, d_in], `linear_0.bias`;
every function takes `(base, experts)`, experts in a list, and returns the merged state dict. Options are pivotjax's
defaults.
"""

import torch

Tensors = dict[str, torch.Tensor]
RTOL = torch.finfo(torch.float32).eps ** (2 / 3)  # of a Gram matrix's spectrum, as in pivotjax


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


def thinned(deltas, share):
    """The largest `share` of each update's entries, as rows of one matrix."""
    stacked = torch.stack(deltas).reshape(len(deltas), -1)
    keep = max(1, int(share * stacked.shape[1]))
    threshold = stacked.abs().kthvalue(stacked.shape[1] - keep + 1, dim=1, keepdim=True).values
    return torch.where(stacked.abs() >= threshold, stacked, 0)


def elected(trimmed):
    """TIES' election and the mean of what agrees, on rows."""
    agrees = (trimmed != 0) & (trimmed.sign() == trimmed.sum(0).sign())
    return torch.where(agrees, trimmed, 0).sum(0) / agrees.sum(0).clamp(min=1)


@elementwise
def ties(deltas):
    return elected(thinned(deltas, 0.2)).reshape(deltas[0].shape)


def dropped(deltas, density):
    return [torch.bernoulli(torch.full_like(d, density)) * d / density for d in deltas]


@elementwise
def dare_linear(deltas):
    return 0.3 * sum(dropped(deltas, 0.5))


@elementwise
def dare_ties(deltas):
    return elected(torch.stack(dropped(deltas, 0.5)))


def by_magnitude(delta, density=0.7, epsilon=0.15):
    """DELLA: keep-probabilities by rank in each row."""
    rows = delta.reshape(-1, delta.shape[-1])
    ranks = rows.abs().argsort(1).argsort(1) / max(rows.shape[1] - 1, 1)
    keep = density - epsilon + 2 * epsilon * ranks
    return (torch.bernoulli(keep) * rows / keep).reshape(delta.shape)


@elementwise
def della_linear(deltas):
    return 0.3 * sum(map(by_magnitude, deltas))


@elementwise
def della(deltas):
    return elected(torch.stack([by_magnitude(d) for d in deltas]))


def window(delta, density=0.9, gamma=0.01):
    order = delta.abs().flatten().argsort()
    keep, top = int(density * len(order)), int(gamma * len(order))
    start = max(0, len(order) - keep - top)
    mask = torch.zeros(len(order))
    mask[order[start : start + keep]] = 1
    return delta * mask.reshape(delta.shape)


@elementwise
def breadcrumbs(deltas):
    return 0.3 * sum(map(window, deltas))


@elementwise
def breadcrumbs_ties(deltas):
    return elected(torch.stack([window(d) for d in deltas]))


@elementwise
def sce(deltas, select=0.1):
    stacked = torch.stack(deltas)
    variance = stacked.var(0, unbiased=False)
    count = int(select * variance.count_nonzero())
    threshold = variance.flatten().kthvalue(variance.numel() - count + 1).values if count else torch.inf
    stacked = stacked * (variance >= threshold)
    energy = (stacked**2).flatten(1).mean(1)
    weights = (energy / energy.sum()).reshape(-1, *[1] * (stacked.ndim - 1)) * (stacked.sign() == stacked.sum(0).sign())
    weights = weights * (stacked != 0)
    return (weights * stacked).sum(0) / weights.sum(0).clamp(min=1e-30)


def metagpt(base, experts):
    energy = [sum((e[key] - base[key]).pow(2).sum() for key in base) for e in experts]
    shares = [e / sum(energy) for e in energy]
    return {key: leaf + sum(s * (e[key] - leaf) for s, e in zip(shares, experts)) for key, leaf in base.items()}


def lines(base, experts, beta=0.5):
    total = {key: sum(updates(base, experts, key)) for key in base}
    depth = {name: i for i, name in enumerate(dict.fromkeys(key.split(".")[0] for key in base))}
    alpha = 1 / len(experts)
    return {key: leaf + (alpha + beta * depth[key.split(".")[0]] / max(len(depth) - 1, 1)) * total[key]
            for key, leaf in base.items()}


def weightwise(method):
    """Methods on the weights themselves, tensor by tensor."""

    def merge(base, experts):
        return {key: method([e[key] for e in experts]) for key in base}

    return merge


def arc(a, b, t, nearly):
    cosine = torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())
    if cosine.abs() > nearly:
        return (1 - t) * a + t * b
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@weightwise
def slerp(weights):
    return arc(*weights, 0.5, 0.9995)


@elementwise
def nuslerp(deltas):
    return arc(*deltas, 0.5, 1 - 1e-7)


@elementwise
def multislerp(deltas):
    units = [d / d.norm() for d in deltas]
    mean = sum(units) / len(units)
    mean = mean / mean.norm()
    tangent = sum(u - (u * mean).sum() * mean for u in units) / len(units)
    size = tangent.norm()
    point = torch.cos(size) * mean + torch.sinc(size / torch.pi) * tangent
    return point * sum(d.norm() for d in deltas) / len(deltas)


@weightwise
def karcher(weights, iterations=10, tolerance=1e-5):
    units = [w / w.norm() for w in weights]
    mean = sum(units) / len(units)
    mean = mean / mean.norm()
    for _ in range(iterations):
        tangent = 0
        for u in units:
            cosine = (u * mean).sum().clamp(-1, 1)
            away = u - cosine * mean
            if away.norm() > 1e-12:
                tangent = tangent + torch.arccos(cosine) * away / away.norm() / len(units)
        size = tangent.norm()
        if size < tolerance:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * tangent / size
        mean = mean / mean.norm()
    return mean * sum(w.norm() for w in weights) / len(weights)


@elementwise
def model_stock(deltas):
    count = len(deltas)
    cosines = [(deltas[j] * deltas[k]).sum() / (deltas[j].norm() * deltas[k].norm())
               for j in range(count) for k in range(j + 1, count)]
    cosine = sum(cosines) / len(cosines)
    return count * cosine / (1 + (count - 1) * cosine) * sum(deltas) / count


def spectral(method, scale=1.0):
    """Methods on matrices; biases are averaged."""

    def merge(base, experts):
        merged = {}
        for key, leaf in base.items():
            deltas = updates(base, experts, key)
            merged[key] = leaf + scale * (method(deltas) if leaf.ndim == 2 else sum(deltas) / len(deltas))
        return merged

    return merge


def svd(x, rank=None):
    try:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
    except torch.linalg.LinAlgError:  # LAPACK's float32 gives up on some of these matrices
        u, s, vt = (part.float() for part in torch.linalg.svd(x.double(), full_matrices=False))
    return u[:, :rank], s[:rank], vt[:rank]


def polar(x):
    u, _, vt = svd(x)
    return u @ vt


def share(deltas):
    return max(1, min(deltas[0].shape) // len(deltas))


def tsv_m(deltas):
    us, ss, vs = zip(*(svd(d, share(deltas)) for d in deltas))
    return (polar(torch.cat(us, 1)) * torch.cat(ss)) @ polar(torch.cat(vs, 0))


def iso_c(deltas):
    u, s, vt = svd(sum(deltas))
    return s.mean() * u @ vt


def iso_cts(deltas, common=0.8):
    size = min(deltas[0].shape)
    own = min(round((size - int(common * size)) / len(deltas)), size // len(deltas))
    u, s, vt = svd(sum(deltas), size - own * len(deltas))
    parts = [(u, s, vt), *(svd(d - u @ (u.T @ d), own) for d in deltas)]
    us, ss, vs = zip(*parts)
    return torch.cat(ss).mean() * polar(torch.cat(us, 1)) @ polar(torch.cat(vs, 0))


def knots(deltas):
    u, s, vt = svd(torch.cat(deltas, 1))
    return u, [s[:, None] * part for part in vt.chunk(len(deltas), 1)]


def knots_ties(deltas):
    u, coefficients = knots(deltas)
    return u @ elected(thinned(coefficients, 0.2)).reshape(coefficients[0].shape)


def knots_dare(deltas):
    u, coefficients = knots(deltas)
    return u @ elected(torch.stack(dropped(coefficients, 0.9)))


def normal_equations(targets, measures, deltas):
    grams = [m.T @ m / d.pow(2).sum() for m, d in zip(measures, deltas)]
    return sum(grams), sum(t @ g for t, g in zip(targets, grams))


def wudi(deltas):
    gram, moment = normal_equations(deltas, deltas, deltas)
    start = sum(deltas) / len(deltas)  # where the updates say nothing
    return start + (moment - start @ gram) @ torch.linalg.pinv(gram, hermitian=True, rtol=RTOL)


def swudi(deltas, time=300.0, keep=0.65):
    gram, moment = normal_equations(deltas, deltas, deltas)
    values, vectors = torch.linalg.eigh(gram)
    leading = -(-int(keep * len(values)) // 1)
    weight = torch.zeros(len(values))
    weight[-leading:] = 1 - torch.exp(-time * values[-leading:].clamp(min=0))
    start = sum(deltas)
    whole = moment @ torch.linalg.pinv(gram, hermitian=True, rtol=RTOL)
    return start + (whole - start) @ (vectors * weight) @ vectors.T


def optmerge(deltas, steps=300, rate=1e-5):
    mean, rank = sum(deltas) / len(deltas), share(deltas)
    targets, measures = [], []
    for delta in deltas:
        u, s, vt = svd(delta - mean, rank)
        targets.append(mean + (u * s) @ vt)
        _, s, vt = svd(delta, rank)
        measures.append(s[:, None] * vt)
    gram, moment = normal_equations(targets, measures, deltas)
    place = sum(deltas).clone().requires_grad_()
    optimizer = torch.optim.Adam([place], lr=rate)
    for _ in range(steps):
        place.grad = 2 * (place.detach() @ gram - moment)
        optimizer.step()
    return place.detach()


def star(deltas, eta=40.0):
    total = 0
    for delta in deltas:
        u, s, vt = svd(delta)
        rank = int((s.cumsum(0) < eta / 100 * s.sum()).sum()) + 1
        total = total + s.sum() / s[:rank].sum() * (u[:, :rank] * s[:rank]) @ vt[:rank]
    return total / len(deltas)


def cart(deltas, rank=0.08):
    mean = sum(deltas) / len(deltas)
    parts = [svd(d - mean, max(1, int(rank * min(mean.shape)))) for d in deltas]
    return mean + sum((u * s) @ vt for u, s, vt in parts)


def dc_merge(deltas, density=0.001):
    rank = share(deltas)
    us, ss, vs = zip(*(svd(d, rank) for d in deltas))
    left, right = polar(torch.cat(us, 1)), polar(torch.cat(vs, 0))
    inside = [left.T @ ((u * s) @ vt) @ right.T for u, s, vt in zip(us, ss, vs)]
    merged = elected(thinned(inside, density)).reshape(inside[0].shape)
    return left @ (merged * torch.block_diag(*[torch.ones(rank, rank)] * len(deltas))) @ right


def svc(deltas):
    u, s, vt = svd(sum(deltas))
    responses = [u.T @ d for d in deltas]
    contained = sum((s * (vt * r).sum(1) / r.pow(2).sum(1)).clamp(min=1) for r in responses)
    return (u * s * len(deltas) / contained) @ vt


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


RANDOM = ("dare_linear", "dare_ties", "della_linear", "della", "knots_dare")  # other masks than pivotjax's
TWO = ("slerp", "nuslerp")  # methods of two models
TORCH = {
    "pivot": lambda base, experts: pivot(base, experts, guess=True),
    "pivot gram=none basis=energy": lambda base, experts: pivot(base, experts, guess=False),
    **{f.__name__: spectral(f) for f in (tsv_m, iso_c, iso_cts, wudi, swudi, optmerge, star, cart, dc_merge, svc)},
    **{f.__name__: spectral(f, 0.6) for f in (knots_ties, knots_dare)},
    "average": average, "task_arithmetic": task_arithmetic, "ties": ties, "dare_linear": dare_linear,
    "dare_ties": dare_ties, "della_linear": della_linear, "della": della, "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties, "sce": sce, "metagpt": metagpt, "lines": lines, "slerp": slerp,
    "nuslerp": nuslerp, "multislerp": multislerp, "karcher": karcher, "model_stock": model_stock,
}  # fmt: skip
