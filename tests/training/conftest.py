import pytest
from tiny_backbone import Tiny, build


@pytest.fixture
def tiny() -> Tiny:
    """A tiny random backbone with its training step (see `tiny_backbone`)."""
    return build()
