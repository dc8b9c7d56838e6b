"""Names of the Hugging Face hub: downloaded only when asked, from a server of our own that speaks enough of its API."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_folders as tiny
import torch
from safetensors.torch import load_file

from pivotjax.checkpoints import hub
from pivotjax.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one repository, `tiny/llama`; the first `cuts` downloads of weights end half-way."""

    def __init__(self, folder: Path, cuts: int = 0):
        self.folder, self.cuts, self.asked = folder, cuts, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.server.asked.append((self.command, self.path))
        path = self.path.split("?")[0]
        if match := re.fullmatch(rf"/tiny/llama/resolve/{COMMIT}/(.+)", path):
            return self._file(self.server.folder / match[1], body)
        names = [path.name for path in sorted(self.server.folder.iterdir())]
        if re.fullmatch(rf"/api/models/tiny/llama/tree/(main|{COMMIT})", path):
            return self._json([{"type": "file", "path": name, "oid": "0" * 40, "size": 1} for name in names])
        if re.fullmatch(rf"/api/models/tiny/llama(/revision/(main|{COMMIT}))?", path):
            found = {"id": "tiny/llama", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self._json(found | {"private": False, "downloads": 0, "likes": 0, "tags": []})
        self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _json(self, value, status=200, headers=()):
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": len(data), **dict(headers)}.items():
            self.send_header(name, str(text))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, file, body):
        data, start = file.read_bytes(), 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(found[1])
        self.send_response(206 if start else 200)
        etag = hashlib.sha256(data).hexdigest()
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        cut = file.suffix == ".safetensors" and self.server.cuts > 0
        self.server.cuts -= cut
        self.wfile.write(data[start : (start + len(data)) // 2 if cut else None])
        if cut:
            self.close_connection = True


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tiny.save(tiny.text("llama"), tmp_path_factory.mktemp("hub") / "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")  # not needed
    return folder


@pytest.fixture
def convert(tmp_path):
    """`pivotjax convert` in a process of its own (the hub's package reads its settings when it is imported)."""

    def run(url, *args, offline=False):
        environ = os.environ | {
            "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "pivotjax.cli", "convert", *map(str, args)]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)

    return run


def test_a_model_of_the_hub(repository, convert, tmp_path):
    """A connection that breaks is tried again; the second time all is in the cache."""
    server = Hub(repository, cuts=1)
    ended = convert(server.url, "hf://tiny/llama", tmp_path / "hf", "--to", "hf")
    assert ended.returncode == 0, ended.stderr
    assert "downloading tiny/llama" in ended.stderr
    before, after = load_file(repository / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())
    got = downloads(server)
    assert got.count("model.safetensors") == 2 and got.count("config.json") == 1 and "pytorch_model.bin" not in got

    server.asked.clear()
    ended = convert(server.url, "tiny/llama", tmp_path / "orbax", "--download", "--revision", "main")
    assert ended.returncode == 0, ended.stderr
    assert not downloads(server)
    server.shutdown()
    ended = convert(server.url, "hf://tiny/llama", tmp_path / "again", offline=True)  # the cache is enough
    assert ended.returncode == 0, ended.stderr


def downloads(server):
    return [path.rsplit("/", 1)[-1] for method, path in server.asked if method == "GET" and "resolve" in path]


def test_what_the_hub_does_not_have(repository, convert, tmp_path):
    server = Hub(repository)
    for args, said in [
        (["hf://tiny/other"], "has no model tiny/other"),
        (["hf://tiny/llama", "--revision", "v9"], "has no model tiny/llama at revision v9"),
    ]:
        ended = convert(server.url, args[0], tmp_path / "out", *args[1:])
        assert ended.returncode == 2 and said in ended.stderr.splitlines()[-1], ended.stderr
        assert "Traceback" not in ended.stderr and not (tmp_path / "out").exists()
    server.shutdown()
    ended = convert(server.url, "hf://tiny/llama", tmp_path / "out", offline=True)
    assert ended.returncode == 2 and "cannot download tiny/llama" in ended.stderr.splitlines()[-1], ended.stderr


def test_nothing_is_downloaded_unasked(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_downloaded", lambda *_: pytest.fail("it was downloaded"))
    assert "no checkpoint at tiny/llama; for a model of the Hugging Face hub write hf://OWNER/NAME" in refused(
        "convert", "tiny/llama", tmp_path / "out")
    assert "no checkpoint at tiny/llama" in refused("inspect", "tiny/llama")


def test_a_path_that_exists_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_downloaded", lambda *_: pytest.fail("it was downloaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny/llama").mkdir(parents=True)
    assert hub.located("tiny/llama", download=True) == Path("tiny/llama")


@pytest.mark.parametrize("name", ["hf://tiny", "hf://a/b/c", "hf://", "hf://../x y", "hf://a/b?c"])
def test_names_that_cannot_be(name):
    with pytest.raises(InputError, match="write hf://OWNER/NAME"):
        hub.located(name)
