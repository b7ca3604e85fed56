# SPDX-License-Identifier: Apache-2.0
"""The issuer's keys change, or cannot be had: asked of a real server, with a clock that is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest

from arrowhead_client import Unavailable
from arrowhead_server.gateway import reread, tokens
from arrowhead_server.gateway.failures import Forbidden, Unauthorized
from arrowhead_server.gateway.settings import BadSetting, TokenSettings
from arrowhead_server.gateway.tokens import COOLDOWN_S, LIFETIME_S, Tokens

from .issuer import AUDIENCE, ISSUER, Issuer, running_issuer


class Clock:
    """In place of the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tokens, "time", clock)
    monkeypatch.setattr(reread, "time", clock)
    return clock


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with running_issuer() as issuer:
        issuer.add("first")
        yield issuer


def checking(jwks: str) -> Tokens:
    return Tokens(TokenSettings(ISSUER, AUDIENCE, jwks))


async def test_a_new_key_is_fetched_when_a_token_names_it(clock: Clock, issuer: Issuer) -> None:
    checks = checking(issuer.url)
    assert await checks.subject(issuer.sign("first")) == "carol"
    await asyncio.gather(*(checks.subject(issuer.sign("first")) for _ in range(5)))
    assert issuer.fetched == 1
    clock.now += COOLDOWN_S + 1
    issuer.add("second", "ES256")
    several = [checks.subject(issuer.sign("second")) for _ in range(5)]
    assert await asyncio.gather(*several) == ["carol"] * 5
    assert issuer.fetched == 2


async def test_names_that_nobody_has_do_not_make_it_fetch_on_and_on(
    clock: Clock, issuer: Issuer
) -> None:
    checks = checking(issuer.url)
    assert await checks.subject(issuer.sign("first"))
    clock.now += COOLDOWN_S + 1
    for number in range(20):
        wrong = issuer.sign("first", headers={"kid": f"unheard of {number}"})
        with pytest.raises(Unauthorized, match="none of its issuer's"):
            await checks.subject(wrong)
    assert issuer.fetched == 2


async def test_a_key_that_is_withdrawn_lets_nobody_in_for_long(
    clock: Clock, issuer: Issuer
) -> None:
    checks = checking(issuer.url)
    token = issuer.sign("first")
    assert await checks.subject(token)
    issuer.add("second")
    del issuer.keys["first"]
    assert await checks.subject(token)
    clock.now += LIFETIME_S + 1
    await checks.subject(token)  # makes it look, and does not wait
    while issuer.fetched < 2 or checks._key._fetching is not None:  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)
    with pytest.raises(Unauthorized, match="none of its issuer's"):
        await checks.subject(token)


async def test_an_issuer_that_does_not_answer(clock: Clock, issuer: Issuer) -> None:
    issuer.answers = False
    checks = checking(issuer.url)
    for _ in range(5):
        with pytest.raises(Unavailable, match="keys of the tokens' issuer"):
            await checks.subject(issuer.sign("first"))
    assert issuer.fetched == 1
    issuer.answers = True
    clock.now += COOLDOWN_S + 1
    assert await checks.subject(issuer.sign("first")) == "carol"
    issuer.answers = False
    for _ in range(3):  # what is known holds
        clock.now += LIFETIME_S + COOLDOWN_S
        assert await checks.subject(issuer.sign("first")) == "carol"


async def test_keys_in_a_file_are_followed(clock: Clock, issuer: Issuer, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(issuer.jwks()))
    checks = checking(str(file))
    assert await checks.subject(issuer.sign("first"))
    assert await checks.subject(issuer.sign("first", headers={}))  # there is but one
    issuer.add("second", "EdDSA")
    file.write_text(json.dumps(issuer.jwks()))
    clock.now += 2
    assert await checks.subject(issuer.sign("second"))
    with pytest.raises(Unauthorized, match="none of its issuer's"):
        await checks.subject(issuer.sign("first", headers={}))


async def test_keys_in_a_file_that_others_may_change_are_not_taken(
    issuer: Issuer, tmp_path: Path
) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(issuer.jwks()))
    for mode in (0o664, 0o646):
        file.chmod(mode)
        with pytest.raises(BadSetting, match="can be changed by others"):
            checking(str(file))
    file.chmod(0o644)
    assert await checking(str(file)).subject(issuer.sign("first"))


@pytest.mark.parametrize("told", [None, 7, True, {"embed": 1}, [None]])
@pytest.mark.parametrize("name", ["scope", "scp"])
async def test_scopes_that_are_none_forbid(issuer: Issuer, name: str, told: object) -> None:
    checks = Tokens(TokenSettings(ISSUER, AUDIENCE, issuer.url, ("embed",)))
    claims = {**Issuer.claims(scope=None), name: told}
    token = jwt.encode(claims, issuer.keys["first"][1], "RS256", headers={"kid": "first"})
    with pytest.raises(Forbidden, match="has not the scope embed"):
        await checks.subject(token)


async def test_keys_that_both_sides_know_are_not_taken(issuer: Issuer, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    secret = {"kty": "oct", "kid": "shared", "alg": "HS256", "k": "c2VjcmV0" * 8}
    file.write_text(json.dumps({"keys": [secret]}))
    token = jwt.encode(Issuer.claims(), jwt.PyJWK(secret).key, "HS256", headers={"kid": "shared"})
    with pytest.raises(Unauthorized, match="none of its issuer's"):
        await checking(str(file)).subject(token)
