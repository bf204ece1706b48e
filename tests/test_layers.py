"""Imports go one way: a module imports only from rows above its own, and each external library has one home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "service"

# The longest prefix that matches decides. Modules of one row may import each other only within one package.
ROWS: dict[str, int] = {
    "service.errors": 0,
    "service.clock": 0,
    "service.tensor": 0,
    "service.config": 0,
    "service.state": 0,
    "service.trace_context": 0,
    "service.batch": 1,
    "service.scheduler": 1,
    "service.request": 1,
    "service.repository.version_policy": 1,
    "service.engine": 2,
    "service.metrics": 2,
    "service.logs": 2,
    "service.tracing": 2,
    "service.telemetry": 2,
    "service.model": 3,
    "service.sequence_model": 3,
    "service.head_model": 3,
    "service.repository": 4,
    "service.frontend": 5,
    "service.status_page": 5,
    "service.server": 6,
    "service.simulation": 6,
    "service.cli": 7,
    "service.__main__": 7,
}
# Nouns build on each other, and a request is a noun made of the scheduler's.
WITHIN_ROW = {
    ("service.request", "service.scheduler"),
    ("service.scheduler", "service.batch"),
    ("service.sequence_model", "service.model"),
    ("service.head_model", "service.model"),
    ("service.__main__", "service.cli"),
}
HOMES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("service.engine",),
    "prometheus_client": ("service.metrics",),
    # The server and, to collectors, a client.
    "grpc": ("service.frontend", "service.server", "service.telemetry.sender"),
    "opentelemetry": ("service.telemetry",),
    "grpc_health": ("service.frontend",),
    "grpc_reflection": ("service.frontend",),
    "matplotlib": ("service.simulation", "service.cli"),
    "onnx": ("service.config",),
}
PURE = "service.scheduler"
STDLIB_FOR_PURE = {
    "__future__", "abc", "bisect", "collections", "dataclasses", "enum", "heapq", "itertools", "math", "operator",
    "typing",
}  # fmt: skip


def modules() -> list[Path]:
    return [p for p in sorted(ROOT.rglob("*.py")) if "pb" not in p.relative_to(ROOT).parts]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module in ("loadtests", "service", "service.pb"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def home(module: str) -> str:
    """The entry of ROWS that a module belongs to."""
    matches = [prefix for prefix in ROWS if module == prefix or module.startswith(prefix + ".")]
    return max(matches, key=len, default="")


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_only_from_rows_above(path: Path) -> None:
    """No module imports from its own row (outside its package) or from a row below."""
    module = name_of(path)
    if module == "service":
        return
    own = home(module)
    assert own, f"{module} has no row: add it to ROWS and to docs/architecture.md"
    for imported in imports(path):
        if not imported.startswith("service.") or imported.startswith("service.pb"):
            continue
        other = home(imported)
        assert other, f"{module} imports {imported}, which has no row"
        allowed = ROWS[other] < ROWS[own] or other == own or (own, other) in WITHIN_ROW
        assert allowed or ROWS[own] == 0 == ROWS[other], (
            f"{module} (row {ROWS[own]}) imports {imported} (row {ROWS[other]})"
        )


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_external_libraries_have_one_home(path: Path) -> None:
    """ONNX Runtime, Prometheus, gRPC and the plots are each imported in one place."""
    module = name_of(path)
    for imported in imports(path):
        homes = HOMES.get(imported.split(".")[0])
        if homes is not None:
            assert any(module == h or module.startswith(h + ".") for h in homes), f"{module} imports {imported}"


def test_the_scheduler_needs_the_standard_library_only() -> None:
    """Decisions stay cheap to simulate and to test: no clock, no threads, no arrays."""
    for path in modules():
        if name_of(path).startswith(PURE):
            for imported in imports(path):
                outside = imported.split(".")[0] not in STDLIB_FOR_PURE
                allowed = imported.startswith((PURE, "service.batch", "service.clock", "service.errors"))
                assert not outside or allowed, f"{name_of(path)} imports {imported}"


# The load tests know the wire protocol, and for the curve of a sweep two pure functions.
LOADTESTS = ROOT.parent / "loadtests"
LOADTESTS_MAY = ("service.pb", "service.simulation.capacity", "service.simulation.optimum")
# In this order: each imports only from those before it.
LOADTESTS_ROWS = (
    ("errors", "http2"),
    ("pacer", "trace", "outcome", "scenario", "scrape", "search"),
    ("connection", "records"),
    ("model_info", "plan", "stats"),
    ("payload", "verdict", "charts", "explain"),
    ("worker", "report"),
    ("run", "compare"),
    ("live", "sweep"),
    ("cli",),
    ("__main__",),
)
LOADTESTS_HOMES = {
    "grpc": {"model_info"}, "hpack": {"http2"}, "jinja2": {"report"}, "matplotlib": {"charts"}, "pyarrow": {"records"},
    "pydantic": {"scenario", "explain"}, "prometheus_client": {"scrape"},
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(LOADTESTS.glob("*.py")), ids=lambda path: path.stem)
def test_load_tests_know_only_the_protocol(path: Path) -> None:
    """Nothing of the server but its messages; modules build on each other one way; libraries have one home."""
    rows = {name: row for row, names in enumerate(LOADTESTS_ROWS) for name in names}
    assert path.stem == "__init__" or path.stem in rows, f"{path.stem} has no row: add it to LOADTESTS_ROWS"
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] == "service":
            assert imported.startswith(LOADTESTS_MAY), f"{path.stem} imports {imported}"
        elif parts[0] == "loadtests" and len(parts) > 1:
            assert rows[parts[1]] < rows[path.stem], f"{path.stem} imports {imported}"
        elif parts[0] in LOADTESTS_HOMES:
            assert path.stem in LOADTESTS_HOMES[parts[0]], f"{path.stem} imports {imported}"
