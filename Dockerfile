# The server as an image: `cpu` (the default) or `cuda`, from this one file.
#
#   docker build -t onclock .
#   docker build -t onclock:cuda --target cuda .
#
# What runs needs no shell, no compiler and no root; /tmp must be writable (a tmpfs does), nothing else. The models are a
# volume at /models. The bases are arguments: any Debian 12 to build on, anything with its Python 3.11 to run on.
ARG BUILD_BASE=docker.io/library/debian:bookworm-slim
ARG RUN_BASE=gcr.io/distroless/python3-debian12:nonroot

# ------------------------------------------------------------------------------------------------------------- build --
FROM ${BUILD_BASE} AS tools
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      ca-certificates g++ libnghttp2-dev libssl-dev python3-dev python3-pip python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
RUN python3 -m venv --without-pip /opt/onclock
WORKDIR /src
COPY requirements/build.lock requirements/
# Beside what is shipped, not in it. --ignore-installed: Debian's own setuptools is too old and stays where it is.
RUN python3 -m pip install --target /opt/build --require-hashes -r requirements/build.lock

FROM tools AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY models models
COPY loadtests loadtests
# A wheel without its front end would be slower without saying so: here it must be built.
RUN PYTHONPATH=/opt/build python3 -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheel . \
 && python3 -m zipfile -l /wheel/onclock-*.whl | grep -q 'service/frontend/_native.*\.so' \
 && mkdir /native && cp -L /usr/lib/*/libnghttp2.so.14 /native/

FROM tools AS installed-cpu
COPY requirements/image-cpu.lock requirements/
RUN python3 -m pip --python /opt/onclock/bin/python install --require-hashes -r requirements/image-cpu.lock

FROM tools AS installed-cuda
COPY requirements/image-cuda.lock requirements/
RUN python3 -m pip --python /opt/onclock/bin/python install --require-hashes -r requirements/image-cuda.lock

# A layer of its own: a new version of the server changes a megabyte, not what it stands on.
FROM installed-cpu AS application-cpu
COPY --from=wheel /wheel /wheel
RUN python3 -m pip --python /opt/onclock/bin/python install --no-deps --prefix /opt/application /wheel/*.whl

FROM installed-cuda AS application-cuda
COPY --from=wheel /wheel /wheel
RUN python3 -m pip --python /opt/onclock/bin/python install --no-deps --prefix /opt/application /wheel/*.whl

# --------------------------------------------------------------------------------------------------------------- run --
FROM ${RUN_BASE} AS bare
ENV PATH=/opt/onclock/bin:/usr/local/bin:/usr/bin:/bin \
    LD_LIBRARY_PATH=/opt/native \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ONCLOCK_HOST=0.0.0.0 \
    ONCLOCK_MODEL_REPOSITORY=/models \
    ONCLOCK_PROFILE_CACHE=none
EXPOSE 8001 8002
STOPSIGNAL SIGTERM
# A number, so that Kubernetes can see that it is not root.
USER 65532:65532
WORKDIR /
ENTRYPOINT ["/opt/onclock/bin/onclock"]
CMD ["serve"]

FROM bare AS cuda
# The driver is the node's: the NVIDIA container runtime brings it in.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=installed-cuda /opt/onclock /opt/onclock
COPY --from=wheel /native /opt/native
COPY --from=application-cuda /opt/application /opt/onclock

FROM bare AS cpu
COPY --from=installed-cpu /opt/onclock /opt/onclock
COPY --from=wheel /native /opt/native
COPY --from=application-cpu /opt/application /opt/onclock
