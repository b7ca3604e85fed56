# SPDX-License-Identifier: Apache-2.0
"""deploy/install, the steps of the images, in clean environments; and a Triton from PATH."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from docker.utils.build import exclude_paths

from arrowhead_client import Client
from arrowhead_server.address import free_address
from arrowhead_server.triton import find_triton

from .conftest import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `docker build` would see of this folder."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    folder = tmp_path_factory.mktemp("context")
    let_in = exclude_paths(ROOT, [line for line in ignored if line and line[0] != "#"])
    for name in filter(lambda name: (ROOT / name).is_file(), let_in):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def install(context: Path, folder: Path, part: str) -> Path:
    """The environment's bin folder."""
    environment = {**os.environ, "PYTHON": sys.executable}
    if not {"UV_FIND_LINKS", "PIP_FIND_LINKS"} & set(environment):
        environment.setdefault("TORCH", "cpu")  # PyPI's is for GPUs, and gigabytes
    done = subprocess.run(
        [context / "deploy" / "install", folder, part],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


def installed(binaries: Path) -> set[str]:
    listing = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    listed = subprocess.check_output([binaries / "python", "-c", listing], text=True)
    return {name.lower() for name in listed.split()}


@pytest.mark.timeout(600)
def test_the_image_s_steps_serve_with_a_triton_from_path(
    tmp_path: Path,
    context: Path,
    minilm_repository: Path,
    texts: list[str],
    wanted: npt.NDArray[np.float32],
) -> None:
    binaries = install(context, tmp_path / "arrowhead", "triton")
    assert "nvidia-pytriton" not in installed(binaries)
    assert "sentence-transformers" not in installed(binaries)

    # As a container has it: `tritonserver` on PATH knows its own folders.
    runtime = tmp_path / "runtime"
    embedded = find_triton(runtime)
    on_path = tmp_path / "container" / "tritonserver"
    on_path.parent.mkdir()
    on_path.write_text(
        "#!/bin/sh\n"
        f"export LD_LIBRARY_PATH={shlex.quote(embedded.environment['LD_LIBRARY_PATH'])}\n"
        f"exec {shlex.quote(str(embedded.binary))} --backend-directory={embedded.backends} "
        f'--cache-directory={embedded.caches} "$@"\n'
    )
    on_path.chmod(0o755)
    address = free_address()
    ports = [
        f"--{name}-port={getattr(address, f'{name}_port')}"
        for name in ("http", "grpc", "metrics", "health")
    ]
    server = subprocess.Popen(
        [binaries / "arrowhead", "serve", "--repository", minilm_repository, *ports],
        env={**os.environ, "PATH": f"{on_path.parent}:/usr/bin:/bin", "PYTHONPATH": ""},
    )
    try:
        wait_until(lambda: _ready(server, address.health_port), "the server", 120)
        with Client(f"grpc://127.0.0.1:{address.grpc_port}") as client:
            got = client.embed(texts)
        children = psutil.Process(server.pid).children(recursive=True)
        stubs = [each.environ()["PATH"] for each in children if "stub" in each.name()]
    finally:
        server.terminate()
        server.wait(30)
    assert (got * wanted).sum(axis=1).min() > 0.9999
    # It ran the models with the packages of the clean environment.
    assert stubs
    assert all(path.startswith(f"{binaries}:") for path in stubs)


@pytest.mark.timeout(600)
def test_the_gateway_s_steps(tmp_path: Path, context: Path) -> None:
    binaries = install(context, tmp_path / "arrowhead", "gateway")
    assert "torch" not in installed(binaries)
    subprocess.run([binaries / "arrowhead", "gateway", "--help"], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "wanted: deploy/install FOLDER"),
        (["somewhere", "all"], "met part 'all'"),
        (["somewhere", "triton", "--wheel"], "wanted: deploy/install FOLDER"),
    ],
)
def test_wrong_arguments_are_told(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = subprocess.run(
        [ROOT / "deploy" / "install", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert told in done.stderr
    assert not list(tmp_path.iterdir())


def _ready(server: subprocess.Popen[bytes], port: int) -> bool:
    assert server.poll() is None
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    except httpx.TransportError:
        return False
