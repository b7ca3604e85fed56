# SPDX-License-Identifier: Apache-2.0
"""`arrowhead models`, `promote`, `rollback`, `remove` and `configure`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import urllib3

from arrowhead_conversion.command import repository_option
from arrowhead_engine.compute import DTYPES

MODELS_EXAMPLES = """
\b
Examples:
  arrowhead models
  arrowhead models --url http://10.0.0.5:8000 --json | jq .
"""
PROMOTE_EXAMPLES = """
\b
Examples:
  arrowhead convert ./tuned --name support --no-promote     (writes version 2)
  arrowhead promote support --candidate                     (serves it as support_candidate)
  arrowhead promote support                                 (2 takes over from 1)
  arrowhead rollback support                                (1 again)
"""
CONFIGURE_EXAMPLES = """
\b
Examples:
  arrowhead configure minilm --compute-dtype int8    (fast on AVX-512 VNNI; cosine about 0.999)
  arrowhead configure minilm --fused                 (for latency: one process a text)
  arrowhead configure minilm --instances 2           (short texts need not wait for long requests)
"""
_FOLLOWS = "a running `arrowhead serve` follows within seconds, without losing a request"


@click.command(epilog=MODELS_EXAMPLES)
@repository_option
@click.option(
    "--url",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="The running server's HTTP address, for the state of each version.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON in place of the table.")
def models(repository: Path, url: str, as_json: bool) -> None:
    """List every version of every model in the repository.

    Shows which is live (what callers of the name get), which is a candidate (what callers of
    NAME_candidate get), how its weights are stored, its certificate, and what the running server
    says of it.
    """
    from arrowhead_conversion.registry import Entry, entries

    found = entries(repository)
    states = [_state(url, entry.name, entry.version, entry.role) for entry in found]
    if as_json:
        rows = [{**asdict(e), "state": state} for e, state in zip(found, states, strict=True)]
        click.echo(json.dumps(rows, indent=2))
        return

    def cells(entry: Entry, state: str) -> tuple[str, ...]:
        facts = (
            (entry.fault, "", "", "")
            if entry.fault
            else (
                entry.dtype,
                f"{entry.bytes / 1e6:.1f} MB",
                f"{entry.dimension}",
                f"{entry.worst_cosine:.7f}",
            )
        )
        return entry.name, f"{entry.version}", entry.role, *facts, state

    header = ("name", "version", "role", "dtype", "size", "dimension", "certificate", "server")
    table = [header, *map(cells, found, states)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


@click.command(epilog=PROMOTE_EXAMPLES)
@click.argument("name")
@click.argument("version", type=click.IntRange(min=1), required=False)
@click.option("--candidate", is_flag=True, help="Serve it beside the live one, as NAME_candidate.")
@repository_option
def promote(name: str, version: int | None, candidate: bool, repository: Path) -> None:
    """Make VERSION of the model NAME the live one; the newest if none is given.

    The version is proved first, as the server does at load: a broken one is refused and nothing
    changes.
    """
    from arrowhead_conversion import registry

    if candidate:
        chosen = registry.propose(repository, name, version)
        click.echo(f"{name} version {chosen} is the candidate, as {name}_candidate; {_FOLLOWS}")
        return
    chosen, before = registry.promote(repository, name, version)
    click.echo(f"{name} version {chosen} is live{_instead(before, chosen)}; {_FOLLOWS}")


@click.command(epilog=PROMOTE_EXAMPLES)
@click.argument("name")
@click.option("--candidate", is_flag=True, help="Only end the candidacy; what is live stays.")
@repository_option
def rollback(name: str, candidate: bool, repository: Path) -> None:
    """Make the version of the model NAME live that was live before."""
    from arrowhead_conversion import registry

    if candidate:
        version = registry.withdraw(repository, name)
        click.echo(f"{name} version {version} is no candidate any more; {_FOLLOWS}")
        return
    chosen, before = registry.rollback(repository, name)
    click.echo(f"{name} version {chosen} is live{_instead(before, chosen)}; {_FOLLOWS}")


@click.command()
@click.argument("name")
@click.argument("version", type=click.IntRange(min=1), required=False)
@click.option("--yes", is_flag=True, help="Do not ask.")
@repository_option
def remove(name: str, version: int | None, yes: bool, repository: Path) -> None:
    """Remove VERSION of the model NAME from the repository; without VERSION the whole model.

    A version that is live or a candidate stays.
    """
    from arrowhead_conversion import registry

    what = f"{name} version {version}" if version else f"{name} with all its versions"
    if not yes:
        click.confirm(f"Remove {what} from {repository}?", abort=True)
    registry.remove(repository, name, version)
    click.echo(f"{what} is removed")


def _instead(before: int | None, now: int) -> str:
    return f", in place of {before}" if before not in (None, now) else ""


def _state(url: str, name: str, version: int, role: str) -> str:
    """What the running server says of a version: serving, loaded, not loaded, or nothing."""
    from arrowhead_conversion import pins

    served = f"{name}{pins.CANDIDATE}" if role == "candidate" else name
    answers = []
    for model in (served, f"{name}_encoder"):
        try:
            answer = urllib3.request(
                "GET", f"{url}/v2/models/{model}/versions/{version}/ready", timeout=2.0, retries=0
            )
        except urllib3.exceptions.HTTPError:
            return "unreachable"
        answers.append(answer.status == 200)
    serving, loaded = answers
    if serving and role != "idle":
        return "serving"
    return "loaded" if loaded else "not loaded"


@click.command(epilog=CONFIGURE_EXAMPLES)
@click.argument("name")
@click.option(
    "--compute-dtype",
    type=click.Choice(["auto", *DTYPES]),
    help="What the encoder computes in; auto is what the machine is fast at, and never int8.",
)
@click.option(
    "--fused/--two-step",
    default=None,
    help="Tokenize in the encoder's process, or in one of its own, as new models do.",
)
@click.option(
    "--instances",
    type=click.IntRange(min=1, max=64),
    help="Processes that encode; on a GPU machine, on each GPU, with weights of their own.",
)
@repository_option
def configure(
    name: str,
    compute_dtype: str | None,
    fused: bool | None,
    instances: int | None,
    repository: Path,
) -> None:
    """Set how model NAME is served.

    Its files in the repository change; a running server goes on as it is until it starts again.
    """
    from arrowhead_conversion.settings import set_compute_dtype, set_instances, set_steps

    if compute_dtype is None and fused is None and instances is None:
        raise click.UsageError(
            "name what to set: --compute-dtype, --fused or --two-step, --instances"
        )
    if compute_dtype is not None:
        set_compute_dtype(repository, name, compute_dtype)
        click.echo(f"{name} computes in {compute_dtype}")
    if fused is not None:
        set_steps(repository, name, "fused" if fused else "two-step")
        click.echo(f"{name} is served in {'one step' if fused else 'two steps'}")
    if instances is not None:
        set_instances(repository, name, instances)
        click.echo(f"{name} has {instances} encoding process{'es' if instances > 1 else ''}")
    click.echo("start `arrowhead serve` again for it")
