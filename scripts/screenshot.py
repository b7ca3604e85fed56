# SPDX-License-Identifier: Apache-2.0
"""Makes docs/page.png, the picture of the gateway's page that the README shows.

Starts Triton and a gateway on free ports, unless it is given a gateway's URL, and drives Debian's
Chromium. Needs a converted model (`make quickstart`) and the `chromium` package.

  .venv/bin/python scripts/screenshot.py
  .venv/bin/python scripts/screenshot.py --url http://127.0.0.1:8080
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from arrowhead_client import ArrowheadError
from arrowhead_server.address import LOOPBACK, free_address
from arrowhead_server.errors import ServerError
from arrowhead_server.supervisor import running_server

ROOT = Path(__file__).parents[1]
MOST_BYTES = 300_000
_START_TIMEOUT_S = 30.0


def main() -> None:
    """Takes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of a running gateway; else one is started")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "page.png")
    wanted = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("screenshot: no chromium: `scripts/test-packages` installs it")
    with nullcontext(wanted.url) if wanted.url else _gateway() as url:
        picture = _taken(chromium, url)
    if len(picture) > MOST_BYTES:
        raise SystemExit(f"screenshot: {len(picture)} bytes; wanted {MOST_BYTES} at most")
    part = wanted.out.with_name(wanted.out.name + ".part")
    part.write_bytes(picture)
    part.replace(wanted.out)
    print(f"{wanted.out}: {len(picture) / 1e3:.0f} KB")


@contextmanager
def _gateway() -> Iterator[str]:
    """A gateway in front of this repository's models, and its URL."""
    with running_server(ROOT / "model_repository", free_address()) as server:
        port = free_address().http_port
        arrowhead = Path(sys.executable).with_name("arrowhead")
        command = [str(arrowhead), "gateway", f"--url={server.grpc_url}", f"--port={port}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            url = f"http://{LOOPBACK}:{port}"
            _wait(f"{url}/ready", process)
            yield url
        finally:
            process.terminate()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < _START_TIMEOUT_S:
        try:
            urllib.request.urlopen(url).close()  # noqa: S310 (http, by ourselves)
        except urllib.error.URLError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"screenshot: no gateway at {url} within {_START_TIMEOUT_S:.0f} s")


def _taken(chromium: str, url: str) -> bytes:
    """The page, with a cell in focus and a text's tokens shown; a PNG."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium gives root none
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        page = browser.new_page(
            viewport={"width": 1120, "height": 800}, device_scale_factor=1.25, color_scheme="light"
        )
        for number in range(20):  # a new gateway's first calls tell no speed
            page.request.post(f"{url}/embed", data={"inputs": f"text {number}"})
        page.goto(url)
        _pose(page)
        picture = page.screenshot(full_page=True)
        browser.close()
    return picture


def _pose(page: Page) -> None:
    count = page.locator("#texts .count")
    expect(count.first).to_be_visible()
    count.nth(2).click()
    expect(page.locator(".token").first).to_be_visible()
    page.locator("#map tbody tr").nth(3).locator("td").nth(4).hover()
    page.evaluate("document.activeElement.blur()")
    page.evaluate("Promise.all(document.getAnimations().map((moving) => moving.finished))")


if __name__ == "__main__":
    try:
        main()
    except (ArrowheadError, ServerError) as error:
        raise SystemExit(f"screenshot: {error}") from error
