"""Fraud scores of card payments, by three kinds of classifiers that are trained on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from models.zoo import fraud
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, require_close
from models.zoo.session import latency_row, open_session

EVALML = Wheel(
    name="evalml",
    version="0.84.0",
    sha256="612e35a9b64f55f4b104855c92816508f5c16deb030c33fcf3ac250020f41ccc",
    licence="BSD-3-Clause",
)
DATA = "evalml/demos/data/fraud_transactions.csv.gz"


@dataclass(frozen=True, slots=True)
class Kind:
    """A classifier, and how well it did on the last 30 % of the payments when this was written."""

    name: str
    what: str
    libraries: str
    average_precision: float
    area_under_curve: float


KINDS = (
    Kind("lightgbm", "a hundred boosted trees", "LightGBM, onnxmltools", 0.7779, 0.8483),
    Kind("xgboost", "a hundred boosted trees", "XGBoost, onnxmltools", 0.7794, 0.8485),
    Kind("logistic", "a logistic regression on scaled features", "scikit-learn, skl2onnx", 0.7614, 0.8296),
)
# Other versions of the libraries grow somewhat other trees.
SCORE_TOLERANCE = 0.01
# Between the library itself and its ONNX: rounding only.
PROBABILITY_TOLERANCE = 1e-4


def fraud_score(kind: Kind) -> tuple[Entry]:
    """Train on the first payments, compare with the library and with what was recorded on the rest."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    name = f"fraud-{kind.name}"
    payments = fraud.read_payments(read_member(fetch(EVALML), DATA))
    trained = payments.trained
    fitted, model = fraud.TRAINERS[kind.name](payments.features[:trained], payments.fraud[:trained])
    later, truth = payments.features[trained:], payments.fraud[trained:]
    session = open_session(model)
    (answers,) = session.run([fraud.PROBABILITIES], {fraud.INPUT: later})
    require_close(name, "probabilities", answers, fitted.predict_proba(later), PROBABILITY_TOLERANCE)
    precision, area = average_precision_score(truth, answers[:, 1]), roc_auc_score(truth, answers[:, 1])
    require_close(name, "average precision", precision, kind.average_precision, SCORE_TOLERANCE)
    require_close(name, "area under the curve", area, kind.area_under_curve, SCORE_TOLERANCE)
    card = _CARD.format(
        name=name,
        what=kind.what,
        libraries=kind.libraries,
        features="\n".join(f"{number}. {feature}" for number, feature in enumerate(fraud.FEATURES, 1)),
        latency=latency_row(session, {fraud.INPUT: later[:1]}, "a payment"),
        trained=f"{trained:,}",
        tested=f"{len(truth):,}",
        precision=precision,
        area=area,
        base=truth.mean(),
    )
    return (Entry(name, _CONFIG.format(name=name), {"README.md": card}, {"model.onnx": model}),)


# Braces that are the configuration's own are doubled.
_CONFIG = """\
# A fraud score. Works on Triton as well: the objective is a parameter, which Triton passes over.
name: "{name}"
backend: "onnxruntime"
# A row is 68 bytes and some microseconds: whole tables may come in one request.
max_batch_size: 4096
input [ {{ name: "features" data_type: TYPE_FP32 dims: [ 17 ] }} ]
output [ {{ name: "probabilities" data_type: TYPE_FP32 dims: [ 2 ] }} ]
dynamic_batching {{ }}
# Answer within this, or refuse at once. A payment waits for it; most of it is room for a busy machine.
parameters {{ key: "latency_slo_ms" value {{ string_value: "20" }} }}
"""

_CARD = f"""\
# {{name}}

Scores how likely a card payment is fraud: {{what}}. An example of a model that takes microseconds.

| | |
| --- | --- |
| Input | `features` FP32 [N, {len(fraud.FEATURES)}], in the order below |
| Preparation | `features` in `models/zoo/fraud.py` |
| Output | `probabilities` FP32 [N, 2]: honest, fraud |
| Afterwards | the second is the score; where to draw the line is a question of costs |
| Objective | 20 ms per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Trained | where this was made, with {{libraries}}: on the first {{trained}} payments of the data in time |
| On the {{tested}} after them | average precision {{precision:.3f}} (by chance {{base:.3f}}), area under the \
ROC curve {{area:.3f}} |
| Data | `{EVALML.requirement}`, `{DATA}` |
| SHA-256 | `{EVALML.sha256}` (the wheel) |
| Licence | data BSD-3-Clause, as the package they are in; the model is trained by you |
| Made by | `onclock models fetch {{name}}` |

The payments look made up: nearly all that there is to find lies in the amount. So this is no example of how well fraud
can be found.

{{features}}
"""

RECIPES = tuple(
    Recipe(
        name=f"fraud-{kind.name}",
        task="fraud scoring",
        summary=f"card payments: how likely each is fraud; {kind.what} (microseconds; trained on the spot)",
        packages=(EVALML,),
        make=partial(fraud_score, kind),
    )
    for kind in KINDS
)
