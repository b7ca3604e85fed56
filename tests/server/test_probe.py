# SPDX-License-Identifier: Apache-2.0
"""The judge alone, against a fake Triton: busy is not dead, and neither is one bad answer."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from arrowhead_server.address import Address
from arrowhead_server.probe import FAILURES_IN_A_ROW, Pulse
from arrowhead_server.repository import EmbeddingModel

OUTPUTS = {
    "toy_tokenizer": [
        {"name": "input_ids", "shape": [1, 2], "datatype": "INT32", "data": [1, 2]},
        {"name": "length", "shape": [1, 1], "datatype": "INT32", "data": [2]},
    ],
    "toy_encoder": [
        {"name": "embeddings", "shape": [1, 1], "datatype": "FP32", "data": [0.5]},
    ],
}


class FakeTriton:
    """Answers like Triton, except where it is told to fail."""

    def __init__(self) -> None:
        self.failing: dict[str, tuple[int, str]] = {}
        self.successes = {("toy_tokenizer", 1): 0, ("toy_encoder", 1): 0}
        self.inputs: dict[str, Any] = {}

    def answer(self, path: str, body: bytes) -> tuple[int, str]:
        if path == "/v2/models/stats":
            stats = [
                {
                    "name": name,
                    "version": str(version),
                    "inference_stats": {"success": {"count": count}},
                }
                for (name, version), count in self.successes.items()
            ]
            return 200, json.dumps({"model_stats": stats})
        if path == "/v2/health/live":
            return 200, ""
        _, _, _, model, _, version, _ = path.split("/")
        if f"{model}/{version}" in self.failing:
            return self.failing[f"{model}/{version}"]
        if model in self.failing:
            return self.failing[model]
        self.inputs[model] = json.loads(body)["inputs"]
        key = model, int(version)
        self.successes[key] = self.successes.get(key, 0) + 1
        return 200, json.dumps({"outputs": OUTPUTS[model]})


@contextmanager
def listening(fake: FakeTriton) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, text = fake.answer(self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def fake() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def pulse(fake: FakeTriton) -> Iterator[Pulse]:
    with listening(fake) as port:
        yield Pulse(Address(http_port=port), (EmbeddingModel("toy", 1, 1, "toy"),), timeout_s=5.0)


def test_the_encoder_gets_what_the_tokenizer_said(pulse: Pulse, fake: FakeTriton) -> None:
    assert pulse.failures() == {}
    assert fake.inputs["toy_encoder"] == OUTPUTS["toy_tokenizer"]


def test_no_text_is_asked_twice(pulse: Pulse, fake: FakeTriton) -> None:
    """An encoder that remembers it would answer without computing anything."""
    asked = []
    for _ in range(3):
        pulse.beat()
        asked += fake.inputs["toy_tokenizer"][0]["data"]
    assert len(set(asked)) == 3


def test_a_model_that_answers_nobody_is_hung(pulse: Pulse, fake: FakeTriton) -> None:
    fake.failing["toy_encoder"] = (500, '{"error": "Stub process is not healthy."}')
    verdicts = [pulse.beat() for _ in range(FAILURES_IN_A_ROW)]
    assert verdicts[:-1] == [None] * (FAILURES_IN_A_ROW - 1)
    assert verdicts[-1] is not None
    assert "'toy_encoder' failed 3 probes in a row: status 500, Stub" in verdicts[-1]


def test_a_model_that_answers_others_is_busy(pulse: Pulse, fake: FakeTriton) -> None:
    fake.failing["toy_encoder"] = (503, '{"error": "queue full"}')
    for _ in range(3 * FAILURES_IN_A_ROW):
        assert pulse.beat() is None
        fake.successes["toy_encoder", 1] += 1


def test_the_tokenizer_moving_does_not_excuse_the_encoder(pulse: Pulse, fake: FakeTriton) -> None:
    fake.failing["toy_encoder"] = (500, "{}")
    for _ in range(FAILURES_IN_A_ROW - 1):
        assert pulse.beat() is None  # each of them moves the tokenizer's count
    assert fake.successes["toy_tokenizer", 1] == FAILURES_IN_A_ROW - 1
    assert pulse.beat() is not None


def test_one_good_answer_clears_the_record(pulse: Pulse, fake: FakeTriton) -> None:
    for _ in range(3):
        fake.failing["toy_tokenizer"] = (500, "{}")
        for _ in range(FAILURES_IN_A_ROW - 1):
            assert pulse.beat() is None
        fake.failing.clear()
        assert pulse.beat() is None


@pytest.mark.parametrize("answer", ["not JSON", "{}"])
def test_an_answer_that_makes_no_sense_is_a_failure(
    pulse: Pulse, fake: FakeTriton, answer: str
) -> None:
    fake.failing["toy_tokenizer"] = (200, answer)
    assert list(pulse.failures()) == [("toy_tokenizer", 1)]


def test_nobody_listening_is_a_failure_and_not_ready() -> None:
    address = Address(http_port=1)
    pulse = Pulse(address, (EmbeddingModel("toy", 1, 1, "toy"),), timeout_s=1.0)
    assert not pulse.is_ready()
    assert "connection failed" in pulse.failures()["toy_tokenizer", 1]
    assert [pulse.beat() for _ in range(FAILURES_IN_A_ROW)][-1] is not None


def test_another_version_that_answers_does_not_excuse_one_that_hangs(
    pulse: Pulse, fake: FakeTriton
) -> None:
    pulse.models = [
        EmbeddingModel("toy", 1, 1, "toy"),
        EmbeddingModel("toy_candidate", 1, 2, "toy"),
    ]
    fake.failing["toy_encoder/1"] = (500, json.dumps({"error": "hangs"}))
    verdicts = [pulse.beat() for _ in range(FAILURES_IN_A_ROW)]
    assert verdicts[:-1] == [None] * (FAILURES_IN_A_ROW - 1)
    assert "'toy_encoder' failed 3 probes in a row" in (verdicts[-1] or "")
