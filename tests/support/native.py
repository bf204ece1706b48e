"""Whether the native ingress is there to be tested."""

from __future__ import annotations

import os

import pytest

from service.frontend import native_ingress

# Set where a run that does not test the native ingress must not pass.
REQUIRE = "ONCLOCK_TEST_NATIVE"


def needs_native() -> None:
    """Skip the test where the extension was not built; fail it where `ONCLOCK_TEST_NATIVE=require` says it must be."""
    reason = native_ingress.missing()
    if reason and os.environ.get(REQUIRE) == "require":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
