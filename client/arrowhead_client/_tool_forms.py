# SPDX-License-Identifier: Apache-2.0
"""A typed method with a docstring as a tool: its schema, in everybody's form, and its checks.

signature + docstring ─▶ Form ─▶ JSON Schema ─▶ openai, openai-responses, anthropic, json-schema
                          └────▶ what a model sent ─▶ arguments, or an error it can act on
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar, get_type_hints

import griffe
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema

from arrowhead_client._errors import InvalidInput

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

Schema = dict[str, Any]

_SHOWN_CHARS = 60  # of a wrong value
_SHOWN_ERRORS = 5


class _Plain(GenerateJsonSchema):
    """Schemas without titles: a model reads every word, and these only repeat names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@dataclass(frozen=True)
class Form:
    """A tool as others see it.

    Attributes:
        name: the method's.
        description: its docstring, down to the arguments.
        arguments: what it takes.
        result: what it gives.
    """

    name: str
    description: str
    arguments: type[BaseModel]
    result: TypeAdapter[Any]

    @classmethod
    def of(cls, method: Callable[..., Any]) -> Form:
        """The form of a method whose docstring is in Google's style.

        Raises:
            TypeError: an argument or the result has no type, or no word in the docstring.
        """
        text, described = _documented(method)
        hints = get_type_hints(method, include_extras=True)
        parameters = list(inspect.signature(method).parameters.values())[1:]  # less `self`
        names = {parameter.name for parameter in parameters}
        if missing := (names | {"return"}) - set(hints) or names ^ set(described):
            raise TypeError(f"{method.__qualname__}: no type or no description: {sorted(missing)}")
        fields: dict[str, Any] = {
            parameter.name: (
                Annotated[hints[parameter.name], Field(description=described[parameter.name])],
                ... if parameter.default is parameter.empty else parameter.default,
            )
            for parameter in parameters
        }
        name = method.__name__
        model = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        return cls(name, text, model, TypeAdapter(hints["return"]))

    def schema(self) -> Schema:
        """JSON Schema of the arguments."""
        schema = self.arguments.model_json_schema(schema_generator=_Plain)
        del schema["title"]
        return schema

    def strict_schema(self) -> Schema:
        """The same as OpenAI's strict mode takes it: all are required, and null means the default.

        See https://developers.openai.com/api/docs/guides/structured-outputs
        """
        schema = self.schema()
        for argument in schema["properties"].values():
            if "default" not in argument:
                continue
            default, description = argument.pop("default"), argument.pop("description")
            choices = argument.pop("anyOf", None) or [argument.copy()]
            if {"type": "null"} not in choices:
                choices.append({"type": "null"})
                description += f" Null means {json.dumps(default)}."
            argument.clear()
            argument.update(anyOf=choices, description=description)
        schema["required"] = list(schema["properties"])
        return schema

    def result_schema(self) -> Schema:
        """JSON Schema of the result."""
        return self.result.json_schema(mode="serialization", schema_generator=_Plain)

    def parsed(self, arguments: str | bytes | Mapping[str, Any]) -> dict[str, Any]:
        """What a model sent, as arguments.

        Null is a default that strict mode has no other word for. A list may come as a string that
        holds its JSON: hosts have sent such.

        Raises:
            InvalidInput: says what is wrong with which, and what the tool takes.
        """
        if isinstance(arguments, (str, bytes)):
            try:
                arguments = pydantic_core.from_json(arguments)
            except ValueError as error:
                raise self._refusal(f"its arguments are no JSON ({error})") from error
        if not isinstance(arguments, Mapping):
            raise self._refusal(f"its arguments are no JSON object but {_shown(arguments)}")
        given: dict[str, Any] = {}
        for name, value in arguments.items():
            field = self.arguments.model_fields.get(name)
            if field is not None and value is None and not field.is_required():
                continue
            if field is not None and isinstance(value, str) and value.startswith("["):
                value = self._unpacked(name, value)
            given[name] = value
        return self.checked(given)

    def checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, of their types and in their ranges.

        Raises:
            InvalidInput: as for `parsed`.
        """
        try:
            model = self.arguments.model_validate(dict(arguments))
        except ValidationError as error:
            told = [_told(one) for one in error.errors(include_url=False)]
            more = [f"and {len(told) - _SHOWN_ERRORS} more"] if len(told) > _SHOWN_ERRORS else []
            raise self._refusal("; ".join(told[:_SHOWN_ERRORS] + more)) from error
        return {name: getattr(model, name) for name in type(model).model_fields}

    def _unpacked(self, name: str, value: str) -> Any:
        if self.schema()["properties"][name].get("type") != "array":
            return value
        try:
            return pydantic_core.from_json(value)
        except ValueError:
            return value

    def _refusal(self, why: str) -> InvalidInput:
        takes = ", ".join(
            name if field.is_required() else f"{name} (optional)"
            for name, field in self.arguments.model_fields.items()
        )
        return InvalidInput(f"{self.name} was not run: {why}. It takes {takes}.")


FORMS: dict[str, Form] = {}


def tool(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Makes a method a tool: its form is in `FORMS`, and however it is called it is checked."""
    form = FORMS[method.__name__] = Form.of(method)
    signature = inspect.signature(method)
    run: Callable[..., R] = method

    @functools.wraps(method)
    def checked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(self, *args, **kwargs).arguments
        del given["self"]
        return run(self, **form.checked(given))

    return checked


def _openai(form: Form) -> Schema:
    return {
        "name": form.name,
        "description": form.description,
        "parameters": form.strict_schema(),
        "strict": True,
    }


# What each kind of caller is given.
FORMATS: dict[str, Callable[[Form], Schema]] = {
    "openai": lambda form: {"type": "function", "function": _openai(form)},
    "openai-responses": lambda form: {"type": "function", **_openai(form)},
    "anthropic": lambda form: {
        "name": form.name,
        "description": form.description,
        "input_schema": form.schema(),
    },
    "json-schema": lambda form: {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": form.name,
        "description": form.description,
        **form.schema(),
    },
}


def _documented(method: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """A docstring's text, and what it says of each argument."""
    docstring = griffe.Docstring(inspect.getdoc(method) or "")
    text: list[str] = []
    arguments: dict[str, str] = {}
    for section in docstring.parse("google", warnings=False):
        if section.kind is griffe.DocstringSectionKind.text:
            text.append(section.value)
        elif section.kind is griffe.DocstringSectionKind.parameters:
            for one in section.value:
                arguments[one.name] = " ".join(one.description.split())
    return "\n\n".join(text), arguments


def _told(error: Any) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else part for part in error["loc"])
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "extra_forbidden":
        return f"{_shown(where)} is none of its arguments"
    return f"{where}={_shown(error['input'])}: {error['msg']}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
