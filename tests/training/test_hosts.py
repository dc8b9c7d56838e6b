"""Several processes on the loopback address train as one does, and end together."""

import subprocess
import sys
import time
from pathlib import Path

import jax
import loopback
import numpy as np
import processes
import pytest
import requests

from pivotjax.errors import InputError
from pivotjax.training import hosts
from pivotjax.training.hosts import HostsConfig
from pivotjax.training.metrics import read_metrics

HERE = Path(__file__).parent
STEPS = 10
QUICK = {  # to compile, not to run
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def together(out, mesh, count, what="", steps=STEPS):
    """All processes of a run: [(status, stderr)]."""
    script, port = [sys.executable, HERE / "loopback.py"], processes.free_port()
    commands = [[*script, out, steps, mesh, count, index, port, what] for index in range(count)]
    return processes.together(commands, processes.environment(**QUICK), timeout=240)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process: its parameters and its rows of metrics."""
    folder = tmp_path_factory.mktemp("alone")
    state = loopback.run(folder, STEPS)
    return jax.device_get(state.params), read_metrics(folder)


def same_curve(rows, alone):
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for key, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-4)):
        curve, expected = ([[row[name][key] for name in ("e0", "e1")] for row in some] for some in (rows, alone))
        np.testing.assert_allclose(curve, expected, rtol=tolerance)
        assert np.ptp(expected) > 0.1


@pytest.mark.slow
def test_four_processes_train_as_one_does(tmp_path, alone):
    ended = together(tmp_path, "2x2", 4)
    assert [status for status, _ in ended] == [0] * 4, ended
    rows = read_metrics(tmp_path)
    same_curve(rows, alone[1])
    assert all(row["samples_per_second"] * row["seconds_per_step"] == pytest.approx(8, rel=0.02) for row in rows[1:])
    assert all("pre-training: 10/10" not in err for _, err in ended[1:])  # process 0 alone speaks
    assert not list(tmp_path.glob("**/.seen-by-all-*"))


@pytest.mark.slow
def test_sigterm_to_one_of_two_ends_both_and_one_process_goes_on(tmp_path, alone):
    ended = together(tmp_path, "1x2", 2, "terminated")
    assert [status for status, _ in ended] == [143] * 2, ended
    saved = max(int(path.name) for path in (tmp_path / "training").iterdir())
    assert 3 < saved < STEPS
    line = f"told to end (SIGTERM): step {saved} is finished and saved; the same command goes on from there"
    assert line in ended[0][1] and line not in ended[1][1]
    state = loopback.run(tmp_path, STEPS)
    same_curve(read_metrics(tmp_path), alone[1])
    for mine, theirs in zip(jax.tree.leaves(jax.device_get(state.params)), jax.tree.leaves(alone[0])):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("failing", "pivotjax: process 1 ended all: the disk of this host is full"),
        ("killed", "loopback: the connection to another process was lost; see its log"),
    ],
)
def test_one_that_fails_ends_all_and_what_was_saved_stays(tmp_path, alone, what, said):
    started = time.monotonic()
    (status, err), (other, _) = together(tmp_path, "1x2", 2, what)
    assert (status, other) == ((2, 2) if what == "failing" else (1, -9)), err
    assert said in err and "Traceback" not in err
    assert time.monotonic() - started < 60
    loopback.run(tmp_path, STEPS)  # from step 3, in one process
    same_curve(read_metrics(tmp_path), alone[1])


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_others_that_never_come_are_waited_for_so_long_and_no_longer(index):
    code = "import sys; from pivotjax.training import hosts; from pivotjax.errors import InputError\n"
    code += f"config = hosts.HostsConfig('127.0.0.1:{processes.free_port()}', 2, {index}, timeout=2)\n"
    code += "try:\n    hosts.joined(config).__enter__()\nexcept InputError as error:\n    "
    code += "sys.exit(f'pivotjax: {error}')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=processes.ROOT, timeout=60)
    assert ended.returncode in (1, 2)
    assert ended.stderr.startswith(f"pivotjax: process {index} of 2 did not meet the others at 127.0.0.1:")
    assert "within 2 s; check hosts.coordinator" in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(coordinator="10.0.0.1"), "HOST:PORT"),
        (dict(coordinator="h:1", count=2, index=2), "count from 0 to 1"),
        (dict(count=2), "no coordinator"),
        (dict(coordinator="h:1"), "coordinator is given, but no count"),
        (dict(timeout=0), "timeout must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        HostsConfig(**given)


def test_a_process_that_is_alone():
    with hosts.joined(HostsConfig()):
        assert hosts.gather({"a": np.int32(3)})["a"].tolist() == [3]
        assert not hosts.preempted(1)


def fails(*args):
    raise requests.exceptions.ConnectionError("Failed to resolve 'metadata.google.internal'")


@pytest.mark.parametrize(("count", "environment"), [(1, {}), (0, {"TPU_PROCESS_ADDRESSES": "local"})])
def test_a_tpu_that_is_known_to_be_alone_asks_nobody(monkeypatch, count, environment):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hosts, "_tpu", lambda: True)
    monkeypatch.setattr(hosts, "_initialise", fails)
    with hosts.joined(HostsConfig(count=count)):
        assert jax.process_count() == 1


def test_a_tpu_without_a_metadata_server_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):  # the compiler's tests set the latter
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts, "_tpu", lambda: True)
    monkeypatch.setattr(hosts, "_initialise", fails)
    with pytest.raises(InputError, match=r"no metadata server .*metadata\.google\.internal.* give hosts\.count 1 "):
        hosts.joined(HostsConfig()).__enter__()
