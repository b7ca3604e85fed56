# SPDX-License-Identifier: Apache-2.0
"""`arrowhead tools`: the tools as a model's API wants them told."""

from __future__ import annotations

import json
from typing import get_args

import click

from arrowhead_client._tool_forms import FORMS
from arrowhead_client.tools import Format, definitions


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, type=click.Choice(list(FORMS)))
@click.option(
    "--format",
    "form",
    type=click.Choice(get_args(Format)),
    default="openai",
    show_default=True,
    help="Whose: OpenAI's Chat Completions or Responses, Anthropic's, or plain JSON Schema.",
)
def tools(names: tuple[str, ...], form: Format) -> None:
    """Print the tools for a language model, as a JSON list: all, or those named.

    \b
    Examples:
      arrowhead tools
      arrowhead tools similarity --format anthropic
    """  # noqa: D301 (click reads the character)
    told = definitions(form, names or tuple(FORMS))
    click.echo(json.dumps(told, ensure_ascii=False, indent=2))
