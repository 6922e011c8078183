"""Headless Chromium for tests of the server's pages, and what they do in it."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (390, 1400)
# Controls that can be seen and have no name, and how far the page reaches beyond the window.
UNNAMED = """() => [...document.querySelectorAll("button, input, select, textarea, a, canvas, progress, summary")]
    .filter((control) => control.checkVisibility())
    .filter((control) => ![...(control.labels ?? [])].some((label) => label.textContent.trim())
        && !control.getAttribute("aria-label") && !control.textContent.trim() && !control.querySelector("img[alt]"))
    .map((control) => control.outerHTML)"""
BEYOND = "() => document.documentElement.scrollWidth - innerWidth"
GROUND = "() => getComputedStyle(document.body).backgroundColor"
GROUNDS = {"light": "rgb(246, 244, 240)", "dark": "rgb(20, 20, 19)"}


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is driven by the package playwright")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser here: install one of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Watched:
    """Opens pages of one server and keeps what went wrong in them."""

    def __init__(self, browser: Browser, url: str, patience_s: float) -> None:
        self.browser, self.url, self.patience_s = browser, url, patience_s
        self.problems: list[str] = []
        self.expected: list[str] = []  # parts of messages that a test provokes
        self.open: list[Any] = []

    def __call__(self, width: int = 1400, scheme: Any = "light", ready: bool = True, path: str = "") -> Page:
        context = self.browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.open.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * self.patience_s)
        page.on("console", lambda message: self.note(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.note(str(error)))
        page.goto(f"{self.url.rstrip('/')}/{path}")
        if ready:
            page.wait_for_selector("html[data-ready]")
        return page

    def note(self, text: str) -> None:
        if not any(part in text for part in self.expected):
            self.problems.append(text)


@contextmanager
def watching(browser: Browser, url: str, patience_s: float = 20) -> Iterator[Watched]:
    """Opens pages; afterwards nothing unexpected was logged."""
    watched = Watched(browser, url, patience_s)
    yield watched
    for context in watched.open:
        context.close()
    assert watched.problems == []


def generate(page: Page, prompt: str, seed: int) -> Any:
    """The card of the drawn image."""
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.click("#generate")
    page.wait_for_selector(f".result[data-seed='{seed}']")
    page.wait_for_selector("#progress", state="hidden")
    return page.locator(f".result[data-seed='{seed}']").first


def paint(page: Page) -> None:
    """A stroke across the upper half of the mask, from a quarter of its width to three quarters."""
    canvas = page.locator("#mask-canvas")
    canvas.evaluate("canvas => canvas.scrollIntoView({ block: 'center' })")
    box = canvas.bounding_box()
    assert box is not None
    across = box["width"]
    page.mouse.move(box["x"] + across * 0.25, box["y"] + across * 0.25)
    page.mouse.down()
    page.mouse.move(box["x"] + across * 0.75, box["y"] + across * 0.25, steps=4)
    page.mouse.up()


def uploaded(uri: str) -> Image.Image:
    """The image in a data URI, or in plain base64."""
    return Image.open(io.BytesIO(base64.b64decode(uri.rpartition(",")[2])))
