"""Scenarios: a corpus split into heterogeneous domains, for merging and for federated training."""

from pivotjax.data.scenarios.folder import Scenario, Subset, load

__all__ = ["Scenario", "Subset", "load"]
