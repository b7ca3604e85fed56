# SPDX-License-Identifier: Apache-2.0
"""Who asks, and whether they may: API keys, JSON Web Tokens, or anybody.

One place for a secret, as RFC 6750 has it: `Authorization: Bearer ...`, which clients of both
dialects send. Not `x-api-key` too: a second place is one more that proxies log.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

from arrowhead_server.gateway import keys, page
from arrowhead_server.gateway.failures import Forbidden, Unauthorized
from arrowhead_server.gateway.keys import Keys
from arrowhead_server.gateway.reread import Reread
from arrowhead_server.gateway.settings import BadSetting, Settings
from arrowhead_server.gateway.tokens import Tokens

KEYS_VARIABLE = "ARROWHEAD_GATEWAY_KEYS"
METADATA = "/.well-known/oauth-protected-resource"
# What tells nothing of texts or models: probes, metrics, the page, and those that describe routes.
# Of these GET and HEAD only: a POST to "/" embeds.
OPEN = frozenset(
    {
        "/health",
        "/ready",
        "/metrics",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
        METADATA,
        *page.PATHS,
    }
)


class Access:
    """Knows callers by what they bring.

    Raises:
        BadSetting: keys, or what tokens are checked by, cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self._keys: list[Callable[[], Keys]] = []
        if settings.keys_file is not None:
            self._keys.append(Reread(settings.keys_file, keys.read))
        if settings.keys_text is not None:
            given = Keys(settings.keys_text, KEYS_VARIABLE)
            self._keys.append(lambda: given)
        if self._keys and not any(map(len, (some() for some in self._keys))):
            raise BadSetting("no key to let anybody in by: `arrowhead gateway-key NAME` makes one")
        self._settings = settings.tokens
        self._tokens = None if settings.tokens is None else Tokens(settings.tokens)

    @property
    def wanted(self) -> bool:
        """Whether callers must bring something."""
        return bool(self._keys) or self._tokens is not None

    async def caller(self, scope: Scope) -> str:
        """A name of the one who asks: a key's, a token's subject, or an address.

        Raises:
            Unauthorized: what was brought lets nobody in, or nothing was.
            Forbidden: a token lacks a scope.
        """
        if not self.wanted:
            return address(scope)
        met = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, secret = (met[0] if len(met) == 1 else b"").decode("latin-1").partition(" ")
        try:
            if scheme.lower() != "bearer" or not secret.strip():
                raise Unauthorized("no key: wanted the header 'Authorization: Bearer KEY'", "")
            return await self._owner(secret.strip())
        except (Unauthorized, Forbidden) as error:
            error.headers["WWW-Authenticate"] = self._challenge(error, scope)
            raise

    def resource(self, scope: Scope) -> dict[str, Any]:
        """What clients of OAuth may know of this resource (RFC 9728)."""
        assert self._settings is not None  # noqa: S101 (the route is there if tokens are)
        audience = self._settings.audience
        return {
            "resource": audience if audience.startswith("https://") else _base(scope),
            "authorization_servers": [self._settings.issuer],
            "scopes_supported": list(self._settings.scopes),
            "bearer_methods_supported": ["header"],
        }

    async def _owner(self, secret: str) -> str:
        for some in self._keys:
            if (name := some().owner(secret)) is not None:
                return f"key:{name}"
        if self._tokens is None or secret.startswith(keys.PREFIX):
            raise Unauthorized("this key is none that is known here")
        return f"token:{await self._tokens.subject(secret)}"

    def _challenge(self, error: Unauthorized | Forbidden, scope: Scope) -> str:
        told = ['realm="arrowhead"']
        if error.code:
            told.append(f'error="{error.code}"')
        if isinstance(error, Forbidden):
            told.append(f'scope="{" ".join(error.scopes)}"')
        if self._tokens is not None:
            told.append(f'resource_metadata="{_base(scope)}{METADATA}"')
        return f"Bearer {', '.join(told)}"


def address(scope: Scope) -> str:
    """Of the one who asks; of IPv6 the network, of which a caller has all addresses."""
    host = (scope.get("client") or ("unknown", 0))[0]
    if ":" in host:
        with suppress(ValueError):  # a proxy's word for it, which may be any
            met = ipaddress.IPv6Address(host.partition("%")[0])
            host = str(met.ipv4_mapped or ipaddress.ip_network((met, 64), strict=False))
    return f"address:{host}"


def _base(scope: Scope) -> str:
    return str(Request(scope).base_url).rstrip("/")
