"""The page at /, in headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from serving import LONGEST, Served, serving

from coreinfer_edge.run.llm import EdgeLLM

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

# CI sets the variable, and has a browser: there, these tests are not passed over.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None and "COREINFER_BROWSER" not in os.environ,
        reason="no Chromium: apt install chromium",
    ),
]

expect.set_options(timeout=LONGEST * 1000)

# The seed of the model makes its answer one of many tokens.
LONG = "Tell me a long story about a fox and a hen."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert BROWSER is not None, "there is no Chromium: apt install chromium"
    quiet = ("background-networking", "component-update", "sync", "gpu", "dev-shm-usage")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", *(f"--disable-{name}" for name in quiet)]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, demo: Served) -> Iterator[Page]:
    page = opened(browser, demo)
    yield page
    page.close()


def opened(browser: Browser, served: Served) -> Page:
    """The page, which may make no error and load nothing from elsewhere."""
    page = browser.new_page()
    page.on("pageerror", lambda error: pytest.fail(f"an error in the page: {error}"))

    def only_own(route: Route) -> None:
        assert route.request.url.startswith((served.url, "data:"))
        route.continue_()

    page.route("**/*", only_own)
    page.goto(served.url)
    return page


def ask(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def test_an_answer_comes_in_pieces_with_its_figures(page: Page, demo_llm: EdgeLLM) -> None:
    expect(page.locator("#model")).to_have_text("demo, context 1024")
    ask(page, "Why is the sky blue?")
    answer, figures = page.locator(".assistant"), page.locator(".figures")
    expect(page.locator("#stop")).to_be_visible()
    expect(figures).to_have_text(re.compile(r"^\d+\.\d tok/s · density 1\.00$"))
    first = answer.inner_text()
    expect(page.locator("#send")).to_be_visible()
    assert len(answer.inner_text()) > len(first)
    expect(figures).to_have_text(re.compile(r"tok/s · density 1\.00 · \d+ \+ \d+ tokens"))
    expect(page.locator(".user")).to_have_text("Why is the sky blue?")


def test_less_quality_is_told_with_what_it_costs_and_gains(page: Page) -> None:
    expect(page.locator("#explained")).to_have_text("the whole model")
    page.locator("#quality").fill("0")
    expect(page.locator("#explained")).to_contain_text("KL of 1 nats")
    ask(page, LONG)
    figures = page.locator(".figures")
    expect(figures).to_contain_text("warm-up, whole model")
    expect(figures).to_have_text(re.compile(r"density 0\.\d\d · estimated KL \d\.\d+"))
    page.click("#stop")
    expect(page.locator("#send")).to_be_visible()


def test_stop_keeps_what_was_said_and_frees_the_model(page: Page, demo: Served) -> None:
    ask(page, LONG)
    expect(page.locator(".figures")).to_contain_text("tok/s")
    page.click("#stop")
    expect(page.locator(".note")).to_have_text("stopped")
    demo.wait_idle()
    said = page.locator(".assistant").inner_text()
    ask(page, "And now?")
    expect(page.locator(".assistant")).to_have_count(2)
    assert page.locator(".assistant").first.inner_text() == said
    page.click("#stop")


def test_a_chat_outlives_a_reload_and_a_new_chat_begins_empty(page: Page, demo: Served) -> None:
    ask(page, "Hello!")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()
    said = page.locator(".assistant").inner_text()
    page.reload()
    expect(page.locator(".assistant")).to_have_text(said)
    ask(page, LONG)
    expect(page.locator(".figures").nth(1)).to_contain_text("tok/s")
    page.reload()  # in the middle of an answer
    demo.wait_idle()
    expect(page.locator(".user")).to_have_count(2)
    page.click("#new")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


def test_an_error_is_shown_and_the_question_is_kept(page: Page) -> None:
    ask(page, "word " * 2000)
    expect(page.locator(".error")).to_contain_text("do not fit into the context of 1024")
    assert page.input_value("#text").startswith("word word")
    expect(page.locator(".message")).to_have_count(1)  # of what was asked
    ask(page, "Hello!")
    expect(page.locator(".assistant")).to_have_count(1)
    page.click("#stop")


def test_what_a_model_says_is_shown_as_text_and_never_as_html(page: Page) -> None:
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    expect(page.locator(".user")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator(".message img, .message b").count() == 0
    page.click("#stop")


def test_a_server_that_ends_in_the_middle_is_told(browser: Browser, demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, grace=0.1) as served:
        page = opened(browser, served)
        ask(page, LONG)
        expect(page.locator(".figures")).to_contain_text("tok/s")
        served.server.should_exit = True
        expect(page.locator(".figures")).to_contain_text("cut: shutdown")
        served.thread.join(LONGEST)
        ask(page, "Hello?")
        expect(page.locator(".error")).to_have_text("the server does not answer")
        page.close()


def test_the_key_of_a_server_is_asked_for(browser: Browser, demo_llm: EdgeLLM) -> None:
    with serving(demo_llm, api_key="secret") as served:
        page = opened(browser, served)
        expect(page.locator("#key-form")).to_be_visible()
        expect(page.locator(".error")).to_have_text("this server asks for its API key")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator(".error")).to_have_text("this key is wrong")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        expect(page.locator("#model")).to_contain_text("context 1024")
        expect(page.locator("#key-form")).to_be_hidden()
        ask(page, "Hello!")
        expect(page.locator(".figures")).to_contain_text("tok/s")
        page.close()


def greedily(page: Page, **options: int) -> None:
    """Have the page ask so: drawn at random, a random model's first token can end the text."""

    def changed(route: Route) -> None:
        route.continue_(post_data={**route.request.post_data_json, "temperature": 0, **options})

    page.route("**/v1/completions", changed)


def test_an_answer_that_is_cut_at_the_pages_own_limit_says_so(
    browser: Browser, base_llm: EdgeLLM
) -> None:
    with serving(base_llm) as served:
        page = opened(browser, served)

        greedily(page, max_tokens=3)
        ask(page, "Hello")
        expect(page.locator(".figures")).to_contain_text("3 tokens · cut at 1024 tokens")
        page.close()


def test_a_base_model_continues_text_and_a_dense_one_has_no_slider(
    browser: Browser, base_llm: EdgeLLM, random_model: Callable[..., Path]
) -> None:
    with serving(base_llm) as served:
        page = opened(browser, served)
        expect(page.locator("#model")).to_contain_text("context")
        greedily(page)
        ask(page, "Hello")
        expect(page.locator(".figures")).to_contain_text("tok/s")
        page.close()
    with EdgeLLM(random_model("llama"), density=1.0) as dense, serving(dense) as served:
        page = opened(browser, served)
        expect(page.locator("#quality")).to_be_disabled()
        expect(page.locator("#explained")).to_contain_text("without core sets")
        page.close()
