# SPDX-License-Identifier: Apache-2.0
"""`arrowhead index` and `arrowhead search`, and the files that they read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from arrowhead_client import (
    Client,
    Document,
    FakeTransport,
    InvalidInput,
    ModelNotFound,
    index_commands,
)
from arrowhead_client._store import Store
from arrowhead_client.cli import main
from arrowhead_client.corpora import Corpus, _text_files

ROWS = [
    {"id": "a", "title": "Tea", "text": "It is made of leaves.", "year": 2021, "day": None},
    {"id": "b", "title": None, "text": "Coffee, of beans.", "year": 1999, "day": date(2024, 1, 2)},
    {"id": "7", "title": 'Rain\n"real"', "text": "", "year": None, "day": None},
]
WANTED = [
    Document("a", "Tea It is made of leaves.", {"year": 2021, "day": None}),
    Document("b", "Coffee, of beans.", {"year": 1999, "day": date(2024, 1, 2)}),
    Document("7", 'Rain\n"real"', {"year": None, "day": None}),
]


def _parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "docs.parquet")
    return folder / "docs.parquet"


def _jsonl(folder: Path) -> Path:
    # What is empty is left out; an id that is a number is taken as it is written.
    rows: list[dict[str, Any]] = [{k: v for k, v in row.items() if v is not None} for row in ROWS]
    rows[2]["id"] = 7
    lines = [json.dumps(row, default=str, ensure_ascii=False) for row in rows]
    (folder / "docs.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    return folder / "docs.jsonl"


def _csv(folder: Path) -> Path:
    lines = [
        ("id", "title", "text", "year", "day"),
        ("a", "Tea", "It is made of leaves.", "2021", ""),
        ("b", "", '"Coffee, of beans."', "1999", "2024-01-02"),
        ("7", '"Rain\n""real"""', "", "", ""),
    ]
    file = folder / "docs.CSV"  # as some programs write it
    file.write_text("\n".join(",".join(line) for line in lines), encoding="utf-8")
    return file


@pytest.mark.parametrize("write", [_parquet, _csv, _jsonl])
def test_rows_of_files_are_documents(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    file = write(tmp_path)
    found = list(Corpus(file, text=("title", "text")))
    if file.suffix == ".jsonl":
        found = [
            one._replace(fields={"year": one.fields.get("year"), "day": WANTED[n].fields["day"]})
            for n, one in enumerate(found)
        ]
    assert found == WANTED
    chosen = list(Corpus(file, text=("text",), fields=("year", "title")))
    assert chosen[0] == Document("a", ROWS[0]["text"], {"year": 2021, "title": "Tea"})


def test_between_tabs_quotes_are_quotes_and_a_line_is_a_row(tmp_path: Path) -> None:
    lines = ("id\ttext\tby", 'a\t"Tea" is made\t', 'b\t"Coffee\tNA', 'c\t5" of rain\tnull')
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    assert list(Corpus(tmp_path / "a.tsv")) == [
        Document("a", '"Tea" is made', {"by": None}),
        Document("b", '"Coffee', {"by": "NA"}),  # no missing value, either
        Document("c", '5" of rain', {"by": "null"}),
    ]


def test_what_pandas_keeps_for_itself_becomes_no_field(tmp_path: Path) -> None:
    rows = {"id": ["a"], "text": ["x"], "year": [1], "__index_level_0__": [7]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert list(Corpus(tmp_path / "a.parquet")) == [Document("a", "x", {"year": 1})]
    chosen = Corpus(tmp_path / "a.parquet", fields=("__index_level_0__",))
    assert list(chosen) == [Document("a", "x", {"__index_level_0__": 7})]


def test_nanoseconds_are_cut(tmp_path: Path) -> None:
    """A `datetime` has none, and Arrow would make pandas' own, or fail where it is missing."""
    at = pa.array([1_600_000_000_123_456_789], pa.timestamp("ns"))
    table = pa.table({"id": ["a"], "text": ["x"], "at": at})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("id,text,at\na,x,2020-09-13 12:26:40.123456789")
    wanted = datetime(2020, 9, 13, 12, 26, 40, 123456)
    for name in ("a.parquet", "a.csv"):
        [found] = Corpus(tmp_path / name)
        assert (type(found.fields["at"]), found.fields["at"]) == (datetime, wanted)


def test_a_long_text_in_a_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"id,text\na,{'long ' * 600_000}\nb,short\n")
    assert [len(one.text) for one in Corpus(tmp_path / "a.csv")] == [3_000_000, 5]


def test_files_of_a_folder_are_documents(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name in ("b.md", "a.txt", "sub/c.MD", "sub/.hidden.md", "sub/.git/d.md", "e.pdf"):
        (tmp_path / name).write_text(f"\ufeffthe text of {name}", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    corpus = Corpus(tmp_path)
    names = ["a.txt", "b.md", "sub/c.MD"]
    assert list(corpus) == [Document(name, f"the text of {name}") for name in names]
    assert corpus.__length_hint__() == 3
    assert list(Corpus(tmp_path / "b.md")) == [Document("b.md", "the text of b.md")]
    (tmp_path / "b.md").write_bytes(b"ab\xff")
    with pytest.raises(InvalidInput, match=r"b\.md is not UTF-8 \(byte 2\)"):
        list(corpus)
    with pytest.raises(InvalidInput, match=r"holds no \.txt and no \.md"):
        list(Corpus(tmp_path / "empty"))
    with pytest.raises(InvalidInput, match=r"cannot read .*gone: No such file"):
        list(_text_files(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"id": "a", "text": "x"}\n{"_id": 1}', r"line 2: no column 'id' among '_id'"),
        ("a.jsonl", '{"id": "a", "body": "x"}', r"no column 'text' among 'id', 'body'; choose"),
        ("a.jsonl", '{"id": 1.5, "text": "x"}', "id is 1.5"),
        ("a.jsonl", '{"id": true, "text": "x"}', "id is True"),
        ("a.jsonl", '{"id": "a", "text": 5}', r"text are \[5\]; wanted strings"),
        ("a.jsonl", "{", "line 1 is no JSON"),
        ("a.jsonl", "[]", "wanted an object"),
        ("a.csv", "id,text\na,b,c", "cannot be read as CSV"),
        ("a.csv", "id,body\na,x", "no column 'text'"),
        ("a.csv", "id,text\na,x", "no column 'yeer' among 'id', 'text'; choose .* --field"),
        ("a.tsv", "id\ttext\na\tx", "no column 'yeer'"),
        ("a.csv", "", "cannot be read as CSV"),
        ("a.parquet", "no", "no Parquet"),
        ("a.xlsx", "no", r"ends in '\.xlsx': wanted \.parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    fields = ("yeer",) if "yeer" in message else None
    with pytest.raises(InvalidInput, match=message) as caught:
        list(Corpus(tmp_path / name, fields=fields))
    assert str(tmp_path / name) in str(caught.value)


@pytest.fixture
def fake() -> FakeTransport:
    return FakeTransport(8)


@pytest.fixture
def arrowhead(
    fake: FakeTransport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Result]:
    """Runs the command line in a folder of its own, as if a server answered."""

    def client(url: str, *, model: str, retries: int) -> Client:
        if model != "minilm":
            raise ModelNotFound(f"no model {model!r}")
        return Client(url, model=model, retries=retries, transport=fake)

    monkeypatch.setattr(index_commands, "Client", client)
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, list(args))


def _told(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_commands_in_turn(arrowhead: Any, tmp_path: Path) -> None:
    build = ["index", "build", str(_parquet(tmp_path)), "--text", "title", "--text", "text"]
    assert _told(arrowhead(*build, "--json")) == {
        "index": "arrowhead_index",
        "changed": 3,
        "documents": 3,
    }
    run = arrowhead(*build)
    assert run.stdout == "arrowhead_index: 0 new or changed, 3 documents\n"
    (tmp_path / "more.jsonl").write_text('{"id": "c", "text": "Water.", "year": 2024}')
    assert "1 new or changed, 4 documents" in arrowhead("index", "add", "more.jsonl").stdout

    told = _told(arrowhead("search", "Water.", "--json", "--where", "year > 2000", "-n", "1"))
    [hit] = told.pop("hits")
    assert told == {"query": "Water."}
    assert hit.pop("score") == pytest.approx(1)
    assert hit == {"id": "c", "snippet": "Water.", "fields": {"year": 2024}}
    lines = arrowhead("search", "Coffee, of beans.").stdout.splitlines()
    assert lines[:2] == ["1.0000  b  year=1999  day=2024-01-02", "        Coffee, of beans."]

    facts = _told(arrowhead("index", "info", "--json"))
    assert facts.pop("bytes") > 1000
    assert facts == {
        "index": "arrowhead_index",
        "model": "minilm",
        "fingerprint": "0" * 32,
        "dimension": 8,
        "format": 1,
        "documents": 4,
        "passages": 4,
        "fields": {"year": "int64", "day": "date32[day]"},
    }
    assert "fields       year (int64), day" in arrowhead("index", "info").stdout

    assert arrowhead("index", "delete", "c", "nothing").stdout == (
        "arrowhead_index: 1 of 2 deleted, 3 left\n"
    )
    assert _told(arrowhead("index", "delete", "a", "--json"))["documents"] == 2


def test_the_model_of_an_index_is_asked_again(arrowhead: Any, fake: FakeTransport) -> None:
    Path("notes").mkdir()
    Path("notes/a.md").write_text("a note")
    run = arrowhead("index", "build", "notes", "--model", "another")
    assert (run.exit_code, "no model 'another'" in run.stderr) == (1, True)
    assert not Path("arrowhead_index").exists()
    assert arrowhead("index", "build", "notes").exit_code == 0
    description = replace(Store.open(Path("arrowhead_index")).description, model="another")
    Store.create(Path("of another"), description)
    run = arrowhead("index", "build", "notes", "--index", "of another")
    assert "no model 'another'" in run.stderr  # an index knows which one it is of
    fake._fingerprint = "3" * 32
    for command in (["index", "build", "notes"], ["index", "add", "notes"], ["search", "a"]):
        run = arrowhead(*command)
        assert (run.exit_code, "vectors are not comparable" in run.stderr) == (1, True)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["search", "a", "--index", "nothing"], "holds no index"),
        (["index", "add", ".", "--index", "nothing"], "holds no index"),
        (["index", "delete", "a", "--index", "nothing"], "holds no index"),
        (["index", "info", "--index", "nothing"], "holds no index"),
        (["index", "build", "."], "holds no .txt and no .md"),
    ],
)
def test_errors_are_one_line(arrowhead: Any, command: list[str], message: str) -> None:
    run = arrowhead(*command)
    assert (run.exit_code, len(run.stderr.splitlines())) == (1, 1)
    assert run.stderr.startswith("arrowhead: ")
    assert message in run.stderr
    assert not Path("nothing").exists()
    assert not Path("arrowhead_index").exists()


def test_an_index_where_no_folder_can_be(arrowhead: Any) -> None:
    Path("a.md").write_text("a note")
    run = arrowhead("index", "build", "a.md", "--index", "a.md/index")
    assert (run.exit_code, len(run.stderr.splitlines())) == (1, 1)
    assert "a.md/index" in run.stderr


def test_what_steers_a_terminal_is_not_printed(arrowhead: Any) -> None:
    Path("a.jsonl").write_text(
        json.dumps({"id": "\x1b[2Ja" + "b" * 100, "text": "red \x1b[31m text " * 20, "k": "\x07"})
    )
    assert arrowhead("index", "build", "a.jsonl").exit_code == 0
    shown = arrowhead("search", "text").stdout
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    # To machines it is told as it is.
    assert "\x1b" in _told(arrowhead("search", "text", "--json"))["hits"][0]["id"]


def test_without_lancedb_the_command_that_installs_it_is_told(tmp_path: Path) -> None:
    """As in an environment without it; the other commands do without."""
    code = (
        "import sys; sys.modules['lancedb'] = None; from arrowhead_client.cli import main; main()"
    )
    for command, status in ((["search", "a"], 1), (["embed", "--help"], 0)):
        run = subprocess.run(
            [sys.executable, "-c", code, *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
            env={"ARROWHEAD_URL": "http://127.0.0.1:9"},
        )
        assert run.returncode == status
        assert ("pip install 'arrowhead[search]'" in run.stderr) == (status == 1)
