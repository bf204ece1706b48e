#!/bin/sh
# Generate service/pb from protos/. The virtual path service/pb makes the generated code import `from service.pb`.
# No *_pb2_grpc.py: handlers are registered by hand (service/frontend), so that request bytes can be read unparsed.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -m grpc_tools.protoc -Iservice/pb=protos --python_out=. --pyi_out=. \
    service/pb/model_config.proto service/pb/grpc_service.proto
