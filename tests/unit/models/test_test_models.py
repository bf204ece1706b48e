"""The test models themselves: each shows the behaviour it was built for, or tests that use it prove nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tests.support import corpus, onnx_models

# Enough for the rarest datatype to turn up.
COUNT = 480


def open_model(model: onnx_models.onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[corpus.CorpusModel]:
    return corpus.write_corpus(tmp_path_factory.mktemp("corpus"), COUNT)


def test_every_model_of_the_corpus_answers(models: list[corpus.CorpusModel]) -> None:
    """Each loads from its place, and its outputs have the declared types; drawing is reproducible."""
    for model in models:
        inputs, outputs = corpus.expected(model.directory, seed=3)
        again, same = corpus.expected(model.directory, seed=3)
        for first, second in ((inputs, again), (outputs, same)):
            assert list(first) == list(second)
            for name in first:
                np.testing.assert_array_equal(first[name], second[name], err_msg=f"{model.name} {name}")
        assert outputs, model.name


def test_the_corpus_is_reproducible_and_small(models: list[corpus.CorpusModel], tmp_path: Path) -> None:
    """The same seed gives the same bytes, another seed other ones; a thousand models stay far below 60 MB."""
    again = corpus.write_corpus(tmp_path / "again", COUNT)
    other = corpus.write_corpus(tmp_path / "other", COUNT, seed=1)
    files = [corpus.model_file(model.directory) for model in models]
    assert [corpus.model_file(m.directory).read_bytes() for m in again] == [file.read_bytes() for file in files]
    assert [corpus.model_file(m.directory).read_bytes() for m in other] != [file.read_bytes() for file in files]
    assert sum(file.stat().st_size for file in files) * 1000 / COUNT < 60e6


def test_the_corpus_is_varied(models: list[corpus.CorpusModel]) -> None:
    """Every datatype, ranks 0 to 4, models with and without a dynamic first dimension, at least 25 kinds."""
    types: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    dynamic: Counter[bool] = Counter()
    for model in models:
        session = corpus.open_session(corpus.model_file(model.directory))
        for tensor in session.get_inputs():
            types[tensor.type] += 1
            ranks[len(tensor.shape)] += 1
            if tensor.shape:
                dynamic[isinstance(tensor.shape[0], str)] += 1
    assert len(types) == len(onnx_models.ELEMENT_TYPES)
    assert set(ranks) >= {0, 1, 2, 3, 4}
    assert min(dynamic[True], dynamic[False]) > COUNT / 10
    assert len({model.kind for model in models}) >= 25


def test_rows_can_be_chosen(models: list[corpus.CorpusModel]) -> None:
    """`rows` is the size of the dimension N wherever a model has one."""
    (mlp, *_) = [model for model in models if model.kind == "mlp"]
    inputs, outputs = corpus.expected(mlp.directory, rows=7)
    assert inputs["x"].shape[0] == outputs["y"].shape[0] == 7


def test_poison_fails_for_one_row_only() -> None:
    """One bad index fails the whole batch; the good rows pass alone."""
    session = open_model(onnx_models.poison(rows=8))
    session.run(None, {"index": np.array([[0], [7]])})
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, {"index": np.array([[0], [8]])})


def test_dynamic_quantisation_depends_on_the_neighbours() -> None:
    """The same row gets another answer beside a large one."""
    session = open_model(onnx_models.dynamic_quantised())
    row = np.linspace(-1, 1, 16, dtype=np.float32)[None]
    (alone,) = session.run(None, {"x": row})
    (beside,) = session.run(None, {"x": np.concatenate([row, row * 100])})
    assert np.abs(alone[0] - beside[0]).max() > 0.01


@pytest.mark.parametrize("build", [onnx_models.linear_classifier, onnx_models.tree_classifier])
def test_classifiers_declare_wrong_shapes(build: object) -> None:
    """`label` is declared [1] and returned with as many rows as came in."""
    assert callable(build)
    session = open_model(build())
    (declared,) = [output.shape for output in session.get_outputs() if output.name == "label"]
    label, probabilities = session.run(["label", "probabilities"], {"features": np.zeros((5, 4), np.float32)})
    assert declared == [1]
    assert label.shape == (5,)
    assert probabilities.shape[0] == 5


def test_padding_does_not_change_the_pooled_text() -> None:
    """Padding with mask 0 leaves `pooled` as it is."""
    session = open_model(onnx_models.text_encoder())
    ids = np.array([[3, 1, 4]])
    (short,) = session.run(["pooled"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    padded = np.pad(ids, ((0, 0), (0, 2)))
    (long,) = session.run(["pooled"], {"input_ids": padded, "attention_mask": (padded > 0).astype(np.int64)})
    np.testing.assert_allclose(short, long, atol=1e-6)


def test_external_data_loads_from_its_path_only(tmp_path: Path) -> None:
    """The weights lie beside the model: its bytes alone do not load, its path does."""
    whole = onnx_models.external_data(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "weights.bin"}
    x = np.ones((2, 64), np.float32)
    (answer,) = corpus.open_session(tmp_path / "model.onnx").run(None, {"x": x})
    (inside,) = open_model(whole).run(None, {"x": x})
    np.testing.assert_array_equal(answer, inside)
    with pytest.raises(Exception, match=r"(?i)external|weights\.bin"):
        ort.InferenceSession((tmp_path / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])


def test_slow_returns_its_input() -> None:
    """The work leaves the rows as they were, however often it is repeated."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    (y,) = open_model(onnx_models.slow(500)).run(None, {"x": x})
    np.testing.assert_array_equal(x, y)


def test_zipmap_has_an_output_that_is_no_tensor() -> None:
    """A sequence of maps cannot be served: a server has to refuse this model when it loads it."""
    (_, maps) = open_model(onnx_models.zipmap_classifier()).get_outputs()
    assert maps.type == "seq(map(int64,tensor(float)))"


def test_differences_are_told_in_words() -> None:
    """Equal answers give nothing; a missing output, another shape, value or text is named."""
    wanted = {"f": np.array([1.0, np.nan], np.float32), "s": np.array(["a"], object), "i": np.array([1, 2])}
    same = {"f": wanted["f"] + np.float32(1e-6), "s": np.array([b"a"], object), "i": wanted["i"].copy()}
    assert corpus.differences(same, wanted) == []
    other = {"f": np.array([1.1, np.nan], np.float32), "s": np.array([b"b"], object), "i": np.array([[1, 2]])}
    assert len(corpus.differences(other, wanted)) == 3
    assert corpus.differences({"f": same["f"], "s": same["s"]}, wanted) == ["output 'i' is missing"]
