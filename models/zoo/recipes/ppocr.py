"""PP-OCRv6: where is text on a picture, and what does it say? A detector and a recogniser."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from models.zoo import ocr, photos
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, RecipeError, require_close
from models.zoo.recipes.yolov4_tiny import SAMPLES, YOLOV4_DETECTOR
from models.zoo.session import Session, latency_row, open_session

RAPIDOCR = Wheel(
    name="rapidocr",
    version="3.10.0",
    sha256="2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
    licence="Apache-2.0",
)
DETECTOR = "rapidocr/models/PP-OCRv6_det_small.onnx"
RECOGNISER = "rapidocr/models/PP-OCRv6_rec_small.onnx"
# The characters lie in the model, one a line; the recogniser knows a space besides.
ALPHABET = "character"

# A photograph with text on it: a bus of Madrid, without emissions.
PHOTO = f"{SAMPLES}/bus.jpg"
RECORDED_LINES = (
    ocr.Line((451, 325, 477, 342), "EMT"),
    ocr.Line((437, 334, 481, 350), "MADRID"),
    ocr.Line((553, 543, 619, 587), "cero"),
    ocr.Line((549, 565, 688, 626), "emisiones"),
)
# More is written on it, too small or too far at the side to be read; it is found all the same.
RECORDED_FOUND = 7
PIXEL_TOLERANCE = 6.0


def ppocr_detector() -> Entry:
    """The detector as it is in the package."""
    model = read_member(fetch(RAPIDOCR), DETECTOR)
    session = open_session(model)
    photo = _photo()
    _check_detector(session, photo)
    tensor = ocr.page_tensor(photo)
    size = f"{tensor.shape[3]}x{tensor.shape[2]}"
    card = _DETECTOR_CARD.format(latency=latency_row(session, {ocr.INPUT: tensor}, f"a picture of {size}"))
    return Entry("ppocr-det", _DETECTOR_CONFIG, {"README.md": card}, {"model.onnx": model})


def ppocr_recogniser() -> Entry:
    """The recogniser as it is in the package, with its alphabet."""
    model = read_member(fetch(RAPIDOCR), RECOGNISER)
    session = open_session(model)
    characters = alphabet(session)
    photo = _photo()
    _check_recogniser(session, characters, photo)
    tensor = ocr.line_tensor(photo.crop(RECORDED_LINES[-1].box))
    latency = latency_row(session, {ocr.INPUT: tensor}, f"a line {tensor.shape[3]} pixels wide")
    return Entry(
        name="ppocr-rec",
        config=_RECOGNISER_CONFIG,
        files={"alphabet.txt": "\n".join(characters) + "\n", "README.md": _RECOGNISER_CARD.format(latency=latency)},
        version_files={"model.onnx": model},
    )


def alphabet(session: Any) -> list[str]:
    """The characters that a recogniser knows, in the order of its classes. Raises `RecipeError`."""
    held = session.get_modelmeta().custom_metadata_map
    if ALPHABET not in held:
        raise RecipeError("ppocr-rec: the model does not hold its alphabet")
    return [*held[ALPHABET].split("\n"), " "]


def _photo() -> Image.Image:
    return photos.packaged_photo(YOLOV4_DETECTOR, PHOTO)


def _check_detector(session: Session, photo: Image.Image) -> None:
    """Find the recorded lines on the photograph. Raises `RecipeError`."""
    (probabilities,) = session.run([ocr.OUTPUT], {ocr.INPUT: ocr.page_tensor(photo)})
    found = ocr.text_boxes(probabilities[0, 0], *photo.size)
    if len(found) != RECORDED_FOUND:
        raise RecipeError(f"ppocr-det: finds {len(found)} lines on the photograph, expected {RECORDED_FOUND}")
    for line in RECORDED_LINES:
        distances = np.abs(np.array(found) - line.box).max(axis=1)
        require_close("ppocr-det", f"edges of '{line.text}'", found[distances.argmin()], line.box, PIXEL_TOLERANCE)


def _check_recogniser(session: Session, characters: list[str], photo: Image.Image) -> None:
    """Read the recorded lines. Raises `RecipeError`."""
    for line in RECORDED_LINES:
        (likely,) = session.run([ocr.OUTPUT], {ocr.INPUT: ocr.line_tensor(photo.crop(line.box))})
        text = ocr.spelt(likely[0], characters)
        if text != line.text:
            raise RecipeError(f"ppocr-rec: reads '{text}', expected '{line.text}'")


_DETECTOR_CONFIG = """\
# PP-OCRv6, the detector. Pictures of one size share a batch.
name: "ppocr-det"
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, -1, -1 ] } ]
output [ { name: "fetch_name_0" data_type: TYPE_FP32 dims: [ 1, -1, -1 ] } ]
dynamic_batching { }
# Answer within this, or refuse at once. Generous for one core of a server CPU: some 150 to 300 ms for 960 x 720 pixels.
parameters { key: "latency_slo_ms" value { string_value: "2000" } }
"""

_RECOGNISER_CONFIG = """\
# PP-OCRv6, the recogniser. Lines of one width share a batch: if they are filled up to a few widths, more do.
name: "ppocr-rec"
backend: "onnxruntime"
max_batch_size: 16
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, 48, -1 ] } ]
output [ { name: "fetch_name_0" data_type: TYPE_FP32 dims: [ -1, 18710 ] } ]
dynamic_batching { }
# Answer within this, or refuse at once. Generous for one core of a server CPU: some 15 ms for a line of 320 pixels.
parameters { key: "latency_slo_ms" value { string_value: "500" } }
"""

_ORIGIN = f"""\
| SHA-256 | `{RAPIDOCR.sha256}` (the wheel) |
| Licence | Apache-2.0 (licence file of the package, and its notice for the models: PaddleOCR authors) |
| Checked with | a photograph in `{YOLOV4_DETECTOR.requirement}` |"""

_DETECTOR_CARD = f"""\
# ppocr-det

Finds lines of text on a picture, for `ppocr-rec` to read them.

| | |
| --- | --- |
| Input | `x` FP32 [N, 3, H, W]: **blue, green, red**, channels first; H and W multiples of 32 |
| Preparation | at most 960 pixels, divided by 255, `(x - mean) / deviation` of ImageNet (`models/zoo/ocr.py`) |
| Output | `fetch_name_0` FP32 [N, 1, H, W]: how likely each pixel lies in the core of a line |
| Afterwards | connected pixels from {ocr.PIXEL_SCORE}, grown by {ocr.GROWTH} of area over circumference \
(`text_boxes` in `models/zoo/ocr.py`) |
| Objective | 2 s per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Network | PP-OCRv6 (small) by PaddleOCR, the detector |
| Source | `{RAPIDOCR.requirement}`, `{DETECTOR}`, unchanged |
{_ORIGIN}
| Made by | `onclock models fetch ppocr-det` |

Checked when it was made: lines on a photograph of a bus. `text_boxes` takes lines as upright. Its accuracy was not
measured here.
"""

_RECOGNISER_CARD = f"""\
# ppocr-rec

Reads a line of text that `ppocr-det` found: Latin and Chinese letters, Japanese, and signs, 18,709 in all.

| | |
| --- | --- |
| Input | `x` FP32 [N, 3, 48, W]: **blue, green, red**, channels first, -1 to 1 |
| Preparation | the line cut out, 48 pixels high, as wide as it is then (`line_tensor` in `models/zoo/ocr.py`) |
| Output | `fetch_name_0` FP32 [N, T, 18710]: how likely each character is, for every 8 pixels of width |
| Afterwards | the likeliest of each, repeated ones once, 0 is none (`spelt` in `models/zoo/ocr.py`) |
| Objective | 500 ms per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Network | PP-OCRv6 (small) by PaddleOCR, the recogniser |
| Source | `{RAPIDOCR.requirement}`, `{RECOGNISER}`, unchanged |
{_ORIGIN}
| Made by | `onclock models fetch ppocr-rec` |

The first line of `alphabet.txt` is class 1, the last one a space. Checked when it was made: what is written on a bus.
Its accuracy was not measured here.
"""

RECIPES = (
    Recipe(
        name="ppocr-det",
        task="text recognition",
        summary="pictures: where text is (any height and width)",
        packages=(RAPIDOCR, YOLOV4_DETECTOR),
        make=lambda: (ppocr_detector(),),
    ),
    Recipe(
        name="ppocr-rec",
        task="text recognition",
        summary="pictures of a line: what it says (any width)",
        packages=(RAPIDOCR, YOLOV4_DETECTOR),
        make=lambda: (ppocr_recogniser(),),
    ),
)
