"""The control: domains that do not differ."""

import numpy as np

from pivotjax.data.scenarios.base import Assignment, Request, Splitter, deal


def assign(options: None, request: Request) -> Assignment:
    """Samples at random to domains of one size."""
    shares = np.full(request.count, 1 / request.count)
    return Assignment(tuple(f"iid{number}" for number in range(request.count)), deal(request, shares, "iid"))


SPLITTER = Splitter("at random, to domains of one size", assign)
