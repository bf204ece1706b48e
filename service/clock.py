"""The one clock: integer nanoseconds, monotonic, unrelated to the time of day.

Decisions never read it: they are told the time. Only the threads that drive them do.
"""

from __future__ import annotations

import time

now_ns = time.monotonic_ns

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

# Later than any deadline (292 years): "no deadline" without a special case in comparisons.
NEVER_NS = 2**63 - 1
