"""Scenarios: a corpus split into heterogeneous domains, for merging and for federated training.

A new way to split is one file here, one line in `SPLITTERS`, and a section of `DomainsConfig` if it has options.
"""

import difflib
from dataclasses import dataclass, field

from pivotjax.config import check_least
from pivotjax.data.scenarios import dirichlet, iid, keywords, kmeans, sizes, source
from pivotjax.data.scenarios.base import Splitter
from pivotjax.data.scenarios.clustering import ClusteringConfig
from pivotjax.data.scenarios.dirichlet import DirichletConfig
from pivotjax.data.scenarios.folder import Scenario, Subset, load
from pivotjax.data.scenarios.keywords import KeywordsConfig
from pivotjax.data.scenarios.sizes import SizesConfig
from pivotjax.data.scenarios.source import SourceConfig
from pivotjax.errors import InputError

__all__ = ["SPLITTERS", "DomainsConfig", "Scenario", "Splitter", "Subset", "load"]

SPLITTERS: dict[str, Splitter] = {
    "kmeans": kmeans.SPLITTER,
    "keywords": keywords.SPLITTER,
    "source": source.SPLITTER,
    "iid": iid.SPLITTER,
    "dirichlet": dirichlet.SPLITTER,
    "sizes": sizes.SPLITTER,
}


@dataclass(frozen=True)
class DomainsConfig:
    """How samples are given to domains."""

    by: str = "kmeans"
    """kmeans, keywords, source, iid, dirichlet or sizes."""
    count: int = 4
    """How many domains; keywords and source find their own, and so do shares of sizes."""
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    """Of kmeans and dirichlet."""
    keywords: KeywordsConfig = field(default_factory=KeywordsConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    dirichlet: DirichletConfig = field(default_factory=DirichletConfig)
    sizes: SizesConfig = field(default_factory=SizesConfig)

    def __post_init__(self) -> None:
        check_least(self, count=1)
        if self.by not in SPLITTERS:
            near = difflib.get_close_matches(self.by, SPLITTERS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"by: unknown way to split {self.by!r}; {hint}known: {', '.join(SPLITTERS)}")

    @property
    def options(self) -> object:
        """The section of the chosen way, None where it has none."""
        return getattr(self, self.by, None)
