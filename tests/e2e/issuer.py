# SPDX-License-Identifier: Apache-2.0
"""An issuer of tokens: key pairs, a real HTTP server that tells the public ones, and signatures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

ISSUER, AUDIENCE = "https://issuer.example.org", "https://embeddings.example.org"
_MADE = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


class Issuer:
    """Signs, and keeps what it publishes."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, Any]] = {}
        self.fetched = 0
        self.answers = True
        self.url = ""

    def add(self, kid: str, algorithm: str = "RS256") -> None:
        self.keys[kid] = algorithm, _MADE[algorithm]()

    def jwks(self) -> dict[str, Any]:
        return {"keys": [self._public(kid) for kid in self.keys]}

    def sign(self, kid: str, headers: dict[str, Any] | None = None, **claims: Any) -> str:
        algorithm, private = self.keys[kid]
        named = {"kid": kid} if headers is None else headers
        return jwt.encode(self.claims(**claims), private, algorithm, headers=named)

    @staticmethod
    def claims(**claims: Any) -> dict[str, Any]:
        """Right ones, but for those given; None takes one out."""
        now = int(time.time())
        right = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "carol",
            "iat": now,
            "exp": now + 300,
            "scope": "embed read",
        }
        return {name: told for name, told in {**right, **claims}.items() if told is not None}

    def _public(self, kid: str) -> dict[str, Any]:
        algorithm, private = self.keys[kid]
        made = jwt.get_algorithm_by_name(algorithm).to_jwk(private.public_key(), as_dict=True)
        return {**made, "kid": kid, "alg": algorithm, "use": "sig"}


@contextmanager
def running_issuer() -> Iterator[Issuer]:
    issuer = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.fetched += 1
            self.send_response(200 if issuer.answers else 500)
            self.end_headers()
            if issuer.answers:
                self.wfile.write(json.dumps(issuer.jwks()).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    issuer.url = f"http://127.0.0.1:{server.server_port}/jwks.json"
    try:
        yield issuer
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
