"""`onclock`: the entry point and its sub-commands.

Exit codes: 0 = done; 1 = it failed (a model did not load, a port is taken, a measurement is impossible); 2 = the
command line or the environment is wrong; 130 = interrupted. Errors go to stderr, one per line, each with what to do
next; results go to stdout.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Sequence

from service import logs
from service.cli.extras import EXTRAS, add_extras, run_extra
from service.cli.parsing import Commands, add_command
from service.cli.progress import load_progress
from service.cli.settings_flags import add_settings, given_settings
from service.cli.tools import add_check, add_key, add_profile, add_simulate
from service.config.settings import SettingsError, available_cores, flag_name, load_settings, unknown_variables
from service.errors import ModelLoadError
from service.metrics import MetricsPortError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

log = logging.getLogger(__name__)

_EPILOG = """\
examples:
  onclock serve --model-repository models/examples
  onclock check models/examples
  onclock profile models/examples/digits --slo-ms 20 --json > digits.json
  onclock models fetch efficientnet-lite0 --repository build/zoo
  onclock simulate --profile digits.json --slo-ms 20 --rate 2000

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted
`onclock COMMAND --help` explains each command.
"""

_SERVE_TEXT = """\
Serve every model of a repository over gRPC (Open Inference Protocol), on time.

A repository is a directory of models: DIR/MODEL/VERSION/model.onnx, with an optional
DIR/MODEL/config.pbtxt. State an objective in it, and the server does the rest:
  parameters { key: "latency_slo_ms" value: { string_value: "20" } }
"""

_SERVE_EPILOG = """\
Each setting is a flag or an environment variable; the flag wins.

examples:
  onclock serve --model-repository models/examples
  onclock serve --model-repository /srv/a --model-repository /srv/b --host 0.0.0.0
  ONCLOCK_MODEL_REPOSITORY=/srv/models ONCLOCK_DEVICE=cuda onclock serve
  onclock serve --model-repository /srv/models --grpc-port 0 --metrics-port off --log-format text

signals: SIGTERM and SIGINT stop it: not ready at once, accepted requests finish within the grace period.
exit codes: 0 stopped as asked, 1 failed, 2 wrong usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `onclock` with `argv` (default: the process's own) and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in EXTRAS:
        return run_extra(given)
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.command is None and not unknown:
        parser.print_help()
        return EXIT_USAGE
    if unknown:
        _complain(_unknown_arguments(unknown, arguments))
        return EXIT_USAGE
    try:
        code: int = arguments.run_command(arguments)
    except SettingsError as error:
        for line in str(error).splitlines():
            _complain(line)
        _complain(f"see onclock {arguments.command} --help")
        return EXIT_USAGE
    except (ModelLoadError, MetricsPortError) as error:
        _complain(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `onclock ... | head`: nobody reads the rest. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of `onclock`. Each sub-command sets `run_command`, a function from its arguments to the exit code."""
    parser = argparse.ArgumentParser(
        prog="onclock",
        description="A gRPC inference server for ONNX models that answers on time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"onclock {importlib.metadata.version('onclock')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_serve(commands)
    add_check(commands)
    add_profile(commands)
    add_simulate(commands)
    add_key(commands)
    add_extras(commands)
    _add_version(commands)
    return parser


def _add_serve(commands: Commands) -> None:
    parser = add_command(commands, "serve", "serve a model repository", _SERVE_TEXT, _SERVE_EPILOG)
    parser.usage = "onclock serve --model-repository DIR [SETTING ...]"
    add_settings(parser)
    parser.set_defaults(run_command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    settings = load_settings(given_settings(arguments))
    logs.configure(settings.log_level, settings.log_format)
    for name, meant in unknown_variables(os.environ):
        hint = f"; did you mean {meant}?" if meant else ""
        log.warning(f"{name} is not a setting and is ignored{hint}")
    # Imported here: a wrong flag is answered without loading ONNX Runtime and gRPC first.
    from service import server

    return server.run(settings, load_progress())


def _add_version(commands: Commands) -> None:
    text = "Versions of onclock and of what decides its behaviour, and the devices it would take."
    add_command(commands, "version", "print versions", text).set_defaults(run_command=_version)


def _version(_: argparse.Namespace) -> int:
    from service.engine.devices import find_devices

    print(f"onclock {importlib.metadata.version('onclock')}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("onnxruntime-gpu", "onnxruntime", "grpcio", "numpy"):
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = find_devices("auto", cpu_slots=1, gpu_slots=1, cpu_threads=available_cores())
    print(f"device: {', '.join(device.name for device in devices.taken)} ({devices.why})")
    return EXIT_OK


def _unknown_arguments(unknown: Sequence[str], arguments: argparse.Namespace) -> str:
    """What to say about arguments that nothing accepts, with the flag that was probably meant."""
    command = f"onclock {arguments.command}" if arguments.command else "onclock"
    flag = unknown[0].partition("=")[0]
    # argparse names values by attribute: every flag of ours is its attribute with dashes
    flags = ["--help", "--version"] if arguments.command is None else [flag_name(name) for name in vars(arguments)]
    close = difflib.get_close_matches(flag, flags, n=1)
    hint = f"did you mean {close[0]}?" if close else f"see {command} --help"
    return f"{command} does not know {unknown[0]!r}; {hint}"


def _complain(text: str) -> None:
    print(f"onclock: error: {text}", file=sys.stderr)
