"""A process of a tiny training run: `python loopback.py OUT STEPS MESH COUNT INDEX PORT [WHAT]`; see test_hosts.py."""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tiny_backbone import build
from tiny_feed import TinyFeed

from pivotjax import cli
from pivotjax.checkpoints.training import CheckpointConfig
from pivotjax.errors import InputError
from pivotjax.training import hosts
from pivotjax.training.loop import train
from pivotjax.training.metrics import MetricsConfig
from pivotjax.training.parallel import MeshConfig, layout, local_share, make_mesh

EXPERTS, ROWS = 2, 4


def run(out, steps, mesh=(1, 1), index=0, what="", every=3, change=lambda step, batch: None):
    """What one process does; `what` happens to process 1 in step 4."""

    def happens(step, batch):
        change(step, batch)
        if what and step >= 3:
            time.sleep(0.3)  # as real steps do: word of a signal takes a second to come round
        if index != 1 or step != 3:
            return
        if what == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
        elif what == "failing":
            raise InputError("the disk of this host is full")
        elif what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

    tiny = build(steps=steps, log_every=1)
    where = layout("jit", make_mesh(MeshConfig(*mesh), EXPERTS, ROWS))
    feed = TinyFeed(tiny, EXPERTS, ROWS, happens, local_share(where.mesh, EXPERTS, ROWS))
    return train(
        tiny.step(where),
        tiny.state(EXPERTS),
        tiny.frozen,
        feed,
        layout=where,
        config=tiny.training,
        checkpoints=CheckpointConfig(every_steps=every),
        metrics=MetricsConfig(),
        folder=out,
    )


def life(out, steps, every):
    """A run, or what is left of it, that keeps its final parameters in `out/final.npz`."""
    cli._quiet()
    state = run(out, steps, every=every)
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state.params)}
    np.savez(out / "final.npz", **leaves)


def main(out, steps, mesh, count, index, port, what=""):
    cli._quiet()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM went past JAX"))  # as the command line's
    try:
        with hosts.joined(hosts.HostsConfig(f"127.0.0.1:{port}", int(count), int(index), timeout=30)):
            run(Path(out), int(steps), tuple(map(int, mesh.split("x"))), int(index), what)
    except InputError as error:
        print(f"loopback: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
