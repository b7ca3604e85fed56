# SPDX-License-Identifier: Apache-2.0
"""Packing loses no token, mixes no texts and keeps its bounds, whatever the lengths."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from arrowhead_engine.packing import MOST_PADDING, SMALL_GROUP, Group, Run, Step, runs

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def runs_of(lengths: list[int], token_budget: int) -> tuple[list[np.ndarray], list[Run]]:
    """Texts whose tokens are all different, so that none can be taken for another."""
    ends = np.cumsum(lengths)
    ids = [np.arange(end - n, end, dtype=np.int32) for n, end in zip(lengths, ends, strict=True)]
    return ids, list(runs(ids, token_budget))


def steps_of(lengths: list[int], token_budget: int) -> tuple[list[np.ndarray], list[Step]]:
    ids, found = runs_of(lengths, token_budget)
    return ids, [Step.of(run, CPU) for run in found]


def real(rows: torch.Tensor, step: Step) -> torch.Tensor:
    return rows[: int(step.lengths.sum())]


@given(LENGTHS, st.integers(1, 5000))
def test_every_text_is_in_one_step_whole(lengths: list[int], token_budget: int) -> None:
    ids, found = runs_of(lengths, token_budget)
    assert sorted(i for run in found for i in run.order) == list(range(len(ids)))
    for run in found:
        step = Step.of(run, CPU)
        assert step.starts.tolist() == [0, *np.cumsum(step.lengths)]
        assert (step.longest, step.real) == (max(step.lengths), sum(step.lengths))
        rows = torch.split(real(step.input_ids, step), step.lengths.tolist())
        for place, row in zip(run.order, rows, strict=True):
            assert row.tolist() == ids[place].tolist()
        assert real(step.positions, step).tolist() == [
            p for n in step.lengths.tolist() for p in range(n)
        ]


@given(LENGTHS, st.integers(1, 5000))
def test_a_step_keeps_to_the_budget_unless_one_text_alone_exceeds_it(
    lengths: list[int], token_budget: int
) -> None:
    _, found = runs_of(lengths, token_budget)
    for run in found:
        assert run.tokens <= token_budget or len(run.order) == 1


@given(LENGTHS, st.integers(1, 20), st.integers(1, 400))
def test_places_without_a_text_share_the_tail_of_a_larger_block(
    lengths: list[int], texts: int, tail: int
) -> None:
    ids, (run,) = runs_of(lengths, 100_000)
    tokens = sum(lengths)
    block = run.block(tokens + tail, len(ids) + texts)
    step = Step.over(block, tokens + tail, max(lengths), tokens + tail, np.empty(0, np.int64))
    exact = Step.of(run, CPU)
    for name in ("input_ids", "positions"):
        met = getattr(step, name)
        assert met[:tokens].tolist() == getattr(exact, name)[:tokens].tolist()
        assert met[tokens:].tolist() == [0] * tail
    starts = step.starts.tolist()
    assert starts[: len(ids) + 1] == exact.starts.tolist()
    shares = np.diff(starts[len(ids) :]).tolist()
    assert sum(shares) == tail
    assert set(shares) <= {tail // texts, -(-tail // texts)}
    assert shares[-1] > 0  # so every place starts at a row that there is


@given(LENGTHS)
def test_groups_show_attention_each_text_alone(lengths: list[int]) -> None:
    _, steps = steps_of(lengths, 100_000)
    (step,) = steps
    assert [group.start for group in step.groups[1:]] == [group.stop for group in step.groups[:-1]]
    assert (step.groups[0].start, step.groups[-1].stop) == (0, sum(lengths))
    rows = iter(torch.split(real(step.input_ids, step), step.lengths.tolist()))
    for group in step.groups:
        places = _places(step, group)
        for text in range(group.texts):
            row = next(rows)
            assert places[text, : len(row)].tolist() == row.tolist()
            if group.mask is not None:
                assert group.mask[text, 0, 0].tolist() == [
                    i < len(row) for i in range(group.length)
                ]


@given(LENGTHS)
def test_scatter_undoes_gather(lengths: list[int]) -> None:
    _, (step,) = steps_of(lengths, 100_000)
    for group in step.groups:
        tokens = step.input_ids[group.start : group.stop]
        if group.scatter is not None:
            back = _places(step, group).reshape(-1).index_select(0, group.scatter)
            assert back.tolist() == tokens.tolist()


@given(LENGTHS)
def test_padding_keeps_its_bound(lengths: list[int]) -> None:
    _, (step,) = steps_of(lengths, 100_000)
    for group in step.groups:
        padded = group.texts * group.length
        assert padded <= max(SMALL_GROUP, MOST_PADDING * (group.stop - group.start))


def _places(step: Step, group: Group) -> torch.Tensor:
    tokens = step.input_ids[group.start : group.stop]
    if group.gather is not None:
        tokens = tokens.index_select(0, group.gather)
    return tokens.view(group.texts, group.length)


def test_nothing_in_nothing_out() -> None:
    assert list(runs([], 4096)) == []


def test_steps_come_in_few_sizes_and_little_larger_than_their_texts() -> None:
    sizes = set()
    for tokens in range(1, 4097):
        _, (step,) = steps_of([tokens], 100_000)
        rows = len(step.input_ids)
        assert len(step.positions) == rows
        assert tokens <= rows <= max(tokens + 3, tokens * 1.125)
        assert step.input_ids[tokens:].tolist() == [0] * (rows - tokens)
        sizes.add(rows)
    assert len(sizes) < 90
