"""The Space in headless Chromium, with the shipped model: `make space-check`. Not part of `make test`.

Pictures of every stage are left in runs/space, to be looked at.
"""

import re
import shutil
import time
from pathlib import Path

import pytest
from multiverse.hub_card.app import Space, build
from multiverse.hub_card.checkpoint import load_demo_model
from multiverse.hub_card.space_page import SPACE_STYLE
from playwright.sync_api import Page, expect, sync_playwright

PICTURES = Path("runs/space")
#: Seconds that a step of a test may take; the model runs beside the browser.
PATIENCE = 180_000


@pytest.fixture(scope="module")
def address():
    page = build(Space(*load_demo_model()))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, css=SPACE_STYLE, footer_links=[])
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "No Chromium: install it (Debian: `apt install chromium`)."
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as a person of its own would."""
    contexts = []

    def open_page(width: int = 1200, height: int = 1000, dark: bool = False) -> Page:
        scheme = "dark" if dark else "light"
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address + ("?__theme=dark" if dark else ""))
        page.get_by_role("button", name="Run").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


def picture(page: Page, name: str) -> None:
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def run(page: Page) -> None:
    page.get_by_role("button", name="Run").click()


def cards(page: Page) -> list[str]:
    return page.locator(".live-path .live-text").all_inner_texts()


def grown(page: Page, count: int) -> None:
    """Waits until `count` columns have grown between two looks."""
    page.locator(".live-path").nth(count - 1).wait_for()
    end = time.monotonic() + PATIENCE / 1000
    before = cards(page)
    while True:
        time.sleep(0.4)
        after = cards(page)
        if sum(new != old for new, old in zip(after, before, strict=False)) >= count:
            return
        assert time.monotonic() < end, (before, after)
        before = after


def verdict(page: Page) -> str:
    return page.locator(".live-verdict").inner_text(timeout=PATIENCE)


def test_three_branches_change_at_once_merge_and_are_summed_up(visit):
    page = visit()
    picture(page, "1_start")
    run(page)
    grown(page, 3)
    picture(page, "2_running")
    assert "sequential steps" in verdict(page)
    picture(page, "3_finished")
    assert page.locator(".live-path.live-finished").count() == 3
    assert page.locator(".live-caret").count() == 0
    assert "Answer:" in page.locator(".live-root").inner_text()
    assert page.locator("#results svg[role=img]").count() == 2
    assert page.locator("#results .mv-problem").count() == 0
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_both_modes_race_on_one_clock(visit):
    page = visit()
    page.get_by_text("a sum made of two parts").click()
    expect(page.get_by_label("Problem")).to_have_value(re.compile("C1"))
    page.get_by_text("race: both at once").click()
    run(page)
    grown(page, 3)
    seconds = [float(text) for text in page.locator(".live-figures div:first-child dd").all_inner_texts()]
    # Whatever the steps cost, both have had the same time but for a step.
    assert len(seconds) == 2
    assert abs(seconds[0] - seconds[1]) < 0.5
    assert page.locator(".live-lane").nth(1).locator(".live-path.live-writing").count() <= 1
    picture(page, "4_race")
    text = verdict(page)
    picture(page, "5_race_finished")
    faster = re.search(r"token for token, in [\d.]+ instead of [\d.]+ seconds, ([\d.]+) times faster", text)
    assert faster is not None, text
    assert float(faster[1]) > 1.2
    assert page.locator(".live-lane").first.locator(".live-first").count() == 1


def test_stop_keeps_what_is_there_and_two_people_do_not_meet(visit):
    pages = [visit(), visit()]
    for page in pages:
        run(page)
    for page in pages:
        grown(page, 3)
    pages[0].get_by_role("button", name="Stop").click()
    assert "Stopped." in verdict(pages[0])
    picture(pages[0], "6_stopped")
    assert pages[0].locator(".live-path").count() == 3
    assert "sequential steps" in verdict(pages[1])
    # And it runs again.
    run(pages[0])
    grown(pages[0], 3)
    pages[0].get_by_role("button", name="Stop").click()
    assert "Stopped." in verdict(pages[0])


def test_the_keyboard_is_enough(visit):
    page = visit()
    page.get_by_label("Problem").focus()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "Run":
            break
    page.keyboard.press("Enter")
    grown(page, 3)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Stop"
    page.keyboard.press("Enter")
    assert "Stopped." in verdict(page)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_narrow_screen_shows_everything_without_scrolling_sideways(dark, visit):
    page = visit(390, 844, dark)
    run(page)
    grown(page, 3)
    picture(page, f"7_narrow_{'dark' if dark else 'light'}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="Stop").click()
    assert "Stopped." in verdict(page)
    picture(page, f"8_narrow_results_{'dark' if dark else 'light'}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_cannot_be_asked_is_refused_and_what_looks_like_code_is_text(visit):
    page = visit()
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.get_by_label("Problem").fill("")
    run(page)
    page.get_by_text("There is no problem yet").wait_for()
    page.get_by_label("Problem").fill("1 " * 1999)
    run(page)
    page.get_by_text("this demo takes 1,024").wait_for()
    picture(page, "9_refused")
    trick = "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}"
    page.get_by_label("Problem").fill(f"Find {trick}.\n{trick} = 1+2+3+4+5")
    page.get_by_label("Longest answer").last.fill("64")
    run(page)
    verdict(page)
    assert page.locator("#lanes img").count() == 0
    assert dialogs == []
