"""The page itself: one document, and a policy that allows it nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

from service.metrics.pages import Page
from service.status_page import status_pages

ROOT = Path(__file__).parents[3]
PACKAGE, DOCS = ROOT / "service" / "status_page", ROOT / "docs"
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


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `#rrggbb`."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(scheme: str) -> None:
    """In both colour schemes as WCAG 2 AA wants it (4.5 to 1); lines and marks 3 to 1."""
    blocks = re.findall(r":root \{(.*?)color-scheme: (\w+);", page("/").body.decode(), re.DOTALL)
    colours = {name: dict(re.findall(r"--([\w-]+): (#\w{6})", text)) for text, name in blocks}[scheme]

    def contrast(one: str, other: str) -> float:
        light, dark = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for behind in ("page", "card"):
        for text in ("text", "soft", "ok", "risk", "bad", "calm"):
            assert contrast(text, behind) >= 4.5, (text, behind)
    for drawn in ("data", "bad", "text"):
        assert contrast(drawn, "card") >= 3, drawn
    # Queue and compute lie on each other.
    assert contrast("data", "data-fill") >= 3


def test_the_guide_has_every_cause_and_every_picture() -> None:
    """What the page can say is explained, and what is shown is small enough to be loaded with the text."""
    guide = (DOCS / "status-page.md").read_text()
    modules = "".join((PACKAGE / f"{name}.py").read_text() for name in ("causes", "verdict"))
    causes = {
        *re.findall(r'return "([a-z ]+)", (?:f?"|text)', modules),
        *re.findall(r'Level\.\w+, "([a-z ]+)"', modules),
        *re.findall(r'\("([a-z ]+)" if .* else "([a-z ]+)"\)', modules)[0],
    }
    assert len(causes) > 10
    for cause in causes:
        assert cause in guide, cause
    pictures = re.findall(r"\]\((images/[\w-]+\.png)\)", guide)
    assert len(pictures) == 6
    for picture in pictures:
        assert 10_000 < (DOCS / picture).stat().st_size < 150_000, picture
