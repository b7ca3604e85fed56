# SPDX-License-Identifier: Apache-2.0
"""Models from a hub: the real `huggingface_hub` client against a hub that serves a folder."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from safetensors.torch import load_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = {"modeling_evil.py": b"raise SystemExit('was executed')", "unused.onnx": b"not wanted"}


@dataclass
class Hub:
    """A hub with one model, `org/model`, whose files are those of `folder`."""

    folder: Path
    url: str = ""
    gated: bool = False
    break_after: int | None = None  # bytes of a large file until the connection is cut, once
    asked: list[str] = field(default_factory=list)
    broken: str = ""

    def files(self) -> dict[str, bytes]:
        own = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file()
        }
        return {**own, **CODE}


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    served = Hub(tiny)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            files = served.files()
            if path.startswith("/api/models/org/model/tree/"):
                rows = [
                    {"type": "file", "path": name, "size": len(data), "oid": _sha1(data)}
                    for name, data in files.items()
                ]
                self.answer(200, json.dumps(rows).encode())
            elif path.startswith("/api/models/org/model"):
                siblings = [{"rfilename": name} for name in files]
                info = {"id": "org/model", "sha": COMMIT, "siblings": siblings, "private": False}
                self.answer(200, json.dumps(info).encode())
            elif path.startswith("/org/model/resolve/"):
                name = path.split("/", 5)[5]
                if served.gated:
                    self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
                elif name not in files:
                    self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                else:
                    self.file(name, files[name])
            else:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

        def file(self, name: str, data: bytes) -> None:
            headers = {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": COMMIT}
            asked = self.headers.get("Range")
            if self.command == "GET":
                served.asked.append(name)
            start = 0
            if asked and self.command == "GET":
                start = int(asked.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            part = data[start:]
            cut = served.break_after
            if self.command == "GET" and cut is not None and len(part) > cut:
                served.break_after, served.broken = None, name
                self.answer(200, part[:cut], headers, length=len(part))
                self.wfile.flush()
                self.connection.close()
                return
            self.answer(206 if start else 200, part, headers)

        def answer(
            self,
            status: int,
            body: bytes,
            headers: dict[str, str] | None = None,
            length: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def convert(hub: Hub, tmp_path: Path, source: str = "org/model", *options: str) -> tuple[int, str]:
    """`arrowhead convert` in a process of its own; its exit status and what it printed."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [Path(sys.executable).parent / "arrowhead", "convert", source, "--name", "tiny"]
    result = subprocess.run(
        [*command, "--repository", tmp_path / "repository", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_a_model_is_downloaded_and_converted_and_its_code_is_left_alone(
    hub: Hub, tmp_path: Path
) -> None:
    status, said = convert(hub, tmp_path)
    assert status == 0, said
    assert "tiny version 1" in said
    assert not {name for name in hub.asked if name.endswith((".py", ".onnx", ".bin"))}
    again = len(hub.asked)
    status, said = convert(hub, tmp_path)
    assert status == 0, said
    assert len(hub.asked) == again  # all of it was in the cache


def test_pickled_weights_are_asked_for_where_there_are_no_others(hub: Hub, tmp_path: Path) -> None:
    import torch

    path = hub.folder / "model.safetensors"
    torch.save(load_file(path), hub.folder / "pytorch_model.bin")
    path.unlink()
    status, said = convert(hub, tmp_path)
    assert status == 0, said
    assert "pytorch_model.bin" in hub.asked


def test_a_download_that_breaks_off_is_made_good(hub: Hub, tmp_path: Path) -> None:
    hub.break_after = 100_000
    status, said = convert(hub, tmp_path)
    assert status == 0, said
    assert [name for name in hub.asked if hub.asked.count(name) == 2] == [hub.broken] * 2


@pytest.mark.parametrize(
    ("source", "message"),
    [("org/model", "the hub wants its terms accepted first"), ("org/other", "no such folder")],
)
def test_refusals(hub: Hub, tmp_path: Path, source: str, message: str) -> None:
    hub.gated = True
    status, said = convert(hub, tmp_path, source)
    assert status == 1
    assert message in said
    assert said.splitlines()[-1].startswith(f"arrowhead: {source}: ")  # bars are above it
    assert not list((tmp_path / "repository").rglob("*"))
