"""What transfer learning is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
