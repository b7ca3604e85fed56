# SPDX-License-Identifier: Apache-2.0
"""The gateway's OpenAPI page held against its answers, by Schemathesis."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from perf.common import last_line
from perf.fuzz.served import gateway_before
from perf.server import served

NAME = "gateway: its OpenAPI page"
WANTED = "Status, headers and body as the page says, whatever is sent."
# What a page cannot say: how long a text may be, or which prompts there are.
_NOT_CHECKED = "positive_data_acceptance"


def run(repository: Path, folder: Path, seconds: float) -> tuple[int, list[dict[str, str]]]:
    """How many requests were made, and what was wrong: `what`, `message` and `input` of each."""
    report = folder / "report.json"
    with served(repository) as server, gateway_before(server) as url:
        command = [str(Path(sys.executable).with_name("schemathesis")), "--no-color", "run"]
        command += [f"{url}/openapi.json", f"--exclude-checks={_NOT_CHECKED}", "--seed=1"]
        command += [f"--max-time={max(1, round(seconds))}", "--continue-on-failure"]
        command += ["--report=json", f"--report-json-path={report}"]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    told: dict[str, Any] = json.loads(report.read_text())
    faults = []
    if done.returncode:
        at = done.stdout.find("= FAILURES =")
        faults.append(
            {
                "what": f"Schemathesis ended with {done.returncode}",
                "message": last_line(done.stdout),
                "input": done.stdout[at if at >= 0 else -16_000 :][:16_000],
            }
        )
    return int(told["test_cases"]["generated"]), faults
