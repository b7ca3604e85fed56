# SPDX-License-Identifier: Apache-2.0
"""Device and dtype follow the stated rule, and an order is an order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arrowhead_engine import compute
from arrowhead_engine.errors import UnsupportedModel


def cpuinfo(tmp_path: Path, vendor: str, *flags: str) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(
        f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {' '.join(flags)}\n\n" * 2
    )
    return path


@pytest.mark.parametrize(
    ("vendor", "flags", "dtype"),
    [
        ("AuthenticAMD", ["avx512f", "avx512_bf16"], torch.bfloat16),
        ("AuthenticAMD", ["avx2"], torch.float32),
        ("GenuineIntel", ["avx512f", "avx512_bf16"], torch.float32),
        ("GenuineIntel", ["avx512f", "avx512_bf16", "amx_tile", "amx_bf16"], torch.bfloat16),
        ("GenuineIntel", ["avx2"], torch.float32),
    ],
)
def test_the_dtype_the_processor_is_fast_at(
    tmp_path: Path, vendor: str, flags: list[str], dtype: torch.dtype
) -> None:
    assert compute._fast_cpu_dtype(cpuinfo(tmp_path, vendor, *flags)) == dtype


def test_an_unknown_processor_computes_in_float32(tmp_path: Path) -> None:
    assert compute._fast_cpu_dtype(tmp_path / "nothing here") == torch.float32


def test_the_rule_can_be_overridden() -> None:
    for dtype, wanted in compute.DTYPES.items():
        assert compute.choose("cpu", dtype) == compute.Compute(torch.device("cpu"), wanted)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", "int4", "dtype 'int4'; known are auto, float32"),
        ("tpu9", "auto", "device 'tpu9'"),
        ("meta", "auto", "device 'meta'; known are"),
        ("mps", "auto", "device 'mps'; known are"),
    ],
)
def test_what_is_not_known_is_refused(device: str, dtype: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        compute.choose(device, dtype)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compute.choose() == compute.Compute(torch.device("cuda"), torch.float16)
    assert compute.instance_device("GPU", "1") == "cuda:1"
    assert compute.instance_device("CPU", "0") == "cpu"


def test_without_a_gpu_the_cpu_is_taken_and_an_order_for_one_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute.choose().device.type == "cpu"
    assert compute.instance_device("GPU", "0") == "cpu"
    with pytest.raises(UnsupportedModel, match="torch sees no CUDA device"):
        compute.choose("cuda:0")
