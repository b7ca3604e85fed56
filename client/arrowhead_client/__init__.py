# SPDX-License-Identifier: Apache-2.0
"""Calls an Arrowhead server: `Client`, `AsyncClient`, the algebra of vectors, and `arrowhead`.

May import none of our other packages, and never torch or a tokenizer. Start reading at
`_client.py`: `Client.embed` -> `_plan.py` (texts to requests) -> `_transports.py` (one request to
the network, `_grpc.py` or `_http.py`) -> `_plan.py` (answers to rows) -> `_algebra.py`.

Everything is imported when it is asked for: a grpc:// client never pays for the HTTP stack, nor the
other way round, and `arrowhead serve`, which calls nothing, not even for numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arrowhead_client._algebra import (
        cosine_similarity,
        dequantize,
        in_candidate,
        normalize,
        quantize,
        truncate_dimensions,
    )
    from arrowhead_client._async_client import AsyncClient
    from arrowhead_client._client import Client
    from arrowhead_client._errors import (
        ArrowheadError,
        ClientClosed,
        IndexBusy,
        IndexDamaged,
        IndexExists,
        IndexFailed,
        IndexNotFound,
        InvalidInput,
        InvalidRequest,
        InvalidUrl,
        ModelNotFound,
        ModelNotReady,
        NotInstalled,
        OtherModel,
        ServerError,
        TextTooLong,
        TimedOut,
        Unavailable,
        UnexpectedResponse,
    )
    from arrowhead_client._grpc import AsyncGrpcTransport, GrpcTransport
    from arrowhead_client._http import AsyncHttpTransport, HttpTransport
    from arrowhead_client._info import Config, ModelFiles, ModelInfo
    from arrowhead_client._options import Options
    from arrowhead_client._plan import Experiment, Request, Token, TokenCounts, Tokenized
    from arrowhead_client._transports import (
        AsyncFakeTransport,
        AsyncTransport,
        FakeTransport,
        Transport,
    )
    from arrowhead_client.documents import Document, Hit, Index

__all__ = [
    "ArrowheadError",
    "AsyncClient",
    "AsyncFakeTransport",
    "AsyncGrpcTransport",
    "AsyncHttpTransport",
    "AsyncTransport",
    "Client",
    "ClientClosed",
    "Config",
    "Document",
    "Experiment",
    "FakeTransport",
    "GrpcTransport",
    "Hit",
    "HttpTransport",
    "Index",
    "IndexBusy",
    "IndexDamaged",
    "IndexExists",
    "IndexFailed",
    "IndexNotFound",
    "InvalidInput",
    "InvalidRequest",
    "InvalidUrl",
    "ModelFiles",
    "ModelInfo",
    "ModelNotFound",
    "ModelNotReady",
    "NotInstalled",
    "Options",
    "OtherModel",
    "Request",
    "ServerError",
    "TextTooLong",
    "TimedOut",
    "Token",
    "TokenCounts",
    "Tokenized",
    "Transport",
    "Unavailable",
    "UnexpectedResponse",
    "cosine_similarity",
    "dequantize",
    "in_candidate",
    "normalize",
    "quantize",
    "truncate_dimensions",
]

_PLACES = {
    "arrowhead_client._algebra": (
        "cosine_similarity",
        "dequantize",
        "in_candidate",
        "normalize",
        "quantize",
        "truncate_dimensions",
    ),
    "arrowhead_client._async_client": ("AsyncClient",),
    "arrowhead_client._client": ("Client",),
    "arrowhead_client._errors": (
        "ArrowheadError",
        "ClientClosed",
        "IndexBusy",
        "IndexDamaged",
        "IndexExists",
        "IndexFailed",
        "IndexNotFound",
        "InvalidInput",
        "InvalidRequest",
        "InvalidUrl",
        "ModelNotFound",
        "ModelNotReady",
        "NotInstalled",
        "OtherModel",
        "ServerError",
        "TextTooLong",
        "TimedOut",
        "Unavailable",
        "UnexpectedResponse",
    ),
    "arrowhead_client._grpc": (
        "AsyncGrpcTransport",
        "GrpcTransport",
    ),
    "arrowhead_client._http": (
        "AsyncHttpTransport",
        "HttpTransport",
    ),
    "arrowhead_client._info": (
        "Config",
        "ModelFiles",
        "ModelInfo",
    ),
    "arrowhead_client._options": ("Options",),
    "arrowhead_client._plan": (
        "Experiment",
        "Request",
        "Token",
        "TokenCounts",
        "Tokenized",
    ),
    "arrowhead_client._transports": (
        "AsyncFakeTransport",
        "AsyncTransport",
        "FakeTransport",
        "Transport",
    ),
    "arrowhead_client.documents": ("Document", "Hit", "Index"),
}
_LAZY = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
