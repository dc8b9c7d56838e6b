"""A domain whose samples say which they are, for tests of order; it travels to worker processes."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pivotjax.data.decode import BadSample
from pivotjax.data.stream import Sample


@dataclass(frozen=True)
class Greys:
    """Sample i is a picture of grey level i with the caption "number i"; the `bad` ones are corrupt."""

    name: str
    count: int
    bad: frozenset[int] = frozenset()
    lives: Path | None = None  # where each process that reads says so
    seconds: float = 0.0  # that reading takes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if self.lives:
            (self.lives / str(os.getpid())).touch()
        if self.seconds:
            time.sleep(self.seconds)
        if index in self.bad:
            raise BadSample("corrupt image", f"{self.name}/{index}")
        return Sample(
            image=np.full((4, 4, 3), index, np.uint8),
            caption=f"number {index}",
            concept=f"{self.name} {index}",
            key=self.key(index),
        )

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"
