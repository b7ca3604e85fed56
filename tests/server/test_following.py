# SPDX-License-Identifier: Apache-2.0
"""A running server follows its repository; toy models, real Triton."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arrowhead_server import rollout
from arrowhead_server.supervisor import Server, running_server

from .conftest import pin, write_version


@pytest.fixture
def repository(make_repository: Callable[..., Path]) -> Path:
    repository = make_repository()
    pin(repository, 1)
    return repository


@pytest.fixture
def server(repository: Path) -> Iterator[Server]:
    with running_server(repository) as server:
        yield server


def value(server: Server, tools: Any, text: str = "a") -> Any:
    return tools.embed(server.address, text)[1]


def test_it_goes_to_a_version_and_back(repository: Path, server: Server, tools: Any) -> None:
    def value_while_ready() -> Any:
        assert tools.ask(server.address.health_port, "GET", "/ready")[0] == 200
        return value(server, tools)

    write_version(repository, 2, "2 * ids.sum")
    assert value_while_ready() == 97
    pin(repository, 2)
    tools.wait_until(lambda: value_while_ready() == 2 * 97, "version 2")
    pin(repository, 1)
    tools.wait_until(lambda: value_while_ready() == 97, "version 1")
    assert server.restarts == []


@pytest.mark.parametrize(
    ("code", "cause"),
    [("no such name +", "invalid syntax"), ("ids.nothing", "failed 3|no attribute 'nothing'")],
    ids=["does not load", "does not answer"],
)
def test_a_version_that_does_not_work_is_refused(
    repository: Path,
    server: Server,
    tools: Any,
    caplog: pytest.LogCaptureFixture,
    code: str,
    cause: str,
) -> None:
    write_version(repository, 2, code)
    pin(repository, 2)
    tools.wait_until(lambda: "toy version 2 is refused" in caplog.text, "the refusal")
    lines = [line for line in caplog.text.splitlines() if "is refused" in line]
    assert len(lines) == 1
    assert any(part in lines[0] for part in cause.split("|"))
    assert value(server, tools, "b") == 98
    path = "/v2/models/toy_encoder/versions/2/ready"
    tools.wait_until(
        lambda: tools.ask(server.address.http_port, "GET", path)[0] != 200, "the withdrawal"
    )
    assert tools.ask(server.address.http_port, "GET", "/v2/health/ready")[0] == 200
    assert value(server, tools, "c") == 99
    assert server.restarts == []


def test_a_version_that_ends_its_process_leaves_the_server_ready(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    states: list[tuple[int, str]] = []

    def is_refused() -> bool:
        states.append(tools.ask(server.address.health_port, "GET", "/ready"))
        return "toy version 2 is refused" in caplog.text

    write_version(repository, 2, "os._exit(1) or ids.sum")
    pin(repository, 2)
    tools.wait_until(is_refused, "the refusal")
    assert set(states) == {(200, '{"state": "ready"}')}
    assert len(states) > 100
    assert value(server, tools, "b") == 98
    assert server.restarts == []


def test_a_repository_that_cannot_be_read_changes_nothing(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = repository / "toy" / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace("[ 8 ]", "[ -1 ]"))
    tools.wait_until(lambda: "'toy' is not followed" in caplog.text, "the complaint")
    assert value(server, tools) == 97
    config.write_text(text)
    write_version(repository, 2, "2 * ids.sum")
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
    assert caplog.text.count("is not followed") == 1


def test_a_model_is_added_and_removed(repository: Path, server: Server, tools: Any) -> None:
    for part in ("_tokenizer", "_encoder", ""):
        copy = shutil.copytree(repository / f"toy{part}", repository.parent / f"new{part}")
        config = copy / "config.pbtxt"
        config.write_text(config.read_text().replace('"toy', '"new'))
        copy.rename(repository / f"new{part}")

    def status(model: str) -> int:
        return int(tools.ask(server.address.http_port, "GET", f"/v2/models/{model}/ready")[0])

    tools.wait_until(lambda: status("new") == 200, "the new model")
    assert {model.name for model in server.models} == {"new", "toy"}
    for part in ("", "_encoder", "_tokenizer"):
        shutil.rmtree(repository / f"new{part}")
    tools.wait_until(lambda: status("new_encoder") != 200, "its end")
    assert value(server, tools) == 97
    assert json.loads(tools.ask(server.address.http_port, "GET", "/v2/models/toy")[1])["versions"]
    assert server.restarts == []


def test_touched_files_do_not_load_the_live_version_again(repository: Path, tools: Any) -> None:
    """A conversion writes `warmup` anew, and `git checkout` every file it changes."""
    warmup = repository / "toy_encoder" / "warmup"
    warmup.mkdir()
    (warmup / "ids").write_bytes(b"1")
    with running_server(repository) as server:
        before = server.stub_pids()
        (warmup / "ids").write_bytes(b"1")
        os.utime(repository / "toy_encoder" / "1" / "model.py")
        # Triton has looked since: what came later is served.
        write_version(repository, 2, "2 * ids.sum")
        pin(repository, 2)
        tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
        after = server.stub_pids()
        assert all(set(pids) <= set(after[model]) for model, pids in before.items())
        assert server.restarts == []


def test_a_file_dated_tomorrow_hides_nothing(repository: Path, tools: Any) -> None:
    tomorrow = time.time() + 86_400
    os.utime(repository / "toy_encoder" / "1" / "weights.parquet", (tomorrow, tomorrow))
    with running_server(repository) as server:
        write_version(repository, 2, "2 * ids.sum")
        pin(repository, 2)
        tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")


def test_a_version_that_hangs_is_ended_and_the_next_goes_live(
    repository: Path,
    server: Server,
    tools: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(rollout, "LOAD_TIMEOUT_S", 3.0)
        write_version(repository, 2, "2 * ids.sum")
        path = repository / "toy_encoder" / "2" / "model.py"
        path.write_text(path.read_text().replace("pass", "time.sleep(1000)", 1))
        pin(repository, 2)
        tools.wait_until(lambda: "toy version 2 is refused" in caplog.text, "the refusal")
        assert value(server, tools) == 97
    write_version(repository, 3, "3 * ids.sum")
    pin(repository, 3)
    tools.wait_until(lambda: value(server, tools) == 3 * 97, "version 3")
    assert server.restarts == []


def test_a_broken_neighbour_holds_nobody_up(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("_tokenizer", "_encoder", ""):
        copy = shutil.copytree(repository / f"toy{part}", repository / f"bad{part}")
        config = copy / "config.pbtxt"
        config.write_text(config.read_text().replace('"toy', '"bad'))
    (repository / "bad_encoder" / "1" / "weights.parquet").unlink()
    tools.wait_until(lambda: "'bad' is not followed: model 'bad' has no" in caplog.text, "a word")
    write_version(repository, 2, "2 * ids.sum")
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")


def test_a_crash_comes_back_with_what_was_live(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """And not with what the repository has named since, which nobody has proved."""
    write_version(repository, 2, "no such name +")
    pin(repository, 2)
    os.kill(server.pid, signal.SIGKILL)
    tools.wait_until(lambda: server.restarts, "a restart")
    assert value(server, tools) == 97
    tools.wait_until(lambda: "toy version 2 is refused" in caplog.text, "the refusal")
    assert value(server, tools, "b") == 98


def test_an_ensemble_that_triton_does_not_take_up_turns_back(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_version(repository, 2, "2 * ids.sum")
    config = repository / "toy" / "config.pbtxt"
    good = config.read_text()
    config.write_text(good + "\nno_such_field: 1\n")
    pin(repository, 2)
    tools.wait_until(lambda: "toy version 2 is refused" in caplog.text, "the refusal")
    ready = "/v2/models/toy_encoder/versions/2/ready"
    tools.wait_until(
        lambda: tools.ask(server.address.http_port, "GET", ready)[0] != 200, "the withdrawal"
    )
    assert value(server, tools, "b") == 98
    config.write_text(good)
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools, "c") == 2 * 99, "version 2")
    tools.wait_until(lambda: "toy: version 2 is live, in place of 1" in caplog.text, "the news")
    # The one that turned back was never away, so nothing is said of it.
    assert caplog.text.count("is live") == 1
    assert server.restarts == []


def test_after_a_crash_a_rollback_helps(repository: Path, server: Server, tools: Any) -> None:
    """What served does not load any more, and the repository has gone back meanwhile."""
    write_version(repository, 2, "2 * ids.sum")
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
    (repository / "toy_encoder" / "2" / "model.py").write_text("no such thing")
    pin(repository, 1)
    os.kill(server.pid, signal.SIGKILL)
    tools.wait_until(lambda: server.restarts, "a restart")
    assert value(server, tools) == 97


def test_what_is_being_removed_is_no_model(repository: Path, server: Server, tools: Any) -> None:
    shutil.copytree(repository / "toy", repository / ".removed-toy")
    write_version(repository, 2, "2 * ids.sum")
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
    assert {model.name for model in server.models} == {"toy"}
