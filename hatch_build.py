# SPDX-License-Identifier: Apache-2.0
"""Compiles the engine's kernels while the package is built, also for an editable install.

The compiler comes with the build requirements (pyproject.toml), so a machine needs none of its own,
and everybody gets the same code: for glibc from 2.17 on, and for processors with AVX-512 and VNNI,
which `arrowhead_engine.compute` looks for before it loads them. On other systems the package is
built without kernels, and the engine computes in torch.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("engine/arrowhead_engine/kernels")
OUT = KERNELS / "libarrowhead.so"
FLAGS = [
    "-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-s",
    "-fno-exceptions", "-fno-rtti", "-nostdlib++", "-fvisibility=hidden",
    "-target", "x86_64-linux-gnu.2.17", "-mcpu=x86_64_v4+avx512vnni+avx512bf16",
]  # fmt: skip


class KernelsHook(BuildHookInterface[Any]):
    """Runs before a wheel is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, and has the library put into the wheel."""
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            return
        root = Path(self.root)
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-manylinux_2_17_x86_64"
        build_data["artifacts"].append(f"/{OUT}")
        sources = [Path(__file__), *(root / KERNELS).glob("*pp")]
        if (root / OUT).exists() and (root / OUT).stat().st_mtime > max(
            source.stat().st_mtime for source in sources
        ):
            return  # pip calls twice for one installation
        # Not beside the sources: another build at the same time would put it into its wheel.
        with tempfile.TemporaryDirectory(dir=root, prefix=".kernels-") as folder:
            made = Path(folder) / OUT.name
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "ziglang",
                    "c++",
                    *FLAGS,
                    "-o",
                    made,
                    KERNELS / "network.cpp",
                ],
                cwd=root,
                env={**os.environ, "ZIG_LOCAL_CACHE_DIR": folder, "ZIG_GLOBAL_CACHE_DIR": folder},
                check=True,
            )
            made.rename(root / OUT)
