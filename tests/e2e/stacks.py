# SPDX-License-Identifier: Apache-2.0
"""The stack of `make stack`, for the tests that ask for it: three Tritons behind HAProxy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.stack import Stack, free_prefix

NEEDED = {"haproxy": "haproxy", "prometheus": "prometheus", "dnsmasq": "dnsmasq-base"}
PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])


def need(*commands: str) -> None:
    """Skips the test where a Debian package is missing; with CI set, fails."""
    missing = [name for name in commands if shutil.which(name, path=PLACES) is None]
    if missing:
        why = f"no {', '.join(missing)} here: sudo scripts/test-packages installs them"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)


@contextmanager
def started(repository: Path, *, replicas: int = 3, gateways: int = 2) -> Iterator[Stack]:
    """A stack on addresses of its own."""
    need(*NEEDED)
    with Stack(repository, replicas=replicas, gateways=gateways, prefix=free_prefix()) as stack:
        yield stack
