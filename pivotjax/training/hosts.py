"""Several processes, one program: how they find each other, what they tell each other, and that they end together."""

import atexit
import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordination service's key-value store has no public name
from jax.experimental import multihost_utils

from pivotjax.checkpoints.training import seen_by_all
from pivotjax.config import check_least
from pivotjax.errors import InputError

_ENDED = "pivotjax/ended"  # key of the coordination service: the process that failed first
_LOST = ("Gloo", "Connection closed", "Connection reset", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "socket")
_LOOK = 0.5  # seconds between looks for such news
_GRACE = 5.0  # seconds for news of another process's end to come through


@dataclass(frozen=True)
class HostsConfig:
    """The processes of a run. TPU pods need nothing here: the same command on every host finds the others."""

    coordinator: str = ""
    """host:port of process 0, where the processes meet; empty: found by JAX on TPU pods, else this process is alone."""
    count: int = 0
    """Number of processes (with `coordinator`); 1: this one is alone, 0: as many as JAX finds on a TPU pod."""
    index: int = 0
    """This process's place among them, from 0 (with `coordinator`)."""
    timeout: int = 300
    """Seconds to wait for the others at the start."""

    def __post_init__(self) -> None:
        check_least(self, count=0, index=0, timeout=1)
        count = max(1, self.count)
        if self.index >= count:
            raise InputError(f"index is {self.index}, but {count} processes count from 0 to {count - 1}")
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and port.isdigit()):
            raise InputError(f"coordinator must be HOST:PORT of process 0, not {self.coordinator!r}")
        if self.coordinator and not self.count:
            raise InputError("coordinator is given, but no count; give the number of processes")
        if self.count > 1 and not self.coordinator:
            raise InputError("count is given, but no coordinator; give HOST:PORT of process 0")


@contextlib.contextmanager
def joined(config: HostsConfig) -> Iterator[None]:
    """Joins the processes before any JAX operation; an error that leaves the context in one of them ends them all.

    Each says in one line which process failed and why, and exits with that one's status. InputError where the others
    cannot be reached in `config.timeout` seconds. Does nothing for a process that is alone, or has joined already.
    """
    if distributed.global_state.client is not None or not _initialised(config) or jax.process_count() == 1:
        yield
        return
    left = threading.Event()
    watching = threading.Thread(target=_end_with_the_others, args=(left,), daemon=True)
    watching.start()
    try:
        yield
        left.set()
        watching.join()
    except (Exception, KeyboardInterrupt) as error:
        lost = isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in _LOST)
        if lost:  # the cause is another process: its own words, if it left any, come within the grace
            watching.join(_GRACE)
            error = InputError(
                "the connection to another process was lost; see its log, then start all of them again: "
                "they go on from the last checkpoint"
            )
        bad_input = isinstance(error, InputError) and not lost  # status 2: the same command would fail again
        status = 2 if bad_input else 130 if isinstance(error, KeyboardInterrupt) else 1
        _tell(status, error)
        atexit.register(_leave, status)  # runs before JAX's, which would wait for the other processes
        raise error


def _initialised(config: HostsConfig) -> bool:
    if config.coordinator:
        if config.index:
            _reach(config)
        _initialise(config, config.coordinator, config.count, config.index, cluster_detection_method="deactivate")
        return True
    if config.count == 1 or os.environ.get("JAX_PLATFORMS") == "cpu" or not _tpu() or _local():
        return False
    try:
        _initialise(config)
    except ValueError:  # a TPU of one host that no cluster manager started
        return False
    except OSError as error:  # of requests, too
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"this host has a TPU, but no metadata server says which hosts belong to it ({reason}); give hosts.count 1 "
            "if it is alone, else hosts.coordinator"
        ) from error
    return True


def _local() -> bool:
    """Whether the environment names this host alone, as notebooks with a TPU do."""
    named = {os.environ.get(name) for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")}
    return not named.isdisjoint({"local", "localhost"})


def _initialise(config: HostsConfig, *args: Any, **options: Any) -> None:
    """JAX itself would end the process with a trace where the others do not come; here a line does it first."""

    def give_up() -> None:
        print(f"pivotjax: {_not_joined(config)}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(config.timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(*args, initialization_timeout=config.timeout + 60, **options)
    except RuntimeError as error:
        raise _not_joined(config) from error
    finally:
        timer.cancel()


def _tpu() -> bool:
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _reach(config: HostsConfig) -> None:
    """Until process 0 listens."""
    host, _, port = config.coordinator.rpartition(":")
    until = time.monotonic() + config.timeout
    while time.monotonic() < until:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise _not_joined(config)


def _not_joined(config: HostsConfig) -> InputError:
    place = f"process {config.index} of {config.count}" if config.coordinator else "this host"
    return InputError(
        f"{place} did not meet the others at {config.coordinator or 'the coordinator'} within {config.timeout} s; "
        "check hosts.coordinator, hosts.count and that every process was started"
    )


def _tell(status: int, error: BaseException) -> None:
    """Leaves word of this process's end for the others, unless another's end is known already."""
    what = " ".join(str(error).split()) or type(error).__name__
    note = json.dumps({"process": jax.process_index(), "status": status, "what": what[:500]})
    with contextlib.suppress(Exception):  # the service is gone, or another was first
        distributed.global_state.client.key_value_set(_ENDED, note)


def _end_with_the_others(left: threading.Event) -> None:
    """In a thread, until `left` is set: where word of another process's end comes, says it and ends this one."""
    while not left.wait(_LOOK):
        try:
            note = json.loads(distributed.global_state.client.key_value_try_get(_ENDED))
        except jax.errors.JaxRuntimeError:  # no word yet
            continue
        if note["process"] != jax.process_index():
            print(f"pivotjax: process {note['process']} ended all: {note['what']}", file=sys.stderr)
            _leave(note["status"])


def _leave(status: int) -> None:
    """Ends now: an orderly end would wait for processes that no longer answer."""
    if jax.process_index() == 0:
        time.sleep(1.0)  # the service lives here: the others read why before it goes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def gather(tree: Any) -> Any:
    """NumPy arrays or scalars of each process -> stacked on a new first axis of size process count, in all of them."""
    if jax.process_count() == 1:
        return jax.tree.map(lambda a: np.asarray(a)[None], tree)
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree))


def fetch(tree: Any) -> Any:
    """Arrays on the devices of all processes -> whole NumPy arrays, in all of them."""

    def whole(a: jax.Array) -> np.ndarray:
        if a.is_fully_addressable or a.is_fully_replicated:
            return jax.device_get(a)
        return np.asarray(multihost_utils.process_allgather(a, tiled=True))

    return jax.tree.map(whole, tree)


def preempted(step: int) -> bool:
    """Whether all processes are to save and end after `step` because one of them was told to end (SIGTERM)."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def cache_filled_once(cache: Path) -> Iterator[None]:
    """Where several processes share a cache, process 0 fills it before the others look."""
    shared = jax.process_count() > 1 and seen_by_all(cache)
    if shared and jax.process_index() > 0:
        multihost_utils.sync_global_devices("the cache is filled")
    yield
    if shared and jax.process_index() == 0:
        multihost_utils.sync_global_devices("the cache is filled")


def agree(things: Mapping[str, str]) -> None:
    """InputError where a thing is not the same in all processes; each calls it at the same point."""
    digests = [int.from_bytes(hashlib.sha256(value.encode()).digest()[:3]) for value in things.values()]
    told = gather(np.array(digests, np.int32))
    for name, column in zip(things, told.T, strict=True):
        if len(set(column.tolist())) > 1:
            raise InputError(f"the processes of this run do not have the same {name}; give all of them the same files")
