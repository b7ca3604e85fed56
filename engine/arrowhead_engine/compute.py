# SPDX-License-Identifier: Apache-2.0
"""Which device and which number format to compute in, by a stated rule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from arrowhead_engine.errors import UnsupportedModel

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """Where and in what the network runs. Pooling and normalising are always float32."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device} {str(self.dtype).removeprefix('torch.')}"


def choose(device: str = "auto", dtype: str = "auto") -> Compute:
    """The device and dtype to compute in.

    `device="auto"` is CUDA where there is a GPU, else the CPU; "cuda:1" names one of several.
    `dtype="auto"` is what the device is fast at:

    - CUDA: float16, which is also how weights are stored, so that they are used as they lie.
    - CPU: bfloat16 where its products are faster than float32's: with AMX tiles, or on AMD with
      AVX512-BF16 (measured 2x). Intel's AVX512-BF16 without AMX runs at about half of float32's
      rate (measured 0.14 against 0.25 TFLOP/s on two Xeon cores), so there and on everything else
      it is float32.

    Raises:
        UnsupportedModel: a device or dtype that is not to be had.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UnsupportedModel(f"device {device!r}; known are auto, cpu, cuda and cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UnsupportedModel(f"device {device!r}; known are auto, cpu, cuda and cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel(f"device {device!r} was asked for, but torch sees no CUDA device")
    if dtype == "auto":
        return Compute(chosen, torch.float16 if chosen.type == "cuda" else _fast_cpu_dtype())
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype {dtype!r}; known are auto, {', '.join(DTYPES)}")
    return Compute(chosen, DTYPES[dtype])


def instance_device(kind: str, device_id: str) -> str:
    """The device for a Triton instance of `kind` "CPU" or "GPU".

    Triton puts instances on a GPU wherever it finds a driver. A torch without CUDA beside it is no
    reason not to serve, so the instance then computes on the CPU.
    """
    return f"cuda:{device_id}" if kind == "GPU" and torch.cuda.is_available() else "cpu"


def _fast_cpu_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> torch.dtype:
    facts: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="ascii", errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value)
    flags = set(facts.get("flags", "").split())
    amd = "AuthenticAMD" in facts.get("vendor_id", "")
    fast = "amx_bf16" in flags or (amd and "avx512_bf16" in flags)
    return torch.bfloat16 if fast else torch.float32
