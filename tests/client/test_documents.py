# SPDX-License-Identifier: Apache-2.0
"""An index on disk, really written and killed; the vectors are the fake transport's."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowhead_client import (
    Client,
    Document,
    FakeTransport,
    Hit,
    Index,
    IndexBusy,
    IndexDamaged,
    IndexExists,
    IndexFailed,
    IndexNotFound,
    InvalidInput,
    NotInstalled,
    OtherModel,
    ServerError,
    _store,
    documents,
)
from arrowhead_client._passages import MOST_CHARS, _pieces, split
from arrowhead_client._snippet import snippet

TEA = Document("tea", "Tea is made of leaves.", {"year": 2021, "source": "notes"})
COFFEE = Document("coffee", "Coffee is made of beans.", {"year": 1999, "hot": True})
WATER = Document("water", "Water is made of rain.")


@pytest.fixture
def fake() -> FakeTransport:
    return FakeTransport(8)


@pytest.fixture
def index(fake: FakeTransport, tmp_path: Path) -> Index:
    index = Index.create(tmp_path / "index", Client(transport=fake))
    index.add([TEA, COFFEE, WATER])
    return index


def _embedded(fake: FakeTransport) -> list[str]:
    """The texts that were embedded since this was last asked."""
    texts = [t.decode() for r in fake.requests if r.outputs == ("embeddings",) for t in r.texts]
    fake.requests.clear()
    return texts


def _passages(index: Index) -> int:
    return _store.Store.open(index.path).passages()


def test_a_document_is_found_with_its_score_snippet_and_fields(index: Index) -> None:
    first, *others = index.search(COFFEE.text)
    assert first == Hit("coffee", pytest.approx(1), COFFEE.text, {"year": 1999, "hot": True})
    client = Client(transport=FakeTransport(8))
    wanted = {d.id: float(client.similarity(COFFEE.text, d.text)[0, 0]) for d in (TEA, WATER)}
    assert {hit.id: hit.score for hit in others} == pytest.approx(wanted, abs=1e-6)
    assert others == sorted(others, key=lambda hit: -hit.score)
    assert [hit.fields for hit in others if hit.id == "water"] == [{}]
    assert index.search(COFFEE.text, limit=1) == [first]
    assert len(index) == 3


def test_an_index_is_found_again_and_an_empty_one_finds_nothing(
    index: Index, fake: FakeTransport, tmp_path: Path
) -> None:
    again = Index.open(str(index.path), Client(transport=fake))
    assert again.search(TEA.text) == index.search(TEA.text)
    empty = Index.create(tmp_path / "another" / "index", Client(transport=fake))
    assert (len(empty), empty.search("a"), empty.delete(["a"]), empty.add([])) == (0, [], 0, 0)


def test_what_is_there_is_not_embedded_again(index: Index, fake: FakeTransport) -> None:
    assert _embedded(fake) == [TEA.text, COFFEE.text, WATER.text]
    assert index.add([TEA, COFFEE, WATER]) == 0
    assert _embedded(fake) == []
    green = TEA._replace(text="Green tea is made of leaves, too.")
    assert index.add([TEA, COFFEE, green]) == 1  # of one id the last counts
    assert _embedded(fake) == [green.text]
    assert len(index) == _passages(index) == 3
    assert index.search(green.text, limit=1) == [
        Hit("tea", pytest.approx(1), green.text, dict(TEA.fields))
    ]


def test_new_fields_need_no_new_vectors(index: Index, fake: FakeTransport) -> None:
    _embedded(fake)
    long = Document("long", "word " * 1000, {"year": 1})
    index.add([long])
    _embedded(fake)
    parts = _passages(index)
    changed = [TEA._replace(fields={"year": 2022}), long._replace(fields={"stars": 4.5})]
    _embedded(fake)
    assert index.add([*changed, COFFEE]) == 2
    assert _embedded(fake) == []
    assert _passages(index) == parts
    found = {hit.id: hit for hit in index.search("word " * 200)}
    assert (found["long"].fields, found["long"].score) == ({"stars": 4.5}, pytest.approx(1))
    assert found["tea"].fields == {"year": 2022}  # what it has no longer is gone
    assert found["coffee"].fields == {"year": 1999, "hot": True}


def test_documents_are_deleted_by_id(index: Index) -> None:
    odd = "it's; \"quoted\" -- \\' OR 1=1"
    index.add([Document(odd, "odd " * 600)])
    assert index.delete(["nothing", "' OR '1'='1"]) == 0
    assert index.delete([odd, odd, "tea"]) == 2
    assert {hit.id for hit in index.search("a")} == {"coffee", "water"}
    assert len(index) == _passages(index) == 2
    for wrong in ("tea", ["tea", 1]):
        with pytest.raises(InvalidInput, match="wanted a list of strings"):
            index.delete(wrong)  # type: ignore[arg-type]
    assert len(index) == 2


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("year > 2020", {"tea"}),
        ("year > 1990 AND hot", {"coffee"}),
        ("year IS NULL AND tags IS NULL", {"water"}),
        ("source LIKE 'no%' OR id = 'water'", {"tea", "water"}),
        ("year IN (1, 2)", set()),
        ("day >= date '2024-02-01'", {"dated"}),
        ("array_has(tags, 'b')", {"dated"}),
        ("`with blank` < 1.5", {"dated"}),
        ("lower(source) = 'notes' AND year IN(2021)", {"tea"}),
        ("source = 'repeat(1)' OR NOT (year > 0) OR id = 'it''s -- $'", set()),
        ("CAST(year AS decimal(10, 2)) > 2000.5", {"tea"}),
    ],
)
def test_filters(index: Index, where: str, found: set[str]) -> None:
    fields = {"day": date(2024, 2, 3), "tags": ["a", "b"], "with blank": 1.0}
    index.add([Document("dated", "A day.", fields)])
    hits = index.search("a", where=where)
    assert {hit.id for hit in hits} == found
    assert all(hit.fields == fields for hit in hits if hit.id == "dated")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("yeer > 2020", r"No field named yeer.*Fields: id \(string\), year \(int64\), source"),
        ("year >", "Expected: an expression"),
        ("year", "boolean"),
        ("year = 'x'", "could not convert"),
        ("year / 0 = 1", "Divide by zero"),
        ("CAST(source AS int) = 1", "Cannot cast string 'notes'"),
        ("year > 1; DROP TABLE documents", "Expected: \\)"),
        ("", "Expected: an expression"),
        ("repeat('a', 1000000000) = source", "calls 'repeat': wanted one of abs, array_contains"),
        ("source = 'x' OR LPAD (source, 1000000000) = ''", "calls 'LPAD'"),
        ("`repeat`('a', 9) = ''", "calls '``'"),
        ("repeat/**/('a', 9) = ''", r"has /\* outside"),
        ("$$'$$ = repeat('a', 9) OR '' = ''", r"has \$ outside"),
        ("year > 1 -- or so", "has -- outside"),
    ],
)
def test_a_filter_that_cannot_be_read(index: Index, where: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        index.search("a", where=where)
    assert repr(where) in str(caught.value)
    assert "_vector" not in str(caught.value)
    assert len(index) == 3


def test_a_wrong_filter_is_shown_in_part_and_fields_as_they_are_written(index: Index) -> None:
    index.add([Document("x", "x", {"with blank": 1, "Upper": 2})])
    with pytest.raises(InvalidInput) as caught:
        index.search("a", where="no = '" + "x" * 5000 + "'")
    assert len(str(caught.value)) < 1000
    assert "`with blank` (int64), `Upper` (int64)" in str(caught.value)
    hits = index.search("a", where="`with blank` = 1 AND `Upper` = 2")
    assert [hit.id for hit in hits] == ["x"]


@pytest.mark.parametrize("query", [["a"], None, b"a"])
def test_a_query_is_one_string(index: Index, query: Any) -> None:
    with pytest.raises(InvalidInput, match="wanted a string"):
        index.search(query)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, 10_001])
def test_limits_out_of_range(index: Index, limit: Any) -> None:
    with pytest.raises(InvalidInput, match="limit"):
        index.search("a", limit=limit)


def test_a_long_document_scores_what_its_best_passage_does(index: Index) -> None:
    """And fills one place of the list, however many of its passages are near."""
    sentences = [f"Sentence {n} has exactly six words. " for n in range(300)]
    index.add([Document("long", "".join(sentences)), *(Document(f"d{n}", "x") for n in range(9))])
    parts = split(Client(transport=FakeTransport(8)), ["".join(sentences)], "")[0]
    assert len(parts) > 10
    for part in parts:
        hits = index.search(part, limit=10)
        assert (hits[0].id, hits[0].score) == ("long", pytest.approx(1))
        assert len({hit.id for hit in hits}) == len(hits) == 10
    assert all(hit.snippet in " ".join(parts) for hit in hits[:1] if "…" not in hit.snippet)


def test_prompts_go_in_front_of_passages_and_queries(tmp_path: Path) -> None:
    fake = FakeTransport(8, prompts={"query": "ask: ", "passage": "told: "})
    index = Index.create(tmp_path / "index", Client(transport=fake))
    index.add([TEA])
    index.search("how?")
    assert _embedded(fake) == ["told: " + TEA.text, "ask: how?"]
    # With another prompt it is another text.
    fake = FakeTransport(8, prompts={"query": "ask: "})
    assert Index.open(index.path, Client(transport=fake)).add([TEA]) == 1
    assert _embedded(fake) == [TEA.text]


def test_another_model_is_refused(index: Index, fake: FakeTransport) -> None:
    other = FakeTransport(8, fingerprint="1" * 32)
    with pytest.raises(OtherModel, match=f"'minilm' .*{'0' * 32}.*'e5' .*{'1' * 32}"):
        Index.open(index.path, Client(transport=other, model="e5"))
    # So is one that takes the model's place while the index is open.
    fake._fingerprint = "2" * 32
    with pytest.raises(OtherModel):
        index.add([Document("new", "new")])
    index._checked_s -= documents._CHECK_S
    with pytest.raises(OtherModel):
        index.search("a")
    assert len(index) == 3


def test_a_model_replaced_while_a_batch_is_embedded_leaves_no_vector(
    index: Index, fake: FakeTransport
) -> None:
    def replaced(request: Any) -> Any:
        if request.outputs == ("embeddings",):
            fake._fingerprint = "2" * 32
        return fake._made_up(request)

    fake._answer = replaced
    with pytest.raises(OtherModel):
        index.add([Document("new", "new")])
    assert len(index) == 3


def test_one_writes_at_a_time_and_others_search_meanwhile(
    index: Index, fake: FakeTransport
) -> None:
    def more() -> Iterator[Document]:
        other = Index.open(index.path, Client(transport=fake))
        for write in (lambda: other.add([WATER]), lambda: other.delete(["tea"])):
            with pytest.raises(IndexBusy, match="somebody else is writing"):
                write()
        with pytest.raises(IndexFailed, match=r"is an index already|somebody else"):
            Index.create(index.path, Client(transport=fake))
        assert len(other.search("a")) == 3
        yield Document("new", "new")

    assert index.add(more()) == 1
    assert Index.open(index.path, Client(transport=fake)).delete(["new"]) == 1


def test_searches_go_on_while_files_are_joined(
    index: Index, fake: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store, "_MOST_FRAGMENTS", 2)
    monkeypatch.setattr(documents, "_BATCH", 4)
    done = threading.Event()
    failures: list[BaseException] = []

    def search() -> None:
        client = Client(transport=FakeTransport(8))
        try:
            while not done.is_set():
                assert Index.open(index.path, client).search(TEA.text)[0].id == "tea"
        except BaseException as error:  # noqa: BLE001 (told below)
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for round_ in range(10):
        index.add([Document(f"{n}", f"text {n} of {round_}") for n in range(20)])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(index) == 23
    assert _store.Store.open(index.path)._table.stats()["fragment_stats"]["num_fragments"] <= 2


def test_many_passages_are_found_by_an_index_of_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store, "EXACT_UNTIL", 1000)
    client = Client(transport=FakeTransport(32))
    index = Index.create(tmp_path / "index", client)
    for start, kinds in ((0, ["BTree", "IvfSq"]), (2000, ["BTree", "IvfSq"])):
        index.add(Document(f"{n}", f"text {n}", {"n": n}) for n in range(start, start + 2000))
        table = _store.Store.open(index.path)._table
        assert sorted(one.index_type for one in table.list_indices()) == kinds
        assert table.index_stats("_vector_idx").num_unindexed_rows == 0
    vectors = client.embed([f"text {n}" for n in range(4000)])
    queries = client.embed(wanted := [f"query {n}" for n in range(20)])
    exact = np.argsort(-queries @ vectors.T, axis=1)[:, :10]
    found = [{int(hit.id) for hit in index.search(query)} for query in wanted]
    # Vectors of noise are the hardest to tell apart; real ones are in perf/results/search.md.
    assert np.mean([len(f & set(e)) / 10 for f, e in zip(found, exact.tolist(), strict=True)]) > 0.6
    # A filter that leaves few of them finds all of these, wherever they are.
    hits = index.search("query", where="n % 1000 = 7")
    assert {hit.id for hit in hits} == {"7", "1007", "2007", "3007"}
    assert index.delete(["7"]) == 1
    assert len(index.search("query", where="n % 1000 = 7")) == 3
    assert index.add([Document("8", "changed"), Document("new", "added")]) == 2
    for text, name in (("changed", "8"), ("added", "new")):
        assert (index.search(text)[0].id, index.search(text)[0].score) == (name, pytest.approx(1))


def test_an_index_of_vectors_that_was_not_finished_is_made_anew(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two that it is: the next `tidy` mends it."""
    monkeypatch.setattr(_store, "EXACT_UNTIL", 300)
    index.add(Document(f"{n}", f"text {n}") for n in range(300))
    store = _store.Store.open(index.path)
    names = {tuple(one.columns): one.name for one in store._table.list_indices()}
    store._table.drop_index(names["_vector",])
    index.add([Document("new", "new")])
    kinds = [one.index_type for one in _store.Store.open(index.path)._table.list_indices()]
    assert sorted(kinds) == ["BTree", "IvfSq"]


def test_a_stream_is_written_as_it_comes(
    index: Index, fake: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a batch of it is held, by documents or by characters."""
    monkeypatch.setattr(documents, "_BATCH", 10)
    monkeypatch.setattr(documents, "_BATCH_CHARS", 1000)
    held = []

    def stream() -> Iterator[Document]:
        for n in range(35):
            held.append(n - (len(index) - 3))
            yield Document(f"{n}", f"{n}")
        for n in range(35, 40):
            yield Document(f"{n}", f"{n} " * 500)
            assert len(index) == 3 + n

    with pytest.raises(AssertionError):
        index.add(stream())
    assert max(held) == 9


def test_the_bar_says_how_far_it_is(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    more = [Document(f"{n}", "x") for n in range(7)]
    index.add(more)
    assert capsys.readouterr() == ("", "")  # no terminal
    index.add(more, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "7/7" in err
    assert "document/s" in err


def test_a_bad_document_costs_those_before_it_nothing(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_BATCH", 2)
    good = [Document(f"{n}", f"{n}") for n in range(5)]
    with pytest.raises(InvalidInput, match="'bad'"):
        index.add([*good, Document("bad", "\ud800")])
    assert len(index) == 3 + 4
    index.add([*good, Document("bad", "is good now")])
    assert len(index) == 3 + 6


def test_a_server_that_fails_costs_only_the_batch(
    index: Index, fake: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_BATCH", 2)
    more = [Document(f"{n}", f"text {n}") for n in range(6)]

    def fails(request: Any) -> Any:
        if b"text 4" in request.texts and request.outputs == ("embeddings",):
            raise ServerError("no")
        return fake._made_up(request)

    fake._answer = fails
    with pytest.raises(ServerError):
        index.add(more)
    fake._answer = None
    _embedded(fake)
    assert index.add(more) == 2
    assert _embedded(fake) == ["text 4", "text 5"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document("", "x"), "has 0 bytes"),
        (Document("é" * 513, "x"), "has 1026 bytes"),
        (Document("\udcff", "x"), "UTF-8"),
        (Document("x", None), "wanted two strings"),  # type: ignore[arg-type]
        (Document(1, "x"), "wanted two strings"),  # type: ignore[arg-type]
        (Document("x", "x", ["a"]), "wanted two strings"),  # type: ignore[arg-type]
        (Document("x", "x", {"_part": 1}), "cannot be called '_part'"),
        (Document("x", "x", {"id": 1}), "cannot be called 'id'"),
        (Document("x", "x", {"a.b": 1}), r"cannot be called 'a\.b'"),
        (Document("x", "x", {"": 1}), "cannot be called ''.*not empty"),
        (Document("x", "x", {" \t": 1}), "not empty"),
        (Document("x", "x", {"a`b": 1}), "without a full stop or a backtick"),
        (Document("x", "x", {"\ud800": 1}), "UTF-8"),
        (Document("x", "x", {"new": 1, "year": "1999"}), "field 'year'"),
        (Document("x", "x", {"year": []}), r"field 'year' is \[\]; .* have int64 there"),
        (Document("x", "x", {"a": [[]]}), "wanted strings, numbers"),
        (Document("x", "x", {"a": {"b": 1}}), "field 'a' is .*: wanted strings, numbers"),
        (Document("x", "x", {"a": [[1]]}), "wanted strings, numbers"),
        (Document("x", "x", {"a": object()}), "field 'a'"),
        (Document("x", "x", {"a": ["b", 1]}), "field 'a'"),
        (Document("x", "x", {"year": "1999"}), "field 'year' is '1999'; .* have int64 there"),
        (Document("x", "x", {"year": 1.5}), "field 'year' is 1.5"),
        (Document("x", "x", {"year": 1 << 70}), "field 'year'"),
    ],
)
def test_documents_that_cannot_be_kept(
    index: Index, fake: FakeTransport, document: Document, message: str
) -> None:
    _embedded(fake)
    with pytest.raises(InvalidInput, match=message):
        index.add([document])
    assert _embedded(fake) == []
    assert len(index) == len(index.search("a")) == 3
    assert _store.Store.open(index.path).fields == ["year", "source", "hot"]


def test_a_batch_that_fails_leaves_no_column(index: Index, fake: FakeTransport) -> None:
    """Which would have decided on the type of a field that no document has."""
    new = Document("new", "new", {"stars": 4})

    def fails(request: Any) -> Any:
        if request.outputs == ("embeddings",):
            raise ServerError("no")
        return fake._made_up(request)

    fake._answer = fails
    with pytest.raises(ServerError):
        index.add([new])
    fake._answer = None
    assert "stars" not in _store.Store.open(index.path).fields
    assert index.add([new._replace(fields={"stars": "four"})]) == 1
    assert index.search("new", limit=1)[0].fields == {"stars": "four"}


def test_empty_lists_have_no_type(index: Index) -> None:
    """Neither of the first document, nor of a whole batch; later they are what they are."""
    empty = [Document("0", "0", {"tags": []}), Document("1", "1", {"tags": [None]})]
    assert index.add(empty) == 2
    assert "tags" not in _store.Store.open(index.path).fields
    assert index.add([*empty, Document("2", "2", {"tags": ["a"]})]) == 3
    assert index.add([Document("3", "3", {"tags": []})]) == 1
    found = {hit.id: hit.fields.get("tags") for hit in index.search("a", where="id < 'a'")}
    assert found == {"0": [], "1": [None], "2": ["a"], "3": []}
    assert [hit.id for hit in index.search("a", where="array_has(tags, 'a')")] == ["2"]


def test_decimals_are_floats(index: Index) -> None:
    prices = {"price": Decimal("1.10"), "prices": [Decimal("0.5")]}
    index.add([Document("0", "0", prices)])
    more = {"price": Decimal("123456789.123"), "prices": [1.25, None]}
    assert index.add([Document("0", "0", prices), Document("1", "1", more)]) == 1
    [hit] = index.search("1", where="price > 100")
    assert hit.fields == {"price": 123456789.123, "prices": [1.25, None]}
    mixed = [Document("0", "0", {"price": Decimal(1)}), Document("1", "1", {"price": 1.5})]
    assert index.add(mixed) == 2


def test_folders_without_an_index(fake: FakeTransport, index: Index, tmp_path: Path) -> None:
    client = Client(transport=fake)
    with pytest.raises(IndexNotFound, match="arrowhead index build"):
        Index.open(tmp_path / "nothing", client)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(IndexExists):
        Index.create(index.path, client)
    table = index.path / "documents.lance"
    for manifest in (table / "_versions").glob("*.manifest"):
        manifest.write_bytes(b"no manifest")
    with pytest.raises(IndexDamaged, match=str(index.path)):
        Index.open(index.path, client)


def test_a_folder_that_cannot_be_made(fake: FakeTransport, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(IndexFailed, match=r"cannot write to .*file/index"):
        Index.create(tmp_path / "file" / "index", Client(transport=fake))


def test_without_lancedb_the_command_that_installs_it_is_told(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(NotInstalled, match=r"pip install 'arrowhead\[search\]'"):
        Index.open(index.path, Client(transport=FakeTransport(8)))


_ADD = """
import sys, time
from arrowhead_client import Client, Document, FakeTransport, Index, IndexNotFound, documents
documents._BATCH = 5
path, first, last, edition = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
client = Client(transport=FakeTransport(8))
try:
    index = Index.open(path, client)
except IndexNotFound:
    index = Index.create(path, client)

def stream():
    for n in range(first, last):
        print(n, flush=True)
        time.sleep(0.002)
        yield Document(f"{n}", f"{edition} {n:02}. " * 160)

index.add(stream())
"""


def test_a_killed_writer_leaves_what_it_committed(tmp_path: Path) -> None:
    """A kill -9 in a build, and in replacing all of it; the next run does the rest."""
    path, fake = tmp_path / "index", FakeTransport(8)
    for edition, after in (("first", 23), ("second", 42)):
        process = subprocess.Popen(
            [sys.executable, "-c", _ADD, str(path), "0", "60", edition],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == after:
                break
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        index = Index.open(path, Client(transport=fake))
        there = len(index) if edition == "first" else 60
        assert len(index) == there
        assert there >= after // 5 * 5
        assert _passages(index) == 2 * there  # no document in part, none twice
        wanted = [Document(f"{n}", f"{edition} {n:02}. " * 160) for n in range(60)]
        _embedded(fake)
        changed = index.add(wanted)
        assert changed <= 60 - after // 5 * 5
        assert len(_embedded(fake)) == 2 * changed
        assert (len(index), _passages(index), index.add(wanted)) == (60, 120, 0)
        for n in (0, after, 59):
            hit = index.search(f"{edition} {n:02}. " * 80, limit=1)[0]
            assert (hit.id, hit.score) == (f"{n}", pytest.approx(1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "bc. ", "\n", " ", "word", "\u3002", "é?", "x" * 50]), max_size=900
    ),
    st.sampled_from(["", "title: none | text: "]),
)
def test_passages_are_the_text_and_the_model_reads_them(pieces: list[str], prompt: str) -> None:
    client, text = Client(transport=FakeTransport(8)), "".join(pieces)
    texts = [text, "short", text[::-1]]
    parts = split(client, texts, prompt)
    assert ["".join(some) for some in parts] == texts
    flat = [one for some in parts for one in some]
    assert not client.count_tokens(flat, prompt=prompt).truncated.any()
    assert max(map(len, flat)) <= MOST_CHARS
    assert all(flat) or not text


def test_passages_end_where_sentences_do_and_are_of_like_length() -> None:
    client = Client(transport=FakeTransport(8))
    text = "A sentence of some words. " * 100
    [parts] = split(client, [text], "")
    assert len(parts) == 3
    assert all(part.endswith("words. ") for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) < 60
    [parts] = split(client, ["word " * 250], "")
    assert all(part.endswith("word ") for part in parts)
    # Many tokens in few characters.
    [parts] = split(client, ["a " * 300], "")
    assert [len(part.split()) for part in parts] == [150, 150]


@pytest.mark.parametrize("text", ["a\u3002bcde", "\u3002" * 5, "\u3002a\u3002\u3002b", "ab\n\nc"])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_an_end_of_no_width_is_passed(text: str, most: int) -> None:
    pieces = list(islice(_pieces(text, most), 10))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= most for piece in pieces)


def test_a_prompt_without_room_is_refused(tmp_path: Path) -> None:
    fake = FakeTransport(8, prompts={"passage": "word " * 256})
    index = Index.create(tmp_path / "index", Client(transport=fake))
    with pytest.raises(InvalidInput, match="no text has room behind it"):
        index.add([TEA])
    assert _embedded(fake) == []


def test_snippets() -> None:
    text = "Nothing of note. " * 40 + "An enzyme\ninhibits it strongly. " + "And so on. " * 40
    found = snippet(text, "which enzymes are inhibited?")
    assert "enzyme inhibits it" in found
    assert len(found) <= 240
    assert (found[0], found[-1]) == ("…", "…")
    assert " ".join(text.split()).find(found.strip("…")) > 0
    assert snippet(text, "zzz").startswith("Nothing of note. Nothing")
    assert snippet("a \n b\t", "x") == "a b"
    assert snippet("x" * 1000, "x") == "x" * 238 + "…"
    assert snippet("", "") == ""


def test_scores_are_cosines_whatever_the_vectors_lengths_are(tmp_path: Path) -> None:
    fake = FakeTransport(8)

    def long(request: Any) -> Any:
        answer = dict(fake._made_up(request))
        if "embeddings" in answer:
            answer["embeddings"] = answer["embeddings"] * np.float32(7)
        return answer

    fake._answer = long
    index = Index.create(tmp_path / "index", Client(transport=fake))
    index.add([TEA, COFFEE])
    assert index.search(TEA.text)[0] == Hit(
        "tea", pytest.approx(1), TEA.text, {"year": 2021, "source": "notes"}
    )
    assert all(-1 <= hit.score <= 1 for hit in index.search(COFFEE.text))
