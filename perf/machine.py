# SPDX-License-Identifier: Apache-2.0
"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Machine:
    """The machine, what ran on it, and how busy it was already.

    Attributes:
        cpu: the processor's model, as the kernel names it.
        cores: processors that this process may use.
        features: what of AVX-512 and AMX decides about the speed of number formats.
        memory_gb: RAM in GB (10^9 bytes).
        load_before: processes that wanted a core before the run (1-minute load average): figures
            are only worth something where this is far below `cores`.
        revision: the git revision, "-changed" if the tree differed from it.
        date: UTC, ISO 8601.
    """

    cpu: str
    cores: int
    features: tuple[str, ...]
    memory_gb: float
    kernel: str
    python: str
    versions: dict[str, str]
    load_before: float
    revision: str
    date: str


_STAT = Path("/proc/stat")
_PACKAGES = ("torch", "sentence-transformers", "transformers", "pyarrow", "numpy", "tritonclient")
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


def describe() -> Machine:
    """This machine, now. Imports nothing heavy."""
    info = cpu_facts(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    flags = set(info.get("flags", "").split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    vendor, name = info.get("vendor_id", ""), info.get("model name", platform.machine())
    family = f"family {info.get('cpu family', '?')} model {info.get('model', '?')}"
    return Machine(
        cpu=f"{name} ({vendor} {family})",
        cores=len(os.sched_getaffinity(0)),
        features=tuple(feature for feature in _FEATURES if feature in flags),
        memory_gb=round(pages / 1e9, 1),
        kernel=platform.release(),
        python=platform.python_version(),
        versions={name: _version(name) for name in _PACKAGES},
        load_before=os.getloadavg()[0],
        revision=_revision(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def device_name(device: str) -> str:
    """What "cpu" or "cuda" is called on pages."""
    if device == "cpu":
        return "the CPU"
    import torch

    return torch.cuda.get_device_name(device)


class Bystanders:
    """Looks, between measurements, at what others do on this machine.

    Attributes:
        percent: of all cores, busy at each look, while nothing of ours had anything to do.
    """

    def __init__(self) -> None:
        self.percent: list[float] = []

    def look(self, seconds: float = 0.5) -> None:
        """Waits so long and notes how busy the cores were meanwhile."""
        before = _STAT.read_text(encoding="ascii")
        time.sleep(seconds)
        self.percent.append(busy_percent(before, _STAT.read_text(encoding="ascii")))


def busy_percent(before: str, after: str) -> float:
    """The share of all cores' time between two states of /proc/stat in which they worked."""
    first, last = (list(map(int, stat.split("\n", 1)[0].split()[1:9])) for stat in (before, after))
    spent = [end - start for start, end in zip(first, last, strict=True)]
    # user nice system idle iowait irq softirq steal
    idle = spent[3] + spent[4]
    return 100 * (1 - idle / max(sum(spent), 1))


def cpu_facts(cpuinfo: str) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _revision() -> str:
    command = ["git", "describe", "--always", "--dirty=-changed", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
