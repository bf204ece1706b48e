"""A scenario: what is sent to which server, how, for how long, and what counts as a pass. A YAML file, checked.

Promise: a scenario that is accepted says nothing that is ignored, and every fault of one that is not is named by its
path with what was expected. Relative paths in it are relative to the file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from loadtests.errors import ScenarioError

_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(us|ms|s|m|h)\s*")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_RATE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(x|/s)?\s*")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

# Bounds with a reason: the plan of a run is held in memory (about 60 bytes a request), a worker is a process.
MAX_DURATION_S = 86_400.0
MAX_WORKERS = 64
MAX_CONNECTIONS = 256
MAX_VARIANTS = 10_000
MAX_CONCURRENCY = 4_096


def parse_duration(value: object) -> float:
    """Seconds: `20s`, `50ms`, `2m`, `1h`. A bare number other than 0 is refused: of what?"""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0:
        return 0.0
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no duration; expected a number with a unit, such as 20s, 50ms or 2m")
    return float(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests per second, or a multiple of the capacity (`of_capacity`)."""

    value: float
    of_capacity: bool = False

    def per_second(self, capacity: float | None) -> float:
        """The rate when the capacity is this. Raises `ScenarioError` when it is needed and unknown."""
        if not self.of_capacity:
            return self.value
        if capacity is None:
            raise ScenarioError(f"a rate of {self.value:g}x needs a capacity: add `capacity: measure`, or a number")
        return self.value * capacity


def parse_rate(value: object) -> Rate:
    """`500` and `500/s` are requests per second, `0.8x` a multiple of the capacity."""
    if isinstance(value, Rate):
        return value
    match = _RATE.fullmatch(str(value)) if isinstance(value, (int, float, str)) and value is not True else None
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{value!r} is no rate; expected requests per second above 0 (500) or a multiple (0.8x)")
    return Rate(float(match[1]), match[2] == "x")


def _weights(value: object) -> dict[int, float]:
    """`4`, or `{1: 0.7, 4: 0.3}`: numbers and how often each is drawn."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {value: 1.0}
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{value!r} is neither a number nor numbers with weights, such as {{1: 0.7, 4: 0.3}}")
    weights: dict[int, float] = {}
    for key, weight in value.items():
        number = int(key) if isinstance(key, str) and key.isdecimal() else key
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"{key!r}: {weight!r} is no number with a weight")
        if number < 1 or weight < 0:
            raise ValueError(f"{number}: {weight} needs a number of at least 1 and a weight of at least 0")
        weights[number] = float(weight)
    if sum(weights.values()) <= 0:
        raise ValueError("the weights are all 0")
    return weights


# Serialised as they are written, so that a run's own scenario can be read again.
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    Field(ge=0, le=MAX_DURATION_S),
    PlainSerializer(lambda seconds: f"{seconds!r}s"),
]
RateField = Annotated[
    Rate, PlainValidator(parse_rate), PlainSerializer(lambda rate: f"{rate.value!r}{'x' if rate.of_capacity else ''}")
]
Weights = Annotated[
    dict[int, float],
    PlainValidator(_weights),
    PlainSerializer(lambda weights: {str(number): weight for number, weight in weights.items()}),
]
Share = Annotated[float, Field(ge=0, le=1)]
Process = Literal["poisson", "gamma", "constant"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, populate_by_name=True)


class Constant(_Part):
    """One after another, at equal distance."""

    kind: Literal["constant"]
    rate: RateField


class Poisson(_Part):
    """Independent clients: exponential gaps."""

    kind: Literal["poisson"]
    rate: RateField


class Gamma(_Part):
    """Bursts: gamma gaps with a coefficient of variation (1 = Poisson)."""

    kind: Literal["gamma"]
    rate: RateField
    cv: float = Field(default=3.0, gt=0, le=20)


class Mmpp(_Part):
    """Calm and hot spells: a Poisson process whose rate switches between two levels."""

    kind: Literal["mmpp"]
    rate: RateField


class Ramp(_Part):
    """A rate that grows (or falls) evenly over the duration."""

    kind: Literal["ramp"]
    start: RateField = Field(alias="from")
    to: RateField
    process: Process = "poisson"
    cv: float = Field(default=3.0, gt=0, le=20)


class Step(_Part):
    """A rate and how long it lasts."""

    rate: RateField
    seconds: Duration = Field(alias="for", gt=0)


class Steps(_Part):
    """One rate after another; the last one lasts until the end."""

    kind: Literal["steps"]
    steps: tuple[Step, ...] = Field(min_length=1, max_length=1000)
    process: Process = "poisson"
    cv: float = Field(default=3.0, gt=0, le=20)


class Replay(_Part):
    """The arrivals of a trace file, `speed` times as fast, over and over when it is shorter than the run."""

    kind: Literal["replay"]
    file: Path
    format: Literal["plain", "azure2019", "azure2021", "azure_llm"] | None = None
    speed: float = Field(default=1.0, gt=0)
    rate: RateField | None = None  # instead of a speed: compressed to this mean
    loop: bool = True
    function: str | None = None  # azure2019: only this function's hash
    top: int | None = Field(default=None, ge=1)  # azure2019: only so many functions, those called most
    minutes: tuple[int, int] | None = None  # azure2019: from this minute of the day to that one, 1 to 1440

    @model_validator(mode="after")
    def _one_of_two(self) -> Replay:
        if self.rate is not None and self.speed != 1.0:
            raise ValueError("give `speed` or `rate`, not both: either one says how far the trace is compressed")
        return self


class Serverless(_Part):
    """What traces of serverless functions look like, without a download: many callers of very different rates, a daily
    swing, timers, bursts and fan-out."""

    kind: Literal["serverless"]
    rate: RateField


class Closed(_Part):
    """A closed loop: so many requests in flight, the next one sent when one is answered. Hides stalls; see the docs."""

    kind: Literal["closed"]
    concurrency: int = Field(ge=1, le=MAX_CONCURRENCY)


OpenArrivals = Annotated[
    Constant | Poisson | Gamma | Mmpp | Ramp | Steps | Replay | Serverless, Field(discriminator="kind")
]
Arrivals = Annotated[
    Constant | Poisson | Gamma | Mmpp | Ramp | Steps | Replay | Serverless | Closed, Field(discriminator="kind")
]


class Payload(_Part):
    """What requests carry. Nothing given: seeded random tensors made from the model's metadata."""

    dims: dict[str, tuple[int, ...]] = {}  # sizes for an input's open dimensions, without the batch
    ranges: dict[str, tuple[float, float]] = {}  # least and most of an input's random values
    npz: Path | None = None  # arrays by input name; the first dimension is the samples when the model batches
    npy: dict[str, Path] = {}  # one file per input, likewise
    images: Path | None = None  # a folder; each file goes through `preprocess`
    texts: Path | None = None  # a file with a text per line, or a folder of files
    preprocess: str | None = None  # "package.module:function": path or text -> {input name: array of one row}

    @model_validator(mode="after")
    def _one_source(self) -> Payload:
        given = [name for name in ("npz", "images", "texts") if getattr(self, name) is not None]
        given += ["npy"] if self.npy else []
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; a payload has one source")
        if given and (self.dims or self.ranges):
            raise ValueError(f"`dims` and `ranges` are for random tensors, and {given[0]} is given")
        if (self.images is not None) != (self.preprocess is not None) and self.texts is None:
            raise ValueError("`images` and `preprocess` belong together: the function makes tensors of a file")
        return self


class CancelPlan(_Part):
    """Requests the client gives up."""

    share: Share = 1.0
    after: Duration = Field(gt=0)


class Slow(_Part):
    """A slow client: so many bytes each way, so often."""

    bytes: int = Field(ge=1)
    every: Duration = Field(gt=0)


class Criteria(_Part):
    """Bounds on what was measured. Whatever is not given is not judged, except errors: none, unless more are
    allowed."""

    p50_ms: float | None = Field(default=None, gt=0)
    p90_ms: float | None = Field(default=None, gt=0)
    p99_ms: float | None = Field(default=None, gt=0)
    p999_ms: float | None = Field(default=None, gt=0)
    p99_within_slo: bool = False
    attainment: Share | None = None  # answered in time / offered (cancelled ones apart): at least
    goodput: float | None = Field(default=None, gt=0)  # answered in time, per second: at least
    goodput_of_capacity: float | None = Field(default=None, gt=0)
    late_share: Share | None = None  # late / answered: at most
    refused_share: Share | None = None  # at most
    reject_p50_ms: float | None = Field(default=None, gt=0)  # time to a refusal: at most
    reject_p99_ms: float | None = Field(default=None, gt=0)
    memory_growth_mib: float | None = Field(default=None, ge=0)  # of the server's process over the run: at most
    errors: Share = 0.0  # share of all that failed otherwise: at most
    recovery: Recovery | None = None


class Recovery(_Part):
    """After `after` (from the start of the measured part) the objective is kept again within `within` (default: 5
    objectives and a second)."""

    after: Duration
    within: Duration | None = None
    attainment: Share = 0.99


class Entry(_Part):
    """One kind of request of the mix."""

    name: str = ""
    model: str
    version: str = ""
    weight: float = Field(default=1.0, gt=0)  # its part of the scenario's arrivals
    arrivals: OpenArrivals | None = None  # its own arrivals instead
    rows: Weights = {1: 1.0}
    priority: Weights | None = None
    deadline: Duration | None = Field(default=None, gt=0)
    slo: Duration | None = Field(default=None, gt=0)
    payload: Payload = Payload()
    variants: int = Field(default=16, ge=1, le=MAX_VARIANTS)
    parameters: dict[str, str | int | bool] = {}
    outputs: tuple[str, ...] = ()
    cancel: CancelPlan | None = None
    slow: Slow | None = None  # on connections of its own
    connections: int = Field(default=0, ge=0, le=MAX_CONNECTIONS)  # its own; 0 = the scenario's
    rpc: Literal["unary", "stream"] = "unary"
    criteria: Criteria | None = Field(default=None, alias="pass")

    @property
    def title(self) -> str:
        return self.name or self.model


class TlsSettings(_Part):
    """Without `ca` the system's authorities are trusted."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    name: str | None = None


class Scenario(_Part):
    """A whole load test. `server`, `metrics` and the counts of workers can be given on the command line instead."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    server: str = "127.0.0.1:8001"
    metrics: str | None = None  # URL of the server's metrics, scraped during the run
    duration: Duration = Field(gt=0)
    warm_up: Duration = 2.0
    drain: Duration = 5.0
    seed: int = Field(default=1, ge=0)
    workers: int = Field(default=1, ge=1, le=MAX_WORKERS)
    connections: int = Field(default=4, ge=1, le=MAX_CONNECTIONS)  # of each worker
    slo: Duration | None = Field(default=None, gt=0)
    tls: TlsSettings | None = None
    metadata: dict[str, str] = {}
    capacity: float | Literal["measure"] | None = None
    arrivals: Arrivals | None = None
    load: tuple[Entry, ...] = Field(min_length=1, max_length=256)
    criteria: Criteria = Field(default_factory=Criteria, alias="pass")

    @field_validator("metadata")
    @classmethod
    def _metadata(cls, metadata: dict[str, str]) -> dict[str, str]:
        for name in metadata:
            if not re.fullmatch(r"[a-z0-9_.-]+", name) or name.startswith("grpc-") or name.endswith("-bin"):
                raise ValueError(f"'{name}' is no metadata key for text; expected lower-case letters, digits, - _ .")
        return metadata

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        shared = [entry for entry in self.load if entry.arrivals is None]
        if shared and self.arrivals is None:
            raise ValueError(f"load entry '{shared[0].title}' has no `arrivals`, and neither has the scenario")
        if not shared and self.arrivals is not None:
            raise ValueError("every load entry has its own `arrivals`; remove the scenario's")
        if self.closed and len(shared) < len(self.load):
            raise ValueError("a closed loop is the whole load: no entry may have `arrivals` of its own")
        if self.closed and any(entry.rpc == "stream" for entry in self.load):
            raise ValueError("streams are open loop; use other arrivals than closed")
        titles = [entry.title for entry in self.load]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"two load entries are called '{title}'; give them different `name`s")
        for criteria, slo in [(self.criteria, self.slo), *((e.criteria, self.slo_of(e)) for e in self.load)]:
            if criteria and criteria.p99_within_slo and not (slo or all(self.slo_of(e) for e in self.load)):
                raise ValueError("`p99_within_slo` needs a `slo`")
            if criteria and criteria.goodput_of_capacity and self.capacity is None:
                raise ValueError("`goodput_of_capacity` needs a `capacity`")
        return self

    @property
    def closed(self) -> bool:
        return isinstance(self.arrivals, Closed)

    def slo_of(self, entry: Entry) -> float | None:
        """The objective of an entry, seconds: its own, or the scenario's."""
        return entry.slo if entry.slo is not None else self.slo

    @property
    def total_s(self) -> float:
        """Warm-up and measured part, seconds."""
        return self.warm_up + self.duration


Criteria.model_rebuild()


def load_scenario(path: Path, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """Read and check a scenario. Top-level keys of `overrides` replace those of the file; `${NAME}` anywhere in a text
    is taken from the environment, so that tokens stay out of files. Raises `ScenarioError`."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ScenarioError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ScenarioError(
            f"{path}: expected keys such as `name`, `duration`, `arrivals` and `load`, found no mapping"
        )
    return parse_scenario({**raw, **(overrides or {})}, str(path), path.parent)


def parse_scenario(raw: Mapping[str, Any], source: str, directory: Path) -> Scenario:
    """A scenario from parsed YAML. Raises `ScenarioError` with one line per fault."""
    try:
        scenario = Scenario.model_validate(_expanded(dict(raw), source))
    except ValidationError as error:
        # An element that is wrong is also missing from its list: only the first is worth saying.
        faults = [item for item in error.errors() if item["type"] != "too_short" or error.error_count() == 1]
        lines = [f"{source}: {_path(item['loc'])}{_said(item)}" for item in faults]
        raise ScenarioError("\n".join(dict.fromkeys(lines))) from error
    return _located(scenario, directory)


def _expanded(value: Any, source: str) -> Any:
    """`value` with `${NAME}` replaced from the environment."""

    def variable(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise ScenarioError(f"{source}: ${{{match[1]}}} is used, but the environment variable is not set")
        return found

    if isinstance(value, str):
        return _VARIABLE.sub(variable, value)
    if isinstance(value, dict):
        return {key: _expanded(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, source) for item in value]
    return value


def _path(location: tuple[int | str, ...]) -> str:
    """`load[0].rows: ` of ("load", 0, "rows"). The kind of arrivals, which pydantic puts in between, is left out."""
    text = ""
    for index, part in enumerate(location):
        if isinstance(part, int):
            text += f"[{part}]"
        elif index and location[index - 1] == "arrivals":
            continue
        else:
            text += f".{part}" if text else part
    return f"{text}: " if text else ""


def _said(item: Any) -> str:
    kind, message = item["type"], item["msg"]
    if kind == "extra_forbidden":
        return "unknown key; see `python -m loadtests explain`"
    if kind == "missing":
        return "missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = item.get("ctx", {}).get("expected_tags", "'constant', 'poisson', ...")
        return f"needs a `kind`, one of {expected}"
    return str(message).removeprefix("Value error, ")


def _located(scenario: Scenario, directory: Path) -> Scenario:
    """The scenario with relative paths made absolute."""

    def put(part: Any) -> Any:
        if isinstance(part, Path):
            return part if part.is_absolute() else directory / part
        if isinstance(part, BaseModel):
            changed = {name: put(getattr(part, name)) for name in type(part).model_fields}
            return part.model_copy(update=changed)
        if isinstance(part, tuple):
            return tuple(put(item) for item in part)
        if isinstance(part, dict):
            return {key: put(item) for key, item in part.items()}
        return part

    located: Scenario = put(scenario)
    return located
