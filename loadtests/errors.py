"""What can stop a load test before it has a result; the message says what is wrong and what to do."""

from __future__ import annotations


class LoadTestError(Exception):
    """A load test cannot be run, read or compared."""


class ScenarioError(LoadTestError):
    """A scenario is wrong. `str(error)` has one line per fault, each with the path of the key: `load[0].rate`."""
