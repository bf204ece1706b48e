"""`python -m loadtests`: run, report, compare, search, sweep; list and explain.

Exit codes: 0 = passed, or done where nothing was to be judged; 1 = a criterion was missed; 2 = the command line or a
scenario is wrong; 3 = void, the numbers must not be believed; 4 = it could not be run; 130 = interrupted. So a
pipeline can gate on it, and tell a slow server from a slow client."""

from __future__ import annotations

import argparse
import datetime as dt
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as TextTable

from loadtests import compare, records, report, sweep, verdict
from loadtests.errors import LoadTestError, ScenarioError
from loadtests.explain import explanation
from loadtests.live import Live
from loadtests.run import Prepared, execute, measure_capacity, prepare
from loadtests.scenario import Scenario, load_scenario, parse_scenario
from loadtests.search import Search
from loadtests.stats import Analysis, analyse
from loadtests.verdict import Verdict
from service.simulation.capacity import classical

EXIT_PASSED, EXIT_MISSED, EXIT_USAGE, EXIT_VOID, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130
WIDTH = 140
SHIPPED = Path(__file__).parent / "scenarios"

_EPILOG = """\
examples:
  python -m loadtests list
  python -m loadtests run steady
  python -m loadtests run my_scenario.yaml --server 10.0.0.7:8001 --duration 60s --out results
  python -m loadtests report results/steady.parquet
  python -m loadtests compare before.parquet after.parquet
  python -m loadtests search steady --attainment 0.99
  python -m loadtests sweep sweep --loads 0.5,1,2,4
  python -m loadtests explain

exit codes: 0 passed, 1 missed, 2 wrong usage, 3 void (the client was too slow), 4 could not run, 130 interrupted
docs/load-testing.md says how to measure honestly.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; the exit code."""
    given = build_parser().parse_args(arguments)
    try:
        code: int = given.command(given)
        return code
    except ScenarioError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except LoadTestError as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:  # noqa: BLE001, the boundary: it is printed, and told from a missed criterion
        # Python's own exit code would be 1, which means that the server missed a criterion.
        traceback.print_exc()
        return EXIT_FAILED


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests",
        description="Load tests of Open Inference Protocol servers: open loop, every request accounted for.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "run a scenario; report; exit non-zero when a criterion is missed")
    _scenario_arguments(run)
    run.add_argument(
        "--retry-void", type=int, default=0, metavar="N", help="run again, up to N times, when the client was late"
    )
    _output_arguments(run)

    made = _command(commands, "report", _report, "make the page of a run again, from its records")
    made.add_argument("run", type=Path, help="the .parquet file of a run, or a folder: its newest")
    made.add_argument("--out", type=Path, help="where to write (default: beside the run)")

    both = _command(commands, "compare", _compare, "two runs side by side, with confidence intervals")
    both.add_argument("a", type=Path)
    both.add_argument("b", type=Path)
    both.add_argument("--names", default="", metavar="A,B", help="what to call them (default: the files' names)")
    both.add_argument("--out", type=Path, default=Path("build/loadtests"), help="folder of the page")

    find = _command(commands, "search", _search, "the highest load that is answered in time")
    _scenario_arguments(find)
    find.add_argument("--attainment", type=float, default=0.99, help="share in time that counts (default 0.99)")
    find.add_argument("--tolerance", type=float, default=0.05, help="how close to bisect (default 0.05)")

    curve = _command(commands, "sweep", _sweep, "the curve of goodput against load, beside the optimum")
    _scenario_arguments(curve)
    loads = ",".join(f"{load:g}" for load in sweep.DEFAULT_LOADS)
    curve.add_argument("--loads", default=loads, help=f"multiples of the capacity (default {loads})")
    curve.add_argument("--table", type=Path, help="latency table (JSON of `onclock profile`); default: measured")
    curve.add_argument("--beside", type=Path, nargs="*", default=[], help="JSON of other sweeps, to be drawn beside it")
    _output_arguments(curve)

    _command(commands, "list", _list, "the scenarios that come with it")
    _command(commands, "explain", _explain, "every key of a scenario")
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    return parser


def _scenario_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scenario", help="a YAML file, or the name of a scenario that comes with it (see `list`)")
    parser.add_argument("--server", help="HOST:PORT instead of the scenario's")
    parser.add_argument("--metrics", help="URL of the server's metrics page, or `off`")
    parser.add_argument("--duration", help="of the measured part, such as 60s")
    parser.add_argument("--warm-up", help="such as 5s")
    parser.add_argument("--seed", type=int, help="of the arrivals and payloads")
    parser.add_argument("--workers", type=int, help="processes that send")
    parser.add_argument("--capacity", help="requests/s, the unit of rates such as 0.8x, or `measure`")
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("build/loadtests"), help="folder of the results")


def _chosen(given: argparse.Namespace) -> Scenario:
    """The scenario with what the command line overrides."""
    path = Path(given.scenario)
    if not path.suffix and not path.exists():
        shipped = SHIPPED / f"{given.scenario}.yaml"
        if not shipped.exists():
            known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
            raise ScenarioError(
                f"'{given.scenario}' is no file and no scenario that comes with this; those are {known}"
            )
        path = shipped
    overrides: dict[str, Any] = {}
    for name in ("server", "duration", "seed", "workers", "metrics"):
        if getattr(given, name) is not None:
            overrides[name] = getattr(given, name)
    if given.metrics == "off":
        overrides["metrics"] = None
    if given.warm_up is not None:
        overrides["warm_up"] = given.warm_up
    if given.capacity is not None:
        try:
            overrides["capacity"] = given.capacity if given.capacity == "measure" else float(given.capacity)
        except ValueError as error:
            raise ScenarioError(f"--capacity {given.capacity}: expected a number or `measure`") from error
    return load_scenario(path, overrides)


def _ready(scenario: Scenario, live: Live) -> tuple[Prepared, float | None]:
    """The prepared scenario, and its capacity where one is needed."""
    prepared = prepare(scenario)
    capacity = None
    if scenario.capacity == "measure":
        with live.stage(f"{scenario.name}: measuring the capacity", 5.0) as watch:
            capacity = measure_capacity(prepared, watch)
        live.say(f"capacity: {capacity:,.0f} requests/s")
    return prepared, capacity


def _run(given: argparse.Namespace) -> int:
    if given.retry_void < 0:
        raise ScenarioError("--retry-void needs 0 or more")
    scenario = _chosen(given)
    live = Live(given.quiet)
    prepared, capacity = _ready(scenario, live)
    for left in range(given.retry_void, -1, -1):
        with live.stage(scenario.name, scenario.total_s) as watch:
            run = execute(prepared, capacity, watch)
        analysis = analyse(run)
        if not analysis.void or not left:
            break
        live.say(f"void, once more: {analysis.void[0]}")
    verdicts = verdict.judge(run, scenario, analysis)
    path = given.out / f"{scenario.name}.parquet"
    records.save(run, path)
    written = report.write(run, analysis, verdicts, given.out / scenario.name)
    print_run(run, analysis, verdicts)
    print(f"written: {', '.join(map(str, [path, *written]))}")
    return exit_code(analysis, verdicts)


def exit_code(analysis: Analysis, verdicts: Sequence[Verdict]) -> int:
    """What a pipeline is told."""
    kind = report.state(analysis, verdicts)
    return {"void": EXIT_VOID, "fail": EXIT_MISSED}.get(kind, EXIT_PASSED)


def print_run(run: records.Run, analysis: Analysis, verdicts: Sequence[Verdict]) -> None:
    """The main figures, on standard output."""
    console = _console()
    page = report.page_of(run, analysis, verdicts)
    assert page.banner is not None
    console.print(f"[bold]{page.title}[/], {page.subtitle}")
    for table in page.tables:
        console.print(_text_table(table))
    for note in page.notes:
        console.print(f"note: {note}")
    console.print(f"[bold]{page.banner['headline']}[/]")
    for line in page.banner["lines"]:
        console.print(f"  {line}")


def _console() -> Console:
    """Standard output; wide enough for the tables where nobody's terminal sets the width."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _text_table(table: report.Table) -> TextTable:
    shown = TextTable(title=table.title, title_justify="left")
    for index, name in enumerate(table.columns):
        shown.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*(cell["text"] if isinstance(cell, dict) else str(cell) for cell in row))
    return shown


def _report(given: argparse.Namespace) -> int:
    run = records.load(given.run)
    scenario = parse_scenario(run.info.scenario, str(given.run), given.run.parent)
    analysis = analyse(run)
    verdicts = verdict.judge(run, scenario, analysis)
    folder = given.out or (given.run if given.run.is_dir() else given.run.parent)
    written = report.write(run, analysis, verdicts, folder / run.info.name)
    print_run(run, analysis, verdicts)
    print(f"written: {', '.join(map(str, written))}")
    return exit_code(analysis, verdicts)


def _compare(given: argparse.Namespace) -> int:
    names = tuple(part.strip() for part in given.names.split(",")) if given.names else (given.a.stem, given.b.stem)
    if len(names) != 2 or not all(names):
        raise ScenarioError("--names needs two names, separated by a comma")
    a, b = records.load(given.a), records.load(given.b)
    page = compare.page_of(a, b, (names[0], names[1]))
    console = _console()
    for table in page.tables:
        console.print(_text_table(table))
    for note in page.notes:
        console.print(f"note: {note}")
    written = report.write_texts(given.out / f"compare_{names[0]}_{names[1]}", {".html": report.html(page)})
    print(f"written: {written[0]}")
    return EXIT_PASSED


def _search(given: argparse.Namespace) -> int:
    scenario = _chosen(given)
    if scenario.closed:
        raise ScenarioError("a search raises the rate of arrivals; a closed loop has none")
    if not 0 < given.attainment < 1 or not 0 < given.tolerance < 1:
        raise ScenarioError("--attainment and --tolerance are shares between 0 and 1")
    live = Live(given.quiet)
    prepared, capacity = _ready(scenario, live)
    state = Search(given.tolerance)
    best: tuple[float, Analysis] | None = None
    limit = ""
    while (factor := state.next()) is not None:
        scaled = Prepared(scenario, prepared.server_name, prepared.models, prepared.templates, factor)
        with live.stage(f"{scenario.name} x {factor:.3g}", scenario.total_s) as watch:
            analysis = analyse(execute(scaled, capacity, watch))
        attainment = analysis.total.attainment or 0.0
        passed = attainment >= given.attainment and not analysis.void
        state.tell(passed)
        p99 = report.number(analysis.total.latency_ms.p99, "ms")
        said = f"{analysis.total.offered_rps:,.0f}/s: {attainment:.2%} in time, p99 {p99}"
        live.say(f"{said}{'' if passed else ': too much' if not analysis.void else ': void'}")
        if passed:
            best = max(best or (0.0, analysis), (factor, analysis), key=lambda pair: pair[0])
        elif analysis.void and attainment >= given.attainment:
            limit = "the client, not the server, was the limit: use more workers or another machine to go on"
    if best is None:
        print(f"no load was answered to {given.attainment:.0%} in time", file=sys.stderr)
        return EXIT_VOID if limit else EXIT_MISSED
    total = best[1].total
    print(
        f"highest load with {given.attainment:.0%} in time: {total.offered_rps:,.0f} requests/s "
        f"({best[0]:.3g} x the scenario's; p99 {report.number(total.latency_ms.p99, 'ms')})"
    )
    if limit:
        print(f"note: {limit}")
    return EXIT_VOID if limit else EXIT_PASSED


def _sweep(given: argparse.Namespace) -> int:
    try:
        loads = sorted({float(part) for part in given.loads.split(",")})
    except ValueError as error:
        raise ScenarioError(f"--loads {given.loads}: expected numbers such as 0.5,1,2") from error
    if not loads or loads[0] <= 0:
        raise ScenarioError(f"--loads {given.loads}: expected numbers above 0")
    scenario = _chosen(given)
    slo_s = sweep.check(scenario)
    live = Live(given.quiet)
    prepared, capacity = _ready(scenario, live)
    if given.table is not None:
        table = sweep.read_table(given.table)
    else:
        with live.stage("latency table", 10.0) as watch:
            table = sweep.measure_table(prepared, watch)
    if capacity is None:
        capacity = scenario.capacity if isinstance(scenario.capacity, float) else classical(table, slo_s)
    live.say(f"loads are multiples of {capacity:,.0f} requests/s")
    points = []
    for load in loads:
        with live.stage(f"{scenario.name} at {load:g}x", scenario.total_s) as watch:
            run, analysis = sweep.one_load(prepared, capacity, load, watch)
        records.save(run, given.out / f"{scenario.name}_{load:g}x.parquet")
        points.append(sweep.point(run, analysis, load, table, slo_s))
    done = sweep.Sweep(
        name=scenario.name,
        server=scenario.server,
        server_name=prepared.server_name,
        started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        slo_s=slo_s,
        capacity=capacity,
        table_ms={rows: round(seconds * 1e3, 4) for rows, seconds in table.items()},
        points=points,
    )
    page = sweep.page_of(done, [sweep.from_json(path) for path in given.beside])
    texts = {".html": report.html(page), ".json": sweep.as_json(done)}
    written = report.write_texts(given.out / f"{scenario.name}_sweep", texts)
    console = _console()
    for each in page.tables:
        console.print(_text_table(each))
    assert page.banner is not None
    console.print(f"[bold]{page.banner['headline']}[/]")
    print(f"written: {', '.join(map(str, written))}")
    return EXIT_VOID if any(p.void for p in points) else EXIT_PASSED


def _list(_: argparse.Namespace) -> int:
    table = TextTable()
    for name in ("scenario", "takes", "what it is for"):
        table.add_column(name, justify="left")
    for path in sorted(SHIPPED.glob("*.yaml")):
        scenario = load_scenario(path)
        table.add_row(path.stem, f"{scenario.total_s:g} s", scenario.description)
    _console().print(table)
    return EXIT_PASSED


def _explain(_: argparse.Namespace) -> int:
    print(explanation())
    return EXIT_PASSED
