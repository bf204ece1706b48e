# Every target does its own set-up: a fresh machine needs only make and Python 3.11 or newer (with venv).
#   make serve      serve the example models on 127.0.0.1:8001, metrics on :8002
#   make zoo        fetch every pretrained model, publish it, and compare its answers with a server's
#   make classify   fetch EfficientNet-Lite0, serve it and name what is in a photograph
#   make test       the whole test suite         make lint types   what CI checks besides
#   make load       a load test against `make serve`; `make load SCENARIO=step` another one
#   make sim        the scheduler in simulation  make bench        the benchmarks (Linux, two cores)
#   make bench-gpu  what only a GPU can show
#   make chart      test the Helm chart (builds helm, which takes minutes once)
#   make test-cluster  install it into an API server of Kubernetes (builds one: a quarter of an hour once)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REPOSITORY ?= models/examples
# More flags for `make serve`, for example: make serve FLAGS="--grpc-port 9001"
FLAGS ?=
# See `python -m loadtests list`.
SCENARIO ?= steady
# More arguments for `make test`, for example: make test TESTS=tests/unit
TESTS ?= tests
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help serve zoo classify load test test-cluster lint format types sim bench bench-gpu chart protos lock image clean

help:
	@sed -n '2,10p' Makefile | sed 's/^# *//'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

NATIVE := $(wildcard service/frontend/native/*)

$(VENV)/.server: $(BIN)/python pyproject.toml requirements/server.lock $(NATIVE)
	@echo "installing the server into $(VENV) ..."
	@$(PIP) install --require-hashes -r requirements/server.lock
	@$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.server requirements/dev.lock
	@echo "installing what tests and models need into $(VENV) ..."
	@$(PIP) install --require-hashes -r requirements/dev.lock
	@touch $@

serve: $(VENV)/.server
	$(BIN)/onclock serve --model-repository $(REPOSITORY) $(FLAGS)

zoo: $(VENV)/.dev
	$(BIN)/onclock models fetch --all
	$(BIN)/onclock models verify

classify: $(VENV)/.dev
	$(BIN)/python -m models.classify_demo

load: $(VENV)/.dev
	$(BIN)/python -m loadtests run $(SCENARIO) $(FLAGS)

# Two at a time, file by file; then, one at a time, what measures time (5: none of those was asked for).
test: $(VENV)/.dev
	$(BIN)/python -m pytest $(TESTS) -m "not timed" -n 2 --dist loadfile
	$(BIN)/python -m pytest $(TESTS) -m timed || [ $$? -eq 5 ]

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

sim: $(VENV)/.dev
	$(BIN)/python -m benchmarks.simulation_table
	$(BIN)/onclock simulate --latency 5+0.5*rows --slo-ms 22 --plot build/simulate.png

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run

bench-gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run_gpu

chart: $(VENV)/.dev
	$(BIN)/python -m tests.helm.tools
	$(BIN)/python -m pytest tests/helm

test-cluster: $(VENV)/.dev
	$(BIN)/python -m tests.helm.tools
	$(BIN)/python -m tests.cluster.api_server
	ONCLOCK_TEST_CLUSTER=require $(BIN)/python -m pytest tests/cluster

protos: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" protos/generate.sh

# The image's Python and processor; its ONNX Runtime is one of two.
LOCK_IMAGE = --quiet --no-strip-extras --generate-hashes --no-emit-index-url --python-version 3.11 --python-platform x86_64-manylinux_2_28

# Resolve the pinned versions anew, for every platform and Python at once, with hashes.
lock: $(VENV)/.dev
	$(PIP) install uv==0.13.9
	$(BIN)/uv pip compile --quiet --no-strip-extras --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
	  pyproject.toml -o requirements/server.lock
	$(BIN)/uv pip compile --quiet --no-strip-extras --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
	  --extra dev --extra loadtests --extra models --extra otlp pyproject.toml -o requirements/dev.lock
	$(BIN)/uv pip compile $(LOCK_IMAGE) requirements/build.in -o requirements/build.lock
	$(BIN)/uv pip compile $(LOCK_IMAGE) --override requirements/image-cpu.override --extra otlp pyproject.toml -o requirements/image-cpu.lock
	$(BIN)/uv pip compile $(LOCK_IMAGE) --extra cuda --extra otlp pyproject.toml -o requirements/image-cuda.lock

# The server as an image, on public bases; IMAGE_FLAGS="--target cuda -t onclock:cuda" for GPUs.
IMAGE_FLAGS ?= -t onclock
BUILDER ?= $(firstword $(shell command -v docker podman buildah))
image:
	@[ -n "$(BUILDER)" ] || { echo "make image needs docker, podman or buildah" >&2; exit 1; }
	$(BUILDER) build $(IMAGE_FLAGS) .

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
