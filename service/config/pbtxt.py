"""From the text of a configuration file to a message that says nothing the server ignores.

Promise: whatever the text is, the outcome is a message that passed `check_supported`, or a `ConfigError` whose path
names the place (`config.pbtxt:3:5`) or the key (`instance_group[0].kind`). What the message means for a particular
model file is decided in `service.config.complete`.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from google.protobuf import json_format, text_format
from google.protobuf.descriptor import Descriptor

from service.config.support import check_supported
from service.errors import ConfigError
from service.pb import model_config_pb2

CONFIG_FILENAME = "config.pbtxt"

# Real configurations have a few kilobytes; a megabyte is a model put in the wrong place.
MAX_CONFIG_BYTES = 1 << 20

_UNKNOWN_FIELD = re.compile(r'[Mm]essage type "inference\.([\w.]+)" has no field named "([^"]*)"')


def read_config(path: Path) -> model_config_pb2.ModelConfig | None:
    """The configuration in `path`, or None where there is no such file. Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(str(path), f"larger than {MAX_CONFIG_BYTES} bytes; expected a ModelConfig in text format")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            str(path), f"byte {error.start} is not UTF-8; expected a ModelConfig in text format"
        ) from None
    return parse_text(text, str(path))


def parse_text(text: str, filename: str = CONFIG_FILENAME) -> model_config_pb2.ModelConfig:
    """Read protobuf text format. Raises `ConfigError`: syntax at `filename:line:column`, refused keys by their path."""
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        line, column = error.GetLine(), error.GetColumn()
        where = filename if line is None else f"{filename}:{line}:{column or 1}"
        message = re.sub(r"^\d+:\d+ : ", "", str(error))
        raise ConfigError(where, message + _suggestion(message)) from None
    except (ValueError, UnicodeError) as error:
        # Text format's own checks of strings: a lone surrogate, a byte that is not UTF-8.
        raise ConfigError(filename, f"not a ModelConfig in text format: {error}") from None
    entries = _parameter_entries(text)
    if entries != len(config.parameters):
        raise ConfigError(
            "parameters", f"{entries} entries, but {len(config.parameters)} different keys: a key is given twice"
        )
    check_supported(config)
    return config


def parse_json(text: str, path: str = "config") -> model_config_pb2.ModelConfig:
    """Read protobuf JSON, the form that a load request carries. Raises `ConfigError`; `path` names the parameter."""
    config = model_config_pb2.ModelConfig()
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(path, f"longer than {MAX_CONFIG_BYTES} characters; expected a ModelConfig in JSON")
    try:
        json_format.Parse(text, config)
    except json_format.ParseError as error:
        message = str(error)
        raise ConfigError(path, f"not a ModelConfig in JSON: {message}{_suggestion(message)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, f"not a ModelConfig in JSON: {error}") from None
    check_supported(config)
    return config


def to_text(config: model_config_pb2.ModelConfig) -> str:
    """The message in text format, as it would stand in a file."""
    return text_format.MessageToString(config, as_utf8=True)


def _parameter_entries(text: str) -> int:
    """How many entries of `parameters` well-formed `text` has. Protobuf keeps the last of equal keys, in silence."""
    tokens = text_format.Tokenizer(text.split("\n"))
    depth = entries = 0
    field = ""
    while not tokens.AtEnd():
        token = tokens.token
        if token in ("{", "<"):
            entries += depth == 0 and field == "parameters"
            depth += 1
        elif token in ("}", ">"):
            depth -= 1
        elif depth == 0 and token not in ("[", "]", ",", ":", ";"):
            field = token
        tokens.NextToken()
    return entries


def _suggestion(message: str) -> str:
    """A field name close to the one that the parser did not know."""
    found = _UNKNOWN_FIELD.search(message)
    if found is None:
        return ""
    descriptor: Descriptor | None = model_config_pb2.DESCRIPTOR.message_types_by_name.get(found[1].split(".")[0])
    for part in found[1].split(".")[1:]:
        descriptor = descriptor.nested_types_by_name.get(part) if descriptor is not None else None
    if descriptor is None:
        return ""
    close = difflib.get_close_matches(found[2], list(descriptor.fields_by_name), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
