import pytest
from small_world import World, make_world


@pytest.fixture
def world() -> World:
    """A small projector world (see `small_world`)."""
    return make_world()
