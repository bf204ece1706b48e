"""A run on disk: one Parquet file with a row per request, and everything else about the run in its metadata.

Other tools read it as it is (`pandas.read_parquet`): `outcome` and `entry_name` are there in words.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loadtests.errors import LoadTestError
from loadtests.outcome import RECORD, Ints, Outcome, Records, classify
from loadtests.scrape import Scrape

# The key of the file's metadata, and the layout's version: raised when a reader of older files would go wrong.
METADATA = b"onclock.loadtest"
FORMAT = 1


@dataclass(slots=True)
class EntryInfo:
    """What a report needs to know of an entry of the load."""

    name: str
    model: str
    slo_s: float | None
    arrivals: str


@dataclass(slots=True)
class RunInfo:
    """All about a run but its requests. Times in seconds from its start."""

    name: str
    description: str
    server: str
    server_name: str
    started_at: str  # ISO 8601, UTC
    start_ns: int  # the same moment on the client's monotonic clock, from which all times count
    seed: int
    plan: str  # hash of the plan
    warm_up_s: float
    duration_s: float
    workers: int
    closed: bool
    capacity: float | None
    entries: list[EntryInfo]
    scenario: dict[str, Any]
    worker_cpu: list[float]  # share of a core each worker used
    messages: dict[str, list[str]] = field(default_factory=dict)  # a server's words, by status
    rates: dict[str, list[float]] = field(default_factory=dict)  # the intended rate of the whole load, over time
    client: dict[str, str] = field(default_factory=dict)
    scrapes: list[Scrape] = field(default_factory=list)
    scrape_failures: int = 0


@dataclass(slots=True)
class Run:
    """A finished run."""

    info: RunInfo
    records: Records

    @property
    def counted(self) -> Records:
        """The requests of the measured part."""
        return self.records[self.records["intended_ns"] >= round(self.info.warm_up_s * 1e9)]

    def slo_ns(self, records: Records) -> Ints:
        """The objective of each record, ns; 0 = none."""
        each = np.array([round((entry.slo_s or 0) * 1e9) for entry in self.info.entries], np.int64)
        result: Ints = each[records["entry"]]
        return result

    def outcomes(self, records: Records) -> Any:
        """The `Outcome` of each record."""
        return classify(records, self.slo_ns(records))


def save(run: Run, path: Path) -> None:
    """Write the file. Raises `LoadTestError`."""
    columns = {name: pa.array(np.ascontiguousarray(run.records[name])) for name in RECORD.names or ()}
    names = np.array([outcome.name.lower() for outcome in Outcome])
    columns["outcome"] = pa.array(names[run.outcomes(run.records)]).dictionary_encode()
    entries = np.array([entry.name for entry in run.info.entries])
    columns["entry_name"] = pa.array(entries[run.records["entry"]]).dictionary_encode()
    columns["slo_ns"] = pa.array(run.slo_ns(run.records))
    document = json.dumps({"format": FORMAT, "run": asdict(run.info)})
    table = pa.table(columns).replace_schema_metadata({METADATA: document.encode()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, compression="zstd")
    except OSError as error:
        raise LoadTestError(f"{path}: cannot be written: {error}") from error


def load(path: Path) -> Run:
    """Read a file that `save` wrote, or the newest `*.parquet` of a folder. Raises `LoadTestError`."""
    if path.is_dir():
        files = sorted(path.glob("*.parquet"), key=lambda file: file.stat().st_mtime)
        if not files:
            raise LoadTestError(
                f"{path}: no run in this folder; expected a *.parquet file of `python -m loadtests run`"
            )
        path = files[-1]
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise LoadTestError(f"{path}: cannot be read as a run: {error}") from error
    document = (table.schema.metadata or {}).get(METADATA)
    if document is None:
        raise LoadTestError(f"{path}: a Parquet file, but not of a load test")
    parsed = json.loads(document)
    if parsed["format"] != FORMAT:
        raise LoadTestError(f"{path}: written by another version (format {parsed['format']}, this one reads {FORMAT})")
    records = np.zeros(table.num_rows, RECORD)
    for name in RECORD.names or ():
        records[name] = table.column(name).to_numpy()
    info = parsed["run"]
    info["entries"] = [EntryInfo(**entry) for entry in info["entries"]]
    info["scrapes"] = [Scrape(**scrape) for scrape in info["scrapes"]]
    return Run(RunInfo(**info), records)
