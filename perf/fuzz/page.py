# SPDX-License-Identifier: Apache-2.0
"""What fuzzing found, as a Markdown page. Every number on it comes from the results."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from perf.report import head, table

if TYPE_CHECKING:
    from perf.fuzz.run import Fuzzed, FuzzResults

_TOOLS = ("atheris", "hypothesis", "schemathesis")
_SHOWN = 600  # characters of an input


def versions() -> dict[str, str]:
    """Of the tools that choose inputs."""
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            found[tool] = "not installed"
    return found


def line(one: Fuzzed) -> str:
    """A target in a line, for who watches."""
    return f"{one.name}: {one.inputs:,} inputs, {one.seconds:.0f} s, {len(one.faults)} faults"


def page(results: FuzzResults) -> str:
    """The whole page."""
    tools = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    inputs = sum(one.inputs for one in results.targets)
    faults = sum(len(one.faults) for one in results.targets)
    parts = [
        *head(
            results,
            "Hostile input",
            f"Written by `python -m perf.fuzz` (`make fuzz`). {inputs:,} inputs to "
            f"{len(results.targets)} targets, {results.minutes:g} minutes each: {faults} faults. A "
            "fault is a crash, a hang, too much memory, an error of another kind than is promised, "
            "or a wrong vector. Edges are those of Arrowhead's own Python code that atheris saw "
            "reached; Hypothesis and Schemathesis ask other processes, or a clock, and follow "
            "none. Replayed are inputs that were faults once and are tried first.",
            facts=[("tools", tools)],
            between="targets",
        ),
        table(
            ["target", "tool", "inputs", "seconds", "edges", "replayed", "faults"],
            [
                (
                    one.name,
                    one.tool,
                    f"{one.inputs:,}",
                    f"{one.seconds:.0f}",
                    "" if one.edges is None else f"{one.edges:,}",
                    f"{one.replayed}",
                    f"{len(one.faults)}",
                )
                for one in results.targets
            ],
        ),
        "## What holds for every input",
        "\n".join(f"- {one.name}: {one.wanted}" for one in results.targets),
    ]
    if faults:
        parts.append("## Faults")
    for one in results.targets:
        for fault in one.faults:
            told = " ".join(fault.message.split())
            parts.append(f"{one.name}: {fault.what}: {told}\n\n```\n{fault.input[:_SHOWN]}\n```")
    return "\n\n".join(parts) + "\n"
