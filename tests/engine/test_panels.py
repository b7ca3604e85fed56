# SPDX-License-Identifier: Apache-2.0
"""Processes share what they lay out, whoever comes first, is killed, or finds the disk full."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from arrowhead_engine import compute
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.errors import CertificateMismatch
from arrowhead_engine.native import NativeEngine
from arrowhead_engine.weightfile import WeightFile
from arrowhead_engine.weightwriter import write

WHY_NOT = compute._not_native("cpu", "float32", plain=True)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no native engine: {WHY_NOT}")

ROWS = [np.arange(1000, 1000 + n, dtype=np.int32) for n in (5, 64)]
BYTES = 21_233_664  # 10.6 million float16 weights
LAYERS = 6 * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def wanted(minilm_weights: Path) -> np.ndarray:
    return opened(minilm_weights, None).embed(ROWS)


def opened(weights: Path, folder: Path | None, dtype: str = "float32") -> Encoder:
    return Encoder.open(weights, device="cpu", dtype=dtype, engine="native", shared=folder)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != "lock")


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a layer laid out in this process."""
    made: list[int] = []
    lay_out = NativeEngine._lay_out
    monkeypatch.setattr(NativeEngine, "_lay_out", lambda *a: (made.append(1), lay_out(*a)))
    return made


HOLDER = """
import os, signal, sys, numpy as np
from arrowhead_engine.encoder import Encoder
from arrowhead_engine.native import NativeEngine
weights, folder, pause_at = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
number, lay_out = 0, NativeEngine._lay_out
def pausing(*arguments):
    global number
    number += 1
    if number == pause_at:
        print("paused", flush=True)
        signal.pause()
    lay_out(*arguments)
NativeEngine._lay_out = pausing
encoder = Encoder.open(weights, dtype="float32", engine="native", shared=folder)
encoder.verify()
vectors = encoder.embed([np.arange(1000, 1000 + n, dtype=np.int32) for n in (5, 64)])
print(number, float(vectors.sum()), flush=True)
sys.stdin.read()
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(minilm_weights: Path) -> Iterator[Start]:
    """Starts a process that opens MiniLM, and pauses before it lays out some layer, or never."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path | None, pause_at: int = 0) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, minilm_weights, folder or "", str(pause_at)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def pss_mb(process: subprocess.Popen[str]) -> float:
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    return int(rollup.partition("\nPss:")[2].split()[0]) * 1024 / 1e6


def test_two_processes_have_the_panels_once(
    folder: Path, start: Start, wanted: np.ndarray, measured: Callable[..., None]
) -> None:
    total = {}
    for where in (None, folder):
        pair = [start(where), start(where)]
        met = [line(process).split() for process in pair]
        assert [float(vectors) for _, vectors in met] == [float(wanted.sum())] * 2
        layers = sorted(int(number) for number, _ in met)
        assert layers == ([0, LAYERS] if where else [LAYERS, LAYERS])
        total[where] = sum(pss_mb(process) for process in pair)
        for process in pair:
            process.communicate("")
    assert [path.stat().st_size for path in files(folder)] == [BYTES + 4]
    measured("PSS of two, apart", total[None], "MB")
    measured("together", total[folder], "MB")
    assert total[None] - total[folder] > 0.8 * BYTES / 1e6


def test_those_who_start_together_lay_out_once(
    folder: Path, minilm_weights: Path, wanted: np.ndarray, laid_out: list[int]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        encoders = list(pool.map(lambda _: opened(minilm_weights, folder), range(4)))
    assert len(laid_out) == LAYERS
    for encoder in encoders:
        np.testing.assert_array_equal(encoder.embed(ROWS), wanted)


def test_one_that_is_killed_while_it_lays_out_leaves_the_next_to_do_it(
    folder: Path, start: Start, wanted: np.ndarray
) -> None:
    first = start(folder, 12)
    assert line(first) == "paused"
    assert [path.name for path in files(folder)] == ["unfinished"]
    second = start(folder)  # waits for it
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(2)
    first.send_signal(signal.SIGKILL)
    assert line(second) == f"{LAYERS} {float(wanted.sum())}"
    assert [path.stat().st_size for path in files(folder)] == [BYTES + 4]


def test_the_last_one_removes_the_file(folder: Path, minilm_weights: Path) -> None:
    one, other = opened(minilm_weights, folder), opened(minilm_weights, folder)
    (path,) = files(folder)
    del one
    assert files(folder) == [path]
    del other
    assert files(folder) == []


def test_what_killed_ones_left_is_removed_by_who_makes_the_next(
    folder: Path, start: Start, minilm_weights: Path
) -> None:
    killed = start(folder)
    line(killed)
    (left,) = files(folder)
    int8 = opened(minilm_weights, folder, "int8")
    assert left in files(folder)  # in use
    killed.kill()
    killed.wait()
    assert left in files(folder)
    del int8
    assert files(folder) == []


def test_what_a_killed_one_left_is_used_again(
    folder: Path, start: Start, minilm_weights: Path, laid_out: list[int], wanted: np.ndarray
) -> None:
    killed = start(folder)
    line(killed)
    killed.kill()
    killed.wait()
    np.testing.assert_array_equal(opened(minilm_weights, folder).embed(ROWS), wanted)
    assert laid_out == []


def test_other_weights_or_formats_are_other_files(
    folder: Path, minilm_weights: Path, tmp_path: Path
) -> None:
    def change(name: str, data: bytes) -> bytes:
        return bytes([data[0] ^ 1]) + data[1:] if name.endswith("3.output.dense.weight") else data

    with WeightFile.open(minilm_weights) as weights:
        tensors = [t._replace(data=change(t.name, bytes(t.data))) for t in weights.stream()]
        write(tmp_path / "other.parquet", tensors, weights.metadata)
    same = shutil.copy(minilm_weights, tmp_path / "same.parquet")
    encoders = [opened(path, folder) for path in (minilm_weights, same, tmp_path / "other.parquet")]
    assert len(files(folder)) == 2
    encoders.append(opened(minilm_weights, folder, "int8"))
    assert len(files(folder)) == 3


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: BYTES // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[BYTES // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def left(folder: Path, start: Start) -> Path:
    """A file that nobody uses any more."""
    killed = start(folder)
    line(killed)
    killed.kill()
    killed.wait()
    return files(folder)[0]


@pytest.mark.parametrize("damage", [truncated, emptied, one_bit])
def test_a_damaged_file_is_made_again(
    minilm_weights: Path,
    left: Path,
    damage: Callable[[Path], None],
    wanted: np.ndarray,
    laid_out: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = left.read_bytes()
    damage(left)
    encoder = opened(minilm_weights, left.parent)
    assert "damaged; laid out anew" in caplog.text
    assert len(laid_out) == LAYERS
    assert left.read_bytes() == whole
    np.testing.assert_array_equal(encoder.embed(ROWS), wanted)


def test_a_file_that_is_whole_but_wrong_is_refused(minilm_weights: Path, left: Path) -> None:
    """The certificate is checked on what was mapped."""
    data = bytearray(left.read_bytes())
    data[BYTES // 2 : BYTES] = bytes(BYTES - BYTES // 2)
    data[BYTES:] = zlib.crc32(data[:BYTES]).to_bytes(4, "little")
    left.write_bytes(data)
    encoder = opened(minilm_weights, left.parent)
    with pytest.raises(CertificateMismatch):
        encoder.verify()


LIMITED = """
import resource, sys
from arrowhead_engine.encoder import Encoder
resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7))
encoder = Encoder.open(sys.argv[1], dtype="float32", engine="native", shared=sys.argv[2])
encoder.verify()
"""


def test_a_disk_that_takes_no_more(folder: Path, minilm_weights: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-c", LIMITED, minilm_weights, folder],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stderr == f"{folder}: weights cannot be shared there: [Errno 27] File too large\n"
    assert files(folder) == []


def test_without_the_folder_every_process_has_its_own(
    folder: Path, minilm_weights: Path, wanted: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = opened(minilm_weights, folder / "missing")
    assert caplog.records[0].levelno == logging.WARNING
    assert "weights cannot be shared there" in caplog.text
    np.testing.assert_array_equal(encoder.embed(ROWS), wanted)


def test_the_folder_may_be_removed_while_it_is_used(
    folder: Path, minilm_weights: Path, wanted: np.ndarray
) -> None:
    encoder = opened(minilm_weights, folder)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(encoder.embed(ROWS), wanted)
    del encoder
    assert not folder.exists()
