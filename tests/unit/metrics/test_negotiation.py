"""Which format a scrape is answered in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.metrics.negotiation import wants_openmetrics

OM = "application/openmetrics-text"


@pytest.mark.parametrize(
    "accept",
    [
        OM,
        f"{OM}; version=1.0.0; charset=utf-8",
        f'{OM};version="0.0.1"',
        f"{OM.upper()};Version=1.0.0",
        # Prometheus 2.42, 2.55 and 3.
        f"{OM};version=1.0.0,{OM};version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        f"{OM};version=1.0.0;q=0.5,{OM};version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
        f"{OM};version=1.0.0;escaping=allow-utf-8;q=0.5,{OM};version=0.0.1;q=0.4,"
        "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
        f"*/*,{OM}",
        f"text/plain;q=0.2, {OM};q=0.3",
        f"text/plain;q=0, {OM};q=0.001",
        f"text/plain;version=1.0.0, {OM};q=0.1",
    ],
)
def test_openmetrics(accept: str) -> None:
    """For who names it and does not like the other better."""
    assert wants_openmetrics(accept)


@pytest.mark.parametrize(
    "accept",
    [
        None,
        "",
        "*/*",
        "application/*",
        "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
        "text/plain;version=0.0.4",
        f"{OM};q=0",
        f"{OM};q=0.000",
        f"{OM};version=2.0.0",
        f"{OM};q=0.4,text/plain;q=0.5",
        f"{OM};q=0.4,*/*;q=0.5",
        f"{OM};q=0.4,text/*;q=0.5,*/*;q=0.1",
        f"{OM};q=much",
        f"{OM};q=1.5",
        f"{OM};q=nan",
        f"{OM}x",
        ";;;,,,=",
    ],
)
def test_the_classic_format(accept: str | None) -> None:
    """For everybody else."""
    assert not wants_openmetrics(accept)


@given(st.text())
def test_anything_is_answered(accept: str) -> None:
    """Nothing raises, and who does not name it does not get it."""
    assert not wants_openmetrics(accept) or "openmetrics" in accept.lower()
