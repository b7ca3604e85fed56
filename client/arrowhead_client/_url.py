# SPDX-License-Identifier: Apache-2.0
"""`grpc://host:port` or `http://host:port`: the scheme decides protocol and default port."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from arrowhead_client._errors import InvalidUrl

DEFAULT_URL = "grpc://127.0.0.1:8001"
_PORTS: dict[Literal["grpc", "http"], int] = {"grpc": 8001, "http": 8000}


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens and what it speaks there."""

    protocol: Literal["grpc", "http"]
    host: str
    port: int

    @property
    def address(self) -> str:
        """`host:port`, an IPv6 host in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.protocol}://{self.address}"


def parse_url(url: str) -> Endpoint:
    """The endpoint a url names; the port defaults to Triton's: 8001 for grpc, 8000 for http.

    Raises:
        InvalidUrl: anything but `grpc://host[:port]` or `http://host[:port]`.
    """
    wanted = f"wanted grpc://host[:port] or http://host[:port], such as {DEFAULT_URL}"
    if not isinstance(url, str):
        raise InvalidUrl(f"invalid url {url!r}: {wanted}")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidUrl(f"invalid url {url!r}: {error}; {wanted}") from error
    if parts.scheme in ("https", "grpcs"):
        raise InvalidUrl(
            f"invalid url {url!r}: TLS is not supported; reach a TLS server through a local proxy; "
            + wanted
        )
    if parts.scheme not in ("grpc", "http"):
        raise InvalidUrl(f"invalid url {url!r}: unknown scheme {parts.scheme!r}; {wanted}")
    protocol: Literal["grpc", "http"] = "grpc" if parts.scheme == "grpc" else "http"
    if not host or port == 0 or any(character.isspace() for character in url):
        raise InvalidUrl(f"invalid url {url!r}: no host, a port of 0 or a space; {wanted}")
    if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise InvalidUrl(f"invalid url {url!r}: more than a host and a port; {wanted}")
    return Endpoint(protocol, host, _PORTS[protocol] if port is None else port)
