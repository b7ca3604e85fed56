# SPDX-License-Identifier: Apache-2.0
"""What is told of batches: sums that reach their counters, and lines that hold no text."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping

import pytest

from arrowhead_engine.account import BATCHES_VARIABLE, PERIOD_S, Account, Batch
from arrowhead_engine.errors import InvalidInput

OF_MODEL = {"model": "minilm_encoder", "version": "3", "model_instance": "minilm_encoder_0_1"}


class Family:
    """Counters of one name, in a dictionary that all share."""

    kept: dict[tuple[str, str], float]

    def __init__(self, name: str, description: str) -> None:
        assert description
        self._name = name

    def Metric(self, *, labels: Mapping[str, str]) -> Counter:  # noqa: N802
        rest = ",".join(f"{key}={labels[key]}" for key in labels if key not in OF_MODEL)
        assert {key: labels[key] for key in OF_MODEL} == OF_MODEL
        return Counter(self.kept, (self._name.removeprefix("arrowhead_"), rest))


class Counter:
    def __init__(self, kept: dict[tuple[str, str], float], key: tuple[str, str]) -> None:
        self._kept, self._key = kept, key
        kept[key] = 0

    def increment(self, value: float) -> None:
        self._kept[self._key] += value


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    monkeypatch.setattr(Family, "kept", {}, raising=False)
    return Family.kept


def batch(account: Account, *refused: str, ids: tuple[str, ...] = ()) -> None:
    why = [InvalidInput(one) for one in refused]
    account.add(Batch(4, 30, 1, why, 0.0123, computed=[5, 15], equal=1, remembered=1), lambda: ids)


def test_sums_arrive_without_another_batch(kept: dict[tuple[str, str], float]) -> None:
    account = Account("minilm_encoder", "3", Family, "minilm_encoder_0_1")
    batch(account)
    batch(account)
    assert not kept
    deadline = time.monotonic() + 10 * PERIOD_S
    while kept.get(("batches_by_tokens_total", "le=+Inf")) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    batch(account)
    account.close()
    assert kept == {
        ("texts_total", ""): 12,
        ("tokens_total", ""): 90,
        ("texts_truncated_total", ""): 3,
        ("requests_refused_total", ""): 0,
        ("batches_total", ""): 3,
        ("texts_reused_total", "how=batch"): 3,
        ("texts_reused_total", "how=step"): 3,
        ("tokens_computed_total", ""): 60,
        ("padding_saved_tokens_total", ""): 30,
        ("batches_by_tokens_total", "le=16"): 0,
        **{("batches_by_tokens_total", f"le={end}"): 3 for end in (64, 256, 1024, 4096, "+Inf")},
    }


def test_lines_are_of_batches_and_only_if_wanted(
    kept: dict[tuple[str, str], float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet = Account("minilm_encoder", "3", Family, "minilm_encoder_0_1")
    batch(quiet, "text 0 is not UTF-8", "another", ids=("a-1", "b,c", "no id\nbut a text"))
    batch(quiet)
    quiet.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line) == {
        "part": "minilm_encoder",
        "level": "warning",
        "message": "refused 2 of a batch's requests; the first: text 0 is not UTF-8",
        "request_id": "a-1,b,c",
    }

    monkeypatch.setenv(BATCHES_VARIABLE, "1")
    wordy = Account("minilm_encoder", "3", Family, "minilm_encoder_0_1")
    ids = [f"{number:0128}" for number in range(250)]
    # As a gateway sends them: one for several callers.
    batch(wordy, ids=(",".join(ids[:120]), *ids[120:]))
    wordy.close()
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) < 4096  # else lines of several processes mix
    told, *more = map(json.loads, lines)
    found = [told.pop("request_id"), *(line.pop("request_id") for line in more)]
    assert ",".join(found).split(",") == ids[:200]
    assert told == {
        "part": "minilm_encoder",
        "level": "info",
        "message": "batch",
        "texts": 4,
        "tokens": 30,
        "truncated": 1,
        "tokens_computed": 20,
        "ms": 12.3,
        "more_ids": 50,
    }
    wanted = {"part": told["part"], "level": "info", "message": "more ids of the last line"}
    assert more == [wanted] * len(more)


def test_refusals_fill_no_log_and_are_all_counted(
    kept: dict[tuple[str, str], float], capsys: pytest.CaptureFixture[str]
) -> None:
    account = Account("minilm_encoder", "3", Family, "minilm_encoder_0_1")
    began = time.monotonic()
    refused = 0
    while time.monotonic() - began < 2.5 * PERIOD_S:
        batch(account, f"text {refused}", f"text {refused + 1}", ids=("an-id",))
        refused += 2
        time.sleep(0.001)
    account.close()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0]["message"].startswith("refused 2 of a batch's requests; the first: text 0")
    assert 2 <= len(lines) <= 5  # at once, after each second, at the end
    more = [re.fullmatch(r"refused (\d+) more requests; .*", one["message"]) for one in lines[1:]]
    assert 2 + sum(int(one[1]) for one in more if one) == refused > 100
    assert f"the last: text {refused - 1}" in lines[-1]["message"]
    assert kept["requests_refused_total", ""] == refused


def test_who_is_refused_after_a_while_has_a_line_again(
    kept: dict[tuple[str, str], float], capsys: pytest.CaptureFixture[str]
) -> None:
    account = Account("minilm_encoder", "3", Family, "minilm_encoder_0_1")
    for number in range(2):
        batch(account, f"text {number}")
        time.sleep(2.2 * PERIOD_S)
        line = capsys.readouterr().err
        assert f"refused 1 of a batch's requests; the first: text {number}" in line
    account.close()
    assert capsys.readouterr().err == ""


def test_without_metrics_it_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    def none(*, name: str, description: str) -> Family:
        raise RuntimeError("metrics are off")

    account = Account("minilm_encoder", "3", none, "minilm_encoder_0_1")
    batch(account)
    time.sleep(1.5 * PERIOD_S)
    batch(account)
    account.close()
    assert capsys.readouterr().err.count("no metrics of batches: metrics are off") == 1


def test_after_an_error_the_next_batches_are_counted_and_none_is_kept(
    kept: dict[tuple[str, str], float],
) -> None:
    fails = [True]

    def full(*, name: str, description: str) -> Family:
        if fails[0]:
            raise RuntimeError("no room in shared memory")
        return Family(name, description)

    account = Account("minilm_encoder", "3", full, "minilm_encoder_0_1")
    batch(account)
    time.sleep(1.5 * PERIOD_S)
    assert account._batches == []
    fails[0] = False
    batch(account)
    account.close()
    assert kept["batches_total", ""] == 1
