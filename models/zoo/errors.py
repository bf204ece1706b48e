"""What the converters raise."""

from __future__ import annotations


class ConversionError(ValueError):
    """The file is damaged, or not the network expected. The message names the tensor."""
