"""What transfer learning is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from service.config.parameters import PARAMETERS
from service.repository.layout import valid_name


class OptionError(Exception):
    """What was asked for cannot be served. The message says what is expected."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to learn from, on what, and where the result goes. `backbone` empty: a table."""

    data: Path
    name: str
    repository: Path
    backbone: str = ""
    cut: str = ""
    test: Path | None = None
    label: str = ""
    text: str = ""
    image: str = ""
    split_column: str = ""
    leave_out: tuple[str, ...] = ()
    head: str = "auto"
    weighted: bool = False
    seed: int = 0
    slo_ms: float = 200.0
    shared: bool = False
    report: Path | None = None


def check_options(name: str, slo_ms: float) -> None:
    """Raises `OptionError` for a name or an objective that the server would refuse."""
    if not valid_name(name):
        raise OptionError(
            f"'{name}' is not a model's name; expected 1 to 255 letters, digits and _ . + : @ -, the first of them a "
            "letter, a digit or _"
        )
    objective = PARAMETERS["latency_slo_ms"]
    try:
        objective.parse(f"{slo_ms:g}")
    except ValueError:
        raise OptionError(f"an objective of {slo_ms:g} ms is not accepted; expected {objective.accepts}") from None
