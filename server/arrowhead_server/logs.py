# SPDX-License-Identifier: Apache-2.0
"""How our processes log: text for people, or JSON for machines, on stderr.

In JSON each line is one object: `time` (RFC 3339, UTC), `level`, `part` (server, triton, gateway,
or a model's name), `message`, `request_id` where there is one, and numbers. No line of ours holds a
text that somebody embeds, a key or a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, TypeAlias

import click

Format: TypeAlias = Literal["text", "json"]
_LOGGER = logging.getLogger(__name__)
# What a line of another part than our own brings along: see `from_part`.
_FIELDS = "fields"


def option(**attributes: Any) -> Callable[[Any], Any]:
    """`--log-format`, of all commands that run on."""
    return click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        envvar="ARROWHEAD_LOG_FORMAT",
        show_default=True,
        show_envvar=True,
        help="text, or json: one object a line on stderr, and nothing on stdout.",
        **attributes,
    )


def configure(kind: Format, part: str, level: int) -> None:
    """Sends what is logged in this process to stderr.

    Args:
        kind: text or json.
        part: who logs, where a line does not say.
        level: of what is not ours; ours is told from INFO on.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Text() if kind == "text" else _json(part))
    logging.basicConfig(level=level, handlers=[handler])


def warn(kind: Format, warning: str) -> None:
    """Tells something before the first line of work, as the log does or as people read it."""
    if kind == "json":
        _LOGGER.warning("%s", warning)
    else:
        click.echo(f"warning: {warning}", err=True)


def from_part(part: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` of a line that another part said, with what it told beside its message."""
    return {"part": part, _FIELDS: dict(fields)}


@contextmanager
def told_in(kind: Format) -> Iterator[None]:
    """In JSON, the error that ends a command is a line of the log like all others.

    As text it is left to the command line.
    """
    try:
        yield
    except Exception as error:
        code = getattr(type(error), "exit_code", None)
        if kind == "text" or not isinstance(code, int):
            raise
        _end(error, code)


def _end(error: Exception, code: int) -> NoReturn:
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    _LOGGER.error("%s", message)
    raise SystemExit(code) from error


class Command(click.Command):
    """One whose arguments are complained of in the format that they, or the variable, ask for.

    Args:
        part: who logs.
    """

    def __init__(self, *args: Any, part: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self._part = part

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Reads the arguments."""
        given = list(args)  # click takes them out of the list
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            # Again, by a reader who minds no fault, as shells have it for completion.
            lenient = click.Context(
                self, parent, info_name, resilient_parsing=True, ignore_unknown_options=True
            )
            self.parse_args(lenient, given)
            if lenient.params.get("log_format") != "json":
                raise
            configure("json", self._part, logging.WARNING)
            _end(error, error.exit_code)


class _Text(logging.Formatter):
    """Of another part's message, says whose it is, and what it told beside it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the base's name)
        if hasattr(record, _FIELDS):
            rest = [f"{name}={value}" for name, value in getattr(record, _FIELDS).items()]
            record.message = " ".join([f"{record.part}:", record.message, *rest])  # type: ignore[attr-defined]
        return super().formatMessage(record)


def _json(part: str) -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter  # who wants text is spared 20 ms

    class Json(JsonFormatter):
        def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
            log_data |= log_data.pop(_FIELDS, {})
            return log_data

    return Json(
        "%(levelname)s %(message)s",
        defaults={"part": part},
        rename_fields={"levelname": "level"},
        timestamp="time",
        json_ensure_ascii=False,
    )
