"""`onclock check`, `key`, `profile` and `simulate`: their flags. The work is done in the modules of the same names.

Those are imported when the command runs, so that a help page or a wrong flag does not wait for ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from service.cli.parsing import Commands, add_command, add_device, add_max_batch_size, number, positive, positive_number
from service.config.keys import OF_MODELS, Group, entry_text, new_key
from service.config.settings import available_cores


def add_check(commands: Commands) -> None:
    """`onclock check`."""
    text = "Say what a server would load from a repository, and why it would not load the rest. Reads files only."
    epilog = """\
examples:
  onclock check models/examples
  onclock check /srv/models/digits --verbose
  onclock check /srv/models --run

exit codes: 0 every model would be served, 1 one would not, 2 wrong usage
"""
    parser = add_command(commands, "check", "say what a repository would serve", text, epilog)
    parser.add_argument(
        "repository", type=Path, nargs="+", metavar="DIR", help="a repository, or one model's directory"
    )
    parser.add_argument("--verbose", action="store_true", help="print each model's completed configuration")
    parser.add_argument("--run", action="store_true", help="also load each model and run it once, as the server would")
    add_device(parser)
    add_max_batch_size(parser)
    parser.set_defaults(run_command=_check)


def _check(arguments: argparse.Namespace) -> int:
    from service.cli.check import check
    from service.cli.probe import Probe

    probe = Probe(arguments.device, available_cores()) if arguments.run else None
    return check(
        arguments.repository,
        arguments.default_max_batch_size,
        gpus=None if probe is None else probe.gpus,
        verbose=arguments.verbose,
        probe=probe,
    )


def add_key(commands: Commands) -> None:
    """`onclock key`."""
    text = """\
Make an API key: the key itself goes to stderr, once; what the file of keys says of it goes to stdout.
Clients send it as metadata, `authorization: Bearer KEY`.
"""
    epilog = """\
examples:
  onclock key --name checkout --groups inference metadata --models 'fraud-*' >> keys.toml
  onclock key --name prometheus --groups metrics >> keys.toml
  onclock key --name operator --groups health metadata inference repository settings --models '*' >> keys.toml
  onclock serve --model-repository /srv/models --api-keys keys.toml

exit codes: 0 done, 2 wrong usage
"""
    groups = [group.value for group in Group]
    parser = add_command(commands, "key", "make an API key", text, epilog)
    parser.add_argument("--name", required=True, help="who has it, for people and logs")
    parser.add_argument("--groups", nargs="+", required=True, choices=groups, metavar="GROUP", help=", ".join(groups))
    parser.add_argument("--models", nargs="+", default=[], metavar="PATTERN", help="models it may ask for; '*' = all")
    parser.set_defaults(run_command=_key)


def _key(arguments: argparse.Namespace) -> int:
    groups = tuple(Group(name) for name in dict.fromkeys(arguments.groups))
    needing = [group.value for group in groups if group in OF_MODELS]
    if needing and not arguments.models:
        print(f"onclock key: error: --models is missing: {', '.join(needing)} need it", file=sys.stderr)
        return 2
    key = new_key()
    print(f"the key, which is not shown again: {key}", file=sys.stderr)
    print("\n" + entry_text(arguments.name, key, groups, tuple(arguments.models)), end="")
    return 0


def add_profile(commands: Commands) -> None:
    """`onclock profile`."""
    text = """\
Measure how long a model takes per batch size, and say what can be promised with it:
the shortest latency objective worth stating, and the load it carries within an objective.
"""
    epilog = """\
examples:
  onclock profile models/examples/digits
  onclock profile models/examples/digits --slo-ms 20 --plot digits.png
  onclock profile model.onnx --device cuda --json > model.json
  onclock simulate --profile model.json --slo-ms 20

exit codes: 0 measured, 1 the model cannot be loaded or run, 2 wrong usage
"""
    parser = add_command(commands, "profile", "measure a model", text, epilog)
    parser.add_argument("path", type=Path, metavar="MODEL", help="a model's directory, a version's, or an .onnx file")
    parser.add_argument("--version", type=positive, metavar="N", help="which version\n[default: the newest]")
    parser.add_argument(
        "--slo-ms",
        type=positive_number,
        metavar="MS",
        help="objective to find the capacity for, milliseconds\n[default: the model's latency_slo_ms, if it has one]",
    )
    parser.add_argument(
        "--budget-ms", type=positive, default=10_000, metavar="N", help="time to measure, milliseconds [default 10000]"
    )
    parser.add_argument(
        "--intra-op-threads",
        type=positive,
        metavar="N",
        help="threads one batch computes with on the CPU\n[default: the cores this process may use]",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw latency and rows/s (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print JSON, which `onclock simulate --profile` reads")
    add_device(parser)
    add_max_batch_size(parser)
    parser.set_defaults(run_command=_profile)


def _profile(arguments: argparse.Namespace) -> int:
    from service.cli.profile import ProfileOptions, profile

    return profile(
        ProfileOptions(
            path=arguments.path,
            version=arguments.version,
            device=arguments.device,
            threads=arguments.intra_op_threads or available_cores(),
            max_batch_size=arguments.default_max_batch_size,
            budget_ms=arguments.budget_ms,
            slo_ms=arguments.slo_ms,
            plot=arguments.plot,
            as_json=arguments.json,
        )
    )


def add_simulate(commands: Commands) -> None:
    """`onclock simulate`."""
    text = """\
How much load can a model carry within an objective, and how many replicas does a rate need?
Runs the server's own scheduler on a measured (or stated) latency per batch size; no hardware needed.
"""
    epilog = """\
examples:
  onclock simulate --profile digits.json --slo-ms 20
  onclock simulate --latency "5+0.5*rows" --slo-ms 40 --rate 2000 --process gamma --cv 3
  onclock simulate --profile digits.json --slo-ms 20 --trace arrivals.txt --plot goodput.png

exit codes: 0 simulated, 1 the profile is unusable or the rate cannot be carried, 2 wrong usage
"""
    parser = add_command(commands, "simulate", "find the load a model can carry", text, epilog)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--profile", type=Path, metavar="FILE", help='JSON with {"table": {"1": ms, "2": ms, ...}}')
    source.add_argument("--latency", metavar="A+B*rows", help="latency of a batch, milliseconds, instead of a profile")
    parser.add_argument(
        "--slo-ms", type=positive_number, required=True, metavar="MS", help="the objective, milliseconds"
    )
    parser.add_argument(
        "--max-rows", type=positive, default=64, metavar="N", help="largest batch, with --latency [default 64]"
    )
    parser.add_argument("--rate", type=positive_number, metavar="N", help="requests per second to find replicas for")
    parser.add_argument(
        "--process",
        default="poisson",
        metavar="NAME",
        help="how requests arrive: poisson, gamma, mmpp, even or diurnal [default poisson]",
    )
    parser.add_argument(
        "--cv", type=positive_number, default=3.0, metavar="N", help="burstiness, with gamma arrivals [default 3]"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="arrival times in seconds, one per line, to replay")
    parser.add_argument(
        "--attainment",
        type=positive_number,
        default=0.99,
        metavar="SHARE",
        help="share of requests to be answered in time, up to 1 [default 0.99]",
    )
    parser.add_argument(
        "--noise-cv",
        type=number,
        default=0.03,
        metavar="N",
        help="spread of a batch's latency, as coefficient of variation [default 0.03]",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="random seed [default 1]")
    parser.add_argument(
        "--requests", type=positive, default=6_000, metavar="N", help="requests per simulated rate [default 6000]"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw goodput and latency over load (.png, .svg, .pdf)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run_command=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    from service.cli.simulate import SimulateOptions, simulate

    return simulate(
        SimulateOptions(
            slo_ms=arguments.slo_ms,
            profile=arguments.profile,
            latency=arguments.latency,
            max_rows=arguments.max_rows,
            rate=arguments.rate,
            process=arguments.process,
            cv=arguments.cv,
            trace=arguments.trace,
            attainment=arguments.attainment,
            noise_cv=arguments.noise_cv,
            seed=arguments.seed,
            requests=arguments.requests,
            plot=arguments.plot,
            as_json=arguments.json,
        )
    )
