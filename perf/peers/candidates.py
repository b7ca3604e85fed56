# SPDX-License-Identifier: Apache-2.0
"""What there is to measure: every peer that can be built here, and ourselves."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perf.peers import environments, servers
from perf.peers.environments import PeerUnavailable
from perf.peers.inprocess import Engine
from perf.peers.servers import Kind

_QUEUE = "what waits goes in together, up to 32 texts"
_PADDED = f"{_QUEUE}, texts of like length padded together; all cores for one call"
_TORCH = {
    "float32": f"`SentenceTransformer.encode` in float32; {_QUEUE}; all cores for one call",
    "bfloat16": f"the same, loaded in bfloat16; {_QUEUE}; all cores for one call",
}
_ONNXRUNTIME = {
    "float32": ("float32", f"one graph up to the finished vector, all optimizations; {_PADDED}"),
    "int8-tensor": (
        "int8 per tensor",
        f"the same graph, dynamic int8, a scale a tensor; {_PADDED}",
    ),
    "int8-channel": (
        "int8 per channel",
        f"the same graph, dynamic int8, a scale a channel; {_PADDED}",
    ),
}
_OPENVINO = {
    "f32": ("float32", f"the same float32 graph, latency hint, one stream; {_PADDED}"),
    "bf16": ("bfloat16", f"the same with the precision hint bf16; {_PADDED}"),
}


@dataclass
class Candidates:
    """What is to be measured.

    Attributes:
        kinds: servers.
        engines: without servers.
        versions: what is installed, by environment.
        missing: what cannot be built, and why.
    """

    kinds: list[Kind] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def only(self, part: str) -> None:
        """Leaves those with `part` in their keys."""
        self.kinds = [kind for kind in self.kinds if part in kind.key]
        self.engines = [engine for engine in self.engines if part in engine.key]

    def add(self, title: str, note: str, python: Path, arguments: list[str]) -> None:
        """An engine (see `engines.open_encoder` for its arguments), with and without a server."""
        key = "-".join(arguments[:2])
        self.kinds.append(servers.fastapi(key, f"FastAPI + {title}", note, python, arguments))
        self.engines.append(Engine(key, title, python, arguments))


def prepare(
    repository: Path,
    checkpoint: Path,
    dtypes: Sequence[str],
    default: str,
    say: Callable[[str], None],
) -> Candidates:
    """Builds what is not built yet, and lists everything, our own servers first.

    Args:
        repository: ours, with the model converted from `checkpoint`.
        checkpoint: the folder that the peers load or export.
        dtypes: what our encoder is measured in.
        default: the one that is asked over HTTP too.
        say: tells of each step.
    """
    found = Candidates()
    for dtype in sorted(dtypes, key=lambda dtype: dtype != default):
        found.kinds.append(servers.arrowhead(repository, dtype, http=dtype == default))
        if dtype in (default, "int8"):
            found.kinds.append(servers.arrowhead(repository, dtype, fused=True))
        arguments = ["arrowhead", dtype, str(repository)]
        own = Path(sys.executable)
        found.engines.append(Engine(f"arrowhead-{dtype}", f"Arrowhead {dtype}", own, arguments))
    graph: Path | None = None
    with _or_missing(found, "sentence-transformers", say):
        python = _build(found, "torch", say)
        for dtype, note in _TORCH.items():
            title = f"sentence-transformers {dtype}"
            found.add(title, note, python, ["torch", dtype, str(checkpoint)])
        with _or_missing(found, "the ONNX file", say):
            say("the checkpoint as an ONNX file")
            graph = environments.export(python, checkpoint)
    with _or_missing(found, "infinity", say):
        found.kinds.append(servers.infinity(_build(found, "infinity", say), checkpoint))
    with _or_missing(found, "onnxruntime", say):
        folder = _needed(graph)
        python = _build(found, "onnxruntime", say)
        environments.quantize(python, folder)
        for variant, (name, note) in _ONNXRUNTIME.items():
            arguments = ["onnxruntime", variant, str(folder)]
            found.add(f"onnxruntime {name}", note, python, arguments)
    with _or_missing(found, "OpenVINO", say):
        folder = _needed(graph)
        python = _build(found, "openvino", say)
        for variant, (name, note) in _OPENVINO.items():
            found.add(f"OpenVINO {name}", note, python, ["openvino", variant, str(folder)])
    return found


def _build(found: Candidates, family: str, say: Callable[[str], None]) -> Path:
    say(f"environment: {family}")
    python = environments.build(family)
    found.versions[family] = environments.versions(python)
    return python


def _needed(graph: Path | None) -> Path:
    if graph is None:
        raise PeerUnavailable("there is no ONNX file to run")
    return graph


@contextlib.contextmanager
def _or_missing(found: Candidates, title: str, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except PeerUnavailable as error:
        found.missing[title] = str(error)
        say(f"{title}: {error}; going on without it")
