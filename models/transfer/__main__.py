"""`python -m models.transfer`: see `models.transfer.command`."""

from __future__ import annotations

import sys

from models.transfer.command import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m models.transfer"))
