"""What serving costs beyond carrying the bytes: onclock over a bare `grpc.server` echo of the same requests.

(a) `tiny`, nothing to compute: server CPU per request with 64 in flight, and median latency with one in flight.
(b) 1x3x224x224 FP32, 588 KiB: CPU per request with 1 and 8 in flight, for a model that answers the same bytes, as the
    echo does, and for one that answers three numbers. Nothing is subtracted, so copies and the model itself count.

Both servers run on one core at the same time, one of them idle; their windows alternate.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness import Settings, parse_settings, say
from benchmarks.load import Load, Request, closed_loop
from benchmarks.models import MODELS, make_repository
from benchmarks.report import Figure, Report, Table, publish
from benchmarks.servers import echo_server, onclock_server


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. `cpu_bar` and `p50_bar` are the most onclock may cost over the echo; None = reported only."""

    model: str
    concurrency: int
    cpu_bar: float | None = None
    p50_bar: float | None = None

    @property
    def label(self) -> str:
        return f"{self.model}, concurrency {self.concurrency}"


CASES = (
    Case("tiny", 64, cpu_bar=1.5),
    Case("tiny", 1, p50_bar=1.4),
    Case("identity", 1, cpu_bar=1.2),
    Case("identity", 8, cpu_bar=1.2),
    Case("average", 1, cpu_bar=1.2),
    Case("average", 8, cpu_bar=1.2),
)


def _figures(case: Case, pairs: list[tuple[Load, Load]]) -> list[Figure]:
    name = case.label
    doubt = next((load.doubt() for pair in pairs for load in pair if load.doubt()), "")
    cpu = tuple(subject.server_cpu_us / echo.server_cpu_us for echo, subject in pairs)
    p50 = tuple(subject.p50_ms / echo.p50_ms for echo, subject in pairs)
    return [
        Figure("overhead", f"{name}: CPU per request / echo", cpu, "x", case.cpu_bar, doubt=doubt),
        Figure("overhead", f"{name}: p50 / echo", p50, "x", case.p50_bar, doubt=doubt),
    ]


def run(settings: Settings) -> Report:
    """Measure every case; raises `BenchmarkError` if a server does not start or a request fails."""
    report = Report("overhead")
    table = Table(
        "Overhead over a bare echo of the same bytes",
        (
            "model",
            "concurrency",
            "server",
            "requests/s",
            "p50 ms",
            "p99 ms",
            "CPU us/request",
            "client cores",
            "foreign",
        ),
        notes=["Medians are taken in the summary; here every window is shown, in the order it was run."],
    )
    models = sorted({case.model for case in CASES})
    repository = make_repository(settings.out / "overhead", settings.models, dict.fromkeys(models), settings.device)
    with echo_server(settings) as echo, onclock_server(settings, repository, models) as onclock:
        for case in (case for case in CASES if settings.only in case.label):
            request = Request(case.model, "x", (1, *MODELS[case.model].row))
            pairs: list[tuple[Load, Load]] = []
            for repeat in range(settings.repeats):
                say(f"overhead: {case.label}, run {repeat + 1} of {settings.repeats}")
                loads: list[Load] = []
                for server in (echo, onclock):
                    load = closed_loop(settings, server, request, case.concurrency)
                    load.expect_all_ok(f"{server.name}, {case.model}")
                    loads.append(load)
                    numbers = [f"{load.ok_rps:.0f}", f"{load.p50_ms:.3f}", f"{load.p99_ms:.3f}"]
                    numbers += [f"{load.server_cpu_us:.1f}", f"{load.client_cores:.2f}", f"{load.foreign:.1%}"]
                    table.rows.append([case.model, str(case.concurrency), server.name, *numbers])
                pairs.append((loads[0], loads[1]))
            report.figures += _figures(case, pairs)
            report.details[f"{case.model}/{case.concurrency}"] = pairs
    report.tables.append(table)
    return report


if __name__ == "__main__":
    chosen = parse_settings("CPU per request and latency over a bare echo", window_s=5.0)
    publish(chosen, [run(chosen)], "overhead")
