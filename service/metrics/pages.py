"""Pages for people on the metrics port, and how a browser shows a key there.

A browser cannot send `Authorization: Bearer`, but asks for a name and a password where it is offered Basic: the
password is then the key, the name is nobody's business. (RFC 7617; a scraper's `basic_auth` works the same way.)
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass

_BASIC = "basic "
# In the order of preference of who can choose.
CHALLENGES = (("WWW-Authenticate", "Bearer"), ("WWW-Authenticate", 'Basic realm="onclock metrics", charset="UTF-8"'))


@dataclass(frozen=True, slots=True)
class Page:
    """What is answered to a path."""

    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


# From a path, which begins with a slash and has no query, to its page; None: there is none.
Pages = Callable[[str], Page | None]


def no_pages(_path: str) -> Page | None:
    """Metrics and nothing else."""
    return None


def as_bearer(header: str | None) -> str | None:
    """An `Authorization` header, with Basic credentials turned into the Bearer key that is their password."""
    if header is None or header[: len(_BASIC)].lower() != _BASIC:
        return header
    try:
        credentials = base64.b64decode(header[len(_BASIC) :].strip(), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return header
    _, separator, password = credentials.partition(":")
    return f"Bearer {password}" if separator else header
