# SPDX-License-Identifier: Apache-2.0
"""Which callers are in the candidate's arm, and that a client stays in its own."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowhead_client import (
    AsyncClient,
    AsyncFakeTransport,
    Client,
    Experiment,
    FakeTransport,
    InvalidInput,
    ModelNotFound,
    Request,
    in_candidate,
)

# The first 16 hexadecimal digits that coreutils' b2sum prints for these keys.
B2SUM = {
    "agent-7": 0x2BB83340520B6E2C,
    "agent-1": 0xDB3CF3606B0E92DE,
    "user:42": 0x315A996DD95B35AF,
    "grüße": 0x96D4E90B88951A6E,
}
IN, OUT = "agent-7", "agent-1"  # at a share of 0.5


@pytest.mark.parametrize(("key", "number"), B2SUM.items())
def test_the_hash_is_blake2b_and_stays_so(key: str, number: int) -> None:
    """The share at which a caller changes sides is the hash itself, to the last bit of a float."""
    edge = number / 2**64
    assert in_candidate(key, math.nextafter(edge, 1))
    assert not in_candidate(key, math.nextafter(edge, 0))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_about_the_share_of_all_keys_is_in(share: float) -> None:
    count = sum(in_candidate(f"agent-{number}", share) for number in range(10_000))
    # Five standard deviations of a fair draw.
    assert abs(count - 10_000 * share) < 5 * math.sqrt(10_000 * share * (1 - share))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(0, 1))
def test_nobody_is_everybody_and_a_rising_share_takes_none_back(key: str, share: float) -> None:
    assert not in_candidate(key, 0)
    assert in_candidate(key, 1)
    if in_candidate(key, share):
        assert all(in_candidate(key, share + (1 - share) * step / 4) for step in range(5))


def test_a_share_of_one_leaves_out_not_even_the_highest_hash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As floats, the highest hash over 2^64 is 1.0, which is not below 1.0."""

    class Highest:
        def digest(self) -> bytes:
            return b"\xff" * 64

    monkeypatch.setattr("arrowhead_client._algebra.blake2b", lambda key: Highest())
    assert in_candidate("a", 1.0)
    assert not in_candidate("a", math.nextafter(1, 0))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, math.inf, "0.1", None, True])
def test_a_share_out_of_range(share: Any) -> None:
    with pytest.raises(InvalidInput, match=r"share=.*wanted a number in 0\.\.1"):
        Experiment(share=share, key="a")


@pytest.mark.parametrize("key", ["", None, 7, b"a", "\ud800"])
def test_a_key_that_is_none(key: Any) -> None:
    with pytest.raises(InvalidInput, match="key="):
        Experiment(share=0.1, key=key)


def _asked(fake: FakeTransport, method: str, texts: list[str], **settings: Any) -> str:
    """The blocking client's model, after a call."""
    with Client(transport=fake, **settings) as client:
        getattr(client, method)(texts)
        return client.model


def _asked_async(fake: FakeTransport, method: str, texts: list[str], **settings: Any) -> str:
    async def call() -> str:
        async with AsyncClient(transport=AsyncFakeTransport(fake), **settings) as client:
            await getattr(client, method)(texts)
            return client.model

    return asyncio.run(call())


@pytest.fixture(params=[_asked, _asked_async], ids=["sync", "async"])
def asked(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize(
    ("experiment", "model"),
    [
        (None, "e5"),
        (Experiment(0.5, IN), "e5_candidate"),
        (Experiment(0.5, OUT), "e5"),
        (Experiment(0.0, IN), "e5"),
        (Experiment(1.0, OUT), "e5_candidate"),
    ],
)
def test_a_client_asks_one_arm_only(asked: Any, experiment: Experiment, model: str) -> None:
    fake = FakeTransport()
    texts = [f"text {number}" for number in range(20)]
    met = asked(fake, "embed", texts, model="e5", experiment=experiment, batch_size=1)
    assert met == model
    assert [request.model for request in fake.requests] == [model] * 20


def test_tokens_are_counted_by_the_live_models_tokenizer(asked: Any) -> None:
    fake = FakeTransport()
    asked(fake, "count_tokens", ["a"], model="e5", experiment=Experiment(1, IN))
    assert [request.model for request in fake.requests] == ["e5_tokenizer"]


def test_a_candidate_that_is_not_served_is_told_and_nothing_falls_back(asked: Any) -> None:
    def answer(request: Request) -> Any:
        raise ModelNotFound("server does not serve this model", status="404")

    fake = FakeTransport(answer=answer)
    experiment = Experiment(0.5, IN)
    with pytest.raises(ModelNotFound, match=r"candidate's arm .*'e5_candidate' is not") as met:
        asked(fake, "embed", ["a"], model="e5", experiment=experiment)
    assert met.value.status == "404"
    assert "agent-7" in str(met.value)
    assert "server does not serve this model" in str(met.value)
    assert [request.model for request in fake.requests] == ["e5_candidate"]
    with pytest.raises(ModelNotFound) as live:  # the other arm is told what it always was
        asked(fake, "embed", ["a"], model="e5", experiment=Experiment(0.5, OUT))
    assert str(live.value) == "server does not serve this model"


def test_what_is_no_experiment(asked: Any) -> None:
    with pytest.raises(InvalidInput, match=r"experiment=0\.1: wanted Experiment"):
        asked(FakeTransport(), "embed", ["a"], experiment=0.1)
