"""The demo's page in a real browser without a window: played, driven by keyboard, on a phone, in the dark.

Skipped where Playwright or a system Chromium is missing. DIAGONAL_SCREENSHOTS=FOLDER keeps pictures to look at.
"""

import os
import shutil
import time
from pathlib import Path

import pytest
from test_demo import PROMPT, pipe, serve  # noqa: F401  (fixtures)
from test_demo_image import RED

from server.player import Player

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, serve, request):  # noqa: F811
    """`open_page(**of new_page) -> page` with what went wrong in it in `page.problems`."""
    port = serve()
    pages = []

    def start(**options):
        page = browser.new_page(**options)
        page.problems = []
        page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        wait(page, "document.querySelector('#table').textContent.includes('total')")
        pages.append(page)
        return page

    yield start
    for page in pages:
        keep(page, request.node.name)
        page.close()


def keep(page, name: str, full_page: bool = True) -> None:
    folder = os.environ.get("DIAGONAL_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=full_page)


def wait(page, condition: str, seconds: float = 120) -> None:
    """Until `condition` is true in the page. Playwright's own wait would need `eval`, which the page forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"{condition}: {page.inner_text('#status')}"
        page.wait_for_timeout(30)


def number(page, name: str) -> float:
    return float(page.locator(f"#{name}").inner_text())


def test_a_visit_by_mouse(open_page):
    page = open_page(viewport={"width": 1280, "height": 900})
    page.fill("#prompt", "a red circle moves right")
    page.click("#play")
    wait(page, "document.querySelectorAll('#strip li').length >= 4")
    assert number(page, "latency") < 2000
    page.fill("#prompt", "a blue square moves up")
    page.click("#say")
    wait(page, "document.querySelector('#status').textContent.includes('Playing: a blue square')")
    wait(page, "Math.abs(Number(document.querySelector('#shown-fps').value) - 16) < 2")
    page.click("#strip li:nth-child(3) button")
    wait(page, "document.querySelector('#status').textContent.includes('Playing')")
    page.click("#stop")
    wait(page, "document.querySelector('#status').textContent === 'Stopped.'")
    with page.expect_download() as download:
        page.click("#mp4")
    assert Path(download.value.path()).stat().st_size > 1000
    assert not page.problems, page.problems


def test_a_visit_by_keyboard_on_a_phone_in_the_dark(open_page):
    page = open_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360, "nothing sticks out"
    play = page.locator("#play").bounding_box()
    assert play["y"] + play["height"] <= 740, "prompt and Play are on the first screen"
    assert play["height"] == page.locator("#say").bounding_box()["height"], "each button's name is one line"
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("a green triangle moves left")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "play"
    page.keyboard.press("Enter")
    wait(page, "document.querySelectorAll('#strip li').length >= 2")
    page.focus("#steps-0")
    before = page.inner_text("#nfe")
    page.keyboard.press("ArrowLeft")
    wait(page, f"document.querySelector('#nfe').textContent !== {before!r}")
    label = page.get_attribute("#screen", "aria-label")
    assert label == "Video of: a green triangle moves left"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')]"
        ".filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).length"
    )
    assert unnamed == 0, "every control has a name"
    assert not page.problems, page.problems


def test_play_while_playing_shows_what_was_asked_for(open_page, monkeypatch):
    """Prompt and latency are those of the new video, at every replay and branch; Enter plays."""
    make = Player.next

    def slow(self):
        if self.session.chunk in (0, 3):
            time.sleep(0.7)
        return make(self)

    monkeypatch.setattr(Player, "next", slow)
    page = open_page(viewport={"width": 1280, "height": 900})
    for prompt in ("a red circle moves right", "a blue square moves up", "a green triangle moves left"):
        page.fill("#prompt", prompt)
        page.keyboard.press("Enter")
        assert page.inner_text("#latency") == "–" and page.input_value("#prompt") == prompt
        page.wait_for_timeout(400)
        assert prompt not in page.inner_text("#status"), "not before it is there"
        wait(page, f"document.querySelector('#status').textContent === 'Playing: {prompt}'")
        assert 700 < number(page, "latency") < 5000
        wait(page, "document.querySelectorAll('#strip li').length >= 5")
    page.fill("#prompt", "a red square moves down")
    page.click("#strip li:nth-child(4) button")
    assert page.inner_text("#latency") == "–"
    wait(page, "document.querySelector('#status').textContent === 'Playing: a red square moves down'")
    assert 700 < number(page, "latency") < 5000
    assert not page.problems, page.problems


def test_shift_enter_is_a_new_line(open_page):
    page = open_page()
    page.fill("#prompt", "a red circle")
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#prompt") == "a red circle\n" and page.query_selector("#strip li") is None


def test_branches_stay_on_the_page(open_page):
    page = open_page(viewport={"width": 1280, "height": 900})
    page.fill("#prompt", "a red circle moves right")
    page.click("#play")
    wait(page, "document.querySelectorAll('#strip li').length >= 4")
    page.fill("#prompt", "a blue square moves up")
    page.click("#strip li:nth-child(3) button")
    wait(page, "document.querySelectorAll('#strip section:nth-child(2) li').length >= 2")
    page.click("#stop")
    first, branch = (page.query_selector_all(f"#strip section:nth-child({i}) li") for i in (1, 2))
    label = branch[0].query_selector("button").get_attribute("aria-label")
    assert len(first) >= 4 and label == "Go back to chunk 2: a blue square moves up"
    assert "Take 2, on from chunk 2: a blue square moves up" in page.inner_text("#strip section:nth-child(2) p")
    sizes = []
    for i in (1, 2):
        with page.expect_download() as download:
            page.click(f"#strip section:nth-child({i}) a")
        sizes.append(Path(download.value.path()).stat().st_size)
    assert min(sizes) > 1000 and sizes[0] != sizes[1]
    page.click("#play")
    wait(page, "document.querySelectorAll('#strip section').length === 1")
    assert not page.problems, page.problems


def test_on_a_phone_the_picture_is_in_sight_while_it_plays(open_page):
    for width, height in ((360, 740), (740, 360)):
        page = open_page(viewport={"width": width, "height": height}, has_touch=True, is_mobile=True)
        page.tap("#play")
        wait(page, "document.querySelectorAll('#strip li').length >= 3")
        page.wait_for_timeout(300)
        box = page.locator("#screen").bounding_box()
        assert 0 <= box["y"] and box["y"] + min(box["height"], height) <= height + 1, box


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (360, 740)], ids=["desktop", "phone"])
def test_twenty_seconds(open_page, size, scheme):
    """Only where pictures are kept to be looked at."""
    if "DIAGONAL_SCREENSHOTS" not in os.environ:
        pytest.skip("DIAGONAL_SCREENSHOTS is not set")
    page = open_page(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme)
    page.click("#play")
    page.wait_for_timeout(10_000)
    page.click("#strip li:nth-child(3) button")
    page.wait_for_timeout(10_000)
    keep(page, f"seen_{size[0]}_{scheme}", full_page=False)
    assert number(page, "stalls") <= 2 and not page.problems, page.problems


def test_the_page_begins_with_a_picture(open_page):
    page = open_page(viewport={"width": 1280, "height": 900})
    assert "not trained" in page.inner_text("#image-hint")
    page.set_input_files("#image", {"name": "x.txt", "mimeType": "image/png", "buffer": b"no picture"})
    wait(page, "document.querySelector('#status').textContent.includes('cannot be read')")
    assert page.is_hidden("#preview")
    page.problems.clear()  # the browser reports the refusal, too
    page.set_input_files("#image", {"name": "red.png", "mimeType": "image/png", "buffer": RED})
    wait(page, "document.querySelector('#status').textContent.includes('begins with this picture')")
    wait(page, "document.querySelector('#preview').naturalWidth === 300")
    page.fill("#prompt", PROMPT)
    page.click("#play")
    wait(page, "document.querySelectorAll('#strip li').length >= 2")
    assert number(page, "latency") < 5000
    page.click("#no-image")
    assert page.is_hidden("#preview") and "without" in page.inner_text("#status")
    assert not page.problems, page.problems


def test_words_that_the_model_does_not_know_are_named(open_page):
    page = open_page(viewport={"width": 1280, "height": 900})
    page.fill("#prompt", "a panda moves right")
    page.click("#play")
    wait(page, "document.querySelector('#warnings').textContent.includes('panda')")
    page.fill("#prompt", "a red circle moves right")
    page.click("#play")
    wait(page, "document.querySelector('#warnings').textContent === ''")
    assert not page.problems, page.problems
