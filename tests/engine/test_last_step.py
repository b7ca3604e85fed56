# SPDX-License-Identifier: Apache-2.0
"""What was computed in the step before is not computed again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from arrowhead_engine.last_step import LastStep
from arrowhead_engine.spec import Ids


class Counting:
    """As `Encoder.embed`; notes which texts it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, ids: Sequence[Ids]) -> npt.NDArray[np.float32]:
        self.asked.append([int(row[0]) for row in ids])
        return np.array([[row.sum(), len(row)] for row in ids], np.float32).reshape(len(ids), 2)


def texts(*firsts: int) -> list[Ids]:
    return [np.array([first, 7], np.int32) for first in firsts]


def vectors(*firsts: int) -> list[list[int]]:
    return [[first + 7, 2] for first in firsts]


def test_only_the_step_before_is_remembered() -> None:
    embed = Counting()
    step = LastStep(embed)
    for firsts, asked in [
        ((1, 2, 1), [1, 2]),
        ((3, 2, 1, 2), [3]),
        ((1,), []),  # still known: it was in the step before
        ((2, 1), [2]),  # forgotten: it was not
        ((), []),
        ((2,), []),
    ]:
        assert step(texts(*firsts)).tolist() == vectors(*firsts)
        assert embed.asked.pop() == asked


def test_what_a_caller_does_to_his_vectors_is_his_own_affair() -> None:
    step = LastStep(Counting())
    for _ in range(3):
        met = step(texts(1, 2))
        assert met.tolist() == vectors(1, 2)
        met.fill(0)


def test_ids_that_are_overwritten_after_the_step() -> None:
    """As Triton does with the memory of a request that was answered."""
    step = LastStep(Counting())
    row = np.array([1, 7], np.int32)
    step([row])
    row[:] = 5
    assert step([row]).tolist() == [[10, 2]]
    assert step(texts(1)).tolist() == vectors(1)


def test_a_prefix_is_another_text() -> None:
    embed = Counting()
    step = LastStep(embed)
    step(texts(1))
    assert step([np.array([1], np.int32)]).tolist() == [[1, 1]]
    assert embed.asked == [[1], [1]]


def test_a_step_that_fails_spoils_nothing() -> None:
    embed = Counting()
    step = LastStep(embed)
    step(texts(1))

    def fails(ids: Sequence[Ids]) -> npt.NDArray[np.float32]:
        raise MemoryError

    step._embed = fails
    with pytest.raises(MemoryError):
        step(texts(2))
    step._embed = embed
    assert step(texts(1, 2)).tolist() == vectors(1, 2)
    assert embed.asked == [[1], [2]]
