"""Where a server's certificate is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where they are: PEM files. With `client_ca`, clients need a certificate of one of the authorities in it."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.certificate, self.key, *(() if self.client_ca is None else (self.client_ca,)))
