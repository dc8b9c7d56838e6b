"""Steps that went wrong for an expert: what is said, what is written down, and which samples were there."""

from collections import Counter

import jax
import numpy as np
from jaxtyping import Bool, Int64

from pivotjax.data.pipeline import Feed
from pivotjax.errors import InputError
from pivotjax.progress import say
from pivotjax.training import hosts
from pivotjax.training.metrics import Log, per_expert
from pivotjax.training.optimizer import GuardConfig
from pivotjax.training.parallel import Layout
from pivotjax.training.step import Metrics

_SAID = 5  # incidents of an expert that are told on the screen; all are written down
_WHAT = {
    "retire": "it keeps its last finite weights, the others go on",
    "skip": "this step leaves it as it was",
    "abort": "the run ends",
}


class Watch:
    """Looks at each step's metrics for what `guard` is about; every process calls it for the same steps."""

    def __init__(self, feed: Feed, layout: Layout, guard: GuardConfig, log: Log):
        self._feed, self._layout, self._guard, self._log = feed, layout, guard, log
        self._told: Counter[str] = Counter()

    def look(
        self, step: int, metrics: Metrics, was_alive: Bool[np.ndarray, " K"], ids: Int64[np.ndarray, "K B I"]
    ) -> None:
        """Writes down each expert that this step left out, with its samples (`ids` is this process's part of them).

        InputError where the guard says abort, and when no expert is left alive.
        """
        wrong = np.flatnonzero(was_alive & ~metrics.applied)
        if wrong.size:
            everyone = self._of_all_processes(ids)
            actions = [self._incident(step, int(k), metrics, everyone[k]) for k in wrong]
            if "abort" in actions:
                names = ", ".join(self._feed.names[k] for k, action in zip(wrong, actions) if action == "abort")
                raise InputError(
                    f"step {step} went wrong for {names} and training.guard says abort; the samples are in "
                    "incidents.jsonl; go on from the checkpoint before, with mended data or another training.guard"
                )
        if not metrics.alive.any():
            raise InputError(
                f"no expert has a finite loss at step {step} ({', '.join(self._feed.names)}); "
                "lower training.learning_rate or check the data"
            )

    def _incident(self, step: int, k: int, metrics: Metrics, ids: Int64[np.ndarray, "B I"]) -> str:
        name, loss = self._feed.names[k], metrics.loss[k]
        finite = bool(np.isfinite(loss) and np.isfinite(metrics.gradient_norm[k]))
        action = self._guard.spike if finite else self._guard.not_finite
        what = f"loss leaps to {loss:.4g}" if finite else "loss or gradient not finite"
        self._told[name] += 1
        if self._told[name] <= _SAID:
            say(f"expert {name}: {what} at step {step}; {_WHAT[action]}")
        if self._told[name] == _SAID:
            say(f"expert {name}: further incidents are in incidents.jsonl alone")
        row = per_expert(self._feed.names, loss=metrics.loss, gradient_norm=metrics.gradient_norm)[name]
        kind = "spike" if finite else "not finite"
        if jax.process_index() == 0:
            keys = self._feed.keys(name, ids[ids >= 0])
            self._log.incident({"step": step, "expert": name, "kind": kind, "action": action} | row | {"keys": keys})
        return action

    def _of_all_processes(self, ids: Int64[np.ndarray, "K B I"]) -> Int64[np.ndarray, "K B I"]:
        if jax.process_count() == 1:
            return ids
        return hosts.fetch(self._layout.put_batch({"ids": ids.astype(np.int32)})["ids"])
