"""The tables of `docs/configuration.md`, made from the tables that the server itself reads.

`python -m service.config.reference` rewrites them in place; a test fails while they differ.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from service.config.parameters import PARAMETERS, SESSION_ENTRIES
from service.config.support import SUPPORT

DOCUMENT = Path("docs/configuration.md")


def keys_table() -> str:
    """Every key of `ModelConfig`: honoured or refused, and what that means."""
    rows = [
        f"| `{key}` | {'honoured' if support.honoured else '**refused**'} | {support.text} |"
        for key, support in SUPPORT.items()
    ]
    return "\n".join(["| key | here | meaning, or what to do instead |", "|---|---|---|", *rows])


def parameters_table() -> str:
    """Every key of `parameters`."""
    rows = [
        f"| `{name}` | {'onclock' if parameter.ours else 'Triton'} | {parameter.accepts} | {parameter.meaning} |"
        for name, parameter in PARAMETERS.items()
    ]
    return "\n".join(["| parameter | from | value | meaning |", "|---|---|---|---|", *rows])


def entries_list() -> str:
    """The entries of ONNX Runtime's session configuration that may be parameters."""
    return "\n".join(f"- `{name}`" for name in sorted(SESSION_ENTRIES))


def filled(document: str) -> str:
    """`document` with the text between each pair of `<!-- name -->` and `<!-- end -->` replaced by the table."""
    tables = {"keys": keys_table(), "parameters": parameters_table(), "entries": entries_list()}
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{tables[found[1]]}\n<!-- end -->",
        document,
        flags=re.DOTALL,
    )


def main() -> int:
    """Rewrite the document."""
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
