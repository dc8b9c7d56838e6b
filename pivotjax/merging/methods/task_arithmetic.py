"""Task arithmetic: the scaled sum of the updates."""

from pivotjax.merging.methods.average import expert_weights, weighted_sum
from pivotjax.merging.registry import ExpertValues, Merged, method
from pivotjax.merging.updates import Updates


@method(
    "task_arithmetic",
    family="elementwise",
    source="W = W0 + scale * sum_k w_k D_k (arXiv 2212.04089)",
    needs=("base",),
    scope="tensor",
    laws={
        "identical": {"scale": 1.0, "normalize": True},
        "order": {},
        "homogeneous": {},
        "average": {"scale": 1.0, "normalize": True},
        "single": {"scale": 1.0},
        "zero": {},
        "idle": {},
    },
)
def task_arithmetic(
    updates: Updates, *, scale: float = 0.3, weights: ExpertValues | None = None, normalize: bool = False
) -> Merged:
    """Base plus the scaled sum of the updates.

    Args:
        updates: K experts measured from their base.
        scale: lambda, on the sum of the updates (not on their mean).
        weights: a factor for each expert by name; None: 1 each.
        normalize: divide the weights by their sum.
    """
    return Merged(weighted_sum(updates, scale * expert_weights(updates, weights, normalize)))
