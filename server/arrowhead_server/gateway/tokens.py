# SPDX-License-Identifier: Apache-2.0
"""JSON Web Tokens: the gateway as an OAuth 2 resource server (RFC 6750, RFC 9068)."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
from jwt import PyJWK, PyJWKClient, PyJWKSet

from arrowhead_client import Unavailable
from arrowhead_server.gateway.failures import Forbidden, Unauthorized
from arrowhead_server.gateway.reread import Reread, check_unwritable, text_of
from arrowhead_server.gateway.settings import BadSetting, TokenSettings

# Of key pairs only: who checks a token must not be able to make one.
ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
LEEWAY_S = 30  # between the issuer's clock and ours
LIFETIME_S = 300.0  # for so long keys that were fetched are not fetched again
COOLDOWN_S = 10.0  # between two fetches, whatever tokens name and whatever came of the first
_FETCH_S = 5.0
_NO_KEYS = (OSError, ValueError, TypeError, AttributeError, jwt.PyJWTError)
_LOG = logging.getLogger(__name__)


class Tokens:
    """Lets JWTs in whose issuer, audience, time, signature and scopes are right.

    Raises:
        BadSetting: the keys' URL is none of https, or their file cannot be read.
    """

    def __init__(self, settings: TokenSettings) -> None:
        self._settings = settings
        self._key = _keys_of(settings.jwks)

    async def subject(self, token: str) -> str:
        """Whose token this is.

        Raises:
            Unauthorized: it is none, or none for here, or not of now.
            Forbidden: it has not all scopes that are wanted.
            Unavailable: the issuer's keys cannot be had.
        """
        try:
            key = await self._key(jwt.get_unverified_header(token).get("kid"))
            if key is None or key.algorithm_name not in ALGORITHMS:
                raise Unauthorized("the token's key is none of its issuer's")
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                issuer=self._settings.issuer,
                audience=self._settings.audience,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise Unauthorized(f"the token is not let in: {error}") from error
        missing = [scope for scope in self._settings.scopes if scope not in _scopes(claims)]
        if missing:
            raise Forbidden(
                f"the token has not the scope {' '.join(missing)}: ask its issuer for one that has",
                self._settings.scopes,
            )
        return str(claims["sub"])


def _scopes(claims: dict[str, Any]) -> list[str]:
    """As RFC 8693 has them, or as Microsoft and Okta do."""
    told = claims.get("scope", claims.get("scp"))
    if isinstance(told, str):
        return told.split()
    return told if isinstance(told, list) else []


def _keys_of(jwks: str) -> Callable[[str | None], Awaitable[PyJWK | None]]:
    place = urlsplit(jwks)
    if place.scheme in ("http", "https"):
        if place.scheme == "http" and place.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise BadSetting(
                f"keys from {jwks}: anybody on the way could put in their own; wanted https"
            )
        return _Fetched(jwks)
    file = Reread(Path(jwks), _read)

    async def key(kid: str | None) -> PyJWK | None:
        return _find(file(), kid)

    return key


def _read(path: Path) -> PyJWKSet:
    check_unwritable(path)  # else others could let in whom they like
    try:
        return PyJWKSet.from_dict(json.loads(text_of(path)))
    except _NO_KEYS as error:
        raise BadSetting(f"{path} is no JSON Web Key Set: {error}") from error


def _find(known: PyJWKSet, kid: str | None) -> PyJWK | None:
    keys = [key for key in known.keys if key.public_key_use in (None, "sig")]
    if kid is None:
        return keys[0] if len(keys) == 1 else None
    return next((key for key in keys if key.key_id == kid), None)


class _Fetched:
    """The issuer's keys, fetched when a token names one that is not known, and now and then.

    The last ones that came hold while the issuer does not answer.
    """

    def __init__(self, url: str) -> None:
        self._client = PyJWKClient(url, cache_jwk_set=False, timeout=_FETCH_S)
        self._known: PyJWKSet | None = None
        self._came = self._asked = -LIFETIME_S
        self._fetching: asyncio.Task[None] | None = None

    async def __call__(self, kid: str | None) -> PyJWK | None:
        key = None if self._known is None else _find(self._known, kid)
        now = time.monotonic()
        wanted = key is None or now - self._came > LIFETIME_S
        if wanted and self._fetching is None and now - self._asked > COOLDOWN_S:
            self._fetching = asyncio.create_task(self._fetch())
        if key is None and self._fetching is not None:
            await asyncio.shield(self._fetching)
        if self._known is None:
            raise Unavailable("the keys of the tokens' issuer cannot be had now: try again")
        return key or _find(self._known, kid)

    async def _fetch(self) -> None:
        try:
            told = await asyncio.to_thread(self._client.fetch_data)
            self._known = PyJWKSet.from_dict(told)
            self._came = time.monotonic()
        except _NO_KEYS as error:
            _LOG.warning("no keys from %s: %s", self._client.uri, error)
        finally:
            self._asked, self._fetching = time.monotonic(), None
