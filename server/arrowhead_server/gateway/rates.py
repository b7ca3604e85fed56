# SPDX-License-Identifier: Apache-2.0
"""How many requests each caller may make in a time: windows that begin with their first request.

Several gateways count together in a Redis. While it is away each counts for itself, so a limit is
never off: it is at most as many times as high as there are gateways.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from limits import parse
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import ConfigurationError, StorageError

from arrowhead_server.gateway.failures import TooFast
from arrowhead_server.gateway.settings import BadSetting

AWAY_S = 5.0  # for so long a Redis that did not answer is not asked again
_ANSWER_S = 0.25
_LOG = logging.getLogger(__name__)


class Rates:
    """Counts the requests of each caller.

    Args:
        rate: such as "100/second" or "5000 per hour".
        store: redis://[:password@]host:port[/number], or rediss:// for TLS; None: this process.
        clock: tells seconds.

    Raises:
        BadSetting: one of them cannot be read.
    """

    def __init__(
        self, rate: str, store: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        try:
            self._item = parse(rate)
        except ValueError:
            raise BadSetting(f"rate {rate!r}: wanted such as 100/second or 5000/hour") from None
        self._clock, self._away_until = clock, -math.inf
        self._here = FixedWindowRateLimiter(MemoryStorage())
        self._shared = None if store is None else FixedWindowRateLimiter(_redis(store))
        self._store = "" if store is None else urlsplit(store).netloc.rpartition("@")[2]

    async def count(self, caller: str) -> dict[str, str]:
        """Counts one request, and says in headers what is left: `RateLimit-*`.

        Raises:
            TooFast: there was nothing left.
        """
        if self._shared is not None and self._clock() >= self._away_until:
            try:
                told = await self._counted(self._shared, caller)
            except (StorageError, OSError) as error:
                self._away_until = self._clock() + AWAY_S
                cause = getattr(error, "storage_error", error)
                _LOG.warning(
                    "no answer from Redis at %s (%s): this gateway counts rates for itself",
                    self._store,
                    type(cause).__name__,
                )
            else:
                if self._away_until > -math.inf:
                    self._away_until = -math.inf
                    _LOG.warning("Redis at %s answers again", self._store)
                return told
        return await self._counted(self._here, caller)

    async def _counted(self, limiter: FixedWindowRateLimiter, caller: str) -> dict[str, str]:
        in_time = await limiter.hit(self._item, caller)
        window = await limiter.get_window_stats(self._item, caller)
        left_s = max(0, math.ceil(window.reset_time - time.time()))
        told = {
            "RateLimit-Limit": str(self._item.amount),
            "RateLimit-Remaining": str(window.remaining),
            "RateLimit-Reset": str(left_s),
        }
        if not in_time:
            raise TooFast(
                f"more than {self._item}: wait {max(1, left_s)} s",
                {**told, "Retry-After": str(max(1, left_s))},
            )
        return told


def _redis(store: str) -> RedisStorage:
    try:
        place = urlsplit(store)
        if place.scheme not in ("redis", "rediss") or not place.hostname:
            raise ValueError
        return RedisStorage(
            f"async+{store}",
            implementation="redispy",
            wrap_exceptions=True,
            key_prefix="arrowhead",
            socket_timeout=_ANSWER_S,
            socket_connect_timeout=_ANSWER_S,
        )
    except (ConfigurationError, ValueError):
        # Neither the text nor what is said of it, which may hold a password.
        raise BadSetting(
            "the rates' store: wanted redis://:password@host:port, or rediss:// for TLS; of the "
            "password what is no letter or digit as %XX"
        ) from None
