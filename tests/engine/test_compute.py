# SPDX-License-Identifier: Apache-2.0
"""Engine, device and dtype follow the stated rule, and an order is an order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arrowhead_engine import compute
from arrowhead_engine.compute import Compute
from arrowhead_engine.errors import UnsupportedModel

VNNI = [*sorted(compute.KERNELS)]


def cpuinfo(tmp_path: Path, vendor: str, *flags: str) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(
        f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {' '.join(flags)}\n\n" * 2
    )
    return path


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes this machine one without a GPU and with such a processor."""
    real = compute.cpu_flags

    def make(vendor: str, *flags: str) -> None:
        path = cpuinfo(tmp_path, vendor, *flags)
        real.cache_clear()
        monkeypatch.setattr(compute, "cpu_flags", lambda: real(path))
        monkeypatch.setattr(compute, "has_cuda", lambda: False)
        monkeypatch.setattr(compute, "library", lambda: path)

    return make


@pytest.mark.parametrize(
    ("vendor", "flags", "chosen"),
    [
        ("AuthenticAMD", [*VNNI, "avx512_bf16"], Compute("native", "cpu", "bfloat16")),
        ("AuthenticAMD", ["avx2"], Compute("torch", "cpu", "float32")),
        ("GenuineIntel", ["avx512f", "avx512_bf16"], Compute("torch", "cpu", "float32")),
        ("GenuineIntel", VNNI, Compute("native", "cpu", "float32")),
        ("GenuineIntel", [*VNNI, "avx512_bf16"], Compute("native", "cpu", "float32")),
        (
            "GenuineIntel",
            [*VNNI, "avx512_bf16", "amx_tile", "amx_bf16"],
            Compute("torch", "cpu", "bfloat16"),
        ),
        ("", [], Compute("torch", "cpu", "float32")),
    ],
)
def test_what_the_processor_is_fast_at(
    processor: Callable[..., None], vendor: str, flags: list[str], chosen: Compute
) -> None:
    processor(vendor, *flags)
    assert compute.choose() == chosen


def test_an_unknown_processor_has_no_flags(tmp_path: Path) -> None:
    assert compute.cpu_flags(tmp_path / "nothing here") == {""}


def test_the_rule_can_be_overridden(processor: Callable[..., None]) -> None:
    processor("GenuineIntel", *VNNI, "avx512_bf16")
    for dtype in ("float32", "bfloat16", "int8"):
        assert compute.choose("cpu", dtype) == Compute("native", "cpu", dtype)
    assert compute.choose("cpu", "float16") == Compute("torch", "cpu", "float16")
    assert compute.choose("cpu", "float32", "torch") == Compute("torch", "cpu", "float32")
    assert compute.choose("cpu", "auto", plain=False) == Compute("torch", "cpu", "float32")


@pytest.mark.parametrize(
    ("device", "dtype", "engine", "message"),
    [
        ("cpu", "int4", "auto", "dtype 'int4'; known are auto, float32"),
        ("tpu9", "auto", "auto", "device 'tpu9'"),
        ("meta", "auto", "auto", "device 'meta'; known are"),
        ("mps", "auto", "auto", "device 'mps'; known are"),
        ("cpu", "auto", "onnx", "engine 'onnx'; known are auto, native, torch"),
        ("cpu", "int8", "torch", "int8 is for the native engine, but torch was asked for"),
        ("cpu", "float16", "native", "it does not compute in float16"),
        ("cpu", "bfloat16", "native", "this processor has no avx512_bf16"),
    ],
)
def test_what_is_not_known_is_refused(
    processor: Callable[..., None], device: str, dtype: str, engine: str, message: str
) -> None:
    processor("GenuineIntel", *VNNI)
    with pytest.raises(UnsupportedModel, match=message):
        compute.choose(device, dtype, engine)


def test_int8_without_the_native_engine_says_why(
    processor: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processor("GenuineIntel", "avx2")
    with pytest.raises(UnsupportedModel, match="but this processor has no avx512_vnni, avx512bw"):
        compute.choose("cpu", "int8")
    processor("GenuineIntel", *VNNI)
    with pytest.raises(UnsupportedModel, match="it does not know this network"):
        compute.choose("cpu", "int8", plain=False)
    monkeypatch.setattr(compute, "library", lambda: tmp_path / "none")
    with pytest.raises(UnsupportedModel, match="this installation has none"):
        compute.choose("cpu", "int8")


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "has_cuda", lambda: True)
    assert compute.choose() == Compute("torch", "cuda", "float16")
    assert compute.instance_device("GPU", "1") == "cuda:1"
    assert compute.instance_device("CPU", "0") == "cpu"


def test_without_a_gpu_the_cpu_is_taken_and_an_order_for_one_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute.choose().device == "cpu"
    assert compute.instance_device("GPU", "0") == "cpu"
    with pytest.raises(UnsupportedModel, match="torch sees no CUDA device"):
        compute.choose("cuda:0")


@pytest.mark.parametrize(
    ("text", "wanted"), [("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1), ("", 64)]
)
def test_a_containers_share_of_the_cores_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, wanted: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "cpu.max").write_text(text)
    assert compute.processors(tmp_path, tmp_path) == wanted
    assert compute.processors(tmp_path / "none", tmp_path) == 64


@pytest.mark.parametrize(("quota", "wanted"), [("-1", 64), ("250000", 2), ("50000", 1)])
def test_a_containers_share_by_cgroup_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, wanted: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert compute.processors(tmp_path, tmp_path) == wanted


def test_two_processors_of_one_core_count_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 5})
    for cpu in range(6):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 3},{cpu % 3 + 3}\n")
    assert compute.processors(tmp_path / "none", tmp_path) == 3
