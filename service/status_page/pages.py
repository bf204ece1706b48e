"""The page at `/` and `/status`, and what it asks for every few seconds, `/status.json`.

One HTML document with its style and script inside: nothing else is loaded, from this server or any other, and the
Content-Security-Policy allows no more: the two hashes, and `/status.json`. Whatever a model is called, it cannot become
markup: the script only ever sets text (the policy forbids it anything else, `require-trusted-types-for`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import cache
from importlib import resources

from service.metrics.pages import Page

_COMMON = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


def status_pages(document: Callable[[], bytes]) -> Callable[[str], Page | None]:
    """From a path to its page; `document` makes `/status.json`."""

    def pages(path: str) -> Page | None:
        if path in ("/", "/status"):
            return _page()
        if path == "/status.json":
            return Page("application/json", document(), _COMMON)
        return None

    return pages


@cache
def _page() -> Page:
    style, script = _asset("page.css"), _asset("page.js")
    body = _asset("page.html").replace("/*style*/", style).replace("/*script*/", script)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
    headers = (*_COMMON, ("Content-Security-Policy", policy), ("Cross-Origin-Opener-Policy", "same-origin"))
    return Page("text/html; charset=utf-8", body.encode(), headers)


def _asset(name: str) -> str:
    return (resources.files("service.status_page") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
