"""The page itself: one document, and a policy that allows it nothing else."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from service.metrics.pages import Page
from service.status_page import status_pages

PAGES = status_pages(lambda: b'{"format":1}')


def page(path: str) -> Page:
    found = PAGES(path)
    assert found is not None
    return found


def test_paths() -> None:
    """The page at two, its figures at one, nothing elsewhere."""
    assert page("/") is page("/status")
    assert page("/status.json").body == b'{"format":1}'
    assert page("/status.json").content_type == "application/json"
    for path in ("/status/", "/page.js", "/metrics", "//", ""):
        assert PAGES(path) is None


@pytest.mark.parametrize("tag", ["style", "script"])
def test_the_policy_has_the_hash_of_what_is_inside(tag: str) -> None:
    """And of nothing else: no other style or script runs, whatever a page could be made to contain."""
    inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page("/").body.decode(), re.DOTALL)
    assert len(inside) == 1
    digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
    policy = dict(part.split(" ", 1) for part in dict(page("/").headers)["Content-Security-Policy"].split("; "))
    assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"


def test_nothing_is_fetched_from_anywhere() -> None:
    """No address of another host, no style or handler in an attribute, no way to make markup of text."""
    text = page("/").body.decode()
    addresses = set(re.findall(r"https?://[^\"'\s)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\s(style|on\w+|src)=[\"']", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert set(re.findall(r'href="([^"]*)"', text)) <= {"data:,", "/metrics", "/status.json"}


def test_nothing_is_kept_or_guessed() -> None:
    """Figures are never old, types never sniffed, whatever is answered."""
    for path in ("/", "/status.json"):
        headers = dict(page(path).headers)
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_is_small() -> None:
    """It is sent whole each time: less than a photograph's thumbnail, compressed by ten."""
    assert len(page("/").body) < 40_000
