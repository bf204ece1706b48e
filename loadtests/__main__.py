"""`python -m loadtests`."""

from __future__ import annotations

import signal
import sys

from loadtests.cli import main

if __name__ == "__main__":
    # Whoever ends this from outside (Kubernetes, a time limit) means its workers as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
