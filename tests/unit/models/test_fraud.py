"""Payments to features, and classifiers to ONNX: on a few made-up payments."""

from __future__ import annotations

import gzip

import numpy as np
import onnx
import pytest

from models.zoo import fraud
from models.zoo.errors import ConversionError
from models.zoo.session import open_session

COLUMNS = "id,datetime,amount,customer_present,fraud,expiration_date,provider,lat,lng"
LIBRARIES = {"logistic": "skl2onnx", "lightgbm": "lightgbm", "xgboost": "xgboost"}


def data(*rows: str) -> bytes:
    return gzip.compress("\n".join((COLUMNS, *rows)).encode())


def test_features_are_those_that_the_card_lists() -> None:
    """One number each, by the columns of a payment."""
    later = "1,2019-03-02 13:05:00,250,True,True,02/20,Maestro,1.5,-2.5"
    earlier = "2,2019-01-01 00:00:00,10,False,False,01/19,VISA 13 digit,0,0"
    payments = fraud.read_payments(data(later, earlier))
    np.testing.assert_array_equal(payments.fraud, [0, 1])
    assert payments.trained == 1
    assert payments.features.dtype == np.float32
    assert payments.features.shape == (2, len(fraud.FEATURES))
    # A Saturday, eleven months before the card expires.
    assert payments.features[1, :7].tolist() == [250, 1, 13, 5, 11, 1.5, -2.5]
    assert [fraud.FEATURES[7 + np.argmax(row[7:])] for row in payments.features] == [
        "1 if the card is VISA 13 digit",
        "1 if the card is Maestro",
    ]


@pytest.mark.parametrize(
    "content",
    [b"not compressed", data("1,yesterday,250,True,True,02/20,Maestro,1,1"), gzip.compress(b"a,b\n1,2\n"), data()[:20]],
    ids=["not compressed", "a date that is none", "other columns", "torn"],
)
def test_other_data_are_refused(content: bytes) -> None:
    """With what is wrong about them."""
    with pytest.raises(ConversionError, match="not the payments expected"):
        fraud.read_payments(content)


@pytest.mark.parametrize("kind", sorted(fraud.TRAINERS))
def test_a_classifier_is_its_onnx(kind: str) -> None:
    """The same probabilities for any number of rows, and the same file each time."""
    pytest.importorskip(LIBRARIES[kind], reason="install onclock[models]")
    rng = np.random.default_rng(1)
    table = rng.standard_normal((400, 17)).astype(np.float32)
    truth = (table[:, 0] + table[:, 1] * table[:, 2] > 0.5).astype(np.int64)
    fitted, model = fraud.TRAINERS[kind](table, truth)
    assert model == fraud.TRAINERS[kind](table, truth)[1]
    session = open_session(model)
    for rows in (table[:1], table[:7]):
        label, probabilities = session.run(["label", "probabilities"], {"features": rows})
        np.testing.assert_allclose(probabilities, fitted.predict_proba(rows), atol=1e-5)
        np.testing.assert_array_equal(label, fitted.predict(rows))


@pytest.mark.parametrize("kind", sorted(fraud.TRAINERS))
def test_declared_shapes_are_those_of_the_answers(kind: str) -> None:
    """A row for each row; each set of operators once."""
    pytest.importorskip(LIBRARIES[kind], reason="install onclock[models]")
    table = np.random.default_rng(2).standard_normal((100, 17)).astype(np.float32)
    _, model = fraud.TRAINERS[kind](table, (table[:, 0] > 0).astype(np.int64))
    read = onnx.load_from_string(model)
    onnx.checker.check_model(read)
    assert {output.type.tensor_type.shape.dim[0].dim_param for output in read.graph.output} == {"N"}
    domains = [opset.domain for opset in read.opset_import]
    assert len(domains) == len(set(domains))
