"""The observer: what it keeps, what it says, and what a step and a poll cost."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from service.clock import NS_PER_MS, NS_PER_S
from service.metrics import MetricsRegistry, ModelMetrics, ModelState
from service.metrics.shard import WINDOW_STEP_NS
from service.repository.loader import Loaded
from service.repository.repository import Entry
from service.repository.version_policy import VersionState
from service.state import Phase, ServerState
from service.status_page.document import MAX_MODELS
from service.status_page.observer import LAG_NS, Observer
from service.status_page.thread import ObserverThread, until_next_step_s
from tests.unit.metrics.records import Request, batch

SLO_NS = 20 * NS_PER_MS


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now_ns = 1000 * WINDOW_STEP_NS + LAG_NS

    def __call__(self) -> int:
        return self.now_ns

    def next_step(self) -> None:
        """To when the present step can be taken in."""
        self.now_ns += round(until_next_step_s(self.now_ns) * NS_PER_S)


@dataclass
class Policy:
    slo_ns: int | None = SLO_NS
    devices: tuple[str, ...] = ("cpu",)


class Model:
    """As much of a model as is looked at, with real metrics."""

    def __init__(self, name: str, version: int = 1, serial: int = 1) -> None:
        self.metrics = ModelMetrics(name, str(version))
        self.metrics.devices = ("cpu",)
        self.shard = self.metrics.shard()
        self.serial = serial
        self.policy = Policy()
        self.instances = 2

    def state(self) -> ModelState:
        return ModelState(slo_ns=SLO_NS, pending_requests=3, scale=1.0, load_ns=NS_PER_S, batch_rows_limit=8)


@dataclass
class Models:
    entries: list[Entry] = field(default_factory=list)

    def index(self) -> list[Entry]:
        return self.entries

    def serve(self, model: Model) -> Entry:
        loaded = cast("Loaded", type("Loaded", (), {"model": model})())
        metrics = model.metrics
        entry = Entry(metrics.name, int(metrics.version), VersionState.READY, loaded=loaded, wanted=True)
        self.entries.append(entry)
        return entry


class Watched:
    """An observer and what it observes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.models = Models()
        self.state = ServerState()
        self.registry = MetricsRegistry(self.clock)
        self.registry.add_device("cpu", "CPUExecutionProvider", 2)
        self.observer = Observer(
            self.registry, self.models, self.state, 0.99, self.clock, lambda: self.clock.now_ns / NS_PER_S
        )
        self.state.enter(Phase.READY)

    def step(self) -> None:
        self.clock.next_step()
        self.observer.observe()

    def document(self) -> dict[str, Any]:
        """What is said now, made anew."""
        self.clock.now_ns += NS_PER_S
        parsed = json.loads(self.observer.document())
        assert isinstance(parsed, dict)
        return parsed


@pytest.fixture
def watched() -> Watched:
    return Watched()


def answer(model: Model, at_ns: int, count: int = 1, took_ms: float = 13) -> None:
    """`count` requests answered at `at_ns`, in one batch of 13 ms."""
    done_ms = at_ns / NS_PER_MS
    arrival_ns = at_ns - round(took_ms * NS_PER_MS)
    requests = [Request(arrival_ns, arrival_ns + SLO_NS) for _ in range(count)]
    model.shard.record_batch(batch(done_ms - 13, requests=count, rows=count), requests)


def test_what_happened_is_said_in_figures_and_words(watched: Watched) -> None:
    """Rates over the last minute, quantiles, batches, what was broken, and the verdict."""
    model = Model("fraud")
    watched.models.serve(model)
    watched.step()
    for _ in range(12):
        answer(model, watched.clock.now_ns, count=4)
        model.shard.record_refusal("overloaded", watched.clock.now_ns, watched.clock.now_ns)
        watched.step()
    document = watched.document()
    (said,) = document["models"]
    assert (said["offered_per_s"], said["in_time_per_s"], said["attainment"]) == (1.0, 0.8, 0.8)
    assert said["latency_ms"] == [17.5, 20.0, 20.0]
    assert (said["queue_ms"], said["compute_ms"]) == (0.0, 13.0)
    assert said["batches"] == [{"rows": "4", "batches": 12}]
    assert said["broken"] == [{"kind": "refused", "reason": "overloaded", "requests": 12}]
    assert (said["instances"], said["pending"], said["devices"]) == (2, 3, ["cpu"])
    assert said["verdict"]["level"] == "breaching"
    assert said["verdict"]["cause"] == "queueing"
    assert len(said["history"]["p99_ms"]) == 60
    assert said["history"]["offered_per_s"][-13:] == [0.0, *[1.0] * 12]
    assert document["verdict"]["headline"] == "Breaching the promise"
    assert document["verdict"]["text"] == "fraud version 1: queueing."


def test_a_minute_later_it_is_idle_and_the_chart_remains(watched: Watched) -> None:
    """For five minutes."""
    model = Model("fraud")
    watched.models.serve(model)
    answer(model, watched.clock.now_ns)
    watched.step()
    assert watched.document()["verdict"]["level"] == "keeping"
    for _ in range(12):
        watched.step()
    (said,) = watched.document()["models"]
    assert (said["verdict"]["level"], said["attainment"], said["attainment_5m"]) == ("idle", None, 1.0)
    assert said["history"] is not None
    for _ in range(60):
        watched.step()
    (said,) = watched.document()["models"]
    assert said["history"] is None


def test_states_are_those_of_the_repository(watched: Watched) -> None:
    """Also of versions that never served, and of a model without any version."""
    watched.models.entries = [
        Entry("a", 1, VersionState.UNAVAILABLE, reason="no such <file>", wanted=True),
        Entry("b", 2, VersionState.LOADING, wanted=True),
        Entry("c", 3, VersionState.UNAVAILABLE),
        Entry("d", None, VersionState.UNAVAILABLE, reason="no version"),
        Entry("e", 1, VersionState.UNAVAILABLE, reason="unloaded", asked=False),
    ]
    watched.models.serve(Model("f")).state = VersionState.UNLOADING
    document = watched.document()
    states = {model["name"]: (model["version"], model["state"]) for model in document["models"]}
    assert states == {
        "a": ("1", "failed"),
        "b": ("2", "loading"),
        "c": ("3", "not loaded"),
        "d": (None, "failed"),
        "e": ("1", "not loaded"),
        "f": ("1", "retiring"),
    }
    assert document["verdict"]["headline"] == "A model failed to load"
    assert [model["name"] for model in document["models"]][:2] == ["a", "d"]
    assert document["models"][0]["verdict"]["text"] == "no such <file>"


def test_another_load_of_a_version_begins_at_zero_and_keeps_the_chart(watched: Watched) -> None:
    """Nothing is counted twice, and nothing is negative."""
    first = Model("m", serial=1)
    entry = watched.models.serve(first)
    answer(first, watched.clock.now_ns, count=5)
    watched.step()
    second = Model("m", serial=2)
    watched.models.entries.remove(entry)
    watched.models.serve(second)
    answer(second, watched.clock.now_ns, count=2)
    watched.step()
    (said,) = watched.document()["models"]
    assert said["batches"] == [{"rows": "2", "batches": 1}, {"rows": "3", "batches": 0}, {"rows": "4", "batches": 0},
                               {"rows": "5-6", "batches": 1}]  # fmt: skip
    assert said["history"]["offered_per_s"][-2:] == [1.0, 0.4]


def test_what_is_gone_is_forgotten(watched: Watched) -> None:
    """A model that nobody lists has no history any more; one that comes back has a new one."""
    model = Model("m")
    entry = watched.models.serve(model)
    answer(model, watched.clock.now_ns)
    watched.step()
    watched.models.entries.clear()
    watched.step()
    assert watched.document()["models"] == []
    watched.models.entries.append(entry)
    assert watched.document()["models"][0]["history"] is None


def test_a_lost_device_is_said_at_once(watched: Watched) -> None:
    """Not only at the next step."""
    watched.models.serve(Model("m"))
    watched.step()
    watched.registry.device_failed("cpu")
    watched.state.failure = "device cpu has failed: it hangs"
    document = watched.document()
    assert document["devices"][0]["healthy"] is False
    assert document["models"][0]["verdict"]["cause"] == "device lost"
    assert "it hangs" in document["verdict"]["text"]


def test_the_headline_names_the_model_that_loses_most(watched: Watched) -> None:
    """Not the first of those that break their promise."""
    models = {name: Model(name) for name in "abc"}
    for model in models.values():
        watched.models.serve(model)
    watched.step()
    for name, count in (("a", 3), ("b", 40), ("c", 5)):
        answer(models[name], watched.clock.now_ns, count, took_ms=500)
    watched.step()
    assert watched.document()["verdict"]["text"].startswith("b version 1, and 2 more")


def test_an_idle_model_is_not_added_up(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step costs grows with the models that were busy."""
    busy, idle = Model("busy"), Model("idle")
    watched.models.serve(busy)
    watched.models.serve(idle)
    watched.step()
    added_up: list[str] = []
    plain = ModelMetrics.sum
    monkeypatch.setattr(ModelMetrics, "sum", lambda self: added_up.append(self.name) or plain(self))
    answer(busy, watched.clock.now_ns)
    watched.step()
    watched.step()
    assert added_up == ["busy"]
    watched.document()
    assert added_up == ["busy"]


def test_an_answer_is_kept_while_nothing_changes(watched: Watched) -> None:
    """The same bytes for everybody who asks, until the next step, or within a second of a change of state."""
    entry = watched.models.serve(Model("m"))
    first = watched.observer.document()
    watched.clock.now_ns += NS_PER_S
    assert watched.observer.document() is first
    entry.state = VersionState.UNLOADING
    watched.clock.now_ns += NS_PER_S - 1
    assert watched.observer.document() is first
    watched.clock.now_ns += 1
    second = watched.observer.document()
    assert json.loads(second)["models"][0]["state"] == "retiring"
    watched.step()
    watched.clock.now_ns += NS_PER_S
    assert watched.observer.document() is not second


def test_no_more_than_the_most_urgent_are_told(watched: Watched) -> None:
    """All count in the verdict."""
    for number in range(2 * MAX_MODELS):
        watched.models.serve(Model(f"m{number}"))
    watched.models.entries.append(Entry("zz", 1, VersionState.UNAVAILABLE, reason="broken", wanted=True))
    document = watched.document()
    assert (document["count"], document["shown"], len(document["models"])) == (201, 100, 100)
    assert document["models"][0]["name"] == "zz"


def test_any_name_makes_valid_json(watched: Watched) -> None:
    """Quotes, markup, line separators, halves of surrogate pairs."""
    name = '</script><b>"\\\u2028\ud800'
    watched.models.entries = [Entry(name, 1, VersionState.UNAVAILABLE, reason=name, wanted=True)]
    document = watched.document()
    assert document["models"][0]["name"] == name


@pytest.mark.parametrize("at_ns", [0, LAG_NS - 1, LAG_NS, LAG_NS + 1, WINDOW_STEP_NS, 7 * WINDOW_STEP_NS + 12345])
def test_the_next_step_is_a_little_after_the_end_of_the_present_one(at_ns: int) -> None:
    """Never now, never more than a step away."""
    wait_ns = round(until_next_step_s(at_ns) * NS_PER_S)
    assert 0 < wait_ns <= WINDOW_STEP_NS
    assert (at_ns + wait_ns) % WINDOW_STEP_NS == LAG_NS


def test_its_thread_ends_when_told(watched: Watched) -> None:
    """Also when it never began."""
    ObserverThread(watched.observer).stop()
    thread = ObserverThread(watched.observer)
    thread.start()
    assert any(running.name == "status" for running in threading.enumerate())
    thread.stop()
    assert not any(running.name == "status" for running in threading.enumerate())


def test_the_modules_that_compute_take_no_clock() -> None:
    """Time is an argument everywhere but in the observer and its thread."""
    package = Path(__file__).parents[3] / "service" / "status_page"
    for module in package.glob("*.py"):
        clocks = "now_ns" in module.read_text() or "import time" in module.read_text()
        assert clocks == (module.stem in ("observer", "thread")), module.name
