# SPDX-License-Identifier: Apache-2.0
"""The tokenizer gives the source library's ids, and reads no more of a text than that takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowhead_engine.errors import CertificateMismatch, InvalidInput, UnsupportedModel
from arrowhead_engine.spec import ModelSpec, read_metadata
from arrowhead_engine.tokenizer import MOST_CHARS_PER_TOKEN, Tokenizer, utf8


@pytest.fixture(scope="module")
def reference(minilm_source: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_source)
    return lambda text: tokenizer(text, truncation=True, max_length=256)["input_ids"]


def test_ids_are_the_source_librarys(
    tokenizer: Tokenizer, reference: Any, texts: list[str]
) -> None:
    ids, _ = tokenizer.encode(texts)
    assert ids == [reference(text) for text in texts]


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_ids_of_any_text(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    assert tokenizer.encode([text])[0] == [reference(text)]


def test_the_ids_at_both_ends_are_those_of_every_text(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    assert tokenizer.ends == ([101], [102])
    ids, _ = tokenizer.encode(texts)
    assert all(row[:1] == [101] and row[-1:] == [102] for row in ids)


LONG = {
    "prose": "The committee met on Tuesday to discuss the coming year's budget. " * 400,
    "chinese": "快速的棕色狐狸跳过懒狗" * 800,
    "one word": "x" * 16_000,
    "long words": ("y" * 300 + " ") * 50,
    "blanks": " " * 9_000 + "the end",
    "blanks between": ("tick" + " " * 60) * 240,
    "ends inside a word": "ab" * 1024 + "c and then some more words",
    **{
        f"{special} across the cut at {place}": ("word " * 253 + " " * 4000)[:place] + special * 9
        for special in ("[MASK]", "[SEP]")
        for place in (2043, 2045, 2047)
    },
}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_text_has_the_ids_of_the_whole_text(
    tokenizer: Tokenizer, reference: Any, kind: str
) -> None:
    text = LONG[kind]
    assert len(text) > 8 * 256
    tokens = tokenizer(["short", text])
    row = tokens.input_ids[1, : tokens.length[1, 0]].tolist()
    if len(text) <= MOST_CHARS_PER_TOKEN * 256 or len(row) == 256:
        assert row == reference(text)
    assert tokens.truncated[1, 0] == (len(reference(text + " z")) == len(reference(text)) == 256)


def test_beyond_the_characters_read_a_text_counts_as_truncated(tokenizer: Tokenizer) -> None:
    tokens = tokenizer([" " * (MOST_CHARS_PER_TOKEN * 256) + "never seen"])
    assert tokens.length.tolist() == [[2]]
    assert tokens.truncated.tolist() == [[True]]


@pytest.mark.parametrize(
    "text", ["the quick brown fox " * 500_000, "x" * 10_000_000, " " * 10_000_000]
)
def test_ten_megabytes_cost_next_to_nothing(tokenizer: Tokenizer, text: str) -> None:
    assert len(text) == 10_000_000
    started = time.process_time()
    tokens = tokenizer([text])
    seconds = time.process_time() - started
    assert tokens.truncated.all()
    # Milliseconds; all of it would take six seconds. The bound is wide for a busy machine.
    assert seconds < 0.5


def test_truncated_says_whether_tokens_were_lost(tokenizer: Tokenizer) -> None:
    # "word" is one token; [CLS] and [SEP] take two of the 256.
    tokens = tokenizer(["word " * 254, "word " * 255])
    assert tokens.length.tolist() == [[256], [256]]
    assert tokens.truncated.tolist() == [[False], [True]]


def test_a_text_has_the_same_ids_alone_and_in_a_batch(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    together = tokenizer(texts)
    for i, text in enumerate(texts):
        alone = tokenizer([text])
        length = int(together.length[i, 0])
        assert alone.input_ids[0].tolist() == together.input_ids[i, :length].tolist()
        assert (together.input_ids[i, length:] == 0).all()
        assert alone.truncated[0, 0] == together.truncated[i, 0]


def test_no_texts_give_no_rows(tokenizer: Tokenizer) -> None:
    tokens = tokenizer([])
    assert tokens.input_ids.shape == (0, 0)
    assert tokens.length.shape == (0, 1)


def test_utf8_names_the_bad_text_and_byte() -> None:
    assert utf8([b"", "naïve".encode()]) == ["", "naïve"]
    with pytest.raises(InvalidInput, match=r"text 1 is not UTF-8: byte 2 of 4 is 0xff"):
        utf8([b"fine", b"ab\xffc"])
    with pytest.raises(InvalidInput, match="text 0"):
        utf8(["\ud800".encode("utf-8", "surrogatepass")])


def test_another_tokenizer_than_the_certified_one_is_refused(
    minilm_repository: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(minilm_repository / "minilm_tokenizer" / "1", tmp_path / "1")
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"hello"', b'"hellp"'))
    with pytest.raises(CertificateMismatch, match="not the certified tokenizer"):
        Tokenizer.open(folder)


def test_a_damaged_description_is_a_named_error(minilm_repository: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(minilm_repository / "minilm_tokenizer" / "1", tmp_path / "1")
    for damaged in ("[]", "[" * 100_000):
        (folder / "metadata.json").write_text(damaged)
        with pytest.raises(UnsupportedModel, match=r"metadata\.json"):
            Tokenizer.open(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(FileNotFoundError):
        Tokenizer.open(folder)


@pytest.mark.parametrize("pad", [None, "0", -1, 2**31, True])
def test_a_pad_id_that_is_none_is_refused(minilm_repository: Path, pad: object) -> None:
    folder = minilm_repository / "minilm_tokenizer" / "1"
    spec = ModelSpec.from_metadata(read_metadata(folder / "metadata.json"))
    spoilt = replace(spec, config={**spec.config, "pad_token_id": pad})
    with pytest.raises(UnsupportedModel, match="pad_token_id is"):
        Tokenizer.parse((folder / "tokenizer.json").read_bytes(), spoilt)


def test_it_imports_no_torch() -> None:
    code = "import arrowhead_engine.tokenizer, sys; print({'torch'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
