# SPDX-License-Identifier: Apache-2.0
"""One request is followed from its caller through the gateway to the encoder: in logs and traces.

All parts run as an operator starts them, as processes of their own that log JSON and send spans.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from arrowhead_client import Client, HttpTransport, InvalidInput, InvalidRequest
from arrowhead_client._tracing import Tracing
from arrowhead_server.address import Address, free_address

from .conftest import wait_until
from .gateways import started, stopped
from .otlp import Receiver, Span, receiver

SENTINEL = "xylophone-quagmire"  # in every text here
ARROWHEAD = str(Path(sys.executable).with_name("arrowhead"))


@dataclass
class Stack:
    """Running parts: Triton under `arrowhead serve`, a gateway with keys, one without."""

    address: Address
    serve: subprocess.Popen[bytes]
    keyed: str
    bare: str
    key: str
    otlp: Receiver
    folder: Path

    def lines(self, part: str | None = None) -> list[dict[str, Any]]:
        """What was logged so far, every line of it."""
        files = self.folder.glob("*.stderr")
        found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [line for line in found if part is None or line["part"] == part]

    def of(self, request_id: str) -> list[dict[str, Any]]:
        return [
            line for line in self.lines() if request_id in line.get("request_id", "").split(",")
        ]

    def ask(self, text: str, **how: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}", **how.pop("headers", {})}
        json_ = {"inputs": f"{SENTINEL} {text}"}
        return httpx.post(f"{self.keyed}/embed", json=json_, headers=headers, **how)


@pytest.fixture(scope="module")
def stack(minilm_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder, address = tmp_path_factory.mktemp("stack"), free_address()
    with receiver() as otlp, ExitStack() as ending:
        environment = {
            **os.environ,
            "ARROWHEAD_LOG_FORMAT": "json",
            "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        ports = [
            f"--{name}-port={getattr(address, f'{name}_port')}"
            for name in ("http", "grpc", "metrics", "health")
        ]
        command = [ARROWHEAD, "serve", f"--repository={minilm_repository}", "--verbose", *ports]
        with (folder / "serve.stderr").open("wb") as log, (folder / "stdout").open("wb") as out:
            serve = subprocess.Popen(command, stdout=out, stderr=log, env=environment)
        ending.callback(stopped, serve)  # whatever fails from here on
        key = subprocess.check_output(
            [ARROWHEAD, "gateway-key", "alice", f"--keys={folder / 'keys'}"], text=True
        ).strip()
        ready = f"http://127.0.0.1:{address.health_port}/ready"
        wait_until(lambda: _status(ready) == 200, "the server")
        urls = []
        for name, options in (("keyed", [f"--keys={folder / 'keys'}"]), ("bare", [])):
            with (folder / f"{name}.stderr").open("wb") as log:
                process, url = started(
                    f"--url=grpc://127.0.0.1:{address.grpc_port}",
                    *options,
                    env=environment,
                    stderr=log,
                )
            ending.callback(stopped, process)
            urls.append(url)
        yield Stack(address, serve, *urls, key, otlp, folder)
    assert serve.wait(20) == 0
    assert (folder / "stdout").read_bytes() == b""  # what it has to say is in the log
    lines = [json.loads(line) for line in (folder / "serve.stderr").read_text().splitlines()]
    assert [line["message"] for line in lines if line["part"] == "server"][-1] == "stopped"


def _status(url: str) -> int:
    try:
        return httpx.get(url).status_code
    except httpx.TransportError:
        return 0


def test_one_id_from_the_client_through_the_gateway_to_the_encoder(stack: Stack) -> None:
    with Client(transport=HttpTransport(stack.bare, binary=False)) as client:
        client.embed([f"{SENTINEL} one", f"{SENTINEL} two words"], request_id="trip.1:a_b-c")
    wait_until(
        lambda: (
            {line["part"] for line in stack.of("trip.1:a_b-c")} == {"gateway", "minilm_encoder"}
        ),
        "both lines",
    )
    by_part = {line["part"]: line for line in stack.of("trip.1:a_b-c")}
    gateway, encoder = by_part["gateway"], by_part["minilm_encoder"]
    assert (gateway["method"], gateway["path"]) == ("POST", "/v2/models/{name}/infer")
    assert (gateway["status"], gateway["texts"]) == (200, 2)
    assert gateway["tokens"] == encoder["tokens"] == encoder["tokens_computed"]
    assert (encoder["message"], encoder["texts"]) == ("batch", 2)
    assert 0 < encoder["ms"] < gateway["ms"]
    for line in by_part.values():
        assert line["level"] == "INFO"
        assert line["time"].endswith("+00:00")


def test_triton_hands_the_id_of_an_ensemble_to_its_steps(stack: Stack) -> None:
    for scheme, port in (("grpc", stack.address.grpc_port), ("http", stack.address.http_port)):
        with Client(f"{scheme}://127.0.0.1:{port}") as client:
            client.embed(f"{SENTINEL} over {scheme}", request_id=f"ensemble-{scheme}")
            client.count_tokens(f"{SENTINEL} over {scheme}", request_id=f"counted-{scheme}")
            with pytest.raises(InvalidInput, match=r"request_id='no id': wanted 1 to 128"):
                client.embed("a", request_id="no id")
    for scheme in ("grpc", "http"):
        wait_until(lambda name=scheme: len(stack.of(f"ensemble-{name}")) == 2, "both steps")
        parts = {line["part"] for line in stack.of(f"ensemble-{scheme}")}
        assert parts == {"minilm_tokenizer", "minilm_encoder"}
        assert [one["part"] for one in stack.of(f"counted-{scheme}")] == ["minilm_tokenizer"]


@pytest.mark.parametrize("sent", [None, "", "a b", "x" * 129, "naïve", "a,b", 'a"b', SENTINEL * 9])
def test_an_id_that_is_none_is_made_anew(stack: Stack, sent: str | None) -> None:
    headers = {} if sent is None else {"X-Request-Id": sent.encode()}
    answer = stack.ask("made anew", headers=headers)
    made = answer.headers["X-Request-Id"]
    assert answer.status_code == 200
    assert len(made) == 32
    assert set(made) <= set("0123456789abcdef")


def test_an_id_comes_back_in_every_answer(stack: Stack) -> None:
    headers = {"X-Request-Id": "back:1", "Authorization": "Bearer ah_no-key-of-ours"}
    refused = stack.ask("refused", headers=headers)
    assert (refused.status_code, refused.headers["X-Request-Id"]) == (401, "back:1")
    missing = httpx.get(f"{stack.bare}/{SENTINEL}", headers={"X-Request-Id": "back:2"})
    assert (missing.status_code, missing.headers["X-Request-Id"]) == (404, "back:2")
    wait_until(lambda: stack.of("back:1") and stack.of("back:2"), "both lines")
    (line,) = stack.of("back:1")
    assert (line["status"], line["reason"], line["texts"]) == (401, "key", 0)
    assert "caller" not in line
    (line,) = stack.of("back:2")
    assert (line["status"], line["path"]) == (404, "other")  # a path is the caller's own words
    known = stack.ask("known", headers={"X-Request-Id": "back:3"})
    assert known.headers["X-Request-Id"] == "back:3"
    wait_until(lambda: [one for one in stack.of("back:3") if one["part"] == "gateway"], "the line")
    (line,) = [one for one in stack.of("back:3") if one["part"] == "gateway"]
    assert line["caller"] == "key:alice"


def ask_at_once(stack: Stack, what: str, headers: list[dict[str, str]]) -> None:
    """A request of one new text with each of these headers, all at the same moment."""

    async def asked() -> None:
        async with httpx.AsyncClient(base_url=stack.bare) as http:
            await asyncio.gather(
                *(
                    http.post("/embed", json={"inputs": f"{SENTINEL} {what} {n}"}, headers=some)
                    for n, some in enumerate(headers)
                )
            )

    asyncio.run(asked())


def test_what_is_asked_as_one_has_the_ids_of_all(stack: Stack) -> None:
    ask_at_once(stack, "together", [{"X-Request-Id": f"together-{n}"} for n in range(24)])
    wanted = {f"together-{number}" for number in range(24)}

    def told() -> set[str]:
        lines = stack.lines("minilm_encoder")
        return {one for line in lines for one in line.get("request_id", "").split(",")} & wanted

    wait_until(lambda: told() == wanted, "all ids at the encoder")
    asked = [line["request_id"] for line in stack.lines("minilm_encoder") if "request_id" in line]
    assert any(ids.count("together-") > 1 for ids in asked)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_ids_of_many_are_all_told(stack: Stack, scheme: str) -> None:
    """As long as ids may be, of as many as there may be: more than one line holds."""
    ids = [f"{scheme}-{number}".ljust(128, "x") for number in range(200)]
    port = getattr(stack.address, f"{scheme}_port")
    with Client(f"{scheme}://127.0.0.1:{port}") as client:
        client.embed_ids([[101, 2003, 102]], request_id=",".join(ids))

    def told() -> list[str]:
        lines = stack.lines("minilm_encoder")
        found = [one for line in lines for one in line.get("request_id", "").split(",")]
        return [one for one in found if one in set(ids)]

    wait_until(lambda: len(told()) == len(ids), "all ids")
    assert told() == ids


def test_a_refused_request_is_told_by_the_model(stack: Stack) -> None:
    with (
        Client(f"grpc://127.0.0.1:{stack.address.grpc_port}") as client,
        pytest.raises(InvalidRequest),
    ):
        client.embed_ids([[101, 999_999, 102]], request_id="refused-1")
    wait_until(lambda: len(stack.of("refused-1")) == 2, "the refusal, and the batch")
    (line,) = [one for one in stack.of("refused-1") if one["level"] == "WARNING"]
    assert line["part"] == "minilm_encoder"
    assert "refused 1 of a batch's requests; the first: row 0" in line["message"]


def test_what_triton_and_the_supervisor_say(stack: Stack) -> None:
    messages = {line["message"]: line for line in stack.lines("server")}
    assert messages["ready"]["models"] == {"minilm": 1}
    assert messages["starting"]["level"] == "INFO"
    (line,) = [
        line for line in stack.lines("triton") if line["message"].startswith('"Started HTTPService')
    ]
    assert line["level"] == "INFO"
    assert line["file"].startswith("http_server.cc:")
    gateway = [line for line in stack.lines("gateway") if line["message"] == "starting"]
    assert {line["model"] for line in gateway} == {"minilm"}


PARENT = "cd" * 8  # the span of a caller


def by_name(spans: list[Span]) -> dict[str, Span]:
    return {span.name: span for span in spans}


def test_one_trace_from_the_client_through_the_gateway_to_triton(stack: Stack) -> None:
    """The client is a program of its own, as any that has set up OpenTelemetry."""
    script = (
        "from arrowhead_client import Client, HttpTransport, _tracing\n"
        "_tracing.start('a-program')\n"
        f"with Client(transport=HttpTransport({stack.bare!r}, binary=False)) as client:\n"
        f"    client.embed({SENTINEL + ' traced'!r}, request_id='traced-1')\n"
    )
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": stack.otlp.endpoint}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)

    def roots() -> list[Span]:
        return [span for span in stack.otlp.spans if span.service == "a-program"]

    wait_until(roots, "the client's span")
    (client,) = roots()
    names = {
        "embeddings minilm",
        "POST /v2/models/{name}/infer",
        "tokenize",
        "wait",
        "ask",
        "InferRequest",
        "minilm_encoder",
        "compute",
    }
    wait_until(lambda: {span.name for span in stack.otlp.of(client.trace)} == names, "all spans")
    spans = stack.otlp.of(client.trace)
    assert len(spans) == 9
    own = {span.name: span for span in spans if span.id != client.id}
    served = own["POST /v2/models/{name}/infer"]
    assert client.parent == ""
    assert client.attributes["gen_ai.request.model"] == "minilm"
    assert served.parent == client.id
    assert own["tokenize"].parent == own["wait"].parent == own["ask"].parent == served.id
    assert own["wait"].links == (own["ask"].id,)
    assert own["embeddings minilm"].parent == own["ask"].id
    assert own["InferRequest"].parent == own["embeddings minilm"].id
    assert own["minilm_encoder"].parent == own["InferRequest"].id
    assert own["compute"].parent == own["minilm_encoder"].id
    services = {span.service for span in spans}
    assert services == {"a-program", "arrowhead-gateway", "arrowhead-triton"}
    assert served.attributes["http.response.status_code"] == 200
    assert served.attributes["arrowhead.texts"] == 1
    assert own["minilm_encoder"].attributes["triton.request_id"] == "traced-1"


def test_a_program_says_in_code_where_its_spans_go(stack: Stack) -> None:
    """By a provider of its own, and after it has made its client."""
    script = (
        "from opentelemetry import trace\n"
        "from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter\n"
        "from opentelemetry.sdk.resources import Resource\n"
        "from opentelemetry.sdk.trace import TracerProvider\n"
        "from opentelemetry.sdk.trace.export import SimpleSpanProcessor\n"
        "from arrowhead_client import Client, HttpTransport\n"
        f"with Client(transport=HttpTransport({stack.bare!r}, binary=False)) as client:\n"
        f"    client.embed({SENTINEL + ' before'!r}, request_id='before-1')\n"
        "    provider = TracerProvider(resource=Resource.create({'service.name': 'by-code'}))\n"
        f"    exporter = OTLPSpanExporter({stack.otlp.endpoint + '/v1/traces'!r})\n"
        "    provider.add_span_processor(SimpleSpanProcessor(exporter))\n"
        "    trace.set_tracer_provider(provider)\n"
        f"    client.embed({SENTINEL + ' by code'!r}, request_id='by-code-1')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    (client,) = [span for span in stack.otlp.spans if span.service == "by-code"]
    assert client.attributes["arrowhead.request_id"] == "by-code-1"
    served = "POST /v2/models/{name}/infer"
    wait_until(lambda: served in by_name(stack.otlp.of(client.trace)), "the gateway's span")
    assert by_name(stack.otlp.of(client.trace))[served].parent == client.id


def test_a_client_imports_nothing_of_opentelemetry() -> None:
    script = (
        "import sys\n"
        "from arrowhead_client import Client, FakeTransport\n"
        "Client(transport=FakeTransport()).embed('a')\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_callers_own_trace_goes_on_if_it_is_sampled(stack: Stack) -> None:
    for number, flags in enumerate(("00", "01")):
        answer = stack.ask(
            f"sampled {flags}",
            headers={"traceparent": f"00-{number + 10:032x}-{PARENT}-{flags}"},
        )
        assert answer.status_code == 200
    sampled = f"{11:032x}"
    wait_until(lambda: "compute" in by_name(stack.otlp.of(sampled)), "Triton's spans")
    wait_until(lambda: "POST /embed" in by_name(stack.otlp.of(sampled)), "the gateway's span")
    assert by_name(stack.otlp.of(sampled))["POST /embed"].parent == PARENT
    assert stack.otlp.of(f"{10:032x}") == []
    # What nobody traces, Triton does not either: not the probes of each second.
    roots = [span.name for span in stack.otlp.spans if not span.parent]
    assert "InferRequest" not in roots


def test_requests_that_are_asked_as_one_are_linked(stack: Stack) -> None:
    traces = [f"{number + 100:032x}" for number in range(24)]
    ask_at_once(stack, "linked", [{"traceparent": f"00-{one}-{PARENT}-01"} for one in traces])

    def asked() -> list[Span]:
        return [span for span in stack.otlp.spans if span.name == "ask" and span.trace in traces]

    def waits() -> list[Span]:
        return [span for span in stack.otlp.spans if span.name == "wait" and span.trace in traces]

    wait_until(lambda: len(waits()) == 24 and len(asked()) < 24, "all to have waited")
    wait_until(lambda: sum(len(span.links) + 1 for span in asked()) == 24, "the links")

    def served() -> dict[str, Span]:
        spans = [span for span in stack.otlp.spans if span.name == "POST /embed"]
        return {span.trace: span for span in spans if span.trace in traces}

    wait_until(lambda: len(served()) == 24, "the requests' own spans")
    requests = served()
    for span in asked():
        assert span.parent == requests[span.trace].id
    linked = [one for span in asked() for one in span.links]
    assert set(linked) <= {requests[name].id for name in traces}
    assert any(linked)
    assert {one for span in waits() for one in span.links} == {span.id for span in asked()}


def test_what_is_not_sampled_is_told_to_nobody() -> None:
    provider = TracerProvider()
    made = Tracing()
    assert made.headers() == ()
    with trace.use_span(provider.get_tracer("a").start_span("b")):
        ((name, value),) = made.headers()
        assert name == "traceparent"
        assert int(value[-2:], 16) & trace.TraceFlags.SAMPLED
    unsampled = trace.SpanContext(1, 2, is_remote=True, trace_flags=trace.TraceFlags(0))
    with trace.use_span(trace.NonRecordingSpan(unsampled)):
        assert made.headers() == ()


def test_no_text_and_no_key_is_in_any_log_or_span(stack: Stack) -> None:
    """The last of this module: after all that was sent before, good, bad and broken."""
    before = len(stack.lines("gateway"))
    texts = [f"{SENTINEL} {'long ' * 400}", f"{SENTINEL} \ud800".encode("utf-8", "surrogatepass")]
    for body in (
        json.dumps({"inputs": texts[0]}),
        json.dumps({"inputs": {SENTINEL: 1}}),
        f'{{"inputs": "{SENTINEL}',
        texts[1],
    ):
        headers = {
            "Authorization": f"Bearer {stack.key}",
            "Content-Type": "application/json",
            "X-Other": SENTINEL,
        }
        httpx.post(f"{stack.keyed}/embed?q={SENTINEL}", content=body, headers=headers)
        httpx.post(f"{stack.keyed}/v1/embeddings", content=body, headers=headers)
    url = f"http://127.0.0.1:{stack.address.http_port}/v2/models/minilm/infer"
    raw = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [SENTINEL * 3]}
    httpx.post(url, json={"inputs": [{**raw, "shape": [7, 1]}]})
    httpx.post(url, json={"inputs": [{**raw, "name": "other"}]})
    httpx.post(url, json={"inputs": [raw], "id": f"not an id but {SENTINEL}"})
    httpx.post(url, content=f'{{"inputs": "{SENTINEL}')
    wait_until(lambda: len(stack.lines("gateway")) >= before + 8, "a line for each")
    logged = b"".join(file.read_bytes() for file in stack.folder.glob("*.stderr"))
    assert len(stack.lines()) > 50
    assert SENTINEL.encode() not in logged
    assert b"xylophone" not in logged  # nor a part of it
    assert stack.key.encode() not in logged
    assert b"no-key-of-ours" not in logged
    told = "".join(span.raw for span in stack.otlp.spans)
    assert "xylophone" not in told
    assert stack.key not in told


def test_probes_are_no_traces(stack: Stack) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{stack.bare}{path}", timeout=10).status_code == 200
    trace_id = f"{999:032x}"
    httpx.post(
        f"{stack.bare}/embed",
        json={"inputs": f"{SENTINEL} after the probes"},
        headers={"traceparent": f"00-{trace_id}-{PARENT}-01"},
    )
    wait_until(lambda: "embeddings minilm" in by_name(stack.otlp.of(trace_id)), "later spans")
    spans = [span for span in stack.otlp.spans if span.service == "arrowhead-gateway"]
    assert "embeddings minilm" not in {span.name for span in spans if not span.parent}
    probed = ("GET /health", "GET /ready", "GET /metrics")
    assert not {span.name for span in spans} & {*probed}
