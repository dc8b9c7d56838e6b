from collections.abc import Iterator

import jax
import pytest
from small_world import World, make_world


@pytest.fixture(scope="module", autouse=True)
def _quickly_compiled() -> Iterator[None]:
    """Hundreds of programs that run once on tiny arrays: without it a third of the time goes into optimising them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def world() -> World:
    """A small projector world (see `small_world`)."""
    return make_world()
