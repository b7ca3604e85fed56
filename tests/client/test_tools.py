# SPDX-License-Identifier: Apache-2.0
"""The tools as a model's API is told them, and as a model calls them."""

from __future__ import annotations

import base64
import copy
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from litellm.types.llms.anthropic import AnthropicMessagesTool
from openai import OpenAI
from openai.lib._pydantic import _ensure_strict_json_schema
from openai.types.chat import ChatCompletionFunctionToolParam
from openai.types.responses import FunctionToolParam
from pydantic import TypeAdapter

from arrowhead_client import Client, FakeTransport, InvalidInput, Request, Unavailable, normalize
from arrowhead_client._tool_forms import FORMS, tool
from arrowhead_client.cli import main
from arrowhead_client.documents import Document, Hit, Index
from arrowhead_client.tools import Tools, definitions

LONG = "word " * 300
NAMES = ["embed", "similarity", "search"]
TYPES: dict[str, Any] = {
    "openai": ChatCompletionFunctionToolParam,
    "openai-responses": FunctionToolParam,
    "anthropic": AnthropicMessagesTool,
}
# https://developers.openai.com/api/docs/guides/structured-outputs, "Supported schemas".
STRICT_WORDS = {
    *("type", "enum", "anyOf", "description", "properties", "required", "additionalProperties"),
    *("items", "minItems", "maxItems", "minimum", "maximum"),
}


class Documents:
    """An index of given hits."""

    def __init__(self, *hits: Hit) -> None:
        self.hits = hits
        self.asked: list[Any] = []

    def search(self, query: str, *, limit: int = 10, where: str | None = None) -> list[Hit]:
        self.asked.append((query, limit, where))
        return list(self.hits[:limit])

    def __len__(self) -> int:
        return len(self.hits)


def tools(*hits: Hit, fake: FakeTransport | None = None, **options: Any) -> Tools:
    return Tools(Client(transport=fake or FakeTransport()), Documents(*hits), **options)


def words(schema: Any) -> set[str]:
    """The keywords that a schema uses."""
    if isinstance(schema, list):
        return set().union(*map(words, schema))
    if not isinstance(schema, dict):
        return set()
    below = [value for key, value in schema.items() if key not in ("properties", "enum")]
    return set(schema) | words(below) | words(list(schema.get("properties", {}).values()))


@pytest.mark.filterwarnings("ignore:Items .* using the `ReadOnly` qualifier")
@pytest.mark.parametrize("form", TYPES)
def test_definitions_are_of_the_apis_types(form: Any) -> None:
    """A TypedDict drops what it does not know, so nothing may be lost either."""
    for definition in definitions(form):
        assert TypeAdapter(TYPES[form]).validate_python(definition) == definition


def test_openai_is_told_what_its_strict_mode_takes() -> None:
    chat, responses = definitions("openai"), definitions("openai-responses")
    assert [one["function"] for one in chat] == [
        {key: value for key, value in one.items() if key != "type"} for one in responses
    ]
    for one in responses:
        schema = one["parameters"]
        assert words(schema) <= STRICT_WORDS
        kept = copy.deepcopy(schema)
        assert _ensure_strict_json_schema(schema, path=(), root=schema) == kept


def test_a_tool_is_its_signature_and_its_docstring() -> None:
    schemas = {one["title"]: one for one in definitions("json-schema")}
    assert list(schemas) == NAMES
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    search = schemas["search"]
    assert search["description"] == (
        "Find the documents of the index that are closest in meaning to a query, the best first."
    )
    assert search["required"] == ["query"]
    assert search["properties"] == {
        "query": {
            "type": "string",
            "description": "what is looked for, in words or as a question.",
        },
        "limit": {
            "type": "integer",
            "default": 5,
            "minimum": 1,
            "maximum": 50,
            "description": "how many documents to give.",
        },
        "where": {
            "anyOf": [{"type": "string"}, {"type": "null"}],
            "default": None,
            "description": "only documents that meet this condition over `id` and their fields, in "
            "SQL: \"year >= 2020 AND source = 'notes'\". A wrong one is answered with the fields.",
        },
    }


def test_a_tool_without_types_or_words_is_refused() -> None:
    class Bad:
        def silent(self, a: int) -> int:
            """Of what?"""
            return a

        def untyped(self, a) -> int:  # type: ignore[no-untyped-def]
            """Of what?

            Args:
                a: something.
            """
            return int(a)

    for method in (Bad.silent, Bad.untyped):
        with pytest.raises(TypeError, match="no type or no description: \\['a'\\]"):
            tool(method)
    assert list(FORMS) == NAMES


def test_a_call_is_a_tool_call_of_openais_client() -> None:
    """The loop of the README, with a scripted model at the other end."""
    asked: list[dict[str, Any]] = []

    def model(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        arguments = {"text": "a", "others": ["b", "a"], "limit": 1, "question": None}
        call = {"name": "similarity", "arguments": json.dumps(arguments)}
        message: dict[str, Any] = {"role": "assistant", "content": "It is the second."}
        if len(asked) == 1:
            calls = [{"id": "1", "type": "function", "function": call}]
            message = {"role": "assistant", "content": None, "tool_calls": calls}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        return httpx.Response(200, json={**answer, "choices": [choice]})

    transport = httpx.MockTransport(model)
    with httpx.Client(transport=transport) as http, Client(transport=FakeTransport()) as client:
        assert _agent(OpenAI(api_key="none", http_client=http), Tools(client)) == (
            "It is the second."
        )
    assert [one["function"]["name"] for one in asked[0]["tools"]] == ["embed", "similarity"]
    answer = json.loads(asked[1]["messages"][-1]["content"])
    assert answer["matches"] == [{"index": 1, "score": 1.0, "text": "a"}]


def _agent(openai: OpenAI, tools: Tools) -> str | None:
    messages: list[Any] = [{"role": "user", "content": "Which is like a: b or a?"}]
    while True:
        answer = openai.chat.completions.create(
            model="m", messages=messages, tools=tools.definitions("openai")
        )
        message = answer.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            content = tools.call(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


def test_embed_tells_tokens_and_encodes_vectors() -> None:
    fake = FakeTransport(20, prompts={"query": "q: "})
    texts = ["a b", LONG]
    vectors = Client(transport=FakeTransport(20)).embed(texts)
    answers = {
        encoding: tools(fake=fake).run("embed", {"texts": texts, "encoding": encoding})
        for encoding in ("preview", "binary", "float32")
    }
    for answer in answers.values():
        assert (answer["model"], answer["dimension"]) == ("minilm", 20)
        assert [(one["tokens"], one["truncated"]) for one in answer["texts"]] == [
            (2, False),
            (256, True),
        ]
    for index, vector in enumerate(vectors):
        shown = answers["preview"]["texts"][index]["vector"]
        np.testing.assert_allclose(shown, vector[:8], atol=5e-5)
        whole = base64.b64decode(answers["float32"]["texts"][index]["vector"])
        np.testing.assert_array_equal(np.frombuffer(whole, "<f4"), vector)
        bits = base64.b64decode(answers["binary"]["texts"][index]["vector"])
        np.testing.assert_array_equal(np.unpackbits(np.frombuffer(bits, "u1"))[:20], vector > 0)
    assert "'float32' gives all" in answers["preview"]["note"]
    assert "note" not in answers["float32"]
    query = tools(fake=fake).embed(["a b"], "float32", "query").texts[0]
    assert query.tokens == 3
    wanted = Client(transport=FakeTransport(20)).embed("q: a b")
    assert query.vector == base64.b64encode(wanted.tobytes()).decode()


def test_similarity_ranks_and_tells_what_it_left_out() -> None:
    others = ["b", "a", LONG, "c"]
    answer = tools().similarity("a", others, limit=2)
    vectors = normalize(Client(transport=FakeTransport()).embed(["a", *others]))
    scores = vectors[1:] @ vectors[0]
    order = np.argsort(-scores)[:2].tolist()
    assert [match.index for match in answer.matches] == order
    assert [match.score for match in answer.matches] == [round(float(scores[i]), 4) for i in order]
    assert answer.compared == 4
    assert answer.note == (
        "Only the first 256 tokens were read of others[2]. The 2 lowest are not listed."
    )
    assert tools().similarity("a", ["b"]).note is None
    many = tools().similarity(LONG, [LONG] * 7, limit=7)
    assert many.note is not None
    assert "read of text. " in many.note
    assert "others[4] and 2 more." in many.note
    assert max(len(match.text) for match in many.matches) == 240


def test_a_question_gets_the_models_prompts() -> None:
    fake = FakeTransport(prompts={"query": "q: ", "passage": "p: "})
    tools(fake=fake).similarity("a", ["b"], question=True)
    assert {text for request in fake.requests for text in request.texts} == {b"q: a", b"p: b"}
    fake = FakeTransport(prompts={"query": "q: ", "passage": "p: "})
    tools(fake=fake).similarity("a", ["b"])
    assert {text for request in fake.requests for text in request.texts} == {b"a", b"b"}


def test_search_asks_the_index_and_shortens_fields() -> None:
    fields = {"year": 2020, "open": True, "by": "x" * 500, "none": None, "tags": ["a", "b"]}
    index = Documents(Hit("1", 0.87654321, "s" * 500, fields), Hit("2", 0.5, "t", {}))
    found = Tools(Client(transport=FakeTransport()), index).search("q", where="year > 2000")
    assert index.asked == [("q", 5, "year > 2000")]
    for where in ("", " "):  # as models fill in what they do not need
        Tools(Client(transport=FakeTransport()), index).search("q", where=where)
        assert index.asked.pop() == ("q", 5, None)
    assert found.documents == 2
    shown = {"year": 2020, "open": True, "by": "x" * 79 + "…", "tags": "['a', 'b']"}
    assert found.hits[0].fields == shown
    assert found.hits[0].snippet == "s" * 239 + "…"
    assert (found.hits[0].score, found.hits[1].fields) == (0.8765, None)


def test_search_of_an_index(tmp_path: Path) -> None:
    """A real one: its hits, its answer to a wrong condition, and its refusal of another model."""
    client = Client(transport=FakeTransport())
    index = Index.create(tmp_path, client)
    index.add([Document(f"{one}", f"text {one}", {"year": 2000 + one}) for one in range(20)])
    subject = Tools(client, index)
    found = subject.run("search", {"query": "text 7", "where": "year > 2004"})
    assert found["documents"] == 20
    assert len(found["hits"]) == 5
    best = {"id": "7", "score": 1.0, "snippet": "text 7", "fields": {"year": 2007}}
    assert found["hits"][0] == best
    wrong = subject.call("search", {"query": "text 7", "where": "years > 2004"})
    assert "Fields: id (string), year (int64)" in json.loads(wrong)["error"]
    long = subject.call("search", {"query": "text 7", "where": "x" * 9999})
    assert len(json.loads(long)["error"]) == 1000


def test_without_an_index_there_is_no_search() -> None:
    client = Client(transport=FakeTransport())
    assert Tools(client).names == ("embed", "similarity")
    assert len(Tools(client).definitions("anthropic")) == 2
    with pytest.raises(InvalidInput, match=r"there are embed, similarity$"):
        Tools(client).run("search", {"query": "a"})
    with pytest.raises(InvalidInput, match="no index"):
        Tools(client).search("a")


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("embed_all", "{}", "no tool 'embed_all': there are embed, similarity, search"),
        ("embed", "{", "its arguments are no JSON (EOF while parsing an object at line 1 column"),
        ("embed", "", "its arguments are no JSON"),
        ("embed", "[" * 100_000, "its arguments are no JSON (recursion limit"),
        ("embed", b"\xff", "its arguments are no JSON"),
        ("embed", '["a"]', "no JSON object but ['a']"),
        ("embed", "{}", "texts is missing. It takes texts, encoding (optional), input_type"),
        ("embed", '{"texts": "a"}', "texts='a': Input should be a valid list"),
        ("embed", '{"texts": ["a", 1]}', "texts[1]=1: Input should be a valid string"),
        ("embed", '{"texts": []}', "at least 1 item"),
        ("embed", {"texts": ["a"] * 101}, "at most 100 items"),
        ("embed", {"texts": ["\ud800"]}, "texts[0] (prompt in front) has a lone"),
        ("embed", {"texts": ["a"], "text": 1}, "'text' is none of its arguments"),
        ("embed", {"texts": ["a"], "encoding": "hex"}, "'preview', 'binary' or 'float32'"),
        ("embed", {"texts": ["a"], "encoding": "x" * 999}, f"encoding='{'x' * 59}…: "),
        ("embed", {"texts": [0] * 50}, "and 45 more"),
        ("similarity", {"text": None, "others": ["a"]}, "text=None: Input should be a valid str"),
        ("search", '{"query": "a", "limit": 51}', "limit=51: Input should be less than or equal"),
    ],
)
def test_a_bad_call_is_told_so_that_a_model_can_call_again(
    name: str, arguments: Any, wanted: str
) -> None:
    fake = FakeTransport()
    error = json.loads(tools(fake=fake).call(name, arguments))["error"]
    assert wanted in error
    assert len(error) < 700
    assert not fake.requests


def test_pythons_own_callers_are_checked_too() -> None:
    with pytest.raises(InvalidInput, match="limit=0: Input should be greater"):
        tools().similarity("a", ["b"], limit=0)
    with pytest.raises(InvalidInput, match="most_chars"):
        tools(most_chars=100)
    with pytest.raises(InvalidInput, match="form='gemini'"):
        definitions("gemini")  # type: ignore[arg-type]


def test_null_is_the_default_and_a_list_may_come_as_a_string() -> None:
    run = tools().run
    wanted = run("similarity", {"text": "a", "others": ["b", "a"]})
    sent = {"text": "a", "others": '["b", "a"]', "limit": None, "question": None}
    assert run("similarity", sent) == run("similarity", json.dumps(sent)) == wanted
    # Elsewhere such a string is a text.
    assert run("similarity", {"text": '["b"]', "others": ["a"]})["compared"] == 1
    assert "valid list" in tools().call("similarity", {"text": "a", "others": "[b"})


def test_what_goes_wrong_elsewhere_is_told_too() -> None:
    def away(request: Request) -> Any:
        raise Unavailable("no server answers")

    client = Client(transport=FakeTransport(answer=away), retries=0)
    answer = json.loads(Tools(client).call("embed", {"texts": ["a"]}))
    assert answer["error"].startswith("no server answers")


texts = st.text(max_size=300)
whole = st.integers(-1, 60)
scalar = st.one_of(st.none(), st.booleans(), whole, st.floats(), texts)
hits = st.lists(
    st.builds(
        Hit,
        id=st.text(max_size=2000),
        score=st.floats(-1, 1),
        snippet=st.text(max_size=1000),
        fields=st.dictionaries(st.text(max_size=99), scalar, max_size=9),
    ),
    max_size=50,
)
calls = st.one_of(
    st.tuples(
        st.just("embed"),
        st.fixed_dictionaries(
            {"texts": st.lists(texts, max_size=20) | scalar},
            optional={
                "encoding": st.sampled_from(["preview", "binary", "float32", "x", None]),
                "input_type": st.sampled_from(["query", "document", None, 1]),
            },
        ),
    ),
    st.tuples(
        st.just("similarity"),
        st.fixed_dictionaries(
            {"text": texts, "others": st.lists(texts | st.just(1), max_size=60)},
            optional={"limit": whole | scalar, "question": st.booleans() | scalar, "x": scalar},
        ),
    ),
    st.tuples(
        st.just("search"),
        st.fixed_dictionaries({"query": texts}, optional={"limit": whole, "where": scalar}),
    ),
)


@settings(max_examples=300, deadline=None)
@given(call=calls, found=hits, most=st.integers(1500, 6000), width=st.sampled_from([8, 384, 4096]))
def test_what_the_schema_allows_runs_and_is_short(
    call: tuple[str, dict[str, Any]], found: list[Hit], most: int, width: int
) -> None:
    name, arguments = call
    subject = tools(*found, fake=FakeTransport(width), most_chars=most)
    strict = {one["name"]: one["parameters"] for one in definitions("openai-responses")}[name]
    told = all(key in arguments for key in strict["required"])
    allowed = any(
        jsonschema.Draft202012Validator(schema).is_valid(arguments)
        for schema in (FORMS[name].schema(), *([strict] if told else []))
    )
    answer = subject.call(name, arguments)
    assert len(answer) <= most
    result = json.loads(answer)
    if "error" in result:
        assert not allowed
        return
    jsonschema.validate(result, FORMS[name].result_schema())
    assert subject.run(name, json.dumps(arguments)) == result
    sent, rows = {
        "embed": (len(arguments.get("texts") or ""), result.get("texts", [])),
        "similarity": (len(arguments.get("others", "")), result.get("matches", [])),
        "search": (len(found), result.get("hits", [])),
    }[name]
    limit = arguments.get("limit")
    default = {"embed": 100, "similarity": 10, "search": 5}[name]
    left = min(sent, default if limit is None else int(limit)) - len(rows)
    assert (f" {left} left out" in result.get("note", "")) if left else True


def test_an_answer_is_cut_honestly() -> None:
    """Ten vectors of 384 do not fit; what does is whole, the rest is counted."""
    answer = tools(fake=FakeTransport(384)).embed(["a"] * 10, "float32")
    assert [one.vector is not None for one in answer.texts] == [True] + [False] * 9
    assert answer.note is not None
    assert answer.note.startswith("9 shortened and 0 left out, to answer in 4000 characters: ask")
    answer = tools(fake=FakeTransport(128), most_chars=1500).embed(["a"] * 100, "float32")
    told = re.search(r"(\d+) shortened and (\d+) left out", answer.note or "")
    assert told is not None
    assert int(told[1]) == sum(one.vector is None for one in answer.texts) > 0
    assert int(told[2]) == 100 - len(answer.texts) > 0
    heavy = [Hit(str(one), 0.5, "s" * 240, {"by": "x" * 80}) for one in range(50)]
    found = tools(*heavy).search("q", limit=50)
    assert found.note is not None
    assert f" {50 - len(found.hits)} left out" in found.note
    assert 5 < len(found.hits) < 50
    wide = Hit("wide", 0.5, "s", {f"field {one}": "x" * 80 for one in range(60)})
    found = tools(wide, heavy[0]).search("q")
    assert [(one.id, one.fields is None) for one in found.hits] == [("wide", True), ("0", False)]
    assert found.note is not None
    assert found.note.startswith("1 shortened and 0 left out")
    # One without room costs those behind it nothing.
    found = tools(heavy[0], Hit("x" * 5000, 0.5, "s", {}), heavy[1]).search("q")
    assert [one.id for one in found.hits] == ["0", "1"]
    assert found.note is not None
    assert " 1 left out" in found.note
    small = tools(*heavy, most_chars=20_000).search("q", limit=50)
    assert (len(small.hits), small.note) == (50, None)
    assert asdict(small.hits[0])["fields"] == {"by": "x" * 80}


def test_the_command_prints_the_definitions() -> None:
    for form in (*TYPES, "json-schema"):
        result = CliRunner().invoke(main, ["tools", "--format", form])
        assert json.loads(result.stdout) == definitions(form)
    result = CliRunner().invoke(main, ["tools", "search", "--format", "anthropic"])
    assert [one["name"] for one in json.loads(result.stdout)] == ["search"]
    assert CliRunner().invoke(main, ["tools", "fly"]).exit_code == 2
