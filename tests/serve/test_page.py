"""The page in a real browser: needs Chromium (Debian: apt-get install chromium) and pip install playwright."""

import shutil

import pytest
from support.server import serving

from rookery.serve.app import create_app

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(llm):
    with serving(create_app({"stories": llm})) as address:
        yield f"{address}/"


@pytest.fixture(params=[("light", 1200), ("dark", 390)], ids=lambda p: f"{p[0]}-{p[1]}")
def page(browser, address, request):
    scheme, width = request.param
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("#model option", state="attached")
    yield page
    assert [text for text in wrong if "Bad Request" not in text] == []  # that one a test provokes
    context.close()


def send(page, text, answers):
    """Types and sends with the keyboard alone; waits until so many answers are in the tree."""
    page.focus("#text")
    page.keyboard.type(text)
    page.keyboard.press("Control+Enter")
    page.locator("#tree li").nth(answers - 1).wait_for(state="attached")
    page.locator("#send:enabled").wait_for()


def test_a_text_is_continued_forked_and_stopped(page):
    page.select_option("#mode", "continue")
    send(page, "Once upon a time", 1)
    whole = page.inner_text("#page")
    assert whole.startswith("Once upon a time")
    assert len(whole) > 40
    send(page, " But then", 2)
    assert page.inner_text("#page").startswith(whole.rstrip())
    page.locator("#tree button").first.focus()
    page.keyboard.press("Enter")  # back to the first place
    assert page.inner_text("#page") == whole
    page.fill("#max_tokens", "4000")
    page.focus("#text")
    page.keyboard.type(" The cat")
    page.keyboard.press("Control+Enter")
    page.keyboard.press("Escape")
    page.locator("#tree li").nth(2).wait_for(state="attached")
    page.locator("#send:enabled").wait_for()
    assert page.locator("#tree > li").count() == 1
    assert page.locator("#tree > li > ul > li").count() == 2  # a fork
    assert page.inner_text("#told").split()[1] == "tokens"
    assert page.evaluate("() => document.querySelector('#picture').width") == 4  # heads of the model


def test_a_conversation_begins_anew_and_an_error_is_said(page):
    send(page, "Hello", 1)
    assert page.locator(".turn.user").count() == 1
    assert page.locator(".turn.assistant").inner_text().strip()
    page.click("#fresh")
    assert page.inner_text("#page") == ""
    page.fill("#temperature", "9")
    page.fill("#text", "Hello")
    page.click("#send")
    page.locator(".turn.error").wait_for()
    assert "temperature" in page.inner_text(".turn.error")
    assert page.input_value("#text") == "Hello"  # nothing typed is lost
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


COUNTED = (
    "() => { window.seen = []; const old = draw; draw = norms => { seen.push($('told').textContent); old(norms); }; }"
)


def test_the_picture_moves_while_text_is_read_and_written(page):
    page.select_option("#mode", "continue")
    page.evaluate(COUNTED)
    page.fill(
        "#text", f"Once there were {page.viewport_size} cats. " * 700
    )  # of each page its own: nothing is read twice
    page.fill("#max_tokens", "300")
    page.click("#send")
    page.locator("#send:enabled").wait_for(timeout=120_000)
    seen = page.evaluate("() => seen")
    assert any(text.startswith("reading, ") for text in seen)
    assert any(text.endswith("tokens/s") for text in seen)
    assert len(seen) > 4
    words = page.inner_text("#bytes").split()
    assert words[2:4] == ["tokens", "in"]
    assert page.inner_text("#total").startswith("· 1 in ")


def test_the_tree_is_walked_and_continued_by_keyboard_alone(page):
    def tab_to(inside, key):
        for _ in range(40):
            page.keyboard.press(key)
            if page.evaluate(f"() => document.activeElement.closest('{inside}') !== null"):
                return
        raise AssertionError(f"{key} does not lead to {inside}")

    page.select_option("#mode", "continue")
    page.fill("#max_tokens", "10")
    send(page, "One day", 1)
    send(page, " a dog", 2)
    whole = page.inner_text("#page")
    tab_to("#tree", "Tab")
    page.keyboard.press("ArrowLeft")  # from the second place to the one it came from
    page.keyboard.press("Enter")
    assert whole.startswith(page.inner_text("#page"))
    assert len(page.inner_text("#page")) < len(whole)
    tab_to("#text", "Shift+Tab")
    page.keyboard.type(" a bird")
    page.keyboard.press("Control+Enter")
    page.locator("#tree > li > ul > li").nth(1).wait_for(state="attached")
    page.locator("#send:enabled").wait_for()
    assert " a bird" in page.inner_text("#page")
    tab_to("#tree", "Tab")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert page.inner_text("#page") == whole
    assert page.evaluate("() => document.activeElement.getAttribute('aria-current')") == "true"
