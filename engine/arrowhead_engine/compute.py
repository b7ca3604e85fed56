# SPDX-License-Identifier: Apache-2.0
"""Which engine, device and number format to compute in, by a stated rule. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from arrowhead_engine.errors import UnsupportedModel

DTYPES = ("float32", "bfloat16", "float16", "int8")
ENGINES = ("native", "torch")
# What the kernels were compiled to use, by the names of /proc/cpuinfo.
KERNELS = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni", "f16c", "fma"}


@dataclass(frozen=True)
class Compute:
    """Where and in what the network runs. Pooling and normalising are always float32.

    Attributes:
        engine: "native", the kernels of this package, or "torch".
        device: "cpu", "cuda" or "cuda:N".
        dtype: of the products: "float32", "bfloat16", "float16" or "int8".
    """

    engine: str
    device: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.device} {self.dtype}, {self.engine} engine"


def choose(
    device: str = "auto", dtype: str = "auto", engine: str = "auto", *, plain: bool = True
) -> Compute:
    """The engine, device and dtype to compute in.

    `device="auto"` is CUDA where there is a GPU, else the CPU; "cuda:1" names one of several.
    `dtype="auto"` is what the device is fast at and what keeps to the source's vectors:

    - CUDA: float16, which is also how weights are stored, so that they are used as they lie.
    - CPU: bfloat16 where its products are faster than float32's: with AMX tiles, or on AMD with
      AVX512-BF16 (measured 2x). Intel's AVX512-BF16 without AMX runs at about half of float32's
      rate (measured 0.16 against 0.29 TFLOP/s on two Xeon cores), so there and on everything else
      it is float32.

    "int8" is never taken by itself: it is two to three times as fast as float32 and comes out
    within a cosine of 0.997.

    `engine="auto"` is native on a CPU with AVX-512 and VNNI for networks that the kernels know,
    which `plain` tells, but not for bfloat16 on AMX, which the kernels do not use; else torch.

    Raises:
        UnsupportedModel: a device, dtype or engine that is not to be had here.
    """
    if engine not in ("auto", *ENGINES):
        raise UnsupportedModel(f"engine {engine!r}; known are auto, {', '.join(ENGINES)}")
    if dtype not in ("auto", *DTYPES):
        raise UnsupportedModel(f"dtype {dtype!r}; known are auto, {', '.join(DTYPES)}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UnsupportedModel(f"device {device!r}; known are auto, cpu, cuda and cuda:N")
    if device == "auto":
        device = "cuda" if has_cuda() else "cpu"
    elif device != "cpu" and not has_cuda():
        raise UnsupportedModel(f"device {device!r} was asked for, but torch sees no CUDA device")
    if dtype == "auto":
        dtype = "float16" if device != "cpu" else _fast_cpu_dtype()
    why = _not_native(device, dtype, plain)
    if engine == "auto":
        slow = dtype == "bfloat16" and "amx_bf16" in cpu_flags()
        engine = "torch" if why or (slow and plain) else "native"
    elif engine == "native" and why:
        raise UnsupportedModel(f"the native engine was asked for, but {why}")
    if engine == "torch" and dtype == "int8":
        raise UnsupportedModel(
            f"compute_dtype int8 is for the native engine, but {why or 'torch was asked for'}; "
            "take auto"
        )
    return Compute(engine, device, dtype)


def _not_native(device: str, dtype: str, plain: bool) -> str:
    """Why the kernels cannot be used; or nothing."""
    if device != "cpu":
        return f"it has no kernels for {device}"
    if not library().exists():
        return "this installation has none (they are compiled for Linux on x86-64)"
    if missing := KERNELS - cpu_flags():
        return f"this processor has no {', '.join(sorted(missing))}"
    if dtype == "float16":
        return "it does not compute in float16"
    if dtype == "bfloat16" and "avx512_bf16" not in cpu_flags():
        return "this processor has no avx512_bf16"
    return "" if plain else "it does not know this network, or these sizes"


def library() -> Path:
    """The kernels, compiled when this package was installed (hatch_build.py)."""
    return Path(__file__).parent / "kernels" / "libarrowhead.so"


def has_cuda() -> bool:
    """Whether torch sees a GPU. Not asked where there is no driver: torch takes long to import."""
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/dxg").exists():
        return False
    import torch

    return torch.cuda.is_available()


def instance_device(kind: str, device_id: str) -> str:
    """The device for a Triton instance of `kind` "CPU" or "GPU".

    Triton puts instances on a GPU wherever it finds a driver. A torch without CUDA beside it is no
    reason not to serve, so the instance then computes on the CPU.
    """
    return f"cuda:{device_id}" if kind == "GPU" and has_cuda() else "cpu"


def processors(
    cgroup: Path = Path("/sys/fs/cgroup"), cpus: Path = Path("/sys/devices/system/cpu")
) -> int:
    """How many threads this process can keep busy: its cores, or its container's share of them.

    Two processors that share a core's arithmetic count once.
    """
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        try:
            text = (cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text("ascii")
        except OSError:
            text = str(cpu)
        siblings.add(text)
    cores = len(siblings)
    for share in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):  # cgroup 2, 1
        try:
            words = " ".join((cgroup / name).read_text(encoding="ascii") for name in share).split()
            quota, period = map(int, words)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0:  # -1 is "max"
            return min(cores, max(1, quota // period))
    return cores


@cache
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the processor can do, and who made it, by the words of /proc/cpuinfo."""
    facts: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="ascii", errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value)
    return frozenset(facts.get("flags", "").split()) | {facts.get("vendor_id", "").strip()}


def _fast_cpu_dtype() -> str:
    flags = cpu_flags()
    fast = "amx_bf16" in flags or {"AuthenticAMD", "avx512_bf16"} <= flags
    return "bfloat16" if fast else "float32"
