# SPDX-License-Identifier: Apache-2.0
"""Every row of every file is in one unit, wherever the cuts fall, and is read as it is."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arrowhead_bulk import corpus as corpus_module
from arrowhead_bulk.corpus import Columns, Corpus, survey
from arrowhead_bulk.errors import BadCorpus
from arrowhead_bulk.reading import BAD_ID, Reader

from .conftest import texts, write_lines, write_parquet

TEXT = Columns("text")
AWKWARD = [
    "plain",
    "",
    " ",
    'a "quoted" word',
    '"',
    '5" pipe, 6" pipe',
    "comma, comma",
    "a line\nand another",
    "\r\n in it",
    "tab\there",
    "grüße, 世界 \U0001f680",
    "nul \0 inside",
    "\ufeffmark",
    "\u2028 separator \x85 and \x1c",
]


def all_of(found: Corpus, columns: Columns = TEXT) -> tuple[list[str], list[int]]:
    """The texts of all units, and their rows' numbers in the corpus."""
    read_texts, rows = list[str](), list[int]()
    read = Reader(found, columns)
    for unit in found.units:
        seen = 0
        for batch in read(unit):
            read_texts += batch.texts
            rows += batch.numbers
            seen += len(batch)
        assert seen == unit.rows
    return read_texts, rows


def written(path: Path, form: str, rows: list[str]) -> Path:
    if form == "parquet":
        return write_parquet(path, rows, group=7)
    if form == "json":
        return write_lines(path, [{"text": row} for row in rows])
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["n", "text"], *([str(n), row] for n, row in enumerate(rows))])
    path.write_text(buffer.getvalue(), encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 100])
@pytest.mark.parametrize("form", ["parquet", "json", "csv"])
def test_every_row_is_in_one_unit(form: str, rows: int, small_units: int, tmp_path: Path) -> None:
    ending = {"json": "jsonl"}.get(form, form)
    wanted = texts(rows)
    written(tmp_path / f"a.{ending}", form, wanted[: rows // 3])
    written(tmp_path / f"b.{ending}", form, wanted[rows // 3 :])
    found = survey([str(tmp_path)], TEXT)
    assert all_of(found) == (wanted, list(range(rows)))
    assert [unit.number for unit in found.units] == list(range(len(found.units)))
    sizes = [unit.rows for unit in found.units]
    assert all(small_units <= size < 2 * small_units for size in sizes[:-1])
    assert found.rows == rows


@pytest.mark.parametrize("form", ["parquet", "json", "csv"])
def test_awkward_texts_come_as_they_are(form: str, small_units: int, tmp_path: Path) -> None:
    rows = [one for one in AWKWARD * 5 if form != "csv" or "\0" not in one]
    ending = {"json": "jsonl"}.get(form, form)
    found = survey([str(written(tmp_path / f"a.{ending}", form, rows))], TEXT)
    assert len(found.units) > 3
    assert all_of(found)[0] == rows


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_csv_is_cut_where_its_reader_ends_rows(
    rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "ATOM_ROWS", 3)
    found = survey([str(written(tmp_path / "a.csv", "csv", rows))], TEXT)
    assert all_of(found)[0] == rows


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(raw=st.binary(max_size=300), form=st.sampled_from(["csv", "tsv", "jsonl"]))
def test_no_file_of_text_makes_the_count_differ(
    raw: bytes, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "ATOM_ROWS", 2)
    path = tmp_path / f"a.{form}"
    head = {"jsonl": b"", "csv": b"text,n\n", "tsv": b"text\tn\n"}[form]
    path.write_bytes(head + raw)
    try:
        found = survey([str(path)], TEXT)
    except BadCorpus:
        return
    all_of(found)  # which compares


def test_lines_may_be_blank_and_the_last_may_have_no_end(small_units: int, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in texts(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n" + "\n\n".join(lines), encoding="utf-8")
    assert all_of(survey([str(path)], TEXT))[0] == texts(40)
    path.write_text("\r\n".join(lines) + "\r\n \r\n", encoding="utf-8", newline="")
    assert all_of(survey([str(path)], TEXT))[0] == texts(40)


@pytest.mark.parametrize("form", ["json", "csv"])
def test_a_compressed_file_is_one_unit(form: str, small_units: int, tmp_path: Path) -> None:
    ending = {"json": "jsonl"}.get(form, form)
    plain = written(tmp_path / f"plain.{ending}", form, texts(50))
    (tmp_path / f"a.{ending}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    found = survey([str(tmp_path)], TEXT)
    assert len(found.units) == 1
    assert all_of(found)[0] == texts(50)


def test_small_files_are_one_unit_and_large_groups_several(
    small_units: int, tmp_path: Path
) -> None:
    for number in range(8):
        write_parquet(tmp_path / "small" / f"{number}.parquet", texts(4))
    assert [unit.rows for unit in survey([str(tmp_path / "small")], TEXT).units] == [16, 16]
    write_parquet(tmp_path / "large.parquet", texts(100))
    found = survey([str(tmp_path / "large.parquet")], TEXT)
    assert [unit.rows for unit in found.units] == [16] * 6 + [4]


def test_units_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus_module, "ATOM_ROWS", 2)
    monkeypatch.setattr(corpus_module, "MOST_UNITS", 5)
    write_parquet(tmp_path / "a.parquet", texts(99), group=10)
    assert len(survey([str(tmp_path)], TEXT).units) == 5
    monkeypatch.setattr(corpus_module, "MOST_UNIT_ROWS", 8)
    assert max(unit.rows for unit in survey([str(tmp_path)], TEXT).units) == 8


def test_files_are_found_by_name_folder_and_pattern(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet", "in/c.parquet", ".hidden.parquet", "_x/d.parquet"):
        write_parquet(tmp_path / name, texts(2))
    (tmp_path / "notes.md").write_text("no rows")

    def names(*sources: str) -> list[str]:
        found = survey([str(tmp_path / source) for source in sources], TEXT)
        return [Path(file.path).relative_to(tmp_path).as_posix() for file in found.files]

    assert names("") == ["a.parquet", "b.parquet", "in/c.parquet"]
    assert names("*.parquet") == ["a.parquet", "b.parquet"]
    assert names("*/*.parquet") == ["in/c.parquet"]
    assert names("b.parquet", "a.parquet", "[ab].parquet") == ["a.parquet", "b.parquet"]
    for source in ("nothing.parquet", "*.csv", "notes.md", "missing/"):
        with pytest.raises(BadCorpus, match=r"nothing there|notes.md: wanted"):
            names(source)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "a.parquet", texts(3), id=pa.array([1, 2, 3]))
    with pytest.raises(BadCorpus, match=r"no column 'body' among 'text', 'id'.*--column"):
        survey([str(good)], Columns("body"))
    with pytest.raises(BadCorpus, match=r"column 'id' is int64: wanted strings"):
        survey([str(good)], Columns("id"))
    write_parquet(tmp_path / "b.parquet", texts(3), id=pa.array(["1", "2", "3"]))
    with pytest.raises(BadCorpus, match=r"b\.parquet has id string.*a\.parquet has id int64"):
        survey([str(tmp_path)], Columns("text", "id"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(BadCorpus, match=r"c\.parquet cannot be read as parquet"):
        survey([str(tmp_path)], TEXT)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadCorpus, match=r"no rows"):
        survey([str(tmp_path / "empty.jsonl")], TEXT)
    with pytest.raises(BadCorpus, match=r"nosuch"):
        survey(["nosuch://place/a.parquet"], TEXT)


def test_bad_rows_are_told_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = [b"good", None, b"\xff\xfe", "grüße".encode(), b""]
    pq.write_table(pa.table({"text": pa.array(raw, pa.binary())}), path)
    found = survey([str(path)], TEXT)
    (batch,) = Reader(found, TEXT)(found.units[0])
    assert batch.texts == ["good", "grüße", ""]
    assert [(one.row, one.reason) for one in batch.bad] == [(1, "null"), (2, "not UTF-8")]
    assert batch.bad[1].detail == "byte 0 of 2 is 0xff"
    assert batch.numbers == [0, 3, 4]

    lines = [
        *[b'{"text": "good", "id": 1}'] * 12,
        b'{"text": "of another id", "id": "x"}',
        b'{"text": 7, "id": 2}',
        b'{"id": 3}',
        b"[1]",
        b'{"text": "torn',
        b'{"text": "\xff", "id": 4}',
        b'{"text": "\\ud800 alone", "id": 5}',
        b'{"text": "no id"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    columns = Columns("text", "id")
    found = survey([str(tmp_path / "a.jsonl")], columns)
    (batch,) = Reader(found, columns)(found.units[0])
    assert batch.texts == ["good"] * 12
    assert batch.carried[0].to_pylist() == [1] * 12
    assert sorted((one.row - 11, one.reason) for one in batch.bad) == [
        (1, BAD_ID), (2, "not a string"), (3, "null"), (4, "unreadable row"),
        (5, "unreadable row"), (6, "not UTF-8"), (7, "not UTF-8"), (8, BAD_ID),
    ]  # fmt: skip

    (tmp_path / "a.csv").write_bytes(b'id,text\n1,good\n2,too,many\n3\n4,\xff\n\n5,"a ""b"""\n')
    found = survey([str(tmp_path / "a.csv")], columns)
    (batch,) = Reader(found, columns)(found.units[0])
    assert batch.texts == ["good", 'a "b"']
    assert batch.carried[0].to_pylist() == ["1", "5"]
    assert sorted((one.row, one.reason) for one in batch.bad) == [
        (1, "unreadable row"), (2, "unreadable row"), (3, "not UTF-8"),
    ]  # fmt: skip


def test_a_file_that_changed_is_told(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", texts(3))
    found = survey([str(path)], TEXT)
    write_parquet(path, texts(4))
    with pytest.raises(BadCorpus, match=r"has changed since the job began"):
        list(Reader(found, TEXT)(found.units[0]))


def test_columns_of_json_lines_hold_what_there_is(tmp_path: Path) -> None:
    columns = Columns("text", "id", ("tags", "size", "flag", "seldom"))
    one = write_lines(tmp_path / "a.jsonl", [
        {"text": "a", "id": 2**63 + 5, "tags": [], "size": 1, "flag": True},
        {"text": "b", "id": 7, "tags": ["x"], "size": 2.5, "flag": None},
    ])  # fmt: skip
    write_lines(tmp_path / "b.jsonl", [{"text": "c", "id": 1, "tags": {"y": None}, "seldom": "é"}])
    found = survey([str(tmp_path)], columns)
    assert found.carried.types == [
        pa.uint64(), pa.string(), pa.float64(), pa.bool_(), pa.string(),
    ]  # fmt: skip
    batches = [batch for unit in found.units for batch in Reader(found, columns)(unit)]
    assert [column.to_pylist() for column in batches[0].carried] == [
        [2**63 + 5, 7, 1], ["[]", '["x"]', '{"y": null}'], [1.0, 2.5, None], [True, None, None],
        [None, None, "é"],
    ]  # fmt: skip
    assert not batches[0].bad
    one.write_text('{"text": "a"}\n')
    with pytest.raises(BadCorpus, match=r"no column 'size'"):
        survey([str(tmp_path)], columns)


def test_a_row_without_an_id_is_a_bad_one(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", "b"], id=pa.array(["x", None]))
    columns = Columns("text", "id")
    found = survey([str(path)], columns)
    (batch,) = Reader(found, columns)(found.units[0])
    assert (batch.texts, batch.bad[0][1:3]) == (["a"], (1, BAD_ID))


def test_strings_of_all_kinds(small_units: int, tmp_path: Path) -> None:
    kinds = [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    for number, kind in enumerate([*kinds, pa.binary(), pa.binary_view()]):
        values = pa.array(texts(5)).cast(kind)
        write_parquet(tmp_path / f"{number}.parquet", values)
    assert all_of(survey([str(tmp_path)], TEXT))[0] == texts(5) * 5
    kept = pa.array(["a", "b", None]).cast(pa.string_view())
    path = write_parquet(tmp_path / "kept" / "a.parquet", ["x", None, "z"], note=kept)
    columns = Columns("text", None, ("note", "row"))
    with pytest.raises(BadCorpus, match=r"no column 'row'"):
        survey([str(path)], columns)
    columns = Columns("text", None, ("note",))
    found = survey([str(path)], columns)
    (batch,) = Reader(found, columns)(found.units[0])
    assert batch.carried[0].to_pylist() == ["a", None]


def test_what_is_too_large_is_a_bad_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from arrowhead_bulk import files, reading

    monkeypatch.setattr(files, "MOST_LINE", 1000)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(reading, "MOST_LINE", 1000)
    path = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in ("a", "x" * 5000, "b")])
    found = survey([str(path)], TEXT)
    (batch,) = Reader(found, TEXT)(found.units[0])
    assert (batch.texts, batch.bad[0][1:3]) == (["a", "b"], (1, "unreadable row"))
    was = csv.field_size_limit(1000)
    try:
        lines = ["text,n", "a,1", 'b"' + "y" * 5000 + ",2", "c,3"]
        (tmp_path / "a.csv").write_text("\n".join(lines))
        found = survey([str(tmp_path / "a.csv")], TEXT)
        (batch,) = Reader(found, TEXT)(found.units[0])
    finally:
        csv.field_size_limit(was)
    assert batch.texts == ["a", "c"]
    assert [one.reason for one in batch.bad] == ["unreadable row"]


def test_large_texts_come_few_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from arrowhead_bulk import reading

    monkeypatch.setattr(reading, "_STEP", 2)
    monkeypatch.setattr(reading, "BATCH_SIZE", 1000)
    path = write_parquet(tmp_path / "a.parquet", ["x" * 400] * 10)
    found = survey([str(path)], TEXT)
    assert [len(batch) for batch in Reader(found, TEXT)(found.units[0])] == [4, 4, 2]


def test_a_row_group_of_many_units_is_read_once(
    small_units: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from arrowhead_bulk import reading

    opened = list[int]()

    class Stream(reading._Stream):
        def __init__(self, where: Any, file: Any, group: int, names: Any) -> None:
            opened.append(group)
            super().__init__(where, file, group, names)

    monkeypatch.setattr(reading, "_Stream", Stream)
    monkeypatch.setattr(reading, "_STEP", 3)
    wanted = texts(200)
    found = survey([str(write_parquet(tmp_path / "a.parquet", wanted, group=100))], TEXT)
    assert len(found.units) > 8
    assert all_of(found)[0] == wanted
    assert opened[0] == 0
    assert len(opened) <= 2  # the second group may be gone on to, or opened

    read = Reader(found, TEXT)

    def rows(number: int) -> list[int]:
        return [row for batch in read(found.units[number]) for row in batch.numbers]

    opened.clear()
    again = [rows(number) for number in (0, 2, 3, 1, len(found.units) - 1, 0)]
    assert [own[0] for own in again] == [
        found.units[n].pieces[0].first for n in (0, 2, 3, 1, -1, 0)
    ]
    assert opened == [0, 0, 1, 0]  # ahead it goes on; back, or past a group, it opens

    # What broke is not gone on with: nobody knows where it is.
    opened.clear()
    broken = [OSError("the store is away")]

    def take(self: Any, first: int, count: int) -> Any:
        if broken:
            raise broken.pop()
        return real(self, first, count)

    real = reading._Stream.take
    monkeypatch.setattr(reading._Stream, "take", take)
    with pytest.raises(OSError, match=r"the store is away"):
        rows(1)
    assert opened == []
    assert rows(1) == again[3]
    assert opened == [0]


def test_batches_do_not_depend_on_where_reading_began(
    small_units: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from arrowhead_bulk import reading

    monkeypatch.setattr(reading, "_STEP", 5)
    monkeypatch.setattr(reading, "BATCH_ROWS", 10)
    # Arrow takes no batches of such columns over the end of a row group.
    tags = pa.array([["a", "b"], ["c"]] * 60, pa.list_(pa.dictionary(pa.int32(), pa.string())))
    path = write_parquet(tmp_path / "a.parquet", texts(120), group=53, tags=tags)
    columns = Columns("text", None, ("tags",))
    found = survey([str(path)], columns)
    one = Reader(found, columns)
    for unit in found.units:
        gone_on, fresh = list(one(unit)), list(Reader(found, columns)(unit))
        assert [batch.texts for batch in gone_on] == [batch.texts for batch in fresh]
        assert gone_on[0].carried[0].to_pylist() == fresh[0].carried[0].to_pylist()


def test_large_columns_come_few_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from arrowhead_bulk import reading

    monkeypatch.setattr(reading, "_STEP", 2)
    monkeypatch.setattr(reading, "BATCH_SIZE", 1000)
    images = pa.array([b"x" * 400] * 10)
    path = write_parquet(tmp_path / "a.parquet", ["a"] * 10, image=images)
    columns = Columns("text", None, ("image",))
    found = survey([str(path)], columns)
    assert [len(batch) for batch in Reader(found, columns)(found.units[0])] == [4, 4, 2]


def test_lines_that_tell_no_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1]\nnothing\n")
    with pytest.raises(
        BadCorpus, match=r"a\.jsonl: none of the first 1,000 lines is a JSON object"
    ):
        survey([str(tmp_path / "a.jsonl")], Columns("text", "id"))


def test_names_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(BadCorpus, match=r"2 columns are called 'text'"):
        survey([str(tmp_path / "a.csv")], TEXT)
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadCorpus, match=r"2 columns are called 'text'"):
        survey([str(tmp_path / "a.parquet")], TEXT)


def test_a_file_uri_and_capitals(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.PARQUET", texts(3))
    assert all_of(survey([f"file://{tmp_path}/a.PARQUET"], TEXT))[0] == texts(3)
    lines = write_lines(tmp_path / "in" / "a.jsonl", [{"text": text} for text in texts(3)])
    (tmp_path / "in" / "b.JSONL.GZ").write_bytes(gzip.compress(lines.read_bytes()))
    assert all_of(survey([str(tmp_path / "in")], TEXT))[0] == texts(3) * 2
    with pytest.raises(BadCorpus, match=r"\*\* is not known"):
        survey([f"{tmp_path}/**/*.parquet"], TEXT)
