"""The few facts of the protobuf wire format that the fast path needs.

A `ModelInferRequest` is split into its header, everything a client's requests have in common, and its raw tensors,
without parsing either. Serializers write fields in order of their numbers, so the header is everything before the first
`raw_input_contents` (field 7), less the request id (field 3). What does not look like that is not an error: `split`
returns None, and the message takes the slow path through the protobuf library, which alone decides what is malformed.
(https://protobuf.dev/programming-guides/encoding)
"""

from __future__ import annotations

from dataclasses import dataclass

_ID = 0x1A  # field 3, length-delimited
_RAW = 0x3A  # field 7, length-delimited
# Fields 1, 2, 4, 5, 6: model_name, model_version, parameters, inputs, outputs.
_HEADER = frozenset((0x0A, 0x12, 0x22, 0x2A, 0x32))
# A length of more than 5 bytes exceeds 2 GiB, the largest message protobuf allows.
_MAX_LENGTH_BYTES = 5


@dataclass(slots=True)
class SplitMessage:
    """`header`: the bytes that decide how the request is served. `raws`: (start, end) of each raw tensor."""

    header: bytes
    request_id: bytes
    raws: list[tuple[int, int]]


def split(message: bytes | memoryview) -> SplitMessage | None:  # noqa: C901 - one loop over bytes: calls would cost more than the parsing
    """Split a serialized `ModelInferRequest`, or None when its fields are not in the usual order or form."""
    position = 0
    total = len(message)
    header_end = -1
    id_start = id_end = 0
    request_id = b""
    raws: list[tuple[int, int]] = []
    while position < total:
        start = position
        tag = message[position]
        position += 1
        if position == total:
            return None
        length = message[position]
        position += 1
        if length >= 0x80:
            length, position = _long_length(message, length, position)
            if length < 0:
                return None
        end = position + length
        if end > total:
            return None
        if tag == _RAW:
            if header_end < 0:
                header_end = start
            raws.append((position, end))
        elif header_end >= 0:
            return None
        elif tag == _ID:
            if id_end:
                return None
            request_id = bytes(message[position:end])
            id_start, id_end = start, end
        elif tag not in _HEADER:
            return None
        position = end
    if header_end < 0:
        header_end = total
    header = bytes(message[:header_end])
    if id_end:
        header = header[:id_start] + header[id_end:]
    return SplitMessage(header, request_id, raws)


def _long_length(message: bytes | memoryview, first: int, position: int) -> tuple[int, int]:
    """The rest of a varint whose first byte was `first`: (value, next position), value -1 if it is not well formed."""
    value = first & 0x7F
    shift = 7
    for _ in range(_MAX_LENGTH_BYTES - 1):
        if position >= len(message):
            return -1, position
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return -1, position


def varint(value: int) -> bytes:
    """Encode a non-negative integer."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def delimited(field: int, payload: bytes) -> bytes:
    """A length-delimited field: tag, length and payload."""
    return delimiter(field, len(payload)) + payload


def delimiter(field: int, length: int) -> bytes:
    """The tag and length that precede the payload of a length-delimited field."""
    return varint(field << 3 | 2) + varint(length)
