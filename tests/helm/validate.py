"""Checks objects against the schemas of Kubernetes; run by the interpreter that `tests.helm.tools.validator` finds.

    python validate.py VERSION < objects.json

Reads a JSON list of objects. Prints one line for each that is wrong, and fails when there is one. Unknown keys are
wrong.
"""

from __future__ import annotations

import json
import sys

import kubernetes_validate  # type: ignore[import-not-found]


def main() -> int:
    version = sys.argv[1]
    wrong = 0
    for document in json.load(sys.stdin):
        name = f"{document['kind']} {document['metadata']['name']}"
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            path = ".".join(map(str, getattr(error, "path", ())))
            sys.stdout.write(f"{name}: {path}: {getattr(error, 'message', error)}\n")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
