"""How long work shows itself: a bar on a terminal, plain lines elsewhere, process 0 only."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from tqdm import tqdm

T = TypeVar("T")
_LINE_SECONDS = 15.0  # without a terminal: at most one line per bar in this time


def _shows() -> bool:
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints one line (process 0 only) without tearing a bar that is on the screen."""
    if _shows():
        tqdm.write(text, file=sys.stderr)


class Bar:
    """A progress bar of `total` units; `update(n, note)` moves it. Use as a context manager."""

    def __init__(self, total: int | None, desc: str, unit: str = "it", initial: int = 0):
        self.total, self.desc, self.unit, self.done, self.note = total, desc, unit, initial, ""
        self._started = self._spoke = time.monotonic()
        self._told: int | None = None  # units done when it last spoke
        self._initial = initial
        terminal = _shows() and sys.stderr.isatty()
        self._tqdm = tqdm(total=total, desc=desc, unit=unit, initial=initial, dynamic_ncols=True) if terminal else None

    def update(self, n: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + n, note or self.note
        if self._tqdm is not None:
            if note:
                self._tqdm.set_postfix_str(note, refresh=False)
            self._tqdm.update(n)
        elif _shows() and time.monotonic() - self._spoke >= _LINE_SECONDS:
            self._speak()

    def _speak(self) -> None:
        self._spoke, self._told = time.monotonic(), self.done
        seconds = self._spoke - self._started
        rate = (self.done - self._initial) / max(seconds, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate > 0 else ""
        print(
            f"{self.desc}: {self.done}{of} {self.unit} in {seconds:.0f} s{left} {self.note}".rstrip(), file=sys.stderr
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc) -> None:
        if self._tqdm is not None:
            self._tqdm.close()
        elif _shows() and exc[0] is None and self._told != self.done:
            self._speak()


def bar(iterable: Iterable[T], desc: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yields from `iterable`, showing progress."""
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    with Bar(total, desc, unit) as shown:
        for item in iterable:
            yield item
            shown.update()
