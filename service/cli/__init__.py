"""The command line: `onclock serve | key | profile | simulate | check | version`."""

from service.cli.main import main

__all__ = ["main"]
