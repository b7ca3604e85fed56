# SPDX-License-Identifier: Apache-2.0
"""Gateways as `arrowhead gateway` starts them, for the tests that ask them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from arrowhead_server.address import free_address

from .conftest import wait_until


def started(
    *options: str, scheme: str = "http", verify: Any = True, **how: Any
) -> tuple[subprocess.Popen[bytes], str]:
    """A running gateway and its URL; `how` goes to `Popen`, `verify` to httpx."""
    port = free_address().http_port
    command = [str(Path(sys.executable).with_name("arrowhead")), "gateway", f"--port={port}"]
    process = subprocess.Popen([*command, *options], **{"stdout": subprocess.DEVNULL, **how})
    url = f"{scheme}://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"{url}/ready", verify=verify).status_code in (200, 503)
        except httpx.TransportError:
            return False

    try:
        wait_until(answers, "the gateway")
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process, url


def stopped(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
