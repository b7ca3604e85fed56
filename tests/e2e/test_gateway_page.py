# SPDX-License-Identifier: Apache-2.0
"""The gateway's page in a real Chromium, in front of a real gateway and a real Triton."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Error, Page, Request, Route, expect, sync_playwright

from arrowhead_client import cosine_similarity, truncate_dimensions
from arrowhead_server.address import free_address
from arrowhead_server.supervisor import Server

from .gateways import started, stopped

TEXTS = ["A man is playing a guitar.", "Someone performs music.", "Shares dropped on Tuesday."]
LONG = "a text whose end is cut off " * 100
ATTACK = '<img src="x" onerror="window.hit = 1"><script>window.hit = 1</script>'
SCRIPT = re.compile(r"page/page\.js\?v=\w+")


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    process, url = started(f"--url={server.grpc_url}")
    yield url
    stopped(process)


@pytest.fixture(scope="module")
def ask(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as ask:
        yield ask


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("no chromium: scripts/test-packages installs it")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium gives root none
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        yield browser
        browser.close()


class Watched:
    """A page, and what its console and its requests complain of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.sent: list[Request] = []
        page.on("console", lambda told: self.complaints.append(f"{told.type}: {told.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda one: self.sent.append(one))

    def open(self, url: str, texts: list[str] = TEXTS) -> Page:
        """The page with these texts, and what the gateway said of them."""
        self.page.goto(url)
        expect(self.page.locator("#map td.same").first).to_be_visible()
        self.page.get_by_role("button", name="Clear all").click()
        for number, text in enumerate(texts):
            if number:
                self.page.get_by_role("button", name="Add a text").click()
            area(self.page, number + 1).fill(text)
        self.settled()
        return self.page

    def settled(self) -> None:
        """Waits until what is shown is of what is written."""
        expect(self.page.locator("#map")).not_to_have_attribute("aria-busy", "true")

    def asked(self, path: str) -> list[Any]:
        """The bodies that were sent to a path."""
        return [one.post_data_json for one in self.sent if one.url.endswith(path)]

    def failures(self) -> list[str]:
        """The complaints, which are expected here: at the end of a test there must be none."""
        found, self.complaints = self.complaints, []
        return found


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(10_000)
    watched = Watched(context.new_page())
    yield watched
    context.close()
    assert watched.complaints == []


def area(page: Page, number: int) -> Any:
    return page.get_by_role("textbox", name=f"Text {number}", exact=True)


def row(page: Page, number: int) -> Any:
    return page.locator("#texts > li").nth(number - 1)


def values(page: Page) -> Any:
    """The numbers in the map, float64 [N, N]."""
    rows = page.locator("#map tbody tr")
    told = [rows.nth(i).locator(".value").all_inner_texts() for i in range(rows.count())]
    return np.array([[float(one.replace("−", "-")) for one in line] for line in told])  # noqa: RUF001


def similarities(ask: httpx.Client, texts: list[str], **parameters: Any) -> Any:
    """`/similarity` of every text with every, [N, N]."""
    return np.array(
        [
            ask.post(
                "/similarity",
                json={
                    "inputs": {"source_sentence": text, "sentences": texts},
                    "parameters": {"truncate": True, **parameters},
                },
            ).json()
            for text in texts
        ]
    )


def rounded(met: Any, wanted: Any, digits: int = 2) -> None:
    np.testing.assert_allclose(met, wanted, rtol=0, atol=0.5001 * 10**-digits)


def test_the_first_view_is_of_examples(watched: Watched, url: str, ask: httpx.Client) -> None:
    page = watched.page
    page.goto(url)
    expect(page.locator("#map td.same")).to_have_count(7)
    texts = page.locator("#texts textarea").evaluate_all("all => all.map((one) => one.value)")
    rounded(values(page), similarities(ask, texts))
    expect(page.locator("#status")).to_have_text(re.compile(r"^7 texts, \d+ tokens in [\d.]+ ms$"))


def test_values_are_those_of_similarity(watched: Watched, url: str, ask: httpx.Client) -> None:
    page = watched.open(url)
    wanted = similarities(ask, TEXTS)
    rounded(values(page), wanted)
    assert page.locator("#map tbody th .text").all_inner_texts() == TEXTS
    for i, j in ((0, 1), (1, 2), (2, 0)):
        page.locator("#map tbody tr").nth(i).locator("td").nth(j).hover()
        pair = page.locator("#pair p").all_inner_texts()
        rounded(float(pair[0].split()[0].replace("−", "-")), wanted[i, j], 4)  # noqa: RUF001
        assert [one.partition("\n")[2] for one in pair[1:]] == [TEXTS[i], TEXTS[j]]
    page.mouse.move(0, 0)
    expect(page.locator("#pair p").first).to_contain_text("the closest pair")


def test_token_counts_and_places_are_those_of_tokenize(
    watched: Watched, url: str, ask: httpx.Client
) -> None:
    texts = ["naïve café 🙂🚀 unbelievably", "", "two\nlines"]
    page = watched.open(url, texts)
    for number in (1, 3):
        (tokens,) = ask.post("/tokenize", json={"inputs": texts[number - 1]}).json()
        count = row(page, number).get_by_role("button", name=f"{len(tokens)} tokens")
        count.click()
        expect(count).to_have_attribute("aria-expanded", "true")
        shown = row(page, number).locator(".tokens span")
        expect(shown).to_have_text([one["text"] for one in tokens])
        whole = row(page, number).locator(".tokens").inner_text()
        assert whole == f"[CLS]{texts[number - 1]}[SEP]"
    expect(row(page, 2).locator(".count")).to_be_hidden()
    # An open text's tokens follow what is typed.
    area(page, 3).fill("three words here")
    expect(row(page, 3).locator(".token")).to_have_text(["three", "words", "here"])


def test_an_edited_text_is_asked_for_and_no_other(
    watched: Watched, url: str, ask: httpx.Client
) -> None:
    page = watched.open(url)
    watched.sent.clear()
    new = "A woman plays the violin."
    area(page, 2).fill(new)
    expect(page.locator("#map tbody th .text").nth(1)).to_have_text(new)
    watched.settled()
    rounded(values(page), similarities(ask, [TEXTS[0], new, TEXTS[2]]))
    assert [one["input"] for one in watched.asked("/v1/embeddings")] == [[new]]
    expect(page.locator("#status")).to_have_text(re.compile(r"^1 text, \d+ tokens in [\d.]+ ms$"))
    page.get_by_role("button", name="Remove text 1").click()
    expect(page.locator("#map tbody tr")).to_have_count(2)
    rounded(values(page), similarities(ask, [new, TEXTS[2]]))
    assert len(watched.asked("/v1/embeddings")) == 1
    expect(area(page, 1)).to_be_focused()


def test_a_call_is_dropped_when_its_text_is_edited_again(
    watched: Watched, url: str, ask: httpx.Client
) -> None:
    page = watched.open(url)
    held: list[Route] = []
    page.route("**/v1/embeddings", lambda route: route.continue_() if held else held.append(route))
    with page.expect_request("**/v1/embeddings"):
        area(page, 1).fill("first")
    with page.expect_event("requestfailed") as dropped:
        area(page, 1).fill("second")
    assert dropped.value.failure == "net::ERR_ABORTED"
    expect(page.locator("#map tbody th .text").first).to_have_text("second")
    watched.settled()
    rounded(values(page), similarities(ask, ["second", *TEXTS[1:]]))


def test_a_text_that_is_too_long_is_marked(watched: Watched, url: str, ask: httpx.Client) -> None:
    page = watched.open(url, [TEXTS[0], LONG])
    expect(row(page, 1).locator(".truncated")).to_be_hidden()
    expect(row(page, 2).locator(".truncated")).to_have_text("the rest is not read")
    rounded(values(page), similarities(ask, [TEXTS[0], LONG]))
    row(page, 2).get_by_role("button", name="256 tokens").click()
    expect(row(page, 2).locator(".tokens span")).to_have_count(256)
    unread = row(page, 2).locator(".tokens s").inner_text()
    assert unread.startswith(" ") or LONG.find(unread[:20]) > 0
    area(page, 2).fill("short")
    expect(row(page, 2).locator(".truncated")).to_be_hidden()


def test_fewer_dimensions_without_asking_again(
    watched: Watched, url: str, ask: httpx.Client
) -> None:
    page = watched.open(url)
    watched.sent.clear()
    full = values(page)
    slider = page.get_by_role("slider", name="Dimensions")
    slider.fill("64")
    expect(page.locator("#kept")).to_have_text("64 of 384")
    vectors = np.array(ask.post("/embed", json={"inputs": TEXTS}).json())
    wanted = cosine_similarity(truncate_dimensions(vectors, 64))
    rounded(values(page), wanted)
    moved = np.abs(wanted - cosine_similarity(vectors))[np.triu_indices(3, 1)]
    told = re.findall(r"\d\.\d\d", page.locator("#moved").inner_text())
    rounded([float(one) for one in told], [moved.mean(), moved.max()])
    change = page.locator("#map tbody tr").first.locator("td small").nth(1).inner_text()
    rounded(float(change.replace("−", "-")), (wanted - cosine_similarity(vectors))[0, 1])  # noqa: RUF001
    slider.fill("384")
    np.testing.assert_array_equal(values(page), full)
    assert watched.sent == []


def test_each_text_has_its_prompt(prompted: Server, watched: Watched) -> None:
    process, url = started(f"--url={prompted.grpc_url}")
    try:
        page = watched.open(url, TEXTS[:2])
        choice = page.get_by_role("combobox", name="Prompt of text 1")
        names = choice.locator("option").all_inner_texts()
        assert names[0] == "default"
        assert {"query", 'quoted "ß"'} < set(names)
        choice.select_option("query")
        with httpx.Client(base_url=url, timeout=30) as ask:
            inputs = {"source_sentence": TEXTS[0], "sentences": [TEXTS[1]]}
            sides = {"source_prompt_name": "query"}
            wanted = ask.post("/similarity", json={"inputs": inputs, "parameters": sides}).json()
            wish = {"inputs": TEXTS[0], "prompt_name": "query"}
            (tokens,) = ask.post("/tokenize", json=wish).json()
        row(page, 1).get_by_role("button", name=f"{len(tokens)} tokens").click()
        expect(row(page, 1).locator(".tokens")).to_have_text(f"[CLS]query: {TEXTS[0]}[SEP]")
        rounded(values(page)[0, 1], wanted[0])
        # A new text has the prompt of the one before it.
        area(page, 1).press("Enter")
        expect(page.get_by_role("combobox", name="Prompt of text 2")).to_have_value("query")
        expect(page.locator("#facts")).to_contain_text("query")
    finally:
        stopped(process)


def test_another_model_is_asked_for_all_texts_again(watched: Watched, url: str) -> None:
    page = watched.open(url)
    watched.sent.clear()

    def another(route: Route) -> None:
        facts = route.fetch().json()
        route.fulfill(json={**facts, "fingerprint": "f" * 32})

    page.route("**/info", another)
    area(page, 1).fill("new")
    expect(page.locator("#facts")).to_contain_text("ffffffff")
    watched.settled()
    inputs = [one["input"] for one in watched.asked("/v1/embeddings")]
    assert inputs == [["new"], ["new", *TEXTS[1:]]]


def test_what_the_gateway_says_without_triton(watched: Watched) -> None:
    process, url = started(f"--url=grpc://127.0.0.1:{free_address().grpc_port}")
    try:
        watched.page.goto(url)
        expect(watched.page.get_by_role("alert")).to_be_visible()
        wanted = httpx.get(f"{url}/info", timeout=30)
        assert wanted.status_code == 503
        expect(watched.page.locator("#told")).to_have_text(wanted.json()["error"])
        expect(watched.page.locator("#keyform")).to_be_hidden()
        expect(watched.page.locator("#compared")).to_be_hidden()
        assert all("503 (Service Unavailable)" in one for one in watched.failures())
    finally:
        stopped(process)


def test_a_gateway_of_few_texts_a_request_that_is_gone_then(
    server: Server, watched: Watched
) -> None:
    process, url = started(f"--url={server.grpc_url}", "--max-texts=3")
    try:
        page = watched.open(url)
        first = watched.asked("/v1/embeddings")[:3]
        assert [len(one["input"]) for one in first] == [3, 3, 1]
    finally:
        stopped(process)
    area(page, 1).fill("nobody answers")
    expect(page.locator("#told")).to_have_text(
        f"The gateway at {url.removeprefix('http://')} does not answer. Is it running?"
    )
    expect(page.locator("#status")).to_have_text("Not up to date")
    expect(row(page, 1).locator(".count")).to_be_hidden()  # those were another text's
    page.get_by_role("slider", name="Dimensions").fill("64")  # what is there can still be looked at
    expect(page.locator("#map tbody tr")).to_have_count(3)
    assert all("ERR_CONNECTION_REFUSED" in one for one in watched.failures())


def test_a_key_is_asked_for_sent_and_kept_in_memory_only(watched: Watched, url: str) -> None:
    refused = {"error": "no key: wanted the header 'Authorization: Bearer KEY'"}

    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret-7":
            route.continue_()
        else:
            route.fulfill(status=401, json=refused)

    page = watched.page
    for path in ("info", "v1/embeddings", "tokenize"):
        page.route(f"**/{path}", guard)
    page.goto(url)
    expect(page.locator("#told")).to_have_text(refused["error"])
    key = page.get_by_label("API key or token")
    key.fill("wrong")
    key.press("Enter")
    expect(page.locator("#status")).to_have_text("Not up to date")
    expect(key).to_be_visible()
    key.fill("secret-7")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#map td.same")).to_have_count(7)
    expect(page.get_by_role("alert")).to_be_hidden()
    row(page, 1).get_by_role("button", name="12 tokens").click()
    expect(row(page, 1).locator(".token").first).to_be_visible()
    kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
    assert kept == [0, 0, ""]
    assert "secret-7" not in page.url
    assert all("401 (Unauthorized)" in one for one in watched.failures())


def test_markup_in_a_text_is_text(watched: Watched, url: str) -> None:
    page = watched.open(url, [ATTACK, TEXTS[0]])
    row(page, 1).locator(".count").click()
    expect(row(page, 1).locator(".tokens")).to_contain_text('<img src="x" onerror=')
    page.locator("#map tbody td").nth(1).hover()
    expect(page.locator("#pair")).to_contain_text(ATTACK)
    expect(page.locator("#map tbody th").first).to_contain_text(ATTACK)
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("window.hit") is None


def test_the_policy_refuses_scripts_and_markup_of_others(watched: Watched, url: str) -> None:
    page = watched.open(url)
    assert watched.complaints == []
    with pytest.raises(Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>markup</b>'")
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.append("window.hit = 1");
            document.body.append(script);
        }"""
    )
    assert page.evaluate("window.hit") is None
    assert page.evaluate(
        "fetch('http://127.0.0.1:9/').then(() => '', (error) => error.message)"
    ).startswith("Failed to fetch")
    told = "\n".join(watched.failures())
    for refused in ("'TrustedHTML'", "'TrustedScript'", "connect-src 'self'"):
        assert refused in told


def test_it_is_used_by_keyboard(watched: Watched, url: str) -> None:
    page = watched.open(url, TEXTS[:2])
    area(page, 2).press("Enter")
    expect(area(page, 3)).to_be_focused()
    page.keyboard.type(TEXTS[2])
    expect(page.locator("#map tbody tr")).to_have_count(3)
    page.locator("#map td[tabindex='0']").focus()
    assert page.locator("#map td[tabindex='0']").count() == 1
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    expect(page.locator("#map tbody tr").nth(1).locator("td").nth(2)).to_be_focused()
    shown = page.locator("#pair .text").all_inner_texts()
    assert [one.partition("\n")[2] for one in shown] == [TEXTS[1], TEXTS[2]]
    page.keyboard.press("ArrowRight")  # there is nothing further
    expect(page.locator("#map tbody tr").nth(1).locator("td").nth(2)).to_be_focused()
    area(page, 1).press("Enter")  # the map's numbers stay those of the texts
    expect(page.locator("#map thead th")).to_have_text(["1", "3", "4"])
    expect(area(page, 2)).to_be_focused()
    page.keyboard.press("Backspace")
    expect(page.locator("#map thead th")).to_have_text(["1", "2", "3"])
    expect(area(page, 2)).to_be_focused()
    page.get_by_role("button", name="Clear all").press("Enter")
    expect(page.locator("#nothing")).to_be_visible()


def test_lines_pasted_into_an_empty_text_are_texts(watched: Watched, url: str) -> None:
    page = watched.open(url, [""])
    paste = """(area, text) => {
        const clipboardData = new DataTransfer();
        clipboardData.setData("text/plain", text);
        area.dispatchEvent(new ClipboardEvent("paste", { clipboardData, cancelable: true }));
    }"""
    area(page, 1).evaluate(paste, "one\r\n\n two \nthree")
    expect(page.locator("#map tbody th .text")).to_have_text(["one", "two", "three"])
    page.get_by_role("button", name="Clear all").click()
    area(page, 1).evaluate(paste, "\n".join(f"line {number}" for number in range(50)))
    expect(page.locator("#map tbody tr")).to_have_count(32)
    expect(page.locator("#note")).to_have_text("The map shows 32 texts at most.")


def test_it_fits_a_small_screen(watched: Watched, url: str) -> None:
    watched.page.set_viewport_size({"width": 360, "height": 740})
    texts = [f"{text} {number}" for number in range(4) for text in TEXTS] + ["x" * 400, LONG]
    page = watched.open(url, texts)
    row(page, 14).locator(".count").click()
    expect(row(page, 14).locator(".tokens")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    cell = page.locator("#map tbody td").first.bounding_box()
    assert cell is not None
    assert cell["width"] >= 34  # the map scrolls within itself, its numbers stay readable


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_are_readable_on_every_colour(
    watched: Watched, url: str, scheme: Any, measured: Callable[..., None]
) -> None:
    watched.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page = watched.open(url)
    contrasts = page.evaluate(
        """() => {
            const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            const luminance = (colour) => {
                pixel.fillStyle = colour;
                pixel.fillRect(0, 0, 1, 1);
                const [red, green, blue] = [...pixel.getImageData(0, 0, 1, 1).data].map((byte) =>
                    byte <= 10 ? byte / 3294 : ((byte / 255 + 0.055) / 1.055) ** 2.4);
                return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
            };
            const cell = document.querySelectorAll("#map tbody td")[1];
            return Array.from({ length: 101 }, (_, i) => {
                cell.style.setProperty("--heat", i / 100);
                const { color, backgroundColor } = getComputedStyle(cell);
                const [a, b] = [luminance(color), luminance(backgroundColor)];
                return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), b];
            });
        }"""
    )
    measured(f"least contrast in {scheme}", min(contrast for contrast, _ in contrasts), ": 1")
    assert min(contrast for contrast, _ in contrasts) >= 4.5  # WCAG 2.2, AA
    # Read without colours, more heat is more ink throughout.
    steps = np.diff([luminance for _, luminance in contrasts])
    assert (steps < 0).all() if scheme == "light" else (steps > 0).all()


def test_files_are_kept_by_browsers_as_long_as_they_are_the_same(ask: httpx.Client) -> None:
    index = ask.get("/")
    assert index.headers["Content-Type"] == "text/html; charset=utf-8"
    assert index.headers["Cache-Control"] == "no-cache"
    assert "unsafe" not in index.headers["Content-Security-Policy"]
    assert index.headers["X-Content-Type-Options"] == "nosniff"
    again = ask.get("/", headers={"If-None-Match": index.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert ask.head("/").status_code == 200
    script = SCRIPT.search(index.text)
    assert script is not None
    named = ask.get(f"/{script[0]}")
    assert named.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert named.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert re.search(r'from "\./gateway\.js\?v=\w+"', named.text)  # so are all that it imports
    for other in ("/page/page.js", "/page/page.js?v=old"):
        assert ask.get(other).headers["Cache-Control"] == "no-cache"
    assert "/" not in ask.get("/openapi.json").json()["paths"]
