# SPDX-License-Identifier: Apache-2.0
"""The gateway as it is started, in front of a real Triton, asked by the clients people use."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest

from arrowhead_client import Client, Unavailable, cosine_similarity, truncate_dimensions
from arrowhead_server import probe
from arrowhead_server.address import free_address
from arrowhead_server.supervisor import Server, running_server

from .gateways import started, stopped

Vectors = npt.NDArray[np.float32]
LONG = "a text whose end is cut off " * 100


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    process, url = started(f"--url={server.grpc_url}")
    yield url
    stopped(process)


@pytest.fixture(scope="module")
def ask(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as ask:
        yield ask


@pytest.fixture(scope="module")
def official(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as official:
        yield official


def close(met: Any, wanted: Vectors) -> None:
    np.testing.assert_allclose(np.asarray(met, np.float32), wanted, atol=1e-6)


def test_embed_as_tei_does(ask: httpx.Client, texts: list[str], wanted: Vectors) -> None:
    one = ask.post("/embed", json={"inputs": texts[0]})
    assert one.status_code == 200
    close(one.json(), wanted[:1])
    every = ask.post("/embed", json={"inputs": texts, "truncate": True})
    assert every.status_code == 200
    close(every.json(), wanted)
    short = ask.post("/embed", json={"inputs": texts[:2], "dimensions": 64}).json()
    close(short, truncate_dimensions(wanted[:2], 64))


def test_similarity_as_tei_does(ask: httpx.Client, texts: list[str], wanted: Vectors) -> None:
    inputs = {"source_sentence": texts[0], "sentences": texts[1:4]}
    met = ask.post("/similarity", json={"inputs": inputs}).json()
    close(met, cosine_similarity(wanted[:1], wanted[1:4])[0])


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_openais_own_client(
    official: openai.OpenAI, texts: list[str], wanted: Vectors, encoding: Any
) -> None:
    chosen = {} if encoding is None else {"encoding_format": encoding}
    made = official.embeddings.create(model="minilm", input=texts[:8], **chosen)
    met = [
        np.frombuffer(base64.b64decode(one.embedding), "<f4")  # type: ignore[arg-type]
        if encoding == "base64"
        else one.embedding
        for one in made.data
    ]
    close(met, wanted[:8])
    assert [one.index for one in made.data] == list(range(8))
    assert made.model == "minilm"


def test_openai_usage_is_what_the_tokenizer_counts(
    official: openai.OpenAI, client: Client, texts: list[str]
) -> None:
    made = official.embeddings.create(model="minilm", input=texts[:8])
    assert made.usage.prompt_tokens == client.count_tokens(texts[:8]).length.sum()
    assert [model.id for model in official.models.list()] == ["minilm"]


def test_openai_dimensions_and_the_end_cut_when_asked(
    official: openai.OpenAI, wanted: Vectors, texts: list[str]
) -> None:
    made = official.embeddings.create(
        model="minilm", input=[texts[0], LONG], dimensions=96, extra_body={"truncate": "end"}
    )
    close(made.data[0].embedding, truncate_dimensions(wanted[:1], 96)[0])
    extra = [one.model_extra for one in made.data]
    assert [one["truncated"] for one in extra] == [False, True]
    assert [one["tokens"] for one in extra] == [9, 256]
    assert made.usage.total_tokens > 256


def test_more_texts_than_triton_takes_at_once(official: openai.OpenAI, client: Client) -> None:
    texts = [f"text {number}" for number in range(250)]
    made = official.embeddings.create(model="minilm", input=texts)
    close([one.embedding for one in made.data], client.embed(texts))


@pytest.mark.parametrize(
    ("wish", "error", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "no model 'gpt' here; wanted 'minilm'"),
        ({"input": LONG}, openai.BadRequestError, "text 0 has more than the 256 tokens"),
        ({"input": []}, openai.BadRequestError, "no texts"),
        ({"input": ["a"] * 2049}, openai.BadRequestError, "2048 at most"),
        ({"input": [[1, 2], "a"]}, openai.BadRequestError, "valid string"),
        (
            {"input": [[101, 10**6, 102]]},
            openai.BadRequestError,
            r"ids of 101\.\.1000000: wanted .* 0\.\.30521",
        ),
        (
            {"input": [[101, 102], [101, 15339, 1917]]},
            openai.BadRequestError,
            r"input 1 has token ids from 101 to 1917: .* gives \[101\] first and \[102\] last",
        ),
        ({"input": [15339, 102]}, openai.BadRequestError, "has token ids from 15339 to 102"),
        ({"input": [[]]}, openai.BadRequestError, "input 0 is empty"),
        (
            {"input": [[1]], "extra_body": {"input_type": "query"}},
            openai.BadRequestError,
            "token ids have no prompt",
        ),
        ({"dimensions": 385}, openai.BadRequestError, r"wanted 1\.\.384"),
        ({"dimensions": 0}, openai.BadRequestError, r"dimensions=0: wanted 1\.\."),
        (
            {"extra_body": {"prompt_name": "q"}},
            openai.BadRequestError,
            "prompt_name='q': model 'minilm' knows none",
        ),
        ({"extra_body": {"truncate": "x"}}, openai.BadRequestError, "truncate: Input should be"),
    ],
)
def test_openai_errors(
    official: openai.OpenAI, wish: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        official.embeddings.create(**{"model": "minilm", "input": "a", **wish})
    body = caught.value.body  # type: ignore[attr-defined]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/embed", {"inputs": LONG}, 413, "text 0 has more than the 256 tokens"),
        ("/embed", {"inputs": ["a"] * 2049}, 413, "2048 at most"),
        ("/embed", {"inputs": []}, 422, "no texts"),
        ("/embed", {}, 422, "inputs: Field required"),
        ("/embed", {"inputs": "a", "truncation_direction": "Up"}, 422, "truncation_direction"),
        ("/embed", {"inputs": "a", "output_dtype": "int4"}, 422, "output_dtype: Input should be"),
        ("/tokenize", {"inputs": LONG}, 413, "text 0 has more than the 256 tokens"),
        ("/tokenize", {"inputs": ["a"] * 2049}, 413, "2048 at most"),
        ("/similarity", {"inputs": "a"}, 422, "inputs"),
        ("/embed", {"inputs": "\ud800"}, 422, ""),
    ],
)
def test_tei_errors(
    ask: httpx.Client, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    # By hand: httpx refuses to send what has no UTF-8.
    content, headers = json.dumps(body), {"Content-Type": "application/json"}
    met = ask.post(path, content=content, headers=headers)
    assert met.status_code == status, met.text
    assert set(met.json()) == {"error", "error_type"}
    assert message in met.json()["error"]
    assert ask.post("/embed", json={"inputs": "a"}).status_code == 200


def test_a_body_that_is_too_large_is_not_read(ask: httpx.Client) -> None:
    for path, field in (("/embed", "inputs"), ("/v1/embeddings", "input")):
        met = ask.post(path, json={field: "x" * 17_000_000, "model": "minilm"})
        assert met.status_code == 413
        assert "a body of more than 16 MB" in met.text
    chunks = (b'{"inputs": "' + b"x" * 10**6 for _ in range(20))  # of a length that is not told
    assert ask.post("/embed", content=chunks).status_code == 413


def test_json_that_is_nested_too_deep_or_is_none(ask: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b"[" * 200_000 + b"]" * 200_000, b"{", b"\xff"):
        met = ask.post("/embed", content=content, headers=headers)
        assert (met.status_code, met.json()["error_type"]) == (422, "Validation")
        met = ask.post("/v1/embeddings", content=content, headers=headers)
        assert met.status_code == 400
        assert met.json()["error"]["type"] == "invalid_request_error"


def test_paths_and_methods_that_there_are_not(ask: httpx.Client) -> None:
    assert ask.get("/no/such").json() == {
        "error": "/no/such: Not Found",
        "error_type": "Validation",
    }
    met = ask.get("/v1/embeddings")
    assert met.status_code == 405
    assert met.json()["error"]["message"] == "/v1/embeddings: Method Not Allowed"


def test_health_readiness_info_and_pages(ask: httpx.Client) -> None:
    assert ask.get("/health").status_code == 200
    assert ask.get("/ready").status_code == 200
    facts = ask.get("/info").json()
    assert (facts["model_id"], facts["dimension"], facts["prompts"]) == ("minilm", 384, {})
    assert (facts["max_input_length"], facts["max_client_batch_size"]) == (256, 2048)
    assert facts["certificate"]["worst_cosine"] > 0.99999
    assert facts["output_dtypes"] == ["float", "int8", "uint8", "binary", "ubinary"]
    assert {"/embed", "/similarity", "/tokenize", "/v1/embeddings"} <= set(
        ask.get("/openapi.json").json()["paths"]
    )
    assert "swagger" in ask.get("/docs").text.lower()


def metric(ask: httpx.Client, name: str) -> float:
    (line,) = [one for one in ask.get("/metrics").text.splitlines() if one.startswith(name + " ")]
    return float(line.split()[-1])


def test_metrics_tell_what_the_cache_did(ask: httpx.Client) -> None:
    hit, miss = (f'arrowhead_gateway_texts_total{{how="{how}"}}' for how in ("hit", "miss"))
    before = metric(ask, hit), metric(ask, miss)
    ask.post("/embed", json={"inputs": ["a text for the metrics", "another one"]})
    ask.post("/embed", json={"inputs": ["a text for the metrics", "a third"]})
    assert (metric(ask, hit), metric(ask, miss)) == (before[0] + 1, before[1] + 3)
    ask.get("/no/such/path")
    assert 'path="other",status="404"' in ask.get("/metrics").text


def test_too_many_at_once_are_told_to_come_again(server: Server) -> None:
    process, url = started(f"--url={server.grpc_url}", "--in-flight=2")

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as ask:
            calls = [
                ask.post(path, json={field: f"flood {number} " * 40, "model": "minilm"})
                for number in range(20)
                for path, field in (("/embed", "inputs"), ("/v1/embeddings", "input"))
            ]
            # Full is not unready: another gateway would be as full, or gets its share anyway.
            *answers, ready = await asyncio.gather(*calls, ask.get("/ready"))
            assert ready.status_code == 200
            return answers

    try:
        answers = asyncio.run(flood())
    finally:
        stopped(process)
    turned_away = [answer for answer in answers if answer.status_code == 429]
    assert 0 < len(turned_away) < len(answers)
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in turned_away:
        assert answer.headers["Retry-After"] == "1"
        told = answer.json()["error"]
        wanted = told["type"] if isinstance(told, dict) else answer.json()["error_type"]
        assert wanted in ("rate_limit_error", "Overloaded")


def test_without_triton_it_says_so_in_each_dialect() -> None:
    process, url = started(f"--url=grpc://127.0.0.1:{free_address().grpc_port}")
    try:
        with httpx.Client(base_url=url, timeout=30) as ask:
            assert ask.get("/ready").status_code == 503
            assert ask.get("/health").status_code == 503
            tei = ask.post("/embed", json={"inputs": "a"})
            assert (tei.status_code, tei.json()["error_type"]) == (503, "Unhealthy")
            other = ask.post("/v1/embeddings", json={"input": "a", "model": "minilm"})
            assert (other.status_code, other.json()["error"]["type"]) == (503, "server_error")
            assert other.headers["Retry-After"] == "1"
    finally:
        stopped(process)


def test_a_model_whose_process_does_not_answer_is_asked_again(
    minilm_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's word for it is INTERNAL and 500, as for faults that stay."""

    def embed(url: str, retries: int) -> str:
        with Client(url, retries=retries) as client:
            try:
                client.embed(f"over {url} {retries}")
            except Unavailable as error:
                return str(error)
        return "a vector"

    def ask(path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{url}{path}", json=body, timeout=30)

    monkeypatch.setattr(probe, "FAILURES_IN_A_ROW", 10_000)  # whoever asks has time to see it
    with running_server(minilm_repository) as server, ThreadPoolExecutor() as beside:
        process, url = started(f"--url={server.grpc_url}", stderr=subprocess.DEVNULL)
        try:
            assert ask("/embed", {"inputs": "before"}).status_code == 200
            (pid,) = server.stub_pids()["minilm_encoder"]
            os.kill(pid, signal.SIGSTOP)  # until the supervisor has seen enough, and kills it
            tei = beside.submit(ask, "/embed", {"inputs": "now"})
            other = beside.submit(ask, "/v1/embeddings", {"input": "and", "model": "minilm"})
            urls = server.grpc_url, server.http_url
            once = [beside.submit(embed, road, 0) for road in urls]
            for failed in once:
                assert "a model's process died or hangs" in failed.result()
            assert tei.result().status_code == other.result().status_code == 503
            assert tei.result().headers["Retry-After"] == other.result().headers["Retry-After"]
            assert tei.result().json()["error_type"] == "Unhealthy"
            assert "a model's process died or hangs" in tei.result().json()["error"]
            assert "Tried 3 times" in tei.result().json()["error"]
            assert server.restarts == []
            again = [beside.submit(embed, road, 12) for road in urls]
            monkeypatch.setattr(probe, "FAILURES_IN_A_ROW", 3)
            for answered in again:
                assert answered.result() == "a vector"
            assert len(server.restarts) == 1
            assert ask("/embed", {"inputs": "after"}).status_code == 200
        finally:
            stopped(process)


def test_a_model_of_an_older_arrowhead_is_said_to_be_one(
    minilm_repository: Path, tmp_path: Path
) -> None:
    repository = shutil.copytree(minilm_repository, tmp_path / "models")
    config = repository / "minilm_tokenizer" / "config.pbtxt"
    lines = config.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not re.search(r'"(info|tokenizer|metadata)"', line)]
    assert len(lines) - len(kept) == 3
    config.write_text(re.sub(r"\},(?=[^{]*\n\])", "}", "".join(kept)))
    with running_server(repository) as server:
        process, url = started(f"--url={server.grpc_url}")
        try:
            answer = httpx.post(f"{url}/embed", json={"inputs": "a"})
            assert answer.status_code == 424
            assert "convert it again" in answer.json()["error"]
        finally:
            stopped(process)
