"""docs/configuration.md is about every key there is, and agrees with what the server does."""

from __future__ import annotations

from pathlib import Path

from service.config.parameters import PARAMETERS
from service.config.reference import filled
from service.config.support import SUPPORT, schema_keys
from service.pb import model_config_pb2

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_tables_are_the_ones_the_server_reads() -> None:
    """`python -m service.config.reference` would change nothing."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert filled(text) == text


def test_every_field_of_the_schema_is_decided() -> None:
    """A key is honoured or refused; none was forgotten, none is left over."""
    assert set(schema_keys(model_config_pb2.ModelConfig.DESCRIPTOR)) == set(SUPPORT)


def test_every_field_of_the_schema_is_in_the_document() -> None:
    """Every field of ModelConfig and each decided key below it has a row."""
    text = DOCUMENT.read_text(encoding="utf-8")
    keys = [*(field.name for field in model_config_pb2.ModelConfig.DESCRIPTOR.fields), *SUPPORT]
    assert [key for key in keys if f"| `{key}` |" not in text] == []
    assert [key for key in PARAMETERS if f"| `{key}` |" not in text] == []
