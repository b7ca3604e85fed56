# SPDX-License-Identifier: Apache-2.0
"""The build hook compiles the kernels, and leaves nothing else among what goes into a wheel."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HOOK = Path(__file__).parents[2] / "hatch_build.py"


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, its base class stood in for: hatchling is there while building only."""
    interface: Any = ModuleType("hatchling.builders.hooks.plugin.interface")

    class BuildHookInterface:
        root = str(tmp_path)

        def __class_getitem__(cls, _: Any) -> Any:
            return cls

    interface.BuildHookInterface = BuildHookInterface
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", HOOK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / module.KERNELS).mkdir(parents=True)
    return module


def on(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: machine)


def test_nothing_unfinished_lies_among_the_sources(
    hook: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled = []

    def compiler(command: list[Any], **_: Any) -> None:
        assert not [path for path in (tmp_path / hook.KERNELS).iterdir() if path.is_dir()]
        compiled.append(command)
        Path(command[command.index("-o") + 1]).write_text("kernels")

    on("x86_64", monkeypatch)
    monkeypatch.setattr(hook.subprocess, "run", compiler)
    for _ in range(2):  # as pip does
        data: dict[str, Any] = {"artifacts": []}
        hook.KernelsHook().initialize("standard", data)
    assert len(compiled) == 1
    assert (tmp_path / hook.OUT).read_text() == "kernels"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    assert data["artifacts"] == [f"/{hook.OUT}"]
    source = tmp_path / hook.KERNELS / "tile.hpp"
    source.touch()
    os.utime(source, (time.time() + 60, time.time() + 60))
    hook.KernelsHook().initialize("standard", {"artifacts": []})
    assert len(compiled) == 2


def test_elsewhere_the_package_is_built_without_kernels(
    hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("aarch64", monkeypatch)
    data: dict[str, Any] = {"artifacts": []}
    hook.KernelsHook().initialize("standard", data)
    assert data == {"artifacts": []}
