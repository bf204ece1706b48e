"""`traceparent` and `tracestate`, as the specification has them."""

from __future__ import annotations

import pytest

from service.trace_context import MAX_STATE, Parent, parse_parent, parse_state

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        # Bits that mean something else, or nothing yet.
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"00-{TRACE}-{SPAN}-fe", False),
        # Later versions may say more behind another dash.
        (f"01-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-is-this", True),
        (f"cc-{TRACE}-{SPAN}-01-", True),
    ],
)
def test_a_parent(text: str, sampled: bool) -> None:
    """Its ids, and whether it is traced."""
    assert parse_parent(text) == Parent(bytes.fromhex(TRACE), bytes.fromhex(SPAN), sampled)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}-01.",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"cc-{TRACE}-{SPAN}-011",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0A",
        f"00-{TRACE}-{SPAN}-0\u0661",
        f" 00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00_{TRACE}_{SPAN}_01",
        f"00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01",
        "0" * 100_000,
    ],
)
def test_what_is_no_parent(text: str) -> None:
    """Counts as absent."""
    assert parse_parent(text) is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        ("rojo=00f067aa0ba902b7", "rojo=00f067aa0ba902b7"),
        ("rojo=1 , congo=t61rcWkgMzE\t,,", "rojo=1,congo=t61rcWkgMzE"),
        ("fw529a3039@dt=FfAAAAAAAAA", "fw529a3039@dt=FfAAAAAAAAA"),
        ("a=with blank", "a=with blank"),
        # Not valid: the whole of it counts as absent.
        ("a", ""),
        ("a=", ""),
        ("A=1", ""),
        ("a=1,a=2", ""),
        ("a=b=c", ""),
        ("a=\u00e9", ""),
        ("a=1;b=2,c=\x00", ""),
        ("a" * 257 + "=1", ""),
        ("a=" + "1" * 257, ""),
        (",".join(f"k{n}=1" for n in range(33)), ""),
    ],
)
def test_a_state(text: str, kept: str) -> None:
    """Is passed on as it is when it is valid."""
    assert parse_state(text) == kept


def test_a_state_that_is_too_long() -> None:
    """Loses what is long first, then what comes last."""
    long = "long=" + "1" * 200
    short = [f"k{number}={'1' * 60}" for number in range(10)]
    assert parse_state(",".join([short[0], long])) == ",".join([short[0], long])
    kept = parse_state(",".join([long, *short]))
    assert kept == ",".join(short[:8])
    assert len(kept) <= MAX_STATE < len(",".join(short[:9]))
