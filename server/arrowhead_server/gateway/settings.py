# SPDX-License-Identifier: Apache-2.0
"""What a gateway is told: `Settings`, and the limits that hold when it is told nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arrowhead_client import ArrowheadError
from arrowhead_server.gateway.asking import MOST_CHARACTERS, MOST_TEXTS
from arrowhead_server.gateway.embedder import ENTRIES

IN_FLIGHT = 256
MOST_BODY_MB = 16.0  # 2,048 texts of the longest that a model of 512 tokens reads take about 6
MOST_MEMORY_MB = 512.0


class BadSetting(ArrowheadError, ValueError):
    """A setting, or a file that one names, that the gateway cannot run with."""


@dataclass(frozen=True)
class TokenSettings:
    """Which JSON Web Tokens are let in.

    Attributes:
        issuer: their `iss`.
        audience: one of their `aud`.
        jwks: the issuer's public keys, a JSON Web Key Set: an https URL, or a file's path.
        scopes: that each token must have.
    """

    issuer: str
    audience: str
    jwks: str
    scopes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What a gateway is told.

    Attributes:
        url, model: of Triton, as `AsyncClient` takes them.
        entries: texts remembered.
        timeout_s: for Triton's part of a request.
        most_texts: in a request; more are answered with 413 or 400.
        most_characters: of a text; more are answered with 413 or 400.
        in_flight: requests that may be under way at once; more are answered with 429.
        most_body_mb: of a request's body, in 10^6 bytes; more is answered with 413.
        most_memory_mb: that all requests together may take; more are answered with 429.
        keys_file, keys_text: the hashed keys of those who may ask; see `keys`.
        tokens: which JWTs are let in.
        rate: requests of each caller, such as "100/second"; more are answered with 429.
        rate_store: where several gateways count together: redis://host:port; None: here.
        cors_origins: whose pages may ask.
    """

    url: str
    model: str
    entries: int = ENTRIES
    timeout_s: float = 30.0
    most_texts: int = MOST_TEXTS
    most_characters: int = MOST_CHARACTERS
    in_flight: int = IN_FLIGHT
    most_body_mb: float = MOST_BODY_MB
    most_memory_mb: float = MOST_MEMORY_MB
    keys_file: Path | None = None
    keys_text: str | None = None
    tokens: TokenSettings | None = None
    rate: str | None = None
    rate_store: str | None = None
    cors_origins: tuple[str, ...] = ()
