# SPDX-License-Identifier: Apache-2.0
"""The decision alone: which state follows which."""

from __future__ import annotations

import pytest

from arrowhead_server.repository import EmbeddingModel, Pair
from arrowhead_server.rollout import State, next_state


def model(version: int, name: str = "m") -> EmbeddingModel:
    return EmbeddingModel(name, 8, version, name.removesuffix("_candidate"))


def walk(
    shown: State,
    wanted: list[EmbeddingModel],
    *,
    proved: set[Pair],
    refused: set[Pair] | None = None,
    busy: set[Pair] | None = None,
) -> State:
    return next_state(shown, wanted, proved=proved, refused=refused or set(), busy=busy or set())


def versions(state: State) -> tuple[list[int], dict[str, int]]:
    return sorted(v for _, v in state.pairs), {n: m.version for n, m in state.serving.items()}


ONE = State.of([model(1)])


def test_nothing_changes_while_the_repository_does_not() -> None:
    assert walk(ONE, [model(1)], proved={("m", 1)}) == ONE


def test_a_new_version_goes_live_in_three_moves() -> None:
    first = walk(ONE, [model(2)], proved={("m", 1)})
    assert versions(first) == ([1, 2], {"m": 1})
    still = walk(first, [model(2)], proved={("m", 1)})
    assert still == first
    second = walk(first, [model(2)], proved={("m", 1), ("m", 2)})
    # The old parts stay: Triton has not taken the change up yet.
    assert versions(second) == ([1, 2], {"m": 2})
    asked = walk(second, [model(2)], proved={("m", 1), ("m", 2)}, busy={("m", 1)})
    assert asked == second
    third = walk(second, [model(2)], proved={("m", 1), ("m", 2)})
    assert versions(third) == ([2], {"m": 2})


def test_a_refused_version_is_taken_away_and_the_old_one_serves() -> None:
    loading = walk(ONE, [model(2)], proved={("m", 1)})
    refused = walk(loading, [model(2)], proved={("m", 1)}, refused={("m", 2)}, busy={("m", 2)})
    assert refused == ONE
    assert walk(refused, [model(2)], proved={("m", 1)}, refused={("m", 2)}) == ONE


def test_who_changes_his_mind_while_it_loads_keeps_the_old_version() -> None:
    loading = walk(ONE, [model(2)], proved={("m", 1)})
    assert walk(loading, [model(1)], proved={("m", 1)}) == ONE


def test_a_new_model_is_served_once_its_parts_have_answered() -> None:
    wanted = [model(1), model(1, "n")]
    loading = walk(ONE, wanted, proved={("m", 1)})
    assert loading.serving.keys() == {"m"}
    assert ("n", 1) in loading.pairs
    served = walk(loading, wanted, proved={("m", 1), ("n", 1)})
    assert served.serving.keys() == {"m", "n"}


def test_a_removed_model_goes_at_once_and_its_parts_once_nobody_asks() -> None:
    two = State.of([model(1), model(3, "n")])
    both = {("m", 1), ("n", 3)}
    hidden = walk(two, [model(1)], proved=both)
    assert (hidden.serving.keys(), hidden.pairs) == ({"m"}, both)
    assert walk(hidden, [model(1)], proved=both, busy={("n", 3)}) == hidden
    assert walk(hidden, [model(1)], proved=both) == ONE


def test_a_candidate_shares_the_parts_of_its_model() -> None:
    wanted = [model(1), model(2, "m_candidate")]
    state = walk(ONE, wanted, proved={("m", 1)})
    state = walk(state, wanted, proved={("m", 1), ("m", 2)})
    assert versions(state) == ([1, 2], {"m": 1, "m_candidate": 2})
    # It becomes the live one: nothing is loaded again.
    promoted = walk(state, [model(2)], proved={("m", 1), ("m", 2)})
    assert versions(promoted) == ([1, 2], {"m": 2})
    assert versions(walk(promoted, [model(2)], proved={("m", 2)})) == ([2], {"m": 2})


@pytest.mark.parametrize("busy", [set(), {("m", 1)}])
def test_what_serves_is_never_taken_away(busy: set[Pair]) -> None:
    for proved in ({("m", 1)}, set()):
        state = walk(ONE, [model(2)], proved=proved, refused={("m", 2)}, busy=busy)
        assert ("m", 1) in state.pairs
        assert state.serving["m"].version == 1
