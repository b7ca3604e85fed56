# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import arrowhead_client.cli
from arrowhead_client import quantize
from arrowhead_client.cli import COMMANDS, Command, main

ARROWHEAD = [sys.executable, "-m", "arrowhead_client.cli"]


@pytest.fixture
def arrowhead(http_server: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command line against a small server."""
    monkeypatch.setenv("ARROWHEAD_URL", http_server.url)
    return lambda *args, **extra: CliRunner().invoke(main, list(args), **extra)


def _rows(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


FORMS = ["npy", "parquet", "arrow", "jsonl"]


def read(out: Path, form: str) -> Any:
    """The vectors of "a" and "b" that were written in this format."""
    if form == "npy":
        return np.load(out)
    if form == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["text"] for row in rows] == ["a", "b"]
        return np.array([row["embedding"] for row in rows])
    table = pq.read_table(out) if form == "parquet" else pa.ipc.open_file(out).read_all()
    assert table.schema.names == ["text", "embedding"]
    assert table["text"].to_pylist() == ["a", "b"]
    column = table["embedding"].combine_chunks()
    assert pa.types.is_fixed_size_list(column.type)
    return column.flatten().to_numpy().reshape(len(column), -1)


def test_embed_arguments(arrowhead: Any, expected: Any) -> None:
    rows = _rows(arrowhead("embed", "a", "grüße"))
    assert [row["text"] for row in rows] == ["a", "grüße"]
    vectors = np.float32([row["embedding"] for row in rows])
    np.testing.assert_array_equal(vectors, expected(["a", "grüße"]))


@pytest.mark.parametrize("source", ["stdin", "dash", "file"])
def test_embed_lines(arrowhead: Any, tmp_path: Path, source: str) -> None:
    """Line i is vector i: an empty line counts, the end of the last line makes no line."""
    lines = b"\xef\xbb\xbfa\r\n\nb c\n"
    (tmp_path / "texts").write_bytes(lines)
    args = {"stdin": [], "dash": ["--file", "-"], "file": ["-f", str(tmp_path / "texts")]}[source]
    rows = _rows(arrowhead("embed", *args, input=None if source == "file" else lines))
    assert [row["text"] for row in rows] == ["a", "", "b c"]


def test_embed_options_reach_the_client(arrowhead: Any, http_server: Any) -> None:
    rows = _rows(arrowhead("embed", "--prompt", "query: ", "--dimensions", "4", "a"))
    assert http_server.script.seen[0].texts == (b"query: a",)
    assert len(rows[0]["embedding"]) == 4
    assert rows[0]["text"] == "a"
    assert np.linalg.norm(rows[0]["embedding"]) == pytest.approx(1)
    refused = arrowhead("embed", "--model", "another", "a")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("arrowhead: ")


def test_embed_with_a_prompt_of_the_models(arrowhead: Any, http_server: Any) -> None:
    http_server.script.parameters = {"prompt.query": "query: "}
    assert [row["text"] for row in _rows(arrowhead("embed", "--prompt-name", "query", "a"))] == [
        "a"
    ]
    assert http_server.script.seen[0].texts == (b"query: a",)
    refused = arrowhead("embed", "--prompt-name", "q", "a")
    assert refused.exit_code == 1
    assert "model 'minilm' knows 'query'" in refused.stderr


def test_embed_by_input_type(arrowhead: Any, http_server: Any) -> None:
    http_server.script.parameters = {"prompt.query": "query: ", "prompt.passage": "passage: "}
    _rows(arrowhead("embed", "--input-type", "query", "a"))
    _rows(arrowhead("embed", "--input-type", "document", "a"))
    assert [one.texts for one in http_server.script.seen] == [(b"query: a",), (b"passage: a",)]
    assert arrowhead("embed", "--input-type", "question", "a").exit_code == 2


def test_embed_cuts_where_it_is_told(arrowhead: Any, http_server: Any) -> None:
    text = " ".join(f"w{number}" for number in range(300))
    refused = arrowhead("embed", "--truncate", "none", "a", text)
    assert refused.exit_code == 1
    assert "text 1 has more than the 256 tokens" in refused.stderr
    _rows(arrowhead("embed", "--truncate", "start", text))
    cut = " ".join(f"w{number}" for number in range(44, 300))
    assert http_server.script.seen[-1].texts == (cut.encode(),)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("form", FORMS)
def test_embed_writes_bits(
    arrowhead: Any, tmp_path: Path, expected: Any, form: str, precision: Any
) -> None:
    out = tmp_path / "out"
    options = ["--precision", precision, "--format", form, "-o", str(out)]
    assert arrowhead("embed", *options, "a", "b").exit_code == 0
    wanted = quantize(expected(["a", "b"]), precision)
    met = read(out, form)
    assert met.dtype == (np.int64 if form == "jsonl" else wanted.dtype)
    np.testing.assert_array_equal(met, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_embed_writes_files_all_or_nothing(
    arrowhead: Any, http_server: Any, tmp_path: Path, expected: Any, form: str
) -> None:
    out = tmp_path / "out"
    out.write_text("before")
    http_server.script.output = "nothing"
    assert arrowhead("embed", "--format", form, "-o", str(out), "a").exit_code == 1
    assert out.read_text() == "before"
    http_server.script.output = "embeddings"
    assert arrowhead("embed", "--format", form, "-o", str(out), "a", "b").exit_code == 0
    assert list(tmp_path.iterdir()) == [out]
    np.testing.assert_array_equal(np.float32(read(out, form)), expected(["a", "b"]))


def test_embed_writes_binary_to_a_pipe(http_server: Any, expected: Any, tmp_path: Path) -> None:
    for form in ("npy", "parquet", "arrow"):
        run = subprocess.run(
            [*ARROWHEAD, "embed", "--url", http_server.url, "--format", form, "a"],
            capture_output=True,
            check=True,
        )
        (tmp_path / form).write_bytes(run.stdout)
    np.testing.assert_array_equal(np.load(tmp_path / "npy"), expected(["a"]))
    assert pq.read_table(tmp_path / "parquet").num_rows == 1
    assert pa.ipc.open_file(tmp_path / "arrow").read_all().num_rows == 1


def test_binary_is_not_written_to_a_terminal(http_server: Any) -> None:
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    run = subprocess.run(
        [*ARROWHEAD, "embed", "--url", http_server.url, "--format", "npy", "a"],
        stdout=child,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(child)
    os.close(parent)
    assert run.returncode == 2
    assert "npy is binary" in run.stderr
    assert http_server.script.seen == []


def test_similarity(arrowhead: Any) -> None:
    result = arrowhead("similarity", "a", "b", "a", "c")
    lines = result.stdout.splitlines()
    assert lines[0] == " 1.0000  a"
    assert sorted(line.split()[1] for line in lines) == ["a", "b", "c"]
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    [row] = _rows(arrowhead("similarity", "--json", "a", input="b\na\n"))
    assert row["text"] == "a"
    assert row["results"][0] == {"text": "a", "similarity": 1.0}
    assert [found["text"] for found in row["results"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("args", "stdin", "code", "message"),
    [
        (["embed", "a", "--file", "-"], b"b", 2, "give one of them"),
        (["embed"], b"a\nb\xff\n", 1, "arrowhead: line 2 is not UTF-8 (byte 1: 0xff)"),
        (["embed", "--url", "ftp://x", "a"], None, 1, "arrowhead: invalid url 'ftp://x'"),
        (["embed", "--dimensions", "99", "a"], None, 1, "arrowhead: dimensions=99"),
        (["embed", "-o", "/nowhere/file", "a"], None, 1, "arrowhead: cannot write /nowhere/file"),
        (["nothing"], None, 2, "No such command"),
    ],
)
def test_errors_are_one_clear_line(
    arrowhead: Any, args: list[str], stdin: bytes | None, code: int, message: str
) -> None:
    result = arrowhead(*args, input=stdin)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if code == 1:
        assert len(result.stderr.splitlines()) == 1


def test_a_ratio_of_traces_out_of_range_is_one_clear_line(
    arrowhead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "2")
    result = arrowhead("embed", "a")
    wanted = "arrowhead: OTEL_TRACES_SAMPLER_ARG='2': wanted a number from 0 to 1\n"
    assert (result.exit_code, result.stderr) == (1, wanted)


def test_help_imports_nothing_and_the_table_is_right() -> None:
    check = (
        "import sys\nfrom arrowhead_client.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print([n for n in sys.modules if n.startswith('arrowhead_')])"
    )
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    for name, command in COMMANDS.items():
        assert f"{name} " in run.stdout
        assert command.help in run.stdout
    assert "arrowhead_client.commands" not in run.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ["embed", "evaluate", "similarity"])
def test_a_commands_help_begins_as_the_table_says_and_teaches(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert COMMANDS[name].help.split()[0] in result.stdout
    assert "Examples:" in result.stdout
    assert "ARROWHEAD_URL" in result.stdout


def test_version() -> None:
    from importlib.metadata import version

    assert version("arrowhead") in CliRunner().invoke(main, ["--version"]).stdout


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needy_module.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "serve", Command("needy_module:serve", "serve", "Serve."))
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 1
    assert result.stderr == (
        "arrowhead: `arrowhead serve` needs no_such_library, which is not installed: "
        "pip install 'arrowhead[serve]'\n"
    )


def test_exceptions_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flagged(Exception):
        exit_code = 3

    found = {"raise": Flagged("met this, wanted that")}

    @click.command()
    def serve() -> None:
        raise found["raise"]

    monkeypatch.setattr(arrowhead_client.cli.LazyGroup, "get_command", lambda *_: serve)
    result = CliRunner().invoke(main, ["serve"])
    assert (result.exit_code, result.stderr) == (3, "arrowhead: met this, wanted that\n")
    found["raise"] = ZeroDivisionError("a defect")  # type: ignore[assignment]
    assert isinstance(CliRunner().invoke(main, ["serve"]).exception, ZeroDivisionError)


@pytest.mark.parametrize("road", ["grpc", "http"], indirect=True)
def test_ctrl_c_exits_130_at_once(road: Any, until: Any) -> None:
    """Also while requests are in flight: nothing waits for their timeout of 30 s."""
    road.server.script.sleep_s = 60
    process = subprocess.Popen(
        [*ARROWHEAD, "embed", "--url", road.server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job ignores Ctrl-C, and whatever it starts inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None
    process.stdin.write(b"a\n" * 200)
    process.stdin.close()
    process.stdin = None
    until(lambda: len(road.server.script.seen) >= 4)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in stderr


def test_a_closed_pipe_is_quiet(http_server: Any) -> None:
    process = subprocess.Popen(
        [*ARROWHEAD, "embed", "--url", http_server.url, "a"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=20)
    assert process.returncode != 0
    assert stderr == b""
