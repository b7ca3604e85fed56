# SPDX-License-Identifier: Apache-2.0
"""What Arrowhead is made of: all pinned, under licences that it may use, and asked about."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import Distribution, distributions
from pathlib import Path
from threading import Thread

import pytest
from packaging.requirements import Requirement

from scripts import audit

ROOT = Path(__file__).resolve().parents[1]


def test_every_requirement_is_pinned_within_its_range() -> None:
    assert audit.pin_faults(audit.requirements(), audit.pins()) == []
    assert {"numpy", "torch", "pytest", "uvicorn", "pip-audit"} <= {
        requirement.name for requirement in audit.requirements()
    }


def test_nothing_is_installed_beside_the_pins() -> None:
    assert audit.install_faults(distributions(), audit.pins()) == []


def test_every_licence_is_one_that_may_be_used() -> None:
    assert list(filter(None, map(audit.licence_fault, distributions()))) == []


@pytest.mark.parametrize("name", ["constraints.txt", "scripts/pin.in", "perf/peers"])
def test_pins_hold_no_addresses(name: str) -> None:
    path = ROOT / name
    for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?:|file:|git\+| @ |--(extra-)?index|--find-links", text), file


@pytest.mark.parametrize(
    ("requirement", "pins", "fault"),
    [
        ("a>=2", [], "pyproject.toml: a>=2 has no pin"),
        ("a>=2", ["a==1.9"], "pyproject.toml: a>=2 excludes 1.9"),
        ("A_b>=2", ["a-b==2; python_version < '3.11'", "a-b==1; python_version >= '3.11'"], "1,"),
        ("a", ["a>=1"], "constraints.txt: a>=1 is not one exact version"),
        ("a", ["a @ https://example.org/a.whl"], "is not one exact version"),
    ],
)
def test_a_fault_of_the_pins_is_found(requirement: str, pins: list[str], fault: str) -> None:
    faults = audit.pin_faults([Requirement(requirement)], [*map(Requirement, pins)])
    assert any(fault in line for line in faults), faults


def installed(folder: Path, *lines: str) -> Distribution:
    """A distribution as an installer leaves it."""
    info = folder / "thing-1.0.dist-info"
    info.mkdir()
    text = "\n".join(["Metadata-Version: 2.4", "Name: thing", "Version: 1.0", *lines, "", ""])
    (info / "METADATA").write_text(text)
    return Distribution.at(info)


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("License-Expression: MIT", True),
        ("License-Expression: GPL-3.0-only", False),
        ("License-Expression: GPL-3.0-only OR MIT", True),
        ("License-Expression: GPL-3.0-only AND MIT", False),
        ("License-Expression: Apache-2.0 WITH LLVM-exception", True),
        ("Classifier: License :: OSI Approved :: MIT License", True),
        ("Classifier: License :: OSI Approved :: GNU Affero General Public License v3", False),
        ("License: Apache 2.0", True),
        ("License: whatever we like", False),
        ("Summary: says nothing of a licence", False),
    ],
)
def test_a_licence_that_may_not_be_used_is_found(tmp_path: Path, line: str, allowed: bool) -> None:
    assert (audit.licence_fault(installed(tmp_path, line)) is None) is allowed


def test_what_is_installed_beside_the_pins_is_found(tmp_path: Path) -> None:
    thing = installed(tmp_path, "License-Expression: MIT")
    assert audit.install_faults([thing], [Requirement("thing==1.0")]) == []
    for pin in ("thing==1.1", "thing==1.0; python_version < '3'", "other==1.0"):
        (fault,) = audit.install_faults([thing], [Requirement(pin)])
        assert fault.startswith("thing 1.0 is installed; its pin: ")


class Osv(BaseHTTPRequestHandler):
    """Answers as OSV does; it knows of one fault, in jinja2 3.1.2."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = {
            "id": "GHSA-h5c8-rqwp-cp95",
            "aliases": ["CVE-2024-22195"],
            "summary": "attributes by keys with blanks",
            "affected": [
                {
                    "package": {"name": "jinja2", "ecosystem": "PyPI"},
                    "ranges": [
                        {
                            "type": "ECOSYSTEM",
                            "events": [{"introduced": "0"}, {"fixed": "3.1.3"}],
                        }
                    ],
                }
            ],
        }
        found = asked["package"]["name"] == "jinja2" and asked["version"] == "3.1.2"
        body = json.dumps({"vulns": [known]} if found else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def osv() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()
        thread.join()


def test_known_vulnerabilities_are_found_of_all_pins_of_a_package(osv: str) -> None:
    pins = [
        Requirement("jinja2==3.1.2; python_version < '3'"),
        Requirement("jinja2==3.1.6"),
        Requirement("click==8.5.1"),
    ]
    answers = audit.ask(pins, [["-s", "osv", "--osv-url", osv]])
    assert answers.asked == {"jinja2 3.1.2", "jinja2 3.1.6", "click 8.5.1"}
    assert answers.unasked == {}
    (found,) = answers.found
    assert found.startswith("jinja2 3.1.2: ")
    assert "CVE-2024-22195" in found
    assert "mended in 3.1.3" in found


def test_who_cannot_be_asked_is_told_of() -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/query"
        made = subprocess.run(
            [sys.executable, ROOT / "scripts" / "audit.py", "--osv-url", url],
            capture_output=True,
            text=True,
            check=False,
        )
    assert made.returncode == 2, made.stdout + made.stderr
    assert re.search(r"advisories  asked about 0 of \d+ pins: nobody could be asked", made.stdout)
    assert re.search(r"COULD NOT ASK about \d+ pins, so this says nothing", made.stdout)
    assert made.stdout.count("no fault") == 3


def test_the_bill_of_materials_lists_what_is_installed(tmp_path: Path) -> None:
    command = ["make", "--silent", "--old-file", ".venv/.ready", f"SBOM={tmp_path / 'sbom.json'}"]
    subprocess.run([*command, "sbom"], cwd=ROOT, check=True)
    bill = json.loads((tmp_path / "sbom.json").read_text(encoding="utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "arrowhead"
    listed = {(one["name"], one["version"]) for one in bill["components"]}
    here = {(one.name, one.version) for one in distributions() if one.name != "arrowhead"}
    assert here <= listed
