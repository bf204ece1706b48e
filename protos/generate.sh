#!/bin/sh
# Generate service/pb from protos/. The virtual path service/pb makes the generated code import `from service.pb`.
# No *_pb2_grpc.py: handlers are registered by hand (service/frontend), so that request bytes can be read unparsed.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -m grpc_tools.protoc -Iservice/pb=protos --python_out=. --pyi_out=. \
    service/pb/model_config.proto service/pb/grpc_service.proto
# protoc's stubs are looser than strict type checking asks for; what uses them is still checked.
for stub in service/pb/*_pb2.pyi; do
    { echo "# mypy: ignore-errors"; cat "$stub"; } > "$stub.new" && mv "$stub.new" "$stub"
done
