# SPDX-License-Identifier: Apache-2.0
"""What the client makes of answers: HTTP's JSON with bytes behind it, and gRPC's messages.

The client is the real one; only the exchange of bytes is cut off, so that coverage is followed
through decoding alone (`lines.py` has the connections).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as messages

from arrowhead_client import ArrowheadError, Client, GrpcTransport, HttpTransport
from arrowhead_client._http import _Reply
from arrowhead_client._texts import packed
from arrowhead_client._transports import FakeTransport
from perf.fuzz.json_edits import DEEP, edited
from perf.fuzz.target import Target, plain

_WIDTH = 8
_TEXTS = ["a", "two words", "é🙂"]
_ROWS = len(_TEXTS)
_CONFIG = {
    "name": "minilm",
    "parameters": {"prompt.query": {"string_value": "query: "}},
    "ensemble_scheduling": {
        "step": [
            {"model_name": "minilm_tokenizer", "model_version": "1"},
            {"model_name": "minilm_encoder", "model_version": "1"},
        ]
    },
}
_METADATA = {"outputs": [{"name": "embeddings", "datatype": "FP32", "shape": [-1, _WIDTH]}]}
_INFO = {
    "dimension": _WIDTH,
    "max_seq_length": 256,
    "pooling": "mean",
    "normalize": True,
    "source": {"name": "somewhere"},
    "fingerprint": "0" * 32,
    "ranges": base64.b64encode(
        np.array([[-1.0], [1.0]], "<f4").repeat(_WIDTH, 1).tobytes()
    ).decode(),
    "certificate": {"worst_cosine": 0.999},
}


class Output(NamedTuple):
    """An output as it is on the wire."""

    name: str
    kind: str
    shape: list[int]
    content: bytes


def _vectors(rows: int) -> Output:
    vectors = np.arange(1, rows * _WIDTH + 1, dtype="<f4")
    return Output("embeddings", "FP32", [rows, _WIDTH], vectors.tobytes())


def _texts(name: str, shape: list[int], texts: list[bytes]) -> Output:
    return Output(name, "BYTES", shape, packed(texts))


def _numbers(name: str, kind: str, shape: list[int], values: list[int]) -> Output:
    array = np.array(values, {"INT32": "<i4", "BOOL": "?"}[kind])
    return Output(name, kind, shape, array.tobytes())


_COUNTS = [
    _numbers("length", "INT32", [_ROWS, 1], [3] * _ROWS),
    _numbers("truncated", "BOOL", [_ROWS, 1], [0] * _ROWS),
]
_TOKENS = [
    *_COUNTS,
    _numbers("input_ids", "INT32", [_ROWS, 3], [101, 7, 102] * _ROWS),
    _texts("tokens", [_ROWS, 3], [b"[CLS]", b"a", b"[SEP]"] * _ROWS),
    _numbers("offsets", "INT32", [_ROWS, 3, 2], [-1, -1, 0, 1, -1, -1] * _ROWS),
]
_SOUND: dict[str, list[Output]] = {
    "embed": [_vectors(_ROWS)],
    "embed one by one": [_vectors(1)],
    "embed none": [],
    "int8": [_vectors(_ROWS)],
    "token ids": [_vectors(_ROWS)],
    "count tokens": _COUNTS,
    "tokenize": _TOKENS,
    "info": [_texts("info", [1, 1], [json.dumps(_INFO).encode()])],
    "files": [_texts(name, [1, 1], [b"{}"]) for name in ("tokenizer", "metadata")],
    "prompts": [],
}
_CALLS: dict[str, Callable[[Client], Any]] = {
    "embed": lambda client: client.embed(_TEXTS),
    "embed one by one": lambda client: client.embed(_TEXTS),
    "embed none": lambda client: client.embed([]),
    "int8": lambda client: client.embed(_TEXTS, precision="int8"),
    "token ids": lambda client: client.embed_ids([[101, 7, 102]] * _ROWS),
    "count tokens": lambda client: client.count_tokens(_TEXTS),
    "tokenize": lambda client: client.tokenize(_TEXTS),
    "info": lambda client: client.info(),
    "files": lambda client: client.files(_served()),
    "prompts": lambda client: client.prompts(),
}

_CONFIGURED = ("prompts", "token ids", "info")


def _served() -> Any:
    with Client(transport=FakeTransport(_WIDTH)) as client:
        return replace(client.info(), parts="minilm")


class Spoilt(NamedTuple):
    """What a hostile server answers with.

    Attributes:
        call: a key of `_CALLS`.
        status: HTTP's.
        config, metadata: bodies, where those are asked for.
        head: the JSON of the answer. tail: the bytes behind it.
        head_size: as the header tells it; None: it is right; "": no header.
    """

    call: str
    status: int
    config: bytes
    metadata: bytes
    head: bytes
    tail: bytes
    head_size: str | None


@st.composite
def _spoilt(draw: st.DrawFn) -> Spoilt:
    call = draw(st.sampled_from(list(_SOUND)))
    outputs, binary = draw(_outputs(call)), draw(st.sampled_from([True, True, True, False]))
    head = draw(edited({"outputs": [_described(output, binary) for output in outputs]}))
    tail = b"".join(output.content for output in outputs) if binary else b""
    return Spoilt(
        call,
        draw(st.sampled_from([200] * 8 + [400, 404, 500, 503, 999])),
        draw(edited(_CONFIG)) if call in _CONFIGURED else _json(_CONFIG),
        draw(edited(_METADATA)) if call == "embed none" else _json(_METADATA),
        head,
        draw(_changed(tail)),
        draw(st.sampled_from([None] * 6 + ["", "-1", "0", "7", "x", "1e3", "9" * 5000, "-99"])),
    )


@st.composite
def _outputs(draw: st.DrawFn, call: str) -> list[Output]:
    if call != "info":
        return _SOUND[call]
    return [_texts("info", [1, 1], [draw(edited(_INFO))])]


def _described(output: Output, binary: bool) -> dict[str, Any]:
    told = {"name": output.name, "datatype": output.kind, "shape": output.shape}
    if binary:
        return {**told, "parameters": {"binary_data_size": len(output.content)}}
    if output.kind == "BYTES":
        return {**told, "data": ["a"] * int(np.prod(output.shape))}
    kind = {"FP32": "<f4", "INT32": "<i4", "BOOL": "?"}[output.kind]
    return {**told, "data": np.frombuffer(output.content, kind).tolist()}


@st.composite
def _changed(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes with some of them changed, cut off, or added."""
    changed = bytearray(raw)
    for place, value in draw(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)))):
        if changed:
            changed[place % len(changed)] = value
    del changed[len(changed) - min(draw(st.sampled_from([0, 0, 0, 1, 4, 32])), len(changed)) :]
    return bytes(changed) + draw(st.sampled_from([b"", b"", b"", b"\0", b"\0\0\0\0", b"\xff" * 64]))


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


class _Canned(HttpTransport):
    """HTTP without a network: every request gets the answer that was spoilt."""

    def __init__(self, spoilt: Spoilt) -> None:
        super().__init__("http://127.0.0.1:9")
        self._spoilt = spoilt

    def _exchange(self, method: str, path: str, timeout_s: float, request: Any = None) -> _Reply:
        one = self._spoilt
        if path.endswith("/config"):
            return _Reply(one.status, "", None, one.config)
        if method == "GET":
            return _Reply(one.status, "", None, one.metadata)
        size = str(len(one.head)) if one.head_size is None else one.head_size or None
        return _Reply(one.status, "as spoilt", size, bytearray(one.head + one.tail))


def _check_http(spoilt: Spoilt) -> None:
    _check(spoilt.call, _Canned(spoilt), spoilt.head, spoilt.tail)


def _check(call: str, transport: Any, head: bytes, tail: bytes) -> None:
    """Calls a client over that transport: an error of its tree, or what the answer says."""
    size = 1 if call == "embed one by one" else 100
    with Client(transport=transport, retries=0, batch_size=size) as client:
        try:
            result = _CALLS[call](client)
        except ArrowheadError as error:
            check_told(error)
            return
    if call in ("embed", "embed one by one", "token ids"):
        _check_vectors(call, result, head, tail)
    elif call == "count tokens":
        assert result.length.shape == result.truncated.shape == (_ROWS,)
        assert result.length.dtype == np.int32
        assert (result.length >= 0).all()
    elif call == "tokenize":
        assert len(result) == _ROWS
        for one, text in zip(result, _TEXTS, strict=True):
            for token in one.tokens:
                assert token.special or 0 <= token.start <= token.stop <= len(text)
    elif call == "info":
        assert type(result.dimension) is int
        assert type(result.max_seq_length) is int
        assert isinstance(result.fingerprint, str)
        assert result.ranges is None or result.ranges.shape == (2, result.dimension)
    elif call == "files":
        assert all(isinstance(file, bytes) for file in result)
    elif call == "prompts":
        assert all(isinstance(part, str) for pair in result.items() for part in pair)


def check_told(error: ArrowheadError) -> None:
    """That a terminal can show an error, whatever the server put into it."""
    told = str(error)
    assert 0 < len(told) <= 4000, f"{len(told)} characters of an error"
    assert told.isprintable(), f"not printable: {told!r:.200}"


def _check_vectors(call: str, vectors: Any, head: bytes, tail: bytes) -> None:
    """A vector that is given out is the one in the answer."""
    assert vectors.dtype == np.float32
    assert vectors.ndim == 2
    assert len(vectors) == _ROWS
    assert np.isfinite(vectors).all()
    rows = 1 if call == "embed one by one" else _ROWS
    wanted = _vectors(rows)
    plain = _json({"outputs": [_described(wanted, True)]})
    if head == plain and tail == wanted.content:
        sound = np.frombuffer(wanted.content, "<f4").reshape(rows, -1)
        assert (vectors == np.broadcast_to(sound, vectors.shape)).all()


class Message(NamedTuple):
    """A message of gRPC, and which call gets it."""

    call: str
    config: bytes
    metadata: bytes
    answer: bytes


_SIZES = st.sampled_from([-1, 0, 1, 2, 3, 8, 24, 2**31, 2**62, -(2**63)])


@st.composite
def _messages(draw: st.DrawFn) -> Message:
    call = draw(st.sampled_from(list(_SOUND)))
    answer = messages.ModelInferResponse()
    for output in draw(_outputs(call)):
        kind = draw(st.sampled_from([output.kind] * 8 + ["BF16", "FP64", "BYTES", "INT8", "", "x"]))
        shape = draw(st.one_of(*[st.just(output.shape)] * 4, st.lists(_SIZES, max_size=4)))
        answer.outputs.add(name=output.name, datatype=kind, shape=shape)
        answer.raw_output_contents.append(draw(_changed(output.content)))
    if answer.outputs and draw(st.integers(0, 7)) == 0:
        answer.outputs.add().CopyFrom(answer.outputs[0])
    raw = [
        answer.SerializeToString(),
        _grpc_config().SerializeToString(),
        _grpc_metadata().SerializeToString(),
    ]
    if draw(st.integers(0, 3)) == 0:
        raw = [draw(_changed(one)) for one in raw]
    return Message(call, raw[1], raw[2], raw[0])


def _grpc_config() -> Any:
    told = messages.ModelConfigResponse()
    told.config.name = "minilm"
    told.config.parameters["prompt.query"].string_value = "query: "
    for name in ("minilm_tokenizer", "minilm_encoder"):
        told.config.ensemble_scheduling.step.add(model_name=name, model_version=1)
    return told


def _grpc_metadata() -> Any:
    told = messages.ModelMetadataResponse(name="minilm")
    told.outputs.add(name="embeddings", datatype="FP32", shape=[-1, _WIDTH])
    return told


class _CannedGrpc(GrpcTransport):
    """gRPC without a network."""

    def __init__(self, config: Any, metadata: Any, answer: Any) -> None:
        super().__init__("grpc://127.0.0.1:9")
        self._stub = SimpleNamespace(
            ModelInfer=lambda request, **how: answer,
            ModelConfig=lambda request, **how: config,
            ModelMetadata=lambda request, **how: metadata,
        )


def _check_grpc(message: Message) -> None:
    try:  # what is no message, gRPC itself refuses
        config = messages.ModelConfigResponse.FromString(message.config)
        metadata = messages.ModelMetadataResponse.FromString(message.metadata)
        answer = messages.ModelInferResponse.FromString(message.answer)
    except DecodeError:
        return
    _check(message.call, _CannedGrpc(config, metadata, answer), b"", b"")


_DEEP = b"[" * DEEP
_NAN = np.full(_ROWS * _WIDTH, np.nan, "<f4").tobytes()


def _over_http(call: str, outputs: list[Output], **changes: Any) -> Spoilt:
    head = _json({"outputs": [_described(output, True) for output in outputs]})
    tail = b"".join(output.content for output in outputs)
    sound = Spoilt(call, 200, _json(_CONFIG), _json(_METADATA), head, tail, None)
    return sound._replace(**changes)


def _over_grpc(call: str, outputs: list[Output]) -> Message:
    answer = messages.ModelInferResponse()
    for output in outputs:
        answer.outputs.add(name=output.name, datatype=output.kind, shape=output.shape)
        answer.raw_output_contents.append(output.content)
    told = _grpc_config().SerializeToString(), _grpc_metadata().SerializeToString()
    return Message(call, *told, answer.SerializeToString())


def _told(**changes: Any) -> list[Output]:
    """The answer to `info` with other values."""
    return [_texts("info", [1, 1], [_json({**_INFO, **changes})])]


def _tokens(**changes: Output) -> list[Output]:
    return [changes.get(output.name, output) for output in _TOKENS]


# Of both protocols: which call, and the outputs that it got.
_FOUND: tuple[tuple[str, list[Output]], ...] = (
    ("info", [_texts("info", [1, 1], [_DEEP])]),
    ("info", _told(dimension="8")),
    ("info", _told(fingerprint=7, max_seq_length=None)),
    ("embed", [_vectors(_ROWS)._replace(content=_NAN)]),
    ("embed", [_texts("embeddings", [_ROWS, 1], [b"1", b"2", b"x"])]),
    ("count tokens", [_numbers("length", "INT32", [_ROWS, 1], [-2] * _ROWS), _COUNTS[1]]),
    ("tokenize", _tokens(length=_numbers("length", "INT32", [_ROWS, 1], [4] * _ROWS))),
    ("tokenize", _tokens(tokens=_texts("tokens", [_ROWS, 3], [b"\xa4"] * 9))),
    ("tokenize", _tokens(offsets=_numbers("offsets", "INT32", [_ROWS, 3, 2], [9, 1] * 9))),
)
_WRAPPED = {"name": "length", "datatype": "INT32", "shape": [_ROWS, 1], "data": [2**32 + 1] * _ROWS}
_FOUND_HTTP = (
    *(_over_http(call, outputs) for call, outputs in _FOUND),
    _over_http("embed", [], head=_DEEP),
    _over_http("embed", [], head=_DEEP, status=503),
    _over_http("prompts", [], config=_DEEP),
    _over_http("embed", [], status=400, head=_json({"error": "\x1b[2J" + "a" * 100_000})),
    _over_http(
        "count tokens", [], head=_json({"outputs": [_WRAPPED, _described(_COUNTS[1], False)]})
    ),
)
_FOUND_GRPC = tuple(_over_grpc(call, outputs) for call, outputs in _FOUND)

_WANTED = "An error of the client's tree that a terminal can show, or what the answer says."
HTTP = Target("client: HTTP answers", _WANTED, _spoilt(), plain(_check_http), _FOUND_HTTP)
GRPC = Target("client: gRPC answers", _WANTED, _messages(), plain(_check_grpc), _FOUND_GRPC)
