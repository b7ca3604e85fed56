# SPDX-License-Identifier: Apache-2.0
"""`Tools`: `embed`, `similarity` and `search` for a language model to call.

    tools = Tools(Client())
    answer = openai.chat.completions.create(..., tools=tools.definitions("openai"))
    for call in answer.choices[0].message.tool_calls:
        content = tools.call(call.function.name, call.function.arguments)

Each is a typed method whose signature and docstring are its schema; no other description exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from arrowhead_client._algebra import cosine_similarity
from arrowhead_client._client import Client
from arrowhead_client._errors import ArrowheadError, InvalidInput
from arrowhead_client._options import InputType, Options, check_whole, one_of
from arrowhead_client._tool_forms import FORMATS, FORMS, Schema, tool
from arrowhead_client._tool_results import (
    LEAST_CHARS,
    MOST_CHARS,
    EmbeddedText,
    Embeddings,
    Encoding,
    Hits,
    Match,
    Matches,
    as_json,
    encoded,
    fitted,
    found,
    shortened,
    told,
    without_fields,
    without_vector,
)

if TYPE_CHECKING:
    from arrowhead_client.documents import Hit

Format = Literal["openai", "openai-responses", "anthropic", "json-schema"]
_NAMED = 5  # texts that a note names


class Searchable(Protocol):
    """What `search` needs of an index; `arrowhead_client.documents.Index` is one."""

    def search(self, query: str, *, limit: int = 10, where: str | None = None) -> Sequence[Hit]:
        """The best hits."""

    def __len__(self) -> int:
        """How many documents there are."""


class Tools:
    """The tools of one served model, and of an index.

    Their results are dataclasses whose JSON has at most `most_chars` characters: long texts are
    shortened and rows that have no room left out, and a note says so.

    Args:
        client: asks the model. It stays the caller's to close.
        index: what `search` searches; without one there is no such tool.
        most_chars: characters of a result's JSON, about four to a model's token.

    Raises:
        InvalidInput: `most_chars` is below 1,500.
    """

    def __init__(
        self, client: Client, index: Searchable | None = None, *, most_chars: int = MOST_CHARS
    ) -> None:
        check_whole("most_chars", most_chars, LEAST_CHARS, None)
        self._client = client
        self._index = index
        self._most_chars = most_chars

    @tool
    def embed(
        self,
        texts: Annotated[list[str], Field(min_length=1, max_length=100)],
        encoding: Encoding = "preview",
        input_type: InputType | None = None,
    ) -> Embeddings:
        """Count the tokens of texts and turn each text into an embedding vector.

        To compare texts call `similarity`: it is cheaper to read than vectors.

        Args:
            texts: the texts, each embedded by itself.
            encoding: how a vector is given: "preview" is its first 8 numbers; "binary" one bit a
                number, 1 where it is above 0, in base64; "float32" all of it, little-endian in
                base64, for other programs: about 2,000 characters a text.
            input_type: what the texts are, for models trained to tell a "query" from a "document".

        Raises:
            InvalidInput: an argument is not of its type or out of its range.
            ServerError: the model cannot be asked.
        """
        prompt = self._prompt(input_type)
        counts = self._client.count_tokens(texts, prompt=prompt)
        vectors = self._client.embed(texts, prompt=prompt)
        rows = [
            EmbeddedText(tokens, truncated, encoded(vector, encoding))
            for tokens, truncated, vector in zip(
                counts.length.tolist(), counts.truncated.tolist(), vectors, strict=True
            )
        ]
        dimension = vectors.shape[1]
        notes = []
        if encoding == "preview" and dimension > len(rows[0].vector or ()):
            notes = ["A vector's first numbers are shown; encoding 'float32' gives all."]
        return fitted(
            rows,
            lambda kept, note: Embeddings(self._client.model, dimension, encoding, kept, note),
            most_chars=self._most_chars,
            notes=notes,
            hint="ask for fewer texts at once, or for encoding 'binary' or 'preview'.",
            brief=without_vector,
        )

    @tool
    def similarity(
        self,
        text: str,
        others: Annotated[list[str], Field(min_length=1, max_length=1000)],
        limit: Annotated[int, Field(ge=1, le=100)] = 10,
        question: bool = False,
    ) -> Matches:
        """Rank texts by how close they are in meaning to one text, the closest first.

        A score is a cosine: 1 is the same meaning, about 0 none in common.

        Args:
            text: what the others are compared with.
            others: the texts to rank.
            limit: how many of the closest to give.
            question: whether `text` is a question or a search and `others` are what may answer it.

        Raises:
            InvalidInput: an argument is not of its type or out of its range.
            ServerError: the model cannot be asked.
        """
        ask, answer = (
            (self._prompt("query"), self._prompt("document")) if question else (None, None)
        )
        left = self._client.embed([text], prompt=ask)
        scores = cosine_similarity(left, self._client.embed(others, prompt=answer))[0]
        best = np.argsort(-scores, kind="stable")[:limit].tolist()
        notes = [
            *self._cut([text], ask, "text"),
            *self._cut(others, answer, "others[{}]"),
        ]
        if len(best) < len(others):
            notes.append(f"The {len(others) - len(best)} lowest are not listed.")
        return fitted(
            [Match(one, round(float(scores[one]), 4), shortened(others[one])) for one in best],
            lambda kept, note: Matches(len(others), kept, note),
            most_chars=self._most_chars,
            notes=notes,
            hint="the closest are here; ask again without them.",
        )

    @tool
    def search(
        self,
        query: str,
        limit: Annotated[int, Field(ge=1, le=50)] = 5,
        where: str | None = None,
    ) -> Hits:
        """Find the documents of the index that are closest in meaning to a query, the best first.

        Args:
            query: what is looked for, in words or as a question.
            limit: how many documents to give.
            where: only documents that meet this condition over `id` and their fields, in SQL:
                "year >= 2020 AND source = 'notes'". A wrong one is answered with the fields.

        Raises:
            InvalidInput: an argument is not of its type or out of its range, there is no index, or
                the condition cannot be read.
            IndexFailed: the index is damaged, or of another model.
            ServerError: the model cannot be asked.
        """
        if self._index is None:
            raise InvalidInput("these tools have no index to search: give one, `Tools(..., index)`")
        # Some models give a string without anything in it for an argument that they leave out.
        hits = self._index.search(query, limit=limit, where=(where or "").strip() or None)
        documents = len(self._index)
        return fitted(
            [found(*hit) for hit in hits],
            lambda kept, note: Hits(documents, kept, note),
            most_chars=self._most_chars,
            notes=[],
            hint="the best are here; `where` narrows the search.",
            brief=without_fields,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The tools that there are: without an index no `search`."""
        return tuple(name for name in FORMS if name != "search" or self._index is not None)

    def definitions(self, form: Format) -> list[Schema]:
        """The tools for a model's API; see `definitions`."""
        return definitions(form, self.names)

    def run(self, name: str, arguments: str | bytes | Mapping[str, Any]) -> dict[str, Any]:
        """Runs the tool that a model called, and gives what its JSON holds.

        Args:
            name: the tool's.
            arguments: as the model sent them: JSON, or what it holds.

        Raises:
            InvalidInput: there is no such tool, or it does not take such arguments; says what it
                takes, so that a model can call again.
            ArrowheadError: as the tool says.
        """
        if name not in self.names:
            raise InvalidInput(
                f"there is no tool {shortened(name)!r}: there are {', '.join(self.names)}"
            )
        result = getattr(self, name)(**FORMS[name].parsed(arguments))
        dumped: dict[str, Any] = FORMS[name].result.dump_python(
            result, mode="json", exclude_none=True
        )
        return dumped

    def call(self, name: str, arguments: str | bytes | Mapping[str, Any]) -> str:
        """`run` for an agent's loop: the result's JSON, or `{"error": "..."}`; it does not raise.

        Args:
            name: the tool's.
            arguments: as the model sent them: JSON, or what it holds.
        """
        try:
            return as_json(self.run(name, arguments))
        except ArrowheadError as error:
            return as_json({"error": told(error)})

    def _prompt(self, input_type: InputType | None) -> str | None:
        if input_type is None:
            return None
        return Options(input_type=input_type).prefix(self._client.prompts(), self._client.model)

    def _cut(self, texts: list[str], prompt: str | None, called: str) -> list[str]:
        """A note, if the model does not read all of each text; `called` names one by its place."""
        counts = self._client.count_tokens(texts, prompt=prompt)
        places = counts.truncated.nonzero()[0].tolist()
        if not places:
            return []
        named = ", ".join(called.format(place) for place in places[:_NAMED])
        more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
        return [f"Only the first {counts.length[places[0]]} tokens were read of {named}{more}."]


def definitions(form: Format, names: Sequence[str] = tuple(FORMS)) -> list[Schema]:
    """What a model is told of the tools. Needs no server.

    Args:
        form: "openai" for Chat Completions, "openai-responses", "anthropic", or "json-schema".
        names: which tools.

    Raises:
        InvalidInput: there is no such form.
    """
    one_of("form", form, Format)
    return [FORMATS[form](FORMS[name]) for name in names]
