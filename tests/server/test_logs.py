# SPDX-License-Identifier: Apache-2.0
"""One format of logs: of what we log, what Triton and models do, and of the error at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging, sys
from arrowhead_server import logs
from arrowhead_server.errors import StartError
logs.configure(sys.argv[1], "server", logging.WARNING)
log = logging.getLogger("arrowhead_server.any")
log.warning("restarting %s", "ünï", extra={"seconds": 1.5})
log.warning("batch", extra=logs.from_part("toy_encoder", {"texts": 2, "request_id": "a-1"}))
log.info("not told")
logs.warn(sys.argv[1], "listening on 0.0.0.0")
with logs.told_in(sys.argv[1]):
    raise StartError("it did not come up")
"""


def run(kind: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-c", SCRIPT, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


def test_json() -> None:
    code, lines = run("json")
    told = [json.loads(line) for line in lines]
    assert all(one.pop("time").endswith("+00:00") for one in told)
    assert code == 1
    assert told == [
        {"level": "WARNING", "part": "server", "message": "restarting ünï", "seconds": 1.5},
        {
            "level": "WARNING",
            "part": "toy_encoder",
            "message": "batch",
            "texts": 2,
            "request_id": "a-1",
        },
        {"level": "WARNING", "part": "server", "message": "listening on 0.0.0.0"},
        {"level": "ERROR", "part": "server", "message": "it did not come up"},
    ]


def test_text() -> None:
    code, lines = run("text")
    assert code == 1
    assert lines[0].endswith("WARNING restarting ünï")
    assert lines[1].endswith("WARNING toy_encoder: batch texts=2 request_id=a-1")
    assert lines[2] == "warning: listening on 0.0.0.0"
    assert lines[-1].endswith("StartError: it did not come up")  # the command line's to tell


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_the_error_that_ends_a_command_is_a_line_like_all(command: str, tmp_path: Path) -> None:
    wrong = {"serve": f"--repository={tmp_path}", "gateway": "--url=ftp://nowhere"}[command]
    done = subprocess.run(
        [sys.executable, "-m", "arrowhead_client.cli", command, wrong, "--log-format=json"],
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert json.loads(line)["level"] == "ERROR"
