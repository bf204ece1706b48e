"""The image for GPUs, where there is none: it is built, holds CUDA and cuDNN, and says why it serves on the CPU.

Three gigabytes are downloaded and unpacked for it, so it is tested only where `ONCLOCK_TEST_CUDA_IMAGE=require` asks
for it.
"""

from __future__ import annotations

import json
import logging
import os

import grpc
import numpy as np
import pytest

from tests.container.conftest import BASES
from tests.container.podman import LOCKED, PLAIN, build, podman, running
from tests.container.test_image import EXAMPLES, digits
from tests.support.client import Client, arrays, request

ASKED = "ONCLOCK_TEST_CUDA_IMAGE"
pytestmark = [
    pytest.mark.timed,
    pytest.mark.skipif(os.environ.get(ASKED) != "require", reason=f"3 GB; {ASKED}=require builds it"),
]
LOG = logging.getLogger(__name__)
IMAGE = "localhost/onclock:cuda"
# What the wheels bring; the driver, `libcuda.so.1`, is the node's.
LIBRARIES = {"libcublas.so", "libcublasLt.so", "libcudart.so", "libcudnn.so", "libcufft.so", "libcurand.so"}
WHAT_IS_LOADED = """
import ctypes, json, os
import onnxruntime as ort
ort.preload_dlls()
here = os.path.join(os.path.dirname(ort.__file__), "capi", "libonnxruntime_providers_")
ctypes.CDLL(here + "shared.so", ctypes.RTLD_GLOBAL)
try:
    ctypes.CDLL(here + "cuda.so")
    missing = ""
except OSError as error:
    missing = str(error)
maps = {os.path.basename(line.split()[-1]) for line in open("/proc/self/maps") if "/nvidia/" in line}
print(json.dumps([ort.get_available_providers(), sorted(maps), missing]))
"""


@pytest.fixture(scope="module")
def cuda_image(image: str) -> str:
    """The image for GPUs, on the bases of the other one."""
    build("cuda", IMAGE, BASES)
    return IMAGE


def test_all_but_the_driver_is_in_it(cuda_image: str) -> None:
    """ONNX Runtime's CUDA provider finds every library except the one that comes from the node."""
    size = json.loads(podman("inspect", "--type=image", cuda_image).stdout)[0]["Size"]
    LOG.info("%.0f MB", size / 1e6)
    quiet = ("run", "--rm", "--network=none", *PLAIN, *LOCKED)
    found = podman(*quiet, "--entrypoint=/opt/onclock/bin/python", cuda_image, "-c", WHAT_IS_LOADED)
    providers, libraries, missing = json.loads(found.stdout)
    assert "CUDAExecutionProvider" in providers
    assert {name.split(".so")[0] + ".so" for name in libraries} >= LIBRARIES
    assert missing.startswith("libcuda.so.1") or not missing


def test_without_a_driver_it_serves_on_the_cpu_and_says_why(cuda_image: str) -> None:
    """A node whose driver is missing is found in the first lines of the log."""
    with running(cuda_image, mounts=[EXAMPLES]) as container:
        devices = container.wait_for_log("devices")
        assert devices["taken"] == "cpu"
        assert "libcuda.so.1" in str(devices["reason"])
        container.wait_for_log("ready")
        with grpc.insecure_channel(container.address) as channel:
            client = Client(channel)
            name = client.call("ModelMetadata", name="digits").inputs[0].name
            answer = arrays(client.infer(request("digits", {name: digits()})))
        assert np.isfinite(answer["probabilities"]).all()
        assert container.stop() == 0
