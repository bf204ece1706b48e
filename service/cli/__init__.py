"""The command line: `onclock serve | profile | simulate | check | version`."""

from service.cli.main import main

__all__ = ["main"]
