"""Which text format a scrape is answered in, by its `Accept` header. Pure.

OpenMetrics is for those who name it and do not prefer the classic format; everybody else gets what they always got.
"""

from __future__ import annotations

import re

_OPENMETRICS = "application/openmetrics-text"
_CLASSIC = "text/plain"
# Versions that we speak, or that are close enough: an absent one means any.
_VERSIONS = {_OPENMETRICS: ("1.0.0", "0.0.1", ""), _CLASSIC: ("0.0.4", "")}
_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


def wants_openmetrics(accept: str | None) -> bool:
    """Whether to answer in OpenMetrics. `accept`: all `Accept` headers, joined by commas; None: there is none."""
    openmetrics = -1.0
    # Of what stands for the classic format, the most exact decides: the type itself, text/*, */*.
    classic = (0, 0.0)
    for part in (accept or "").split(","):
        name, quality, version = _media_range(part)
        if version not in _VERSIONS.get(name, (version,)):
            continue
        if name == _OPENMETRICS:
            openmetrics = max(openmetrics, quality)
        exactness = {_CLASSIC: 3, "text/*": 2, "*/*": 1}.get(name, 0)
        if exactness:
            classic = max(classic, (exactness, quality))
    return openmetrics > 0 and openmetrics >= classic[1]


def _media_range(text: str) -> tuple[str, float, str]:
    """The type, its quality from 0 to 1 (0 as well when it cannot be read) and its version, if it has one."""
    name, *parameters = (piece.strip() for piece in text.split(";"))
    quality, version = 1.0, ""
    for parameter in parameters:
        key, _, value = (piece.strip() for piece in parameter.partition("="))
        value = value.strip('"')
        if key.lower() == "q":
            quality = float(value) if _QUALITY.fullmatch(value) else 0.0
        elif key.lower() == "version":
            version = value
    return name.lower(), quality, version
