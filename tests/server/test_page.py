"""The page in a real browser without a window: played, steered, compared, by keyboard, on a phone, in the dark.

Skipped where Playwright or a system Chromium is missing. DIAGONAL_SCREENSHOTS=FOLDER keeps pictures to look at.
"""

import io
import json
import os
import shutil
import time
from pathlib import Path

import av
import pytest
from api_case import ALICE, KEYS, Running
from PIL import Image

from server.access import Keys
from server.limits import Limits
from server.worker_messages import ModelSource
from server.workers import WorkerPool

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"), pytest.mark.slow]
LIMIT_S = 600  # of a wait; where a machine is busy a worker takes minutes to load its model
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One worker with the tiny model, which takes four streams however slow the machine is."""
    pool = WorkerPool(ModelSource("configs/tiny.yaml"), limits=Limits(streams=4))
    with Running(tmp_path_factory.mktemp("jobs"), pool, keys=Keys({})) as running:
        yield running


# What the status line has said, since one text may take the place of another before a test looks at it.
TOLD = (
    "window.told = []; new MutationObserver((changes) => {"
    " for (const { target, addedNodes } of changes) if (target.id === 'status')"
    " told.push(...[...addedNodes].map((text) => text.data)); }).observe(document, { childList: true, subtree: true });"
)


@pytest.fixture
def open_page(browser, request):
    """`open_page(url, **of new_page) -> page` with what went wrong in it in `page.problems`."""
    pages = []

    def start(url: str, script: str = "", **options):
        page = browser.new_page(**options)
        page.set_default_timeout(1000 * LIMIT_S)
        page.problems = []
        page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.add_init_script(TOLD + script)
        page.goto(url)
        pages.append(page)
        return page

    yield start
    folder = os.environ.get("DIAGONAL_SCREENSHOTS")
    for number, page in enumerate(pages):
        if folder:
            page.screenshot(path=Path(folder) / f"{request.node.name}{number}.png", full_page=True)
        page.close()


@pytest.fixture
def visit(open_page, server):
    """`visit(**of new_page) -> page` that is connected."""

    def start(**options):
        page = open_page(server.url + options.pop("anchor", ""), **options)
        wait(page, "document.querySelector('.table')?.textContent.includes('total')")
        return page

    return start


def wait(page, condition: str) -> None:
    """Until `condition` is true in the page. Playwright's own wait would need `eval`, which the page forbids."""
    deadline = time.monotonic() + LIMIT_S
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"{condition}: {page.evaluate('told')}"
        page.wait_for_timeout(30)


def wait_status(page, text: str) -> None:
    """Until the status line has said it, after what the call before this one waited for."""
    wait(page, f"(at => at >= 0 && told.splice(0, at + 1))(told.findIndex((one) => one.includes({text!r})))")


def wait_tiles(page, count: int, where: str = ".strip") -> None:
    wait(page, f"document.querySelectorAll('{where} li').length >= {count}")


def wait_next(page, tile) -> None:
    """Until another comes after it."""
    deadline = time.monotonic() + LIMIT_S
    while not tile.evaluate("button => button.closest('li').nextSibling !== null"):
        assert time.monotonic() < deadline, page.inner_text("#status")
        page.wait_for_timeout(30)


def test_a_visit_by_mouse(visit):
    page = visit(viewport=DESKTOP)
    assert page.is_hidden(".numbers"), "figures come with the first video"
    page.fill("#prompt", "a red circle moves right")
    page.click("#play")
    wait_status(page, "Playing: a red circle")
    assert page.inner_text(".nfe") == "17" and float(page.inner_text(".latency")) > 0
    wait_tiles(page, 3)
    page.fill("#prompt", "a blue square moves up")
    page.click("#change")
    wait_status(page, "The new prompt shows from")
    wait(page, "document.querySelector('.screen').dataset.prompt === 'a blue square moves up'")

    page.fill("#prompt", "a green triangle moves left")
    page.click(".strip li:nth-child(3) button")
    wait_status(page, "Playing: a green triangle")
    wait_tiles(page, 2, ".strip section:nth-child(2)")
    branch = page.inner_text(".strip section:nth-child(2) p")
    assert "Take 2, from 1.3 s of take 1 on: “a green triangle moves left”, seed 0" in branch

    page.click("#pause")
    assert page.inner_text("#pause") == "Resume"
    page.wait_for_timeout(300)
    at = page.evaluate("document.querySelector('video').currentTime")
    page.wait_for_timeout(400)
    assert page.evaluate("document.querySelector('video').currentTime") == at
    page.click("#pause")
    wait(page, f"document.querySelector('video').currentTime > {at}")

    chunks = len(page.query_selector_all(".strip section:nth-child(2) li"))
    with page.expect_download() as download:
        page.click(".strip section:nth-child(2) .mp4")
    assert download.value.suggested_filename == "a-green-triangle-moves-left-seed0-take2.mp4"
    with av.open(str(download.value.path())) as file:
        frames = sum(1 for _ in file.decode(video=0))
    assert frames % 12 == 9 and frames >= 9 + 12 * (1 + chunks), "what the branch shares is in its file"
    assert not page.problems, page.problems


def test_tiles_stay_where_they_are_pointed_at(visit):
    page = visit(viewport=PHONE)
    page.fill("#prompt", "a red circle moves right")
    page.click("#play")
    wait_tiles(page, 4)
    row = "document.querySelector('.strip ol')"
    page.evaluate(f"while ({row}.children.length < 60) {row}.prepend({row}.firstChild.cloneNode(true))")
    for hold, let_go in (
        (lambda tile: tile.hover(), lambda: page.mouse.move(0, 0)),
        (lambda tile: tile.focus(), lambda: page.focus("#prompt")),
    ):
        tile, last = (page.query_selector(f".strip li:nth-last-child({place}) button") for place in (3, 1))
        hold(tile)
        at = tile.bounding_box()
        wait_next(page, last)
        assert tile.bounding_box() == pytest.approx(at, abs=1), "while new ones come and the first are dropped"
        let_go()
        wait_next(page, page.query_selector(".strip li:last-child button"))
        assert tile.bounding_box()["x"] < at["x"] - 100, "the newest are in sight again"


def test_a_visit_by_keyboard_on_a_phone_in_the_dark(visit):
    page = visit(viewport=PHONE, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing sticks out"
    play = page.locator("#play").bounding_box()
    assert play["y"] + play["height"] <= 740, "prompt and Play are on the first screen"
    assert play["height"] == page.locator("#change").bounding_box()["height"], "each button's name is one line"
    page.focus("#prompt")
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#prompt").endswith("\n") and page.query_selector(".strip li") is None
    page.keyboard.press("Control+A")
    page.keyboard.type("a green triangle moves left")
    page.keyboard.press("Enter")
    wait_tiles(page, 2)
    label = "document.querySelector('.screen').getAttribute('aria-label')"
    wait(page, f"{label} === 'Video of: a green triangle moves left'")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    assert page.inner_text("#pause") == "Resume"
    page.focus(".slider input")
    before = page.inner_text(".cost")
    page.keyboard.press("ArrowLeft")
    wait(page, f"document.querySelector('.cost').textContent !== {before!r}")
    box = page.locator(".picture").bounding_box()
    assert -1 <= box["y"] <= 740 - box["height"], "the picture stays in sight while the form is used"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')]"
        ".filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).length"
    )
    assert unnamed == 0, "every control has a name"
    assert not page.problems, page.problems


def test_two_schedules_side_by_side_and_the_link_that_restores_them(visit):
    page = visit(viewport=DESKTOP)
    page.fill("#prompt", "a blue square moves up")
    page.fill("#seed", "5")
    page.click("#compare")
    wait(page, "document.querySelectorAll('.screen').length === 2")
    page.click("#play")
    for pane in (1, 2):
        wait_tiles(page, 2, f".pane:nth-child({pane})")
    assert [output.inner_text() for output in page.query_selector_all(".nfe")] == ["17", "35"]
    page.click("#share")
    wait_status(page, "link is")
    anchor = page.evaluate("location.hash")
    page.click("#compare")
    assert len(page.query_selector_all(".pane")) == 1
    other = visit(viewport=PHONE, anchor="/" + anchor)
    assert other.input_value("#prompt") == "a blue square moves up" and other.input_value("#seed") == "5"
    wait(other, "document.querySelectorAll('.table').length === 2")
    wait(other, "document.querySelectorAll('.table')[1].textContent.includes('35 NFE')")
    assert not page.problems + other.problems, page.problems + other.problems


def test_without_media_source_extensions_frames_are_pictures(visit):
    page = visit(viewport=DESKTOP, script="delete window.MediaSource; delete window.ManagedMediaSource;")
    page.click("#play")
    wait_tiles(page, 4)
    wait(page, "document.querySelector('canvas').dataset.prompt !== undefined")
    lit = "document.querySelector('canvas').getContext('2d').getImageData(5, 5, 1, 1).data[0]"
    assert page.evaluate(lit) > 50 and page.query_selector(".mp4") is None
    assert not page.problems, page.problems


def test_a_picture_to_begin_with_and_words_that_the_model_does_not_know(visit):
    page, red = visit(viewport=DESKTOP), io.BytesIO()
    Image.new("RGB", (300, 200), (200, 30, 30)).save(red, "png")
    assert "not trained" not in page.inner_text("#image-hint")
    page.set_input_files("#image", {"name": "x.txt", "mimeType": "image/png", "buffer": b"no picture"})
    wait_status(page, "cannot be read")
    assert page.is_hidden("#preview")
    page.problems.clear()  # the browser reports the refusal, too
    page.set_input_files("#image", {"name": "red.png", "mimeType": "image/png", "buffer": red.getvalue()})
    wait_status(page, "begins with this picture")
    page.fill("#prompt", "a panda moves right")
    page.click("#play")
    wait_tiles(page, 1)
    assert "panda" in page.inner_text(".warnings")
    page.click("#no-image")
    wait_status(page, "without a picture")
    assert page.is_hidden("#preview")
    assert not page.problems, page.problems


SOCKETS = (
    "window.sockets = []; const Own = WebSocket;"
    "window.WebSocket = class extends Own { constructor(...a) { super(...a); sockets.push(this); } };"
)


def test_a_connection_that_was_closed_is_made_again_by_play_and_takes_stay(visit):
    page, red = visit(viewport=DESKTOP, script=SOCKETS), io.BytesIO()
    Image.new("RGB", (300, 200), (200, 30, 30)).save(red, "png")
    page.set_input_files("#image", {"name": "red.png", "mimeType": "image/png", "buffer": red.getvalue()})
    wait_status(page, "begins with this picture")
    for take in (1, 2):
        page.click("#play")
        wait_tiles(page, 3, f'section[data-take="{take}"]')
        wait_status(page, "Playing:")
        page.evaluate("sockets.at(-1).close(4000, 'gone')")
        wait_status(page, "The connection is closed (gone); press Play to connect again.")
    page.fill("#prompt", "  ")
    page.evaluate("document.querySelector('#play').click(), document.querySelector('#play').click()")
    wait_status(page, "prompt is empty")
    assert page.evaluate("sockets.slice(-3).map((one) => one.readyState)") == [3, 3, 1], "two presses connect once"
    assert page.is_disabled('section[data-take="2"] li:nth-child(2) button'), "the server has forgotten it"
    page.fill("#prompt", "a red circle moves right")
    page.click("#play")
    wait_tiles(page, 3, 'section[data-take="3"]')
    assert "Take 3: " in page.inner_text(".strip section:nth-child(3)")
    page.fill("#prompt", "a green triangle moves left")
    page.click('section[data-take="3"] li:nth-child(2) button')
    wait_tiles(page, 1, 'section[data-take="4"]')
    wait_status(page, "Playing: a green triangle")
    assert "of take 3 on: " in page.inner_text(".strip section:nth-child(4)")
    with page.expect_download() as download:
        page.click('section[data-take="1"] .mp4')
    with av.open(str(download.value.path())) as file:
        assert sum(1 for _ in file.decode(video=0)) >= 33
    other = "if (message.type === 'hello') message.model = 'another'; return message;"
    page.evaluate(f"(own => {{ JSON.parse = text => {{ const message = own(text); {other} }}; }})(JSON.parse)")
    page.evaluate("sockets.at(-1).close(4000, 'gone')")
    wait_status(page, "press Play")
    page.click("#play")
    wait_status(page, "; reload the page.")
    assert not page.problems, page.problems


def test_a_server_with_keys_asks_for_one_and_a_page_waits_for_the_model(open_page, tmp_path):
    with Running(tmp_path, keys=KEYS) as running:
        page = open_page(running.url, viewport=DESKTOP)
        page.wait_for_selector("#access[open]")
        page.fill("#key", "a-wrong-key-0123456789")
        page.keyboard.press("Enter")
        wait(page, "document.querySelector('#key-status').textContent.includes('not known')")
        page.fill("#key", ALICE)
        with page.expect_navigation():
            page.keyboard.press("Enter")
        wait_status(page, "being loaded")
        assert ALICE not in page.url


def test_what_was_refused_can_be_asked_for_again_and_a_schedule_can_be_gone_back_to(visit):
    page = visit(viewport=PHONE)
    page.fill("#prompt", "x" * 1000)
    page.click("#play")
    wait_tiles(page, 1)
    wait_status(page, "Playing: xxx")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "a word without an end sticks out of nothing"
    page.fill("#prompt", "  ")
    for _ in range(2):
        page.click("#change")
        wait_status(page, "prompt is empty")
    page.fill("#prompt", "a red circle moves right")
    page.fill("#seed", "-1")
    page.click("#change")
    assert page.evaluate("told") == [], "the browser says what is wrong in the form"
    page.fill("#seed", "0")
    page.select_option(".preset", "self_forcing")
    page.select_option(".context", "clean")
    page.click("#change")
    told = "told.filter((one) => one.startsWith('The new '))"
    wait(page, f"{told}.length === 2")
    prompt, schedule = page.evaluate(told)
    assert "prompt shows" in prompt and "schedule shows" in schedule, "the seed was not refused, nor changed"
    last = page.query_selector(".strip li:last-child button")
    assert last.get_attribute("title").endswith("4 steps"), "of self_forcing"
    wait_next(page, last)
    page.select_option(".preset", "own")
    page.select_option(".context", "last_step")
    last.click()
    wait_status(page, "Playing:")
    with page.expect_download() as download:
        page.click(".strip section:first-child .json")
    made = json.loads(download.value.path().read_text())
    assert made["schedule"]["steps"][:3] == [4, 3, 2]
    assert made["chunks"][-1]["schedule"] == {"preset": "self_forcing", "context": "clean"}
    assert "schedule" not in made["chunks"][0]
    branch = page.query_selector_all(".strip section:nth-child(2) li button")
    titles = [tile.get_attribute("title") for tile in branch]
    assert titles and all(title.endswith("2 steps") for title in titles), "a branch with the schedule of the form"
    assert not page.problems, page.problems


def test_a_take_whose_first_chunk_has_not_come_can_be_downloaded_if_it_shares_a_past(visit):
    page = visit(viewport=DESKTOP, anchor="/#schedule={broken")
    wait_status(page, "schedule cannot be read")
    at_once = (
        "new MutationObserver((_, one) => {{ one.disconnect();"
        "document.querySelector('.strip section:nth-child({}) .mp4').click(); }})"
        ".observe(document.querySelector('.strip'), {{ childList: true }})"
    )
    page.evaluate(at_once.format(1))
    page.click("#play")
    wait_status(page, "Take 1 has no chunk")
    wait_tiles(page, 2)
    page.evaluate(at_once.format(2))
    with page.expect_download() as download:
        page.click(".strip li:nth-child(2) button")
    with av.open(str(download.value.path())) as file:
        assert sum(1 for _ in file.decode(video=0)) == 9
    assert not page.problems, page.problems


def test_nothing_that_has_the_focus_is_behind_the_picture_on_a_phone(visit):
    page = visit(viewport=PHONE)
    page.focus(".context")
    for _ in range(8):
        page.keyboard.press("Shift+Tab")
        at, picture = (f"document.querySelector('{where}').getBoundingClientRect()" for where in (":focus", ".picture"))
        wait(page, f"{at}.top >= {picture}.bottom - 1")


def test_a_stream_that_is_refused_and_a_connection_that_is_closed_stay_told(open_page, tmp_path):
    pool = WorkerPool(ModelSource("configs/tiny.yaml"), limits=Limits(streams=1))
    with Running(tmp_path, pool, keys=Keys({})) as running:
        page = open_page(running.url, viewport=DESKTOP)
        wait(page, "document.querySelector('.table')?.textContent.includes('total')")
        page.click("#compare")
        wait(page, "document.querySelectorAll('.screen').length === 2")
        page.click("#play")
        wait_status(page, "A: Playing:")
        assert "try again in" in page.inner_text(".pane:nth-child(2) .warnings")
        page.click("#compare")
    for press in (lambda: None, lambda: page.click("#play"), lambda: page.click(".strip button[title]")):
        press()
        wait_status(page, "The connection is closed; press Play to connect again")
