# SPDX-License-Identifier: Apache-2.0
"""What a followed repository may do at bad moments; toy models, real Triton."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arrowhead_server.errors import RepositoryError, StartError
from arrowhead_server.repository import EmbeddingModel, read_repository
from arrowhead_server.rollout import Rollout, State
from arrowhead_server.supervisor import Server, running_server

from .conftest import PARTS, pin, write_version


def add(repository: Path, name: str, code: str = "ids.sum") -> None:
    """Another model, which appears whole."""
    for part in ("_tokenizer", "_encoder", ""):
        copy = shutil.copytree(repository / f"toy{part}", repository.parent / f"{name}{part}")
        config = copy / "config.pbtxt"
        config.write_text(config.read_text().replace('"toy', f'"{name}'))
        if part == "_encoder":
            path = copy / "1" / "model.py"
            path.write_text(path.read_text().replace("ids.sum", code))
        copy.rename(repository / f"{name}{part}")


def add_hidden(repository: Path, name: str) -> None:
    """A model that nobody sees before it is `unhide`d."""
    add(repository, f".{name}")
    for part in PARTS:
        config = repository / f".{name}{part}" / "config.pbtxt"
        config.write_text(config.read_text().replace(f'".{name}', f'"{name}'))


def unhide(repository: Path, name: str) -> None:
    for part in reversed(PARTS):
        (repository / f".{name}{part}").rename(repository / f"{name}{part}")


def remove(repository: Path, name: str) -> None:
    for part in ("", "_encoder", "_tokenizer"):
        shutil.rmtree(repository / f"{name}{part}")


@pytest.fixture
def repository(make_repository: Callable[..., Path]) -> Path:
    repository = make_repository()
    pin(repository, 1)
    return repository


@pytest.fixture
def server(repository: Path) -> Iterator[Server]:
    with running_server(repository) as server:
        yield server


def status(server: Server, tools: Any, model: str) -> int:
    """Of its readiness; 0 while Triton restarts."""
    try:
        return int(tools.ask(server.address.http_port, "GET", f"/v2/models/{model}/ready")[0])
    except (OSError, http.client.HTTPException):
        return 0


def value(server: Server, tools: Any, text: str = "a", model: str = "toy") -> Any:
    """The vector's first number, or the error; None while Triton restarts."""
    tensor = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
    path = f"/v2/models/{model}/infer"
    try:
        code, body = tools.ask(server.address.http_port, "POST", path, {"inputs": [tensor]})
    except (OSError, http.client.HTTPException):
        return None
    return json.loads(body)["outputs"][0]["data"][0] if code == 200 else body


def test_a_number_used_again_gives_no_cached_vector_of_the_old_files(
    repository: Path, server: Server, tools: Any
) -> None:
    write_version(repository, 2, "2 * ids.sum")
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
    pin(repository, 1)
    tools.wait_until(lambda: value(server, tools) == 97, "version 1")
    path = "toy_encoder/versions/2"
    tools.wait_until(lambda: status(server, tools, path) != 200, "its end")
    for part in PARTS:
        shutil.rmtree(repository / f"toy{part}" / "2")
    write_version(repository, 2, "3 * ids.sum")
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools, "b") == 3 * 98, "the other version 2")
    assert value(server, tools) == 3 * 97
    assert len(server.restarts) == 1
    assert "not what bore that number before" in server.restarts[0].reason


def test_a_name_used_again_gives_no_cached_vector_of_the_old_model(
    repository: Path, server: Server, tools: Any
) -> None:
    for code, factor in (("ids.sum", 1), ("2 * ids.sum", 2), ("3 * ids.sum", 3)):
        add(repository, "new", code)
        tools.wait_until(lambda: status(server, tools, "new") == 200, "the new model")
        # Not before a restart, if it needs one, is over.
        wanted = factor * 98
        tools.wait_until(
            lambda wanted=wanted: value(server, tools, "b", "new") == wanted, "its vectors"
        )
        assert value(server, tools, model="new") == factor * 97
        remove(repository, "new")
        tools.wait_until(lambda: status(server, tools, "new_encoder") != 200, "its end")


def test_a_name_used_again_before_the_old_parts_are_withdrawn(
    repository: Path, server: Server, tools: Any
) -> None:
    add(repository, "new")
    tools.wait_until(lambda: status(server, tools, "new") == 200, "the new model")
    assert value(server, tools, model="new") == 97
    remove(repository, "new")
    tools.wait_until(lambda: {model.name for model in server.models} == {"toy"}, "its end")
    assert status(server, tools, "new_encoder") == 200  # in case somebody still asks
    add(repository, "new", "2 * ids.sum")
    tools.wait_until(lambda: value(server, tools, "b", "new") == 2 * 98, "the other model")
    assert value(server, tools, model="new") == 2 * 97


def test_files_replaced_under_a_live_version_are_not_served_but_told_of(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_version(repository, 2, "3 * ids.sum")
    path = repository / "toy_encoder" / "1" / "model.py"
    path.write_text(path.read_text().replace("ids.sum", "2 * ids.sum"))
    tools.wait_until(lambda: "version 1 were replaced" in caplog.text, "the complaint")
    assert value(server, tools) == 97
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools, "b") == 3 * 98, "version 2")
    assert caplog.text.count("were replaced") == 1
    assert server.restarts == []


def test_the_last_model_is_served_on_and_another_of_its_name_from_the_next_start(
    repository: Path,
    server: Server,
    tools: Any,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    other = shutil.copytree(repository, tmp_path / "other")
    path = other / "toy_encoder" / "1" / "model.py"
    path.write_text(path.read_text().replace("ids.sum", "2 * ids.sum"))
    remove(repository, "toy")
    tools.wait_until(lambda: "holds no embedding model" in caplog.text, "the complaint")
    assert value(server, tools) == 97
    for part in ("_tokenizer", "_encoder", ""):
        (other / f"toy{part}").rename(repository / f"toy{part}")
    tools.wait_until(lambda: "version 1 were replaced" in caplog.text, "the other complaint")
    assert value(server, tools) == 97
    assert server.restarts == []
    os.kill(server.stub_pids()["toy_encoder"][0], signal.SIGKILL)
    tools.wait_until(lambda: server.restarts, "the restart")
    assert value(server, tools) == 2 * 97


def test_a_version_broken_in_both_parts_goes_live_once_both_are_mended(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_version(repository, 2, "no such name +", tokenizer="no such name")
    pin(repository, 2)
    tools.wait_until(lambda: "version 2 is refused" in caplog.text, "the refusal")
    path = "toy_tokenizer/versions/2"
    tools.wait_until(
        lambda: caplog.text.count("failed to load") > 1 or status(server, tools, path) != 200,
        "both complaints",
    )
    write_version(repository, 2, "2 * ids.sum")
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "the mended version")
    assert caplog.text.count("is refused") <= 2


def test_a_configuration_that_is_no_text_changes_nothing(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = repository / "toy" / "config.pbtxt"
    raw = config.read_bytes()
    config.write_bytes(raw + b"# na\xefve\n")
    tools.wait_until(lambda: "cannot be read" in caplog.text, "the complaint")
    assert "'toy' is not followed" in caplog.text
    assert value(server, tools) == 97
    config.write_bytes(raw)
    write_version(repository, 2, "2 * ids.sum")
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")


def test_a_configuration_that_is_no_text_is_one_line_at_the_start(repository: Path) -> None:
    config = repository / "toy" / "config.pbtxt"
    config.write_bytes(config.read_bytes() + b"# na\xefve\n")
    with pytest.raises(RepositoryError, match=r"config\.pbtxt cannot be read"):
        read_repository(repository)


def test_what_is_being_removed_is_no_model(repository: Path) -> None:
    (repository / "toy").rename(repository / ".removed-toy")
    with pytest.raises(RepositoryError, match="holds no embedding model"):
        read_repository(repository)


def test_what_went_away_since_the_look_is_not_shown(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rollout = Rollout(repository, tmp_path / "shown")
    rollout.begin(lambda _: None)
    rollout.begun()
    (one,) = rollout.models
    gone = EmbeddingModel("toy", 8, 2, "toy")
    rollout.apply(State(frozenset({("toy", 1), ("toy", 2)}), {"toy": one}))
    assert rollout.state == State.of([one])
    folder = tmp_path / "shown"
    assert {path.name for path in (folder / "toy_encoder").iterdir() if path.is_dir()} == {"1"}
    write_version(repository, 2, "2 * ids.sum")
    rollout.apply(State(frozenset({("toy", 1), ("toy", 2)}), {"toy": one}))
    assert rollout.state.pairs == {("toy", 1), ("toy", 2)}
    (repository / "toy" / "config.pbtxt").unlink()
    rollout.apply(State(frozenset({("toy", 1), ("toy", 2)}), {"toy": gone}))
    assert rollout.models == (one,)


def test_a_new_version_that_takes_triton_down_is_refused(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_version(repository, 2, "2 * ids.sum")
    path = repository / "toy_encoder" / "2" / "model.py"
    # The very tritonserver that started it, and nobody whom it may have been handed to since.
    path.write_text(
        "import os\n"
        "parent = os.getppid()\n"
        "if open(f'/proc/{parent}/comm').read().strip() == 'tritonserver':\n"
        "    os.kill(parent, 9)\n" + path.read_text()
    )
    pin(repository, 2)
    tools.wait_until(lambda: "version 2 is refused" in caplog.text, "the refusal", 60)
    tools.wait_until(lambda: value(server, tools) == 97, "version 1")
    tools.wait_until(lambda: len(server.restarts) == 3, "the last restart")
    for number in range(20):
        assert value(server, tools, f"{number}") == sum(map(ord, f"{number}"))
    assert len(server.restarts) == 3


def test_an_old_version_may_be_removed_at_once(
    repository: Path, server: Server, tools: Any
) -> None:
    """While it still serves, or is asked by requests in flight."""
    write_version(repository, 2, "2 * ids.sum")
    met: list[Any] = []
    over = threading.Event()

    def ask() -> None:
        number = 0
        while not over.is_set():
            number += 1
            text = f"{number}"
            met.append((sum(map(ord, text)), value(server, tools, text)))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        pin(repository, 2)
        for part in PARTS:
            shutil.rmtree(repository / f"toy{part}" / "1")
        tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
        path = "toy_encoder/versions/1"
        tools.wait_until(lambda: status(server, tools, path) != 200, "the old one's end")
    finally:
        over.set()
        thread.join()
    assert [answer for wanted, answer in met if answer not in (wanted, 2 * wanted)] == []
    assert server.restarts == []


def test_a_broken_candidate_fails_the_start_with_its_own_way_back(repository: Path) -> None:
    write_version(repository, 2, "no such name +")
    copy = shutil.copytree(repository / "toy", repository / "toy_candidate")
    config = copy / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "toy"', 'name: "toy_candidate"'))
    pin(repository, 2, "toy_candidate")
    advice = pytest.raises(StartError, match="arrowhead rollback toy --candidate")
    with advice, running_server(repository):
        pass


def test_a_broken_candidate_of_a_running_server_has_its_own_way_back(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_version(repository, 2, "no such name +")
    copy = shutil.copytree(repository / "toy", repository.parent / "toy_candidate")
    config = copy / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "toy"', 'name: "toy_candidate"'))
    pin(repository.parent, 2, "toy_candidate")
    copy.rename(repository / "toy_candidate")
    tools.wait_until(lambda: "toy version 2 is refused" in caplog.text, "the refusal")
    assert "run `arrowhead rollback toy --candidate`" in caplog.text
    assert "rollback toy`" not in caplog.text
    assert value(server, tools) == 97


@pytest.mark.parametrize("what", ["no text in a part", "nothing to pin"])
def test_a_new_model_that_cannot_be_shown_is_refused_alone(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    add(repository, "fine")
    tools.wait_until(lambda: status(server, tools, "fine") == 200, "another new model")
    if what == "nothing to pin":
        add(repository, "odd")  # complete for a moment, which must not matter
        config = repository / "odd" / "config.pbtxt"
        config.write_text(re.sub(r"model_version: 1\n", "\n", config.read_text()))
    else:
        add_hidden(repository, "odd")
        with (repository / ".odd_encoder" / "config.pbtxt").open("ab") as file:
            file.write(b"# na\xefve\n")
        unhide(repository, "odd")
    tools.wait_until(lambda: "odd version 1 is refused" in caplog.text, "the refusal")
    write_version(repository, 2, "2 * ids.sum")
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
    assert status(server, tools, "fine") == 200
    assert caplog.text.count("odd version 1 is refused") == 1
    assert server.restarts == []


@pytest.mark.parametrize("what", ["pipe", "device", "huge"])
def test_what_is_no_file_of_ours_holds_nobody_up(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """In the place of each file that the running server reads or copies."""

    def put(path: Path) -> Path:
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        if what == "pipe":
            os.mkfifo(path)
        elif what == "device":
            path.symlink_to("/dev/zero")
        else:
            with path.open("wb") as file:
                file.truncate(1 << 40)  # of no bytes on disk
        return path

    write_version(repository, 2, "2 * ids.sum")
    add(repository, "fine")
    for name, place in (
        ("whole", "/config.pbtxt"),
        ("parted", "_encoder/config.pbtxt"),
        ("beside", "_encoder/data/one"),
        ("certified", "_encoder/1/metadata.json"),
    ):
        add_hidden(repository, name)
        put(repository / f".{name}{place}")
        unhide(repository, name)
    reason = "has more than 1048576 bytes" if what == "huge" else "is no regular file"
    complaint = f"{repository / 'whole' / 'config.pbtxt'} cannot be read: {reason}"
    tools.wait_until(lambda: complaint in caplog.text, "the complaint")
    parted = "parted version 1 is refused" if what == "huge" else "'parted' is not followed"
    tools.wait_until(lambda: parted in caplog.text, "no configuration of a part")
    if what == "huge":
        tools.wait_until(lambda: "beside version 1 is refused" in caplog.text, "no such copy")
    for name in ("fine", "certified", *(["beside"] if what != "huge" else [])):
        tools.wait_until(lambda name=name: status(server, tools, name) == 200, name)
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
    assert server.restarts == []


def test_a_version_whose_warmup_is_mended_is_tried_again(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    add_hidden(repository, "odd")
    encoder = repository / ".odd_encoder"
    (encoder / "warmup").mkdir()
    (encoder / "warmup" / "ids").write_bytes(b"too short")
    with (encoder / "config.pbtxt").open("a") as config:
        config.write(
            'model_warmup { name: "w" batch_size: 1 inputs { key: "input_ids" value { '
            'data_type: TYPE_INT32 dims: [ 4 ] input_data_file: "ids" } } inputs { key: "length" '
            "value { data_type: TYPE_INT32 dims: [ 1 ] zero_data: true } } }\n"
        )
    unhide(repository, "odd")
    tools.wait_until(lambda: "odd version 1 is refused" in caplog.text, "the refusal", 60)
    (repository / "odd_encoder" / "warmup" / "ids").write_bytes(bytes(16))
    tools.wait_until(lambda: status(server, tools, "odd") == 200, "the mended model")
    assert caplog.text.count("odd version 1 is refused") == 1


def test_an_ensemble_of_somebody_elses_is_refused_alone(
    repository: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It uses the parts of a model that is well, and goes on to its next versions."""
    other = shutil.copytree(repository / "toy", repository.parent / "other")
    config = other / "config.pbtxt"
    good = config.read_text().replace('name: "toy"', 'name: "other"')
    config.write_text(f"{good}\nno_such_field: 1\n")
    other = other.rename(repository / "other")
    refusal = "other is not served over toy version 1"
    tools.wait_until(lambda: refusal in caplog.text, "the refusal")
    assert f"put {other / 'config.pbtxt'} right" in caplog.text
    assert "rollback" not in caplog.text
    write_version(repository, 2, "2 * ids.sum")
    pin(repository, 2)
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
    pin(repository, 1)
    tools.wait_until(lambda: value(server, tools) == 97, "version 1, which is not refused")
    (other / "config.pbtxt").write_text(good)
    tools.wait_until(lambda: status(server, tools, "other") == 200, "the mended ensemble")
    assert caplog.text.count(refusal) == 1
    assert "toy version 1 is refused" not in caplog.text
    assert "not served any more" not in caplog.text
    assert server.restarts == []
