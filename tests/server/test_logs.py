# SPDX-License-Identifier: Apache-2.0
"""One format of logs: of what we log, what Triton and models do, and of the error at the end."""

from __future__ import annotations

import json
import os
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--http-port=many", "--log-format=json"], "'many' is not a valid integer"),
        (["serve", "--log-format", "json", "--nonsense"], "No such option"),
        (["serve", "--log-format", "json", "--drain"], "requires an argument"),
        (["gateway", "--port=0", "--log-format=json"], "0 is not in the range"),
        (["gateway", "--log-format=json", "a", "b"], "unexpected extra arguments"),
        (["gateway", "--log-format=json", "--open", "--keys=keys"], "keys and tokens do not"),
    ],
)
def test_a_wrong_argument_is_a_line_like_all(arguments: list[str], message: str) -> None:
    for environment in ({}, {"ARROWHEAD_LOG_FORMAT": "json"}):
        done = subprocess.run(
            [sys.executable, "-m", "arrowhead_client.cli", *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        (line,) = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (2, "")
        told = json.loads(line)
        assert (told["level"], told["part"]) == (
            "ERROR",
            {"serve": "server"}.get(arguments[0], "gateway"),
        )
        assert message in told["message"]
        arguments = [one for one in arguments if one not in ("--log-format", "json")]
        arguments = [one for one in arguments if one != "--log-format=json"]


def test_a_wrong_argument_is_told_people_as_ever() -> None:
    for arguments in (["serve", "--nonsense"], ["serve", "--log-format=yaml"], ["gateway", "a"]):
        done = subprocess.run(
            [sys.executable, "-m", "arrowhead_client.cli", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"Usage: arrowhead {arguments[0]} [OPTIONS]")


def test_that_traces_lack_their_packages_is_a_line_like_all() -> None:
    script = (
        "import sys\n"
        "sys.modules['opentelemetry.exporter'] = None  # as if it were not installed\n"
        "from arrowhead_client.cli import main\n"
        "main(['gateway', '--url=ftp://nowhere', '--log-format=json'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(one["level"], one["part"]) for one in told] == [
        ("WARNING", "gateway"),
        ("ERROR", "gateway"),
    ]
    assert "pip install 'arrowhead[otel]'" in told[0]["message"]
