# SPDX-License-Identifier: Apache-2.0
"""The files that models are scored on, and the command, against the small server."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from arrowhead_client import InvalidInput, evaluate
from arrowhead_client.cli import main
from arrowhead_client.datasets import RetrievalSet, StsPairs
from arrowhead_client.evaluate import score_retrieval, score_sts

CORPUS = [
    {"_id": "d1", "title": "Cats", "text": "purr"},
    {"_id": "d2", "title": "", "text": "dogs bark "},
    {"_id": "q2", "text": "the query's own"},
]
QUERIES = [
    {"_id": "q1", "text": "which purr?"},
    {"_id": "unjudged", "text": "never asked"},
    {"_id": "q2", "text": "the query's own"},
]
QRELS = "query-id\tcorpus-id\tscore\nq2\td2\t2\nq1\td1\t1\nq1\td2\t0\n"
WANTED = RetrievalSet(
    documents=["Cats purr", "dogs bark", "the query's own"],
    queries=["the query's own", "which purr?"],
    judged=[{1: 2}, {0: 1, 1: 0}],
    own=[2, None],
)


def _jsonl(rows: Sequence[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(_jsonl(CORPUS))
    (folder / "queries.jsonl").write_text(_jsonl(QUERIES))
    (folder / "qrels" / "test.tsv").write_text(QRELS)
    return folder


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    folder = tmp_path / "parquet"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(CORPUS), folder / "pets.corpus.parquet")
    pq.write_table(pa.Table.from_pylist(QUERIES), folder / "pets.queries.parquet")
    (folder / "pets.qrels.test.tsv").write_text(QRELS)
    return folder


@pytest.fixture
def sts(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.csv"
    file.write_text('a,b,1.5\n"c, d",e,5\nf,f,3\n')
    return file


@pytest.mark.parametrize("layout", ["beir", "parquet"])
def test_both_layouts_are_the_same_set(layout: str, request: pytest.FixtureRequest) -> None:
    assert RetrievalSet.read(request.getfixturevalue(layout)) == WANTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", None, r"wanted corpus.jsonl or one \*.corpus.parquet, met neither"),
        ("queries.jsonl", None, "wanted queries.jsonl"),
        ("qrels/test.tsv", None, "wanted qrels/test.tsv"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "no judgements"),
        ("qrels/test.tsv", QRELS + "q1\td9\t1\n", "line 5: document 'd9' is not in"),
        ("qrels/test.tsv", QRELS + "q9\td1\t1\n", "line 5: query 'q9' is not in"),
        ("qrels/test.tsv", QRELS + "q1\td1\tx\n", "line 5: the score is 'x'"),
        ("qrels/test.tsv", QRELS + "q1 d1 1\n", "line 5: 1 fields"),
        ("corpus.jsonl", _jsonl(CORPUS) + "{\n", "line 4 is no JSON"),
        ("corpus.jsonl", _jsonl(CORPUS) + "[]\n", "line 4: list; wanted an object"),
        ("corpus.jsonl", _jsonl([*CORPUS, CORPUS[0]]), "line 4: _id 'd1' is there twice"),
        ("queries.jsonl", '{"_id": "q1"}\n', "line 1: _id, title and text are 'q1', '' and None"),
    ],
)
def test_a_set_with_a_fault_is_told(
    beir: Path, name: str, content: str | None, message: str
) -> None:
    (beir / name).unlink()
    if content is not None:
        (beir / name).write_text(content)
    with pytest.raises(InvalidInput, match=message) as caught:
        RetrievalSet.read(beir)
    assert str(beir) in str(caught.value)


def test_two_corpora_in_a_folder_are_told(parquet: Path) -> None:
    (parquet / "other.corpus.parquet").write_bytes(b"no Parquet")
    with pytest.raises(InvalidInput, match=r"met other\.corpus\.parquet, pets\.corpus"):
        RetrievalSet.read(parquet)
    (parquet / "pets.corpus.parquet").unlink()
    with pytest.raises(InvalidInput, match=r"other\.corpus\.parquet is no Parquet"):
        RetrievalSet.read(parquet)


@pytest.mark.parametrize("header", ["", "sentence1,sentence2,score\n"])
def test_sentence_pairs_are_read_with_or_without_a_header(tmp_path: Path, header: str) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(f'{header}a,b,1.5\n"c, d",e,5\n', encoding="utf-8")
    assert StsPairs.read(file) == StsPairs(["a", "c, d"], ["b", "e"], [1.5, 5.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no pairs"),
        (b"a,b,1\na,b\n", "line 2: 2 fields"),
        (b"a,b,c,1\n", "line 1: 4 fields"),
        (b'"a\nb",b,1\na,b,x\n', "line 3: the score is 'x'"),
        (b"a,b,nan\n", "line 1: the score is 'nan'"),
        (b"a,b,1\na,\xff,1\n", "not UTF-8, in line"),
    ],
)
def test_pairs_with_a_fault_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "pairs.csv"
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as caught:
        StsPairs.read(file)
    assert str(file) in str(caught.value)
    with pytest.raises(InvalidInput, match="cannot read"):
        StsPairs.read(tmp_path / "nothing")


def _words(*words: str) -> Callable[[Sequence[str]], np.ndarray]:
    """Vectors that say how often each of these words is in a text."""
    return lambda texts: np.float32([[text.count(word) for word in words] for text in texts])


def test_any_embed_is_scored_on_pairs() -> None:
    pairs = StsPairs(["cat", "cat dog", "cat"], ["cat", "cat", "dog"], [5.0, 3.0, 0.5])
    [score] = score_sts(pairs, _words("cat", "dog"))
    assert (score.measure, score.value, score.texts) == ("STS Spearman", pytest.approx(100), 6)
    reverse = StsPairs(pairs.left, pairs.right, pairs.scores[::-1])
    assert score_sts(reverse, _words("cat", "dog"))[0].value == pytest.approx(-100)


def test_any_embed_is_scored_on_retrieval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "BLOCK", 2)  # documents come in two blocks
    data = RetrievalSet(
        documents=["cat", "cat cat dog", "dog", "cat dog"],
        queries=["cat", "dog"],
        judged=[{1: 1}, {2: 1, 0: 1}],
        own=[None, None],
    )
    # "cat" finds 0 and then 1; "dog" finds 2, 3, 1 and then 0.
    scores = {s.measure: s for s in score_retrieval(data, _words("cat", "dog"))}
    first, second = 1 / np.log2(3), (1 + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert scores["nDCG@10"].value == pytest.approx(50 * (first + second))
    assert scores["MRR@10"].value == pytest.approx(75)
    assert scores["recall@100"].value == pytest.approx(100)
    assert scores["nDCG@10"].texts == 6
    own = RetrievalSet(data.documents, data.queries, data.judged, [0, None])
    scores = {s.measure: s for s in score_retrieval(own, _words("cat", "dog"))}
    assert scores["MRR@10"].value == pytest.approx(100)  # its own document stood before


def test_the_command_prints_a_table_and_json(http_server: Any, sts: Path, beir: Path) -> None:
    common = ["evaluate", "minilm", "--url", http_server.url]
    run = CliRunner().invoke(main, [*common, "--sts", str(sts), "--retrieval", str(beir)])
    assert run.exit_code == 0, run.output
    names = [line[:14].strip() for line in run.stdout.splitlines()]
    assert names == ["measure", "STS Spearman", "nDCG@10", "recall@100", "MRR@10"]
    assert run.stdout.splitlines()[0].split() == ["measure", "value", "texts", "seconds", "texts/s"]
    run = CliRunner().invoke(main, [*common, "--json", "--retrieval", str(beir)])
    told = json.loads(run.stdout)
    assert told["model"] == "minilm"
    # The made-up vectors mean nothing, but of three documents all are found.
    recall = next(row for row in told["scores"] if row["measure"] == "recall@100")
    assert (recall["value"], recall["texts"]) == (100.0, 5)
    assert recall["texts_per_s"] == pytest.approx(5 / recall["seconds"])


def test_prompts_go_in_front_of_their_own_texts(
    http_server: Any, sts: Path, beir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "_STEP", 2)  # no text is lost between two steps
    run = CliRunner().invoke(
        main,
        [
            *("evaluate", "minilm", "--url", http_server.url),
            *("--sts", str(sts), "--retrieval", str(beir)),
            *("--sts-prompt", "s: ", "--query-prompt", "q: ", "--document-prompt", "d: "),
        ],
    )
    assert run.exit_code == 0, run.output
    sent = [text.decode() for request in http_server.script.seen for text in request.texts]
    assert sent[:6] == ["s: a", "s: c, d", "s: f", "s: b", "s: e", "s: f"]
    assert sent[6:8] == [f"q: {query}" for query in WANTED.queries]
    assert sent[8:] == [f"d: {document}" for document in WANTED.documents]


def test_the_bar_is_shown_on_a_terminal_and_on_stderr_only(http_server: Any, beir: Path) -> None:
    pty, fcntl = pytest.importorskip("pty"), pytest.importorskip("fcntl")
    termios = pytest.importorskip("termios")
    parent, child = pty.openpty()
    # On a terminal of no width there is no bar.
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(parent, False)  # an error at once in place of waiting for ever
    command = [sys.executable, "-m", "arrowhead_client.cli", "evaluate", "minilm", "--json"]
    run = subprocess.run(
        [*command, "--url", http_server.url, "--retrieval", str(beir)],
        stdout=subprocess.PIPE,
        stderr=child,
        check=True,
    )
    shown = os.read(parent, 1 << 16).decode()  # before the other end is closed, and all is lost
    os.close(child)
    os.close(parent)
    assert "retrieval" in shown
    assert "/5 " in shown
    assert json.loads(run.stdout)["model"] == "minilm"


def test_the_command_wants_something_to_score_on(http_server: Any, beir: Path, sts: Path) -> None:
    run = CliRunner().invoke(main, ["evaluate", "minilm", "--url", http_server.url])
    assert (run.exit_code, "--retrieval DIR" in run.stderr) == (2, True)
    (beir / "queries.jsonl").unlink()
    run = CliRunner().invoke(
        main,
        ["evaluate", "m", "--url", http_server.url, "--sts", str(sts), "--retrieval", str(beir)],
    )
    assert run.exit_code == 1
    assert run.stderr.startswith("arrowhead: ")
    assert len(run.stderr.splitlines()) == 1
    assert http_server.script.seen == []  # found before anything was embedded
