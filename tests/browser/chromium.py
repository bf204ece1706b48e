"""A real browser: Chromium, driven by Playwright, and pages that tell what they did.

The browser is the system's (Debian: `apt-get install chromium`). Where there is none its tests are skipped, or fail
where `ONCLOCK_TEST_BROWSER=require` says that they must be run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

REQUIRE = "ONCLOCK_TEST_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A desktop's window and a telephone.
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 375, "height": 740}
# Starting on a machine that is busy with other tests; what is waited for comes within a step of five seconds or two.
START_MS = 60_000
WAIT_MS = 40_000


def chromium() -> str:
    """Its path. Skips or fails the test (see above) where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        reason = "needs a browser (Debian: apt-get install chromium)"
        if os.environ.get(REQUIRE) == "require":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    """Without a window. Root, as in a container, has no sandbox to give it."""
    path = chromium()
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments, timeout=START_MS)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page, with everything that went wrong on it and every address that it asked for."""

    def __init__(self, browser: Browser, url: str, viewport: dict[str, int], **options: Any) -> None:
        self.url = url
        self.context = browser.new_context(viewport=viewport, **options)  # type: ignore[arg-type]
        self.context.set_default_timeout(WAIT_MS)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on(
            "console",
            lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self) -> Page:
        """Load it; returns when it has shown something."""
        self.page.goto(self.url)
        self.page.wait_for_selector("#headline:not(:empty)")
        return self.page

    def close(self) -> None:
        """Leave. Raises `AssertionError` when the page complained, or asked for anything but its server's."""
        self.context.close()
        assert self.complaints == []
        own = urlsplit(self.url)
        for address in self.asked:
            asked = urlsplit(address)
            assert asked.scheme == "data" or (asked.scheme, asked.netloc) == (own.scheme, own.netloc), address
            assert asked.scheme == "data" or asked.path in ("/", "/status", "/status.json"), address


@contextlib.contextmanager
def visit(browser: Browser, url: str, viewport: dict[str, int], **options: Any) -> Iterator[Visit]:
    """A visit that is checked when it ends well."""
    visiting = Visit(browser, url, viewport, **options)
    try:
        yield visiting
    except BaseException:
        visiting.context.close()
        raise
    visiting.close()


def overflow(page: Page) -> list[str]:
    """What sticks out of the window sideways: elements, by tag, class and text. Nothing should."""
    found = page.evaluate(
        """() => [...document.body.querySelectorAll("*")].filter((node) => {
             const box = node.getBoundingClientRect(), style = getComputedStyle(node);
             return box.width && style.clipPath === "none" && (box.right > innerWidth + 0.5 || box.left < -0.5);
           }).map((node) => `${node.tagName} ${node.className} ${node.textContent.slice(0, 40)}`)"""
    )
    wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return [*map(str, found), *([f"the document, by {wider}"] if wider > 0 else [])]
