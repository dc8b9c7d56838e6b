"""The launch scripts against a gcloud whose one worker is a folder of this machine."""

import os
import shutil
import signal
import subprocess
import tarfile
import time
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

# Writes down what it is asked; a slice is there once asked for; scp and ssh reach the folder $WORKER.
GCLOUD = """#!/bin/bash
printf '%s\\n' "$*" >> "$WORKER/../log"
case "$*" in
  *describe*) [[ ! -f $WORKER/../made ]] || echo ACTIVE ;;
  *create*) touch "$WORKER/../made" ;;
  *"scp --recurse"*) cp -r "$WORKER/${6#*:}" "$7" ;;
  *scp*) cp "$5" "$WORKER/${6#*:}" ;;
  *ssh*) HOME=$WORKER exec bash -c "${*: -1}" ;;
esac
"""

# Makes an environment whose pivotjax says how it was started, writes to runs/one and, for `wait`, waits for SIGTERM.
UV = """#!/bin/bash
printf 'uv %s\\n' "$*" >> "$HOME/../log"
[[ $1 == venv ]] || exit 0
mkdir -p .venv/bin
cat > .venv/bin/pivotjax <<'END'
#!/bin/bash
printf 'run %s in %s with %s\\n' "$*" "$PWD" "$LIBTPU_INIT_ARGS" >> "$HOME/../log"
mkdir -p runs/one && echo 1 > runs/one/metrics.jsonl
[[ $1 == wait ]] || exit 0
trap 'echo saved; exit 143' TERM
touch "$HOME/../waits"
for ((i = 0; i < 300; i++)); do sleep 0.1; done
END
chmod +x .venv/bin/pivotjax
"""


@pytest.fixture
def cloud(tmp_path):
    """A copy of the program beside things that do not belong on a worker, and the environment of the scripts."""
    tree, worker = tmp_path / "tree", tmp_path / "worker"
    for name in ("tpu_configs", "pivotjax"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".git/HEAD", ".venv/bin/python", "models/big", "runs/old/log", "out/log"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).touch()
    (tree / "train").mkdir()
    (tree / "train" / "one.yaml").write_text("# a recipe\nout: runs/one  # here\n")
    for path, text in ((tmp_path / "bin" / "gcloud", GCLOUD), (worker / ".local" / "bin" / "uv", UV)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    return tree, {"PATH": path, "WORKER": str(worker), "PROJECT": "p", "ZONE": "z", "TMPDIR": str(tmp_path)}


def launch(cloud, script, *args, **environment):
    tree, base = cloud
    where = tree / "tpu_configs" / "launch" / script
    return subprocess.run([where, *args], capture_output=True, text=True, env=base | environment, timeout=60)


def test_a_queued_resource_is_asked_for_awaited_and_used(cloud, tmp_path):
    done = launch(cloud, "queued_resource.sh", "v6e-8", "pretrain", "train/one.yaml", "--a", "b c", SPOT="1")
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "log").read_text()
    assert "--accelerator-type v6e-8 --runtime-version v2-alpha-tpuv6e --spot" in said
    assert "ssh pivotjax-v6e-8 --project p --zone z --worker all" in said
    started = next(line for line in said.splitlines() if line.startswith("run "))
    assert started.startswith(f"run pretrain train/one.yaml --a b c in {tmp_path}/worker/pivotjax with --xla_")
    assert "--xla_enable_async_all_gather=true" in started
    assert (cloud[0] / "runs" / "one" / "metrics.jsonl").read_text() == "1\n"  # fetched
    assert "--worker 0" in said.splitlines()[-1]


def test_the_program_and_nothing_else_is_copied(cloud, tmp_path):
    done = launch(cloud, "all_workers.sh", "name", "pretrain", "train/one.yaml")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "worker" / "pivotjax.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"./pivotjax/models/vlm.py", "./train/one.yaml", "./tpu_configs/v5e-64.yaml"} <= names
    assert {name.split("/")[1] for name in names - {"."}} == {"pivotjax", "tpu_configs", "train"}
    assert not list(tmp_path.glob("tmp.*"))  # the archive here is gone


def test_a_python_that_the_program_runs_on_is_installed(cloud, tmp_path):
    """TPU runtimes have Python 3.10."""
    assert launch(cloud, "all_workers.sh", "name", "pretrain", "train/one.yaml").returncode == 0
    made, installed = (line.split() for line in (tmp_path / "log").read_text().splitlines() if line.startswith("uv "))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = made[made.index("--python") + 1]
    assert [int(n) for n in given.split(".")] >= [int(n) for n in project["requires-python"].strip(">=").split(".")]
    extras = installed[-1].removeprefix(".[").removesuffix("]").split(",")
    assert set(extras) == {"tpu", "gcs"} <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("options", "fetched"),
    [
        (["--out", "runs/two"], "name:pivotjax/runs/two"),
        (["--out=runs/two"], "name:pivotjax/runs/two"),
        (["--out", "/mnt/x"], None),
    ],
)
def test_which_folder_is_fetched(cloud, tmp_path, options, fetched):
    (tmp_path / "worker" / "pivotjax" / "runs" / "two").mkdir(parents=True)
    assert launch(cloud, "all_workers.sh", "name", "pretrain", "train/one.yaml", *options).returncode == 0
    asked = [line for line in (tmp_path / "log").read_text().splitlines() if "--recurse" in line]
    assert [line.split()[5] for line in asked] == ([fetched] if fetched else [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_workers_after_a_checkpoint(cloud, tmp_path, number):
    tree, environment = cloud
    command = [tree / "tpu_configs" / "launch" / "all_workers.sh", "name", "wait", "train/one.yaml"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    until = time.monotonic() + 30
    while not (tmp_path / "waits").exists():
        assert running.poll() is None and time.monotonic() < until, running.communicate()
        time.sleep(0.05)
    os.killpg(running.pid, number)  # as a terminal does
    said, errors = running.communicate(timeout=20)
    assert running.returncode == 143, errors
    assert said == "saved\n" and "told to save a checkpoint" in errors


def test_a_run_that_fails_fails_here(cloud, tmp_path):
    (tmp_path / "worker" / ".local" / "bin" / "uv").write_text("#!/bin/bash\nexit 7\n")
    done = launch(cloud, "all_workers.sh", "name", "pretrain", "train/one.yaml")
    assert done.returncode == 7 and "--recurse" not in (tmp_path / "log").read_text()


def test_a_jobset_keeps_every_argument_as_it_is(cloud):
    words = ["pretrain", 'say "hi"', r"a\nb", "two\nlines", "a\tb", "$x & 'y' # z", "-n", ""]
    done = launch(cloud, "jobset.sh", "v5e-4", *words, IMAGE="image:1", CLAIM="disk")
    (pod,) = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    assert pod["template"]["spec"]["template"]["spec"]["containers"][0]["args"] == words


@pytest.mark.parametrize("script", ["all_workers.sh", "queued_resource.sh", "jobset.sh"])
def test_examples_name_places_that_all_workers_see(script):
    head = (ROOT / "tpu_configs" / "launch" / script).read_text().split("set -euo pipefail")[0]
    options = ("model.vision /mnt/", "model.language /mnt/", "data.scenario /mnt/", "checkpoints.folder gs://")
    assert all(f" --{option}" in head for option in options)
