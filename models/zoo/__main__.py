"""`python -m models.zoo`: see `models.zoo.command`."""

from __future__ import annotations

import sys

from models.zoo.command import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m models.zoo"))
