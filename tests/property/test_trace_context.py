"""Whatever strangers send as a trace's context: it is read as the specification has it, or not at all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.trace_context import MAX_MEMBERS, MAX_STATE, Parent, parse_parent, parse_state

ids = st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8)).filter(
    lambda pair: any(pair[0]) and any(pair[1])
)
versions = st.integers(0, 254)
near = st.text(alphabet="0123456789abcdef-g ,\n", min_size=50, max_size=60)


@given(ids, st.integers(0, 255))
def test_what_is_written_is_read(pair: tuple[bytes, bytes], flags: int) -> None:
    """Any ids that are not zero, any flags."""
    trace, span = pair
    text = f"00-{trace.hex()}-{span.hex()}-{flags:02x}"
    assert parse_parent(text) == Parent(trace, span, bool(flags & 1))


@given(ids, versions, st.integers(0, 255), st.text(max_size=20))
def test_later_versions_are_read_as_this_one(pair: tuple[bytes, bytes], version: int, flags: int, more: str) -> None:
    """What they have behind a dash is theirs; version 0 has nothing there."""
    trace, span = pair
    text = f"{version:02x}-{trace.hex()}-{span.hex()}-{flags:02x}"
    known = Parent(trace, span, bool(flags & 1))
    assert parse_parent(text) == known
    assert parse_parent(f"{text}-{more}") == (known if version else None)
    if more and not more.startswith("-"):
        assert parse_parent(text + more) is None


@given(st.one_of(st.text(), near), st.integers(0, 60), st.characters())
def test_anything_is_a_parent_or_none(text: str, at: int, character: str) -> None:
    """Nothing raises, and what is read could have been written."""
    good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for candidate in (text, good[:at] + character + good[at + 1 :], good[:at] + character + good[at:]):
        parent = parse_parent(candidate)
        if parent is not None:
            assert (len(parent.trace_id), len(parent.span_id)) == (16, 8)
            assert any(parent.trace_id)
            assert any(parent.span_id)
            assert f"-{parent.trace_id.hex()}-{parent.span_id.hex()}-" in candidate


@given(st.one_of(st.text(), st.text(alphabet="ab=,1 \t@*", max_size=700)))
def test_any_state_is_bounded(text: str) -> None:
    """What is passed on was there, is short, and reads the same again."""
    kept = parse_state(text)
    assert len(kept) <= MAX_STATE
    assert len(kept.split(",")) <= MAX_MEMBERS
    assert all(member in text for member in kept.split(","))
    assert parse_state(kept) == kept
