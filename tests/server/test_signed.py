# SPDX-License-Identifier: Apache-2.0
"""With a public key only what was signed is served; toy models, real Triton."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from arrowhead_conversion import signing
from arrowhead_server.address import free_address
from arrowhead_server.errors import NotSignedError, RepositoryError
from arrowhead_server.supervisor import Server, running_server

from .conftest import pin, write_version

# Whatever the server reads of version 1: each of these decides what is computed.
FILES = [
    "toy_tokenizer/1/model.py",
    "toy_tokenizer/1/tokenizer.json",
    "toy_tokenizer/1/metadata.json",
    "toy_encoder/1/model.py",
    "toy_encoder/1/weights.parquet",
    "toy_encoder/1/metadata.json",
    "toy_encoder/warmup/ids",
]
CONFIGURATIONS = ["toy/config.pbtxt", "toy_tokenizer/config.pbtxt", "toy_encoder/config.pbtxt"]


@pytest.fixture
def repository(make_repository: Callable[..., Path]) -> Path:
    repository = make_repository()
    pin(repository, 1)
    (repository / "toy_encoder" / "warmup").mkdir()
    for file in FILES:
        if not file.endswith("model.py"):
            (repository / file).write_bytes(b"some bytes of " + file.encode())
    return repository


@pytest.fixture
def key(tmp_path: Path) -> Path:
    signing.new_key(tmp_path / "release.pem")
    return tmp_path / "release.pem"


@pytest.fixture
def public_key(key: Path) -> Path:
    return key.with_name("release.pem.pub")


@pytest.fixture
def signed(repository: Path, key: Path) -> Path:
    """The repository, its version 1 signed."""
    signing.sign(repository, "toy", 1, key)
    return repository


@pytest.fixture
def server(signed: Path, public_key: Path) -> Iterator[Server]:
    with running_server(signed, public_key=public_key) as server:
        yield server


def value(server: Server, tools: Any, text: str = "a") -> Any:
    return tools.embed(server.address, text)[1]


def flip(path: Path) -> None:
    """One bit of one byte, by a write into the very file."""
    with path.open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))


def refusal(repository: Path, public_key: Path) -> str:
    """Why the repository is not served; Triton is not even started."""
    server = Server(repository, free_address(), public_key=public_key)
    try:
        with pytest.raises(NotSignedError) as caught:
            server.start()
        assert server.pid == 0
    finally:
        with pytest.raises(NotSignedError):
            server.stop()
    return str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_one_changed_bit_in_any_file_is_refused_at_the_start(
    signed: Path, public_key: Path, file: str
) -> None:
    flip(signed / file)
    assert f"{signed / file} is not the file that was signed" in refusal(signed, public_key)


@pytest.mark.parametrize("file", CONFIGURATIONS)
def test_a_configuration_that_says_something_else_is_refused_at_the_start(
    signed: Path, public_key: Path, file: str
) -> None:
    path = signed / file
    path.write_text(path.read_text().replace("max_batch_size: 100", "max_batch_size: 101"))
    assert f"{file} is not what was signed" in refusal(signed, public_key)


@pytest.mark.parametrize(
    "addition",
    [
        'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/tmp/mine.tar.gz" } }',
        'default_model_filename: "other.py"',
        'model_warmup { name: "w" batch_size: 1 inputs { key: "length" value { '
        'data_type: TYPE_INT32 dims: [ 1 ] input_data_file: "other" } } }',
    ],
    ids=["another environment", "other code", "other input"],
)
def test_a_configuration_that_leads_to_other_files_is_refused(
    signed: Path, public_key: Path, addition: str
) -> None:
    with (signed / "toy_encoder" / "config.pbtxt").open("a") as config:
        config.write(addition + "\n")
    assert "toy_encoder/config.pbtxt is not what was signed" in refusal(signed, public_key)


def test_what_is_not_signed_is_refused_at_the_start(
    repository: Path, public_key: Path, key: Path
) -> None:
    said = refusal(repository, public_key)
    assert "toy version 1 is not signed" in said
    assert "arrowhead sign toy --version 1 --key FILE" in said
    signing.sign(repository, "toy", 1, key)
    (repository / "toy_tokenizer" / "1" / "tokenizer.json").unlink()
    assert "tokenizer.json: No such file" in refusal(repository, public_key)


def test_another_key_is_refused_at_the_start(signed: Path, tmp_path: Path) -> None:
    other = signing.new_key(tmp_path / "other.pem")
    assert "was not signed with the key" in refusal(signed, other)


def test_a_forged_statement_is_refused(signed: Path, public_key: Path) -> None:
    path = signing.signature_path(signed, "toy", 1)
    for forged, why in (
        ("{}", "is no signature"),
        ("[1]", "is no signature"),
        ('{"payload": "", "payloadType": "x", "signatures": [1]}', "is no signature"),
        ('{"payload": "", "payloadType": 4, "signatures": []}', "is no signature"),
        ("[" * 100_000, "is no signature"),
        (path.read_text().replace("in-toto+json", "other"), "or was changed"),
        (path.read_text().replace('"payload": "ey', '"payload": "fy'), "or was changed"),
    ):
        path.write_text(forged)
        assert why in refusal(signed, public_key)
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for ever
    assert "is no regular file" in refusal(signed, public_key)


def test_a_signature_of_another_version_is_refused(
    signed: Path, public_key: Path, key: Path
) -> None:
    write_version(signed, 2, "2 * ids.sum")
    pin(signed, 2)
    assert "toy_encoder/2/signature.json is the signature of toy version 1" in refusal(
        signed, public_key
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [(None, "cannot read the key"), ("no key", "is no public key in PEM")],
    ids=["missing", "no key"],
)
def test_a_key_that_is_none_is_told_of(
    signed: Path, tmp_path: Path, text: str | None, why: str
) -> None:
    path = tmp_path / "key.pub"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RepositoryError, match=why), running_server(signed, public_key=path):
        pass


def test_a_public_key_that_others_may_change_is_refused(signed: Path, public_key: Path) -> None:
    public_key.chmod(0o666)
    with (
        pytest.raises(RepositoryError, match="can be changed by others"),
        running_server(signed, public_key=public_key),
    ):
        pass


def test_what_is_signed_is_served_and_what_becomes_of_the_files_is_not(
    signed: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert value(server, tools) == 97
    code = signed / "toy_encoder" / "1" / "model.py"
    with code.open("r+") as file:  # into the very file, which a link would follow
        text = file.read().replace("ids.sum", "2 * ids.sum")
        file.seek(0)
        file.write(text)
    os.kill(server.stub_pids()["toy_encoder"][0], signal.SIGKILL)
    tools.wait_until(lambda: server.restarts, "the restart")
    assert value(server, tools) == 97
    signing.signature_path(signed, "toy", 1).unlink()
    os.kill(server.stub_pids()["toy_encoder"][0], signal.SIGKILL)
    tools.wait_until(lambda: len(server.restarts) == 2, "the other restart")
    assert value(server, tools) == 97
    assert "toy version 1 is served as it was before: toy version 1 is not signed" in caplog.text


def test_files_that_were_added_are_not_shown_to_triton(
    signed: Path, public_key: Path, tools: Any
) -> None:
    (signed / "toy_encoder" / "1" / "numpy.py").write_text("raise SystemExit")
    (signed / "toy_encoder" / "1" / "libtriton_python.so").write_bytes(b"\x7fELF")
    (signed / "toy_encoder" / "libtriton_python").mkdir()
    (signed / "toy_encoder" / "libtriton_python" / "a.so").write_bytes(b"\x7fELF")
    with running_server(signed, public_key=public_key) as server:
        assert value(server, tools) == 97
        command = psutil.Process(server.pid).cmdline()
        (folder,) = [Path(c.split("=")[1]) for c in command if c.startswith("--model-repository")]
        shown = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert "toy_encoder/1/model.py" in shown
    assert not [path for path in shown if "numpy" in path or path.endswith(".so")]


def test_a_version_goes_live_once_it_is_signed(
    signed: Path, server: Server, key: Path, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_version(signed, 2, "2 * ids.sum")
    signing.signature_path(signed, "toy", 2).unlink()
    pin(signed, 2)
    tools.wait_until(lambda: "toy version 2 is refused" in caplog.text, "the refusal")
    assert "toy version 2 is not signed" in caplog.text
    assert value(server, tools, "b") == 98
    signing.sign(signed, "toy", 2, key)
    tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
    assert caplog.text.count("is refused") == 1
    assert server.restarts == []


@pytest.mark.parametrize(
    "forged", ["[" * 100_000, '{"payload": "", "payloadType": 4, "signatures": []}']
)
def test_a_forged_signature_does_not_end_a_running_server(
    signed: Path, server: Server, tools: Any, caplog: pytest.LogCaptureFixture, forged: str
) -> None:
    write_version(signed, 2, "2 * ids.sum")
    signing.signature_path(signed, "toy", 2).write_text(forged)
    pin(signed, 2)
    tools.wait_until(lambda: "toy version 2 is refused" in caplog.text, "the refusal")
    assert value(server, tools, "b") == 98
    assert server.restarts == []


def test_what_was_served_comes_back_though_its_files_are_gone(
    signed: Path, server: Server, tools: Any
) -> None:
    shutil.rmtree(signed / "toy_encoder" / "1")
    os.kill(server.pid, signal.SIGKILL)
    tools.wait_until(lambda: server.restarts, "the restart")
    assert value(server, tools, "b") == 98


@pytest.mark.parametrize("end", ["a crash", "a stop"])
def test_a_copy_of_gigabytes_holds_up_neither_a_restart_nor_a_stop(
    signed: Path,
    server: Server,
    key: Path,
    tools: Any,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    """The look that makes it was begun for a Triton that is no more, and ends before the next."""
    check, copies, over = signing.check, [], threading.Event()

    def slow(
        repository: Path, name: str, version: int, public: Any, copy: Path, progress: Any
    ) -> signing.Statement:
        copies.append(copy)
        while len(copies) == 1 and not over.wait(0.01):
            progress(1)
        return check(repository, name, version, public, copy, progress)

    monkeypatch.setattr(signing, "check", slow)
    write_version(signed, 2, "2 * ids.sum")
    signing.sign(signed, "toy", 2, key)
    pin(signed, 2)
    try:
        tools.wait_until(lambda: copies, "the copy has begun")
        assert value(server, tools, "b") == 98
        if end == "a stop":
            began = time.monotonic()
            server.stop()
            assert time.monotonic() - began < 5
            return
        os.kill(server.pid, signal.SIGKILL)
        tools.wait_until(lambda: server.restarts, "the restart")
        assert not copies[0].exists()
        assert value(server, tools, "c") == 99
        tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
    finally:
        over.set()
    assert len(server.restarts) == 1
    assert server.restarts[0].recovery_s < 5


def test_a_changed_version_never_goes_live(
    signed: Path,
    server: Server,
    key: Path,
    tmp_path: Path,
    tools: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    signing.new_key(tmp_path / "other.pem")
    for version, file in enumerate([*FILES, "toy/config.pbtxt", ""], 2):
        caplog.clear()
        write_version(signed, version, f"{version} * ids.sum")
        signing.sign(signed, "toy", version, key if file else tmp_path / "other.pem")
        path = signed / file.replace("/1/", f"/{version}/")
        before = path.read_bytes() if file else b""
        if file.endswith("config.pbtxt"):
            path.write_text(path.read_text().replace("enable: true", "enable: false"))
        elif file:
            flip(path)
        pin(signed, version)
        tools.wait_until(lambda version=version: f"{version} is refused" in caplog.text, file)
        (line,) = [line for line in caplog.text.splitlines() if "is refused" in line]
        assert (path.name if file else "was not signed with the key") in line
        assert value(server, tools, f"text {version}") == sum(f"text {version}".encode())
        if file:
            path.write_bytes(before)
    assert server.restarts == []
    assert {model.version for model in server.models} == {1}


def test_without_a_key_nothing_is_asked(repository: Path, tools: Any) -> None:
    with running_server(repository) as server:
        assert value(server, tools) == 97
        write_version(repository, 2, "2 * ids.sum")
        pin(repository, 2)
        tools.wait_until(lambda: value(server, tools) == 2 * 97, "version 2")
