# SPDX-License-Identifier: Apache-2.0
"""The peers' virtual environments and model files, kept in .cache/peers until their pins change.

uv installs; torch comes from a folder of wheels if UV_FIND_LINKS or PIP_FIND_LINKS names one (as in
scripts/setup), else as its CPU build.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from perf.common import last_line
from perf.machine import ROOT

CACHE = ROOT / ".cache" / "peers"
PINS = Path(__file__).parent
_BUILD_TIMEOUT_S = 900.0
_VERSIONS = (
    "fastapi",
    "uvicorn",
    "torch",
    "transformers",
    "sentence-transformers",
    "infinity-emb",
    "onnxruntime",
    "openvino",
    "numpy",
)
# Read in the environment itself; prints what of the names given is installed.
_LIST_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try: found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: pass
print(json.dumps(found))
"""


class PeerUnavailable(Exception):
    """A peer cannot be built or does not run here; the message is one line."""


def quiet_environment() -> dict[str, str]:
    """What every process measured sees: no GPU, no hub, no usage statistics."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
    }


def build(family: str, cache: Path = CACHE) -> Path:
    """The Python of a family's environment, made first if there is none with these pins.

    Raises:
        PeerUnavailable: says why it cannot be made.
    """
    pins = PINS / f"{family}.txt"
    folder = cache / family
    python, stamp = folder / "bin" / "python", folder / ".built"
    wanted = fingerprint(pins.read_text(encoding="utf-8"), sys.version)
    if stamp.is_file() and stamp.read_text(encoding="ascii") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    uv = str(Path(sys.executable).with_name("uv"))
    run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], f"{family}: venv")
    install = [uv, "pip", "install", "--quiet", "--compile-bytecode", f"--python={python}"]
    environment = dict(os.environ)
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    if links:
        environment["UV_FIND_LINKS"] = links
    else:
        install += ["--torch-backend", "cpu"]
    run([*install, "--requirement", str(pins)], f"{family}: install", environment)
    stamp.write_text(wanted, encoding="ascii")
    return python


def fingerprint(*parts: str) -> str:
    """Changes when any part does."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def versions(python: Path) -> dict[str, str]:
    """The versions of what matters in an environment."""
    command = [str(python), "-c", _LIST_VERSIONS, *_VERSIONS]
    found: dict[str, str] = json.loads(run(command, "versions"))
    return found


def export(torch_python: Path, checkpoint: Path, cache: Path = CACHE) -> Path:
    """The folder with float32.onnx and the tokenizer's files, made once; `quantize` adds to it.

    Raises:
        PeerUnavailable: the export failed.
    """
    folder, weights = cache / "onnx", checkpoint / "model.safetensors"
    state = weights.stat()
    makers = ("torch.txt", "export.py", "onnxruntime.txt", "quantize.py")
    wanted = fingerprint(
        *((PINS / maker).read_text(encoding="utf-8") for maker in makers),
        f"{weights} {state.st_size} {state.st_mtime_ns}",
    )
    stamp = folder / ".built"
    if stamp.is_file() and stamp.read_text(encoding="ascii") == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target = str(folder / "float32.onnx")
    module(torch_python, "export", [str(checkpoint), target])
    for name in ("tokenizer.json", "sentence_bert_config.json"):
        shutil.copy(checkpoint / name, folder)
    stamp.write_text(wanted, encoding="ascii")
    return folder


def quantize(ort_python: Path, folder: Path) -> None:
    """Writes int8-tensor.onnx and int8-channel.onnx beside float32.onnx, where they are not there.

    Raises:
        PeerUnavailable: the quantizer failed.
    """
    for scale in ("tensor", "channel"):
        target = folder / f"int8-{scale}.onnx"
        if not target.is_file():
            draft = target.with_suffix(".draft")
            module(ort_python, "quantize", [str(folder / "float32.onnx"), scale, str(draft)])
            draft.replace(target)


def module(python: Path, name: str, arguments: Sequence[str]) -> str:
    """Runs a module of this package in a peer's environment; returns what it prints."""
    return run([str(python), "-m", f"perf.peers.{name}", *arguments], name, quiet_environment())


def run(command: list[str], what: str, environment: dict[str, str] | None = None) -> str:
    """Runs a command from the repository's root; returns what it prints.

    Raises:
        PeerUnavailable: it failed; the message is the last line of what it said.
    """
    try:
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_BUILD_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable(f"{what}: {error}") from error
    if result.returncode:
        reason = last_line(result.stderr) or f"exit code {result.returncode}"
        raise PeerUnavailable(f"{what}: {reason}")
    return result.stdout
