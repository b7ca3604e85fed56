# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's perf_analyzer: fetched once, run, and its report read.

The package `perf_analyzer` on PyPI is an empty placeholder. The program itself lies in the wheel
`tritonclient==2.50.0`, the last that runs on Debian 12's glibc. It wants libb64 and CUDA's runtime,
both of which the embedded Triton's wheel carries under names of its own; links give them back the
names that are asked for. So neither apt nor a CUDA package is needed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from perf.common import last_line
from perf.machine import ROOT

CACHE = ROOT / ".cache" / "perf_analyzer"
_WHEEL = "tritonclient==2.50.0"
_WHEEL_SHA256 = "421fbb69ae6ab8cdb2c35b82134fcef2fe11e7af7718b1fcbc53335ab9bfe889"
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_RUN_TIMEOUT_S = 120.0

Protocol = Literal["grpc", "http"]


class PerfAnalyzerUnavailable(Exception):
    """It cannot be had or does not run here; the message is one line."""


class PerfAnalyzerFailed(Exception):
    """A measurement failed; the message is one line."""


@dataclass(frozen=True)
class Measured:
    """One run: latencies of requests in milliseconds, and requests answered in a second."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    requests_s: float


class PerfAnalyzer:
    """The program, ready to run."""

    def __init__(self, binary: Path, libraries: Path) -> None:
        self._binary = binary
        before = os.environ.get("LD_LIBRARY_PATH")
        path = os.pathsep.join([str(libraries), *([before] if before else [])])
        self._environment = {**os.environ, "LD_LIBRARY_PATH": path}

    def check(self) -> None:
        """Proves that it runs.

        Raises:
            PerfAnalyzerUnavailable: it does not run here.
        """
        try:
            result = subprocess.run(
                [self._binary, "--version"],
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=_RUN_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PerfAnalyzerUnavailable(f"perf_analyzer does not run here: {error}") from error
        if result.returncode:
            reason = last_line(result.stderr) or f"exit code {result.returncode}"
            raise PerfAnalyzerUnavailable(f"perf_analyzer does not run here: {reason}")

    def measure(
        self,
        model: str,
        url: str,
        texts: Sequence[str],
        *,
        requests: int | None = None,
        window_ms: int = 1000,
        concurrency: int = 1,
        batch: int = 1,
        protocol: Protocol = "grpc",
    ) -> Measured:
        """Keeps `concurrency` requests in flight, each with `batch` of the texts in turn.

        Three windows are measured as one; or so many `requests` are sent, in which case only the
        latencies mean anything: perf_analyzer looks but once a second whether all are answered, and
        the rest of that second counts.

        Raises:
            PerfAnalyzerFailed: a request failed, a window saw none, or the report cannot be read.
        """
        if requests is None:
            # A threshold that no spread exceeds: three windows are "stable", and there are no more.
            extent = ["-p", str(window_ms), "-r", "3", "-s", "1000"]
        else:
            extent = ["--request-count", str(requests)]
        with tempfile.TemporaryDirectory(prefix="arrowhead-perf-") as folder:
            data, report = Path(folder, "data.json"), Path(folder, "report.csv")
            data.write_text(input_data(texts), encoding="utf-8")
            command = [
                str(self._binary),
                *("-m", model, "-u", url, "-i", protocol, "-b", str(batch)),
                *("--concurrency-range", str(concurrency), *extent),
                *("--input-data", str(data), "-f", str(report)),
            ]
            try:
                result = subprocess.run(
                    command,
                    env=self._environment,
                    capture_output=True,
                    text=True,
                    timeout=_RUN_TIMEOUT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise PerfAnalyzerFailed(f"perf_analyzer took over {error.timeout:g} s") from None
            if result.returncode or not report.is_file():
                reason = last_line(result.stderr) or f"exit code {result.returncode}"
                raise PerfAnalyzerFailed(f"perf_analyzer: {reason}")
            return parse_report(report.read_text(encoding="utf-8"), batch)


def input_data(texts: Sequence[str]) -> str:
    """What `--input-data` reads: one step for each text."""
    return json.dumps({"data": [{"text": {"content": [text], "shape": [1]}} for text in texts]})


def parse_report(report: str, batch: int) -> Measured:
    """Reads the CSV of one concurrency: latencies in microseconds, texts (not requests) a second.

    Raises:
        PerfAnalyzerFailed: it is not such a CSV.
    """
    try:
        row = next(csv.DictReader(report.splitlines()))
        p50, p90, p99 = (float(row[f"p{percent} latency"]) / 1e3 for percent in (50, 90, 99))
        return Measured(p50, p90, p99, float(row["Inferences/Second"]) / batch)
    except (StopIteration, KeyError, TypeError, ValueError) as error:
        raise PerfAnalyzerFailed(f"perf_analyzer's report cannot be read: {error!r}") from error


def fetch(cache: Path = CACHE) -> PerfAnalyzer:
    """The program from the cache folder, downloaded (14 MB) the first time.

    Raises:
        PerfAnalyzerUnavailable: says in one line why it cannot be had.
    """
    binary = cache / "perf_analyzer"
    if not binary.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _extract(_download(Path(folder)), binary, Path(folder))
    libraries = cache / "lib"
    _link_libraries(libraries)
    program = PerfAnalyzer(binary, libraries)
    program.check()
    return program


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", f"--dest={folder}", _WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("tritonclient-*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = last_line(result.stderr) or "no wheel came"
        raise PerfAnalyzerUnavailable(f"perf_analyzer: `pip download {_WHEEL}` failed: {reason}")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != _WHEEL_SHA256:
        raise PerfAnalyzerUnavailable(
            f"perf_analyzer: {wheels[0].name} is not the wheel that is pinned (Linux x86-64)"
        )
    return wheels[0]


def _extract(wheel: Path, binary: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/bin/perf_analyzer"))
        draft = folder / "perf_analyzer"
        with archive.open(member) as source, draft.open("wb") as target:
            shutil.copyfileobj(source, target)
    draft.chmod(0o755)
    draft.replace(binary)


def _link_libraries(libraries: Path) -> None:
    """Gives the embedded wheel's libraries their plain names; the system's serve where it lacks."""
    spec = find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return
    carried = Path(spec.submodule_search_locations[0]).parent / "nvidia_pytriton.libs"
    libraries.mkdir(parents=True, exist_ok=True)
    for name, pattern in _LIBRARIES.items():
        found = sorted(carried.glob(pattern))
        link = libraries / name
        if found and not (link.is_symlink() and link.exists()):
            link.unlink(missing_ok=True)
            link.symlink_to(found[0])
