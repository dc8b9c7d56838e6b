"""Networks without their parameters."""

from collections.abc import Callable

from flax import nnx


def abstract(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict]:
    """The graph of the network that `make` builds, and its parameters as shapes only; nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, nnx.to_pure_dict(state)
