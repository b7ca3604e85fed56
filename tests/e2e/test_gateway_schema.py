# SPDX-License-Identifier: Apache-2.0
"""What the gateway's OpenAPI page promises, held against what it answers, by Schemathesis.

It makes requests from the page, good and bad ones, for every route and method, and holds status,
headers and body of each answer against the page. It runs as a command, as its users run it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from arrowhead_server.supervisor import Server

from .gateways import started, stopped

# What a page cannot say: how long a text may be, or which prompts there are. So a request that is
# right by the page may yet be refused.
NOT_CHECKED = "positive_data_acceptance"


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[str]:
    process, url = started(f"--url={server.grpc_url}")
    yield f"{url}/openapi.json"
    stopped(process)


def test_answers_are_as_the_page_says(page: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "--no-color", "run", page]
    command += [f"--exclude-checks={NOT_CHECKED}", "--max-examples=15", "--seed=1"]
    command += ["--report=json", f"--report-json-path={tmp_path / 'report.json'}"]
    run = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run.returncode == 0, run.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    paths = httpx.get(page).json()["paths"]
    assert report["operations"]["tested"] == sum(len(methods) for methods in paths.values())
    assert report["test_cases"]["generated"] > 200
