"""The server's own view, read from its metrics page once a second: batches, queue, CPU, memory.

Any server with a Prometheus page will do: what is not there is not shown. A page that cannot be read is counted and is
no reason to stop."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

PERIOD_S = 1.0
TIMEOUT_S = 2.0

# Sums over all labels, by a short name: the first of the metrics that is there counts.
COUNTERS: dict[str, tuple[str, ...]] = {
    "cpu_s": ("process_cpu_seconds_total",),
    "requests": ("nv_inference_request_success", "nv_inference_request_success_total"),
    "failures": ("nv_inference_request_failure", "nv_inference_request_failure_total"),
    "rows": ("nv_inference_count", "nv_inference_count_total"),
    "batches": ("nv_inference_exec_count", "nv_inference_exec_count_total"),
    "queue_us": ("nv_inference_queue_duration_us", "nv_inference_queue_duration_us_total"),
    "infer_us": ("nv_inference_compute_infer_duration_us", "nv_inference_compute_infer_duration_us_total"),
}
GAUGES: dict[str, tuple[str, ...]] = {
    "pending": ("nv_inference_pending_request_count",),
    "memory_bytes": ("process_resident_memory_bytes",),
}


@dataclass(slots=True)
class Scrape:
    """One reading: seconds from the start of the run, and the sums by short name."""

    at_s: float
    values: dict[str, float] = field(default_factory=dict)


def parse(text: str) -> dict[str, float]:
    """The sums of one page, by the short names above."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    found: dict[str, float] = {}
    for short, names in (COUNTERS | GAUGES).items():
        for name in names:
            if name in sums:
                found[short] = sums[name]
                break
    return found


class Scraper:
    """Reads the page in a thread from `start` to `stop`."""

    def __init__(self, url: str | None) -> None:
        self._url = url
        self.scrapes: list[Scrape] = []
        self.failures = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scraper", daemon=True)
        self._start_ns = 0

    def start(self, start_ns: int) -> None:
        """Begin; times count from `start_ns` of the monotonic clock."""
        self._start_ns = start_ns
        if self._url is not None:
            self._thread.start()

    def stop(self) -> Sequence[Scrape]:
        """Read once more and end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(TIMEOUT_S + 1)
        return self.scrapes

    def _run(self) -> None:
        while True:
            stopping = self._stop.is_set()
            try:
                assert self._url is not None
                with urllib.request.urlopen(self._url, timeout=TIMEOUT_S) as page:
                    values = parse(page.read().decode("utf-8", "replace"))
                self.scrapes.append(Scrape((time.monotonic_ns() - self._start_ns) / 1e9, values))
            except (OSError, ValueError):
                self.failures += 1
            if stopping:
                return
            self._stop.wait(PERIOD_S)
