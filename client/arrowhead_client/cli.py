# SPDX-License-Identifier: Apache-2.0
"""`arrowhead`: one group over the commands of all our packages, each imported when it is called.

An error ends as one line on stderr and a non-zero exit, when its class says so by having an
`exit_code`; any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NamedTuple

import click

from arrowhead_client import _tracing


class Command(NamedTuple):
    """Where a command lives, which extra brings what it needs, and its line in the list."""

    target: str
    extra: str | None
    help: str


# Names only: the client imports none of the packages that these commands come from.
COMMANDS = {
    "bulk": Command("arrowhead_bulk.command:bulk", "bulk", "Embed a corpus of files."),
    "configure": Command(
        "arrowhead_conversion.registry_commands:configure", "convert", "Set how a model is served."
    ),
    "convert": Command(
        "arrowhead_conversion.command:convert", "convert", "Convert a model to Parquet."
    ),
    "embed": Command("arrowhead_client.commands:embed", None, "Turn texts into vectors."),
    "evaluate": Command(
        "arrowhead_client.evaluate:evaluate", None, "Score a served model on known answers."
    ),
    "gateway": Command(
        "arrowhead_server.gateway.command:gateway", "gateway", "Serve JSON over HTTP."
    ),
    "gateway-key": Command(
        "arrowhead_server.gateway.command:gateway_key", "gateway", "Make an API key for a gateway."
    ),
    "index": Command(
        "arrowhead_client.index_commands:index", "search", "Keep documents to be searched."
    ),
    "info": Command("arrowhead_client.commands:info", None, "Tell what a served model is."),
    "inspect": Command("arrowhead_engine.inspect:inspect", "engine", "Look into a weight file."),
    "mcp": Command(
        "arrowhead_client.mcp_server:mcp", "mcp", "Offer the tools to hosts of language models."
    ),
    "models": Command(
        "arrowhead_conversion.registry_commands:models", "convert", "List models and versions."
    ),
    "promote": Command(
        "arrowhead_conversion.registry_commands:promote", "convert", "Make a version live."
    ),
    "remove": Command(
        "arrowhead_conversion.registry_commands:remove", "convert", "Remove a version or a model."
    ),
    "rollback": Command(
        "arrowhead_conversion.registry_commands:rollback", "convert", "Go back a version."
    ),
    "search": Command(
        "arrowhead_client.index_commands:search", "search", "Find documents by what they mean."
    ),
    "serve": Command("arrowhead_server.command:serve", "serve", "Start and watch Triton."),
    "sign": Command("arrowhead_conversion.signing_command:sign", "convert", "Sign a version."),
    "similarity": Command(
        "arrowhead_client.commands:similarity", None, "Rank texts by likeness to a text."
    ),
    "tools": Command(
        "arrowhead_client.tools_command:tools", "tools", "Print the tools for a language model."
    ),
    "verify": Command(
        "arrowhead_conversion.command:verify", "convert", "Prove a converted model again."
    ),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now.

        Raises:
            click.ClickException: something it needs is not installed; says how to install it.
        """
        command = COMMANDS.get(cmd_name)
        if command is None:
            return None
        module, _, attribute = command.target.partition(":")
        try:
            found: click.Command = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if command.extra is None or (error.name or "").startswith("arrowhead_"):
                raise
            raise click.ClickException(
                f"`arrowhead {cmd_name}` needs {error.name}, which is not installed: "
                f"pip install 'arrowhead[{command.extra}]'"
            ) from error
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `--help`, from the table: no module is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in COMMANDS.items()])

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs the command line, and turns errors into one line and an exit code."""
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
        except click.Abort:  # Ctrl-C
            sys.exit(130)
        except click.UsageError as error:
            error.show()
            sys.exit(error.exit_code)
        except Exception as error:
            exit_code = getattr(type(error), "exit_code", None)
            if not isinstance(exit_code, int):
                raise
            click.echo(f"arrowhead: {error}", err=True)
            sys.exit(exit_code)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="arrowhead", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Text embeddings from NVIDIA Triton.

    \b
    Start a server, then ask it:
      arrowhead serve
      arrowhead embed "a text" "another"
      arrowhead similarity "a cat" "a kitten" "a tractor"
    """  # noqa: D301 (click reads the character)
    # Triton has spans, its supervisor has none; the gateway begins once it has a log.
    if context.invoked_subcommand not in ("serve", "gateway"):
        context.call_on_close(_tracing.start("arrowhead"))


if __name__ == "__main__":
    main(prog_name="arrowhead")
