"""RegMean: the weights that best reproduce what each expert computes on its own inputs."""

from typing import Literal

import jax

from pivotjax.errors import InputError
from pivotjax.merging import spectral
from pivotjax.merging.calibration import Calibration, own_grams
from pivotjax.merging.registry import Merged, Share, method
from pivotjax.merging.updates import Array, Updates, batched, leaves_from


@method(
    "regmean",
    family="least squares",
    source="W = (sum_k W_k G_k) (sum_k G_k)^-1, G_k = X_k'X_k with off-diagonal x rho (arXiv 2212.09849)",
    needs=("calibration",),
    laws={"identical": {}, "order": {}, "homogeneous": {}, "single": {}, "zero": {}},
)
def regmean(
    updates: Updates,
    *,
    calibration: Calibration,
    on: Literal["updates", "weights"] = "updates",
    rho: Share = 0.9,
    scale: float = 1.0,
) -> Merged:
    """Least squares fit of every layer to all experts' outputs on their own inputs.

    Args:
        updates: K experts; `on="weights"` needs no base.
        calibration: gives the Gram matrix of each layer's inputs (an input of 1 last, for the bias).
        on: what is merged. The fit is linear, so both give the same at `scale` 1; only updates can be scaled.
        rho: factor on the off-diagonal entries of each Gram matrix.
        scale: factor on the merged update.
    """
    if on == "updates" and not updates.has_base:
        raise InputError("regmean on updates measures them from a base: give one, or choose on='weights'")
    if on == "weights" and scale != 1:
        raise InputError("regmean on weights cannot be scaled: choose on='updates', or leave scale at 1")
    grams = own_grams(calibration, updates)
    return Merged(_regmean(updates, grams, rho, scale))


@jax.jit
def _regmean(updates: Updates, grams: dict[str, Array], rho: float, scale: float) -> list[Array]:
    def one(update: Array, gram: Array) -> Array:
        """`[K, n, d_out, d_in]`, `[K, n, d_in, d_in]` -> `[n, d_out, d_in]`."""
        shrunk = spectral.shrink(gram, rho)
        moment = spectral.mean(spectral.matmul(update, shrunk))
        return spectral.fit(moment, spectral.mean(shrunk), spectral.mean(update))

    matrices = batched(one, updates.layers, grams)
    return [scale * leaf for leaf in leaves_from(updates.layout, matrices, updates.others_mean())]
