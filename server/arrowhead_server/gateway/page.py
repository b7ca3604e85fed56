# SPDX-License-Identifier: Apache-2.0
"""The page at `/`: texts, how similar they are, their tokens, and what the model is.

It is static (folder `page/`): plain HTML, CSS and JavaScript modules, no build step, nothing from
another origin. All that it shows it asks the gateway's own routes for, as any other caller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, Request, Response

_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_SOURCES = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir())}
_VERSION = hashlib.sha256(b"".join(_SOURCES.values())).hexdigest()[:16]
_HEADERS = {
    # No script but the page's own, and no markup out of strings: a text stays a text.
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


def _versioned(content: bytes) -> bytes:
    """The content, what it names of the page's other files with the version behind it."""
    for name in _SOURCES:
        content = content.replace(b'/%s"' % name.encode(), f'/{name}?v={_VERSION}"'.encode())
    return content


def _route(name: str) -> tuple[str, Callable[[Request], Response]]:
    """A file's path, and what answers there."""
    content = _versioned(_SOURCES[name])
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    kind = _TYPES[Path(name).suffix]

    def answer(request: Request) -> Response:
        # Under a name with its version a file is the same for ever; else the browser asks again.
        for_ever = request.query_params.get("v") == _VERSION
        kept = "public, max-age=31536000, immutable" if for_ever else "no-cache"
        headers = {**_HEADERS, "ETag": etag, "Cache-Control": kept}
        if etag in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return "/" if name == "index.html" else f"/page/{name}", answer


_ROUTES = dict(map(_route, _SOURCES))
# GET and HEAD of these tell nothing of texts or models. Only they: a POST of "/" embeds (tei.py).
PATHS = tuple(_ROUTES)
for _path, _answer in _ROUTES.items():
    router.add_api_route(_path, _answer, methods=["GET", "HEAD"])
