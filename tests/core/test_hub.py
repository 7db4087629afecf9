"""Hub ids against a small server of our own: redirects, broken transfers, refusals, pinned revisions."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tightship.errors import EnvironmentFailure, UsageError
from tightship.opening import open_checkpoint

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"
COMMIT = "a" * 40
OLD = "b" * 40


class Hub:
    """What the server says. `broken` maps a file to the number of bytes after which each transfer ends."""

    def __init__(self) -> None:
        self.files = {p.name: p.read_bytes() for p in EMBER.iterdir()}
        self.files["README.md"] = b"# not wanted"
        self.files["pytorch_model.bin"] = b"not wanted either"
        self.broken: dict[str, list[int]] = {}
        self.announced: dict[str, str] = {}
        self.status: dict[str, tuple[int, str]] = {}
        self.seen: list[tuple[str, str | None]] = []

    def info(self, commit: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if name.endswith((".safetensors", ".bin")):
                digest = self.announced.get(name, hashlib.sha256(data).hexdigest())
                sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        return {"id": "org/ember", "_id": "1", "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}


class Handler(BaseHTTPRequestHandler):
    """Answers of a model hub; a subclass names it."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.seen.append((f"{self.command} {path}", self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[0] in self.hub.status or "/".join(parts[:2]) in self.hub.status:
            code, word = self.hub.status.get(parts[0]) or self.hub.status["/".join(parts[:2])]
            self.send(code, b"", {"X-Error-Code": word})
        elif parts[:3] == ["api", "models", "org"]:
            self.describe(parts[3], parts[5] if len(parts) > 5 else "main")
        elif parts[0] == "cdn":
            self.file(parts[1], body)
        elif len(parts) == 5 and parts[2] == "resolve":
            self.resolve(parts[3], parts[4])
        else:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def describe(self, model: str, revision: str) -> None:
        known = {"main": COMMIT, "v1": OLD, COMMIT: COMMIT, OLD: OLD}
        if model != "ember":
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in known:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.send(200, json.dumps(self.hub.info(known[revision])).encode(), {"Content-Type": "application/json"})

    def resolve(self, commit: str, name: str) -> None:
        data = self.hub.files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if name.endswith(".safetensors"):  # large files live elsewhere
            headers |= {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            self.send(302, b"", {**headers, "Location": f"http://localhost:{self.server.server_address[1]}/cdn/{name}"})
        else:
            self.send(200, data, headers)

    def file(self, name: str, body: bool) -> None:
        data = self.hub.files[name]
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        cuts = self.hub.broken.get(name, [])
        part = data[start:] if not cuts else data[start : start + cuts.pop(0)]
        if body:
            self.wfile.write(part)
        if len(part) < len(data) - start:
            self.close_connection = True

    def send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _seconds: None)
    yield state
    server.shutdown()
    server.server_close()


def test_a_hub_id_becomes_a_checkpoint(hub: Hub) -> None:
    checkpoint = open_checkpoint("org/ember")
    assert (checkpoint.name, checkpoint.source.identity, checkpoint.source.revision) == ("ember", "org/ember", COMMIT)
    digests = {name: digest for name, _, digest in checkpoint.source.files}
    assert digests == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in EMBER.iterdir()}
    local = open_checkpoint(EMBER)
    name = "model.norm.weight"
    assert checkpoint.resolve(name).value().tolist() == local.resolve(name).value().tolist()
    asked = " ".join(path for path, _ in hub.seen)
    assert "README.md" not in asked
    assert "pytorch_model.bin" not in asked


def test_a_revision_is_pinned_to_its_commit(hub: Hub) -> None:
    assert open_checkpoint("org/ember@v1").source.revision == OLD
    assert open_checkpoint("org/ember", revision="v1").source.revision == OLD
    assert all("/main/" not in path for path, _ in hub.seen if "resolve" in path)


def test_a_broken_transfer_is_resumed(hub: Hub) -> None:
    hub.broken["model.safetensors"] = [1_000_000, 500_000]
    checkpoint = open_checkpoint("org/ember")
    assert checkpoint.resolve("model.norm.weight").shape == (256,)
    ranges = [wanted for path, wanted in hub.seen if path == "GET /cdn/model.safetensors"]
    assert ranges == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_transfer_that_never_ends_is_exit_4(hub: Hub) -> None:
    hub.broken["model.safetensors"] = [1000] + [0] * 100
    with pytest.raises(EnvironmentFailure, match=r"fetching org/ember") as caught:
        open_checkpoint("org/ember")
    assert caught.value.exit_code == 4


def test_other_bytes_than_announced_are_exit_4(hub: Hub) -> None:
    hub.announced["model.safetensors"] = "0" * 64
    with pytest.raises(EnvironmentFailure, match=r"model.safetensors of org/ember came as"):
        open_checkpoint("org/ember")


def test_gated_is_exit_4(hub: Hub) -> None:
    hub.status["api"] = (403, "GatedRepo")
    with pytest.raises(EnvironmentFailure, match="gated"):
        open_checkpoint("org/ember")


def test_gated_files_are_exit_4(hub: Hub) -> None:
    hub.status["org/ember"] = (403, "GatedRepo")
    with pytest.raises(EnvironmentFailure, match="gated"):
        open_checkpoint("org/ember")


def test_a_server_error_is_exit_4(hub: Hub) -> None:
    hub.status["api"] = (500, "")
    with pytest.raises(EnvironmentFailure, match="fetching"):
        open_checkpoint("org/ember")


@pytest.mark.parametrize("source", ["org/nothing", "org/ember@v9"])
@pytest.mark.usefixtures("hub")
def test_not_found_is_exit_2(source: str) -> None:
    with pytest.raises(UsageError, match="the hub has no") as caught:
        open_checkpoint(source)
    assert caught.value.exit_code == 2


def test_no_server_is_exit_4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentFailure, match="fetching org/ember failed"):
        open_checkpoint("org/ember")


def test_offline_uses_what_the_cache_holds(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint("org/ember")
    hub.seen.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = open_checkpoint("org/ember", revision=COMMIT)
    assert checkpoint.source.revision == COMMIT
    assert not hub.seen
    with pytest.raises(EnvironmentFailure, match="fetching org/other"):
        open_checkpoint("org/other")
