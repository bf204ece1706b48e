"""Cutting, fitting, composing, publishing: on tiny networks, with every piece compared with what it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from models.transfer import backbones, baselines, heads, pipeline
from models.transfer.backbone import CutError, cut, cut_point
from models.transfer.backbones import Backbone
from models.transfer.command import main
from models.transfer.compose import ComposeError, check, composed, head_model, of_every_class
from models.transfer.data import Column, Dataset, Example
from models.transfer.evaluate import Scores
from models.transfer.features import extract
from models.transfer.heads import KINDS, HeadError, fit
from models.transfer.options import OptionError, Options
from models.transfer.pipeline import transfer
from models.transfer.tables import feeds, matrix, preparation, table_model
from models.zoo.publish import Entry, PublishError, publish
from service.cli import main as onclock
from tests.support import onnx_models
from tests.unit.models.test_transfer_data import picture, write_folders

WIDTH = 16


def blobs(count: int = 120, classes: int = 3, width: int = WIDTH, seed: int = 0) -> tuple[Any, Any]:
    """Features in clouds, one for each class, that touch."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = rng.standard_normal((classes, width)) * 1.2
    return (centres[labels] + rng.standard_normal((count, width))).astype(np.float32), labels.astype(np.int64)


def classifier(layers: int = 2) -> onnx.ModelProto:
    """`x` [N, 8] -> ... -> `t0` [N, 16] -> Gemm, Softmax -> `y`."""
    rng = np.random.default_rng(1)
    return onnx_models.make_model(
        "classifier",
        [
            helper.make_node("MatMul", ["x", "w0"], ["m0"]),
            helper.make_node("Tanh", ["m0"], ["seen"]),
            helper.make_node("Gemm", ["seen", "w1", "b1"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["y"]),
        ],
        [onnx_models.value("x", "FP32", ["N", 8])],
        [onnx_models.value("y", "FP32", ["N", 3])],
        {
            "w0": rng.standard_normal((8, WIDTH)).astype(np.float32),
            "w1": rng.standard_normal((WIDTH, 3)).astype(np.float32),
            "b1": np.zeros(3, np.float32),
        },
    )


def run(model: onnx.ModelProto, names: list[str], **feeds: Any) -> list[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(names, feeds))


# Cutting


def test_the_cut_is_before_the_last_classifier() -> None:
    model = classifier()
    assert cut_point(model) == "seen"
    below = cut(model, "seen")
    x = np.random.default_rng(2).standard_normal((3, 8)).astype(np.float32)
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    np.testing.assert_allclose(run(below, ["features"], x=x)[0], np.tanh(x @ weights["w0"]), rtol=1e-5)
    assert "w1" not in [i.name for i in below.graph.initializer]


def test_a_tensor_called_features_can_be_cut_at(tmp_path: Path) -> None:
    model = onnx_models.backbone(layers=2)
    below = cut(model, "features")
    x = np.ones((2, 8), np.float32)
    assert np.array_equal(run(below, ["features"], x=x)[0], run(model, ["features"], x=x)[0])


def test_pictures_of_features_are_made_flat() -> None:
    model = onnx_models.conv_net()
    tensor = next(node.output[0] for node in model.graph.node if node.op_type == "Conv")
    below = cut(model, tensor)
    shape = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    answer = run(below, ["features"], **{model.graph.input[0].name: np.ones(shape, np.float32)})[0]
    assert answer.ndim == 2


@pytest.mark.parametrize(
    ("model", "tensor", "said"),
    [
        (
            onnx_models.identity(),
            "",
            "no classifier is found at the end of the network (its outputs are made by Identity)",
        ),
        (classifier(), "nothing", "the network has no tensor 'nothing'; the last ones are m0, seen, scores, y"),
        (onnx_models.head(), "label", "'label' has no floating-point elements"),
    ],
)
def test_where_nothing_can_be_cut(model: onnx.ModelProto, tensor: str, said: str) -> None:
    with pytest.raises(CutError) as caught:
        cut(model, tensor or cut_point(model))
    assert said in str(caught.value)


# Heads


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_learns_and_becomes_a_model_that_answers_alike(kind: str) -> None:
    """Well above chance on clouds that touch; the ONNX head and the composed model give scikit-learn's answers."""
    features, labels = blobs()
    fitted = fit(features, labels, kind, seed=0, weighted=False)
    held_out, truth = blobs(seed=0, count=300)
    probabilities = fitted.pipeline.predict_proba(held_out)
    assert (probabilities.argmax(axis=1) == truth).mean() > 0.8
    head = head_model(fitted.pipeline, WIDTH)
    check(head, {"features": held_out[:32]}, probabilities[:32], "the head")
    below = cut(classifier(), "seen")
    whole = composed(below, head, WIDTH)
    x = np.random.default_rng(3).standard_normal((20, 8)).astype(np.float32)
    expected = fitted.pipeline.predict_proba(run(below, ["features"], x=x)[0])
    check(whole, {"x": x}, expected, "the composed model")
    assert [output.name for output in whole.graph.output][:2] == ["label", "probabilities"]


def test_the_best_of_all_heads_is_chosen_by_cross_validation() -> None:
    features, labels = blobs()
    fitted = fit(features, labels, "auto", seed=0, weighted=False)
    assert fitted.scores[fitted.candidate.name] == min(fitted.scores.values())
    assert len(fitted.scores) == 7
    assert not fitted.notes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "neighbours"])
def test_weighted_heads_take_rare_classes_as_seriously_as_frequent_ones(kind: str) -> None:
    """Two clouds that overlap, one of them with a twentieth of the examples: asked from half-way between, either is as
    likely; what is said of each is right as often."""
    rng = np.random.default_rng(0)

    def clouds(frequent: int, rare: int) -> tuple[Any, Any]:
        labels = np.repeat([0, 1], [frequent, rare])
        return (rng.standard_normal((len(labels), 4)) + labels[:, None]).astype(np.float32), labels

    features, labels = clouds(1900, 100)
    asked, truth = clouds(1000, 1000)
    recall = {}
    for weighted in (False, True):
        fitted = fit(features, labels, kind, 0, weighted)
        said = fitted.pipeline.predict_proba(asked)
        recall[weighted] = [float((said.argmax(axis=1) == truth)[truth == label].mean()) for label in (0, 1)]
        half_way = float(fitted.pipeline.predict_proba(np.full((1, 4), 0.5, np.float32))[0, 1])
        assert half_way == pytest.approx(0.5 if weighted else 0.05, abs=0.15 if weighted else 0.1)
    assert recall[False][1] < 0.5
    assert min(recall[True]) > 0.75


def test_the_choice_is_weighted_as_well() -> None:
    """The loss of an example of a rare class counts for more: without information it is that of a fair coin."""
    features = np.random.default_rng(0).standard_normal((200, 2)).astype(np.float32)
    labels = np.repeat([0, 1], [180, 20])
    losses = {weighted: fit(features, labels, "logistic", 0, weighted).scores for weighted in (False, True)}
    coin = -np.log(0.5)
    assert losses[True]["logistic (C 0.001)"] == pytest.approx(coin, abs=0.05)
    assert losses[False]["logistic (C 0.001)"] == pytest.approx(-0.9 * np.log(0.9) - 0.1 * np.log(0.1), abs=0.05)


def test_what_is_said_of_a_rare_class_counts_as_much_in_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.dummy import DummyClassifier

    class Sure(DummyClassifier):  # type: ignore[misc]
        def predict_proba(self, features: Any) -> Any:
            return np.tile([0.9, 0.1], (len(features), 1))

    monkeypatch.setattr(heads, "CANDIDATES", (heads.Candidate("logistic", "sure", lambda *_: Sure()),))
    features, labels = np.zeros((200, 2), np.float32), np.repeat([0, 1], [180, 20])
    losses = [fit(features, labels, "auto", 0, weighted).scores["logistic (sure)"] for weighted in (False, True)]
    assert losses == pytest.approx([share * -np.log(0.9) + (1 - share) * -np.log(0.1) for share in (0.9, 0.5)])


def test_heads_that_cannot_weigh_are_left_out() -> None:
    features, labels = blobs()
    assert "the head 'neighbours' does not suit: it cannot weigh its examples (--weighted): left out" in (
        fit(features, labels, "auto", 0, True).notes
    )
    with pytest.raises(HeadError, match="'neighbours' does not suit: it cannot weigh"):
        fit(features, labels, "neighbours", 0, True)


def test_what_no_head_can_be_fitted_to() -> None:
    features, labels = blobs(7)
    with pytest.raises(HeadError, match="no head 'forest'; expected auto, logistic"):
        fit(features, labels, "forest", 0, False)
    with pytest.raises(HeadError, match="a class has 1 training examples"):
        fit(features[:4], labels[:4], "logistic", 0, False)


def test_no_head_is_asked_about_what_it_has_learned() -> None:
    """Random labels of rows that are there ten times: known by heart they could be told, and must not look so."""
    rng = np.random.default_rng(0)
    features = np.repeat(rng.standard_normal((60, 4)).astype(np.float32), 10, axis=0)
    labels, groups = np.repeat(np.arange(60) % 2, 10), np.repeat(np.arange(60), 10)
    by_heart = fit(features, labels, "neighbours", 0, False).scores["neighbours (5)"]
    honest = fit(features, labels, "neighbours", 0, False, groups=groups).scores["neighbours (5)"]
    assert by_heart < 0.01
    assert honest > 0.5
    with pytest.raises(HeadError, match="a class has 1 training examples that differ"):
        fit(features[:20], labels[:20], "logistic", 0, False, groups=groups[:20])
    mixed = np.array([0, 1] * 10), np.array([0] * 16 + [1, 2, 3, 4])
    assert fit(features[:20], mixed[0], "logistic", 0, False, groups=mixed[1]).scores


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_heads_that_there_is_too_little_for_are_left_out(classes: int) -> None:
    """From the least there can be on: what is tried can be fitted, and what is not is said."""
    tried: set[str] = set()
    for count in (2, 3, 4, 5, 6, 8, 12, 16):
        features, labels = blobs(count * classes, classes)
        fitted = fit(features, labels, "auto", 0, False)
        kinds = {name.partition(" ")[0] for name in fitted.scores}
        said = {kind for kind in KINDS if any(f"'{kind}' does not suit: it needs" in note for note in fitted.notes)}
        assert kinds | said == set(KINDS)
        assert not kinds & said
        assert kinds >= tried, "what could learn from less can learn from more"
        tried = kinds
    assert tried == set(KINDS)
    features, labels = blobs(2 * classes, classes)
    for kind in ("svm", "perceptron"):
        with pytest.raises(HeadError, match=f"the head '{kind}' does not suit: it needs .*; choose another head"):
            fit(features, labels, kind, 0, False)


def test_large_data_takes_fewer_fits_and_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts instead of four, and one thread for products of matrices, whatever else the machine does."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_info

    threads: list[set[int]] = []

    class Watched(LogisticRegression):  # type: ignore[misc]
        def fit(self, *given: Any, **more: Any) -> Any:
            threads.append({pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
            return super().fit(*given, **more)

    monkeypatch.setattr(heads, "CANDIDATES", (heads.Candidate("logistic", "watched", lambda *_: Watched()),))
    monkeypatch.setattr(heads, "MANY", 100)
    features, labels = blobs(120)
    fit(features[:100], labels[:100], "auto", 0, False)
    assert len(threads) == 4 + 1
    fit(features, labels, "auto", 0, False)
    assert len(threads) == 5 + 2 + 1
    monkeypatch.setattr("sklearn.linear_model.LogisticRegression", Watched)
    rows = [Example("", (float(n),), n % 2, str(n)) for n in range(8)]
    table = Dataset("table", ("a", "b"), rows, (Column("size", "number"),))
    baselines.plain(table, table, 0)
    assert len(threads) == 8 + 1
    assert all(found == {1} for found in threads)


@pytest.mark.parametrize(("rows", "batch"), [(20, 16), (800, 16), (5000, 100), (1_000_000, 300)])
def test_a_round_of_the_perceptron_has_some_fifty_steps(rows: int, batch: int) -> None:
    (perceptron,) = (c for c in heads.CANDIDATES if c.kind == "perceptron")
    assert perceptron.make(0, rows).batch_size == batch


def test_neighbours_of_many_examples_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "MOST_NEIGHBOUR_ROWS", 50)
    features, labels = blobs(60)
    with pytest.raises(HeadError, match="it keeps every example, 50 at most, and there are 60; "):
        fit(features, labels, "neighbours", 0, False)


def test_a_head_of_the_wrong_width_is_refused() -> None:
    features, labels = blobs(width=8)
    head = head_model(fit(features, labels, "logistic", 0, False).pipeline, 8)
    with pytest.raises(ComposeError, match="takes 8 features, the backbone gives 16"):
        composed(cut(classifier(), "seen"), head, WIDTH)


def test_a_model_that_answers_otherwise_is_found_out() -> None:
    features, labels = blobs()
    fitted = fit(features, labels, "logistic", 0, False)
    head = head_model(fitted.pipeline, WIDTH)
    expected = fitted.pipeline.predict_proba(features[:8])
    with pytest.raises(ComposeError, match="the head does not answer as its pieces do"):
        check(head, {"features": features[8:16]}, expected, "the head")


def test_what_is_checked_is_of_every_class() -> None:
    """From all over, whatever the order; of many classes one each."""
    labels = np.repeat(np.array([2, 0, 1]), [100, 3, 40])
    some = of_every_class(labels, 32)
    assert np.bincount(labels[some]).tolist() == [3, 10, 10]
    assert some.tolist()[:5] == [100, 101, 102, 103, 107]
    assert (some.max(), some[-1]) == (142, 99)
    assert len(set(some.tolist())) == len(some)
    many = of_every_class(np.arange(100) % 50, 32)
    assert len(set((many % 50).tolist())) == len(many) == 32
    assert of_every_class(np.array([0]), 32).tolist() == [0]


def test_the_finished_model_is_asked_about_every_class(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test data lies there by classes."""
    photographs(tmp_path / "many", 200)
    asked: list[Any] = []
    monkeypatch.setattr(pipeline, "check", lambda *given: asked.append(given[2]))
    report = tmp_path / "report"
    transfer(Options(tmp_path / "many", "light", tmp_path / "repository", "tiny", head="logistic", report=report))
    assert len(asked) == 2
    for expected in asked:
        assert sorted(set(expected.argmax(axis=1).tolist())) == [0, 1]


def test_a_table_with_its_preparation_is_one_model() -> None:
    """Missing numbers, missing and unknown categories: as scikit-learn has it."""
    rng = np.random.default_rng(0)
    columns = (Column("colour", "category"), Column("size", "number"), Column("weight", "number"))
    examples = []
    for number in range(200):
        size = None if number % 17 == 0 else float(rng.standard_normal())
        colour = None if number % 23 == 0 else ("red", "blue")[number % 2]
        label = int((size or 0) + (colour == "red") > 0.5)
        examples.append(Example(f"row {number}", (colour, size, float(number % 5)), label, str(number)))
    data = Dataset("table", ("no", "yes"), examples, columns)
    rows = matrix(examples, columns)
    fitted = fit(rows, np.array([e.label for e in examples]), "logistic", 0, False, preparation(data))
    model = table_model(fitted.pipeline, columns)
    unknown = matrix([Example("new", ("green", None, 1.0), 0, "new"), *examples[:30]], columns)
    check(model, feeds(unknown, columns), fitted.pipeline.predict_proba(unknown), "the model")
    assert [i.name for i in model.graph.input] == ["numbers", "categories"]


def test_a_column_that_nothing_is_known_of_does_no_harm() -> None:
    """As it can be after rows were held out."""
    columns = (Column("empty", "number"), Column("size", "number"))
    examples = [Example("", (None, float(n)), n % 2, str(n)) for n in range(20)]
    rows = matrix(examples, columns)
    labels = np.array([e.label for e in examples])
    fitted = fit(rows, labels, "logistic", 0, False, preparation(Dataset("table", ("a", "b"), examples, columns)))
    asked = matrix([Example("", (5.0, 1.0), 0, ""), *examples], columns)
    check(table_model(fitted.pipeline, columns), feeds(asked, columns), fitted.pipeline.predict_proba(asked), "it")


def test_features_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONCLOCK_CACHE", str(tmp_path))
    model = cut(classifier(), "seen").SerializeToString()
    prepared: list[int] = []

    def prepare(examples: Any) -> dict[str, Any]:
        prepared.append(len(examples))
        return {"x": np.stack([np.full(8, float(e.digest), np.float32) for e in examples])}

    examples = [Example("", "", 0, str(number)) for number in range(20)]
    first = extract(model, prepare, "p", examples)
    assert sum(prepared) == 20
    again = extract(model, prepare, "p", [*examples, Example("", "", 0, "99")])
    assert sum(prepared) == 21
    assert np.array_equal(again[:20], first)
    (kept,) = (tmp_path / "features").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"damaged", whole[: len(whole) // 2], whole[:30] + b"\xff" * 40 + whole[70:], b""):
        kept.write_bytes(damaged)
        assert np.array_equal(extract(model, prepare, "p", examples), first)
        assert list((tmp_path / "features").iterdir()) == [kept]


def test_features_that_are_kept_at_the_same_time_do_not_harm_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run keeps its features while this one writes."""
    monkeypatch.setenv("ONCLOCK_CACHE", str(tmp_path))
    model = cut(classifier(), "seen").SerializeToString()
    save = np.savez

    def prepare(examples: Any) -> dict[str, Any]:
        return {"x": np.stack([np.full(8, float(e.digest), np.float32) for e in examples])}

    def beside(path: Any, **arrays: Any) -> None:
        save(path, **arrays)
        monkeypatch.setattr(np, "savez", save)
        extract(model, prepare, "p", [Example("", "", 0, "99")])

    monkeypatch.setattr(np, "savez", beside)
    extract(model, prepare, "p", [Example("", "", 0, "1")])
    (kept,) = (tmp_path / "features").iterdir()
    with np.load(kept) as found:
        assert found["digests"].tolist() == ["1"]


def test_where_a_row_is_as_wide_as_the_text_is_long_there_is_no_cut() -> None:
    model = onnx_models.make_model(
        "words",
        [helper.make_node("Tanh", ["x"], ["hidden"])],
        [onnx_models.value("x", "FP32", ["N", "S"])],
        [onnx_models.value("hidden", "FP32", ["N", "S"])],
        {},
    )
    with pytest.raises(CutError, match=r"a row of 'hidden' is as wide as the example is long \(S\); expected as many"):
        cut(model, "hidden")


def test_rows_that_turn_out_to_differ_are_no_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the network does not say so: before the batches are computed, or in a later run on other texts."""
    monkeypatch.setenv("ONCLOCK_CACHE", str(tmp_path))
    model = onnx_models.make_model(
        "words",
        [helper.make_node("Tanh", ["x"], ["features"])],
        [onnx_models.value("x", "FP32", ["N", "S"])],
        [onnx_models.value("features", "FP32", ["N", "T"])],
        {},
    ).SerializeToString()
    asked: list[int] = []

    def prepare(examples: Any) -> dict[str, Any]:
        asked.append(len(examples))
        longest = max(len(e.content) for e in examples)
        return {"x": np.stack([np.full(longest, 0.5, np.float32) for _ in examples])}

    texts = [Example("", "a" * (3 + n % 2), 0, str(n)) for n in range(8)]
    with pytest.raises(CutError, match="3 numbers for one example and 4 for another; expected as many for each"):
        extract(model, prepare, "p", texts)
    assert asked == [1, 1]
    extract(model, prepare, "p", texts[::2])
    with pytest.raises(CutError, match="3 numbers for one example and 4 for another"):
        extract(model, prepare, "p", texts[1::2])


def test_another_preparation_has_another_name() -> None:
    """So that features of the former one are not taken for its own."""
    from models.zoo.preprocess import image_tensor, imagenet_tensor
    from models.zoo.wordpiece import WordPiece

    pictures = [backbones._pictures(tensor, "image") for tensor in (image_tensor, image_tensor, imagenet_tensor)]
    names = [backbones.prepared_alike(prepare, "images") for prepare in pictures]
    assert names[0] == names[1] != names[2]
    former, later = (backbones._texts(WordPiece({"one": 3, word: 4}, 0, 1, 2)) for word in ("capitals", "Capitals"))
    assert backbones.prepared_alike(former, "text") != backbones.prepared_alike(later, "text")


# Scores


def test_scores_by_hand() -> None:
    truth = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])
    scores = Scores("s", probabilities.argmax(axis=1), truth, 2, probabilities)
    assert scores.accuracy == 0.75
    assert scores.confusion.tolist() == [[1, 1, 0], [0, 2, 0]]
    assert scores.per_class()[0] == (1.0, 0.5, pytest.approx(2 / 3), 2)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 0.8) / 2)
    assert scores.log_loss == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.7]).mean())
    assert scores.calibration_error == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4)
    silent = Scores("none of them", np.array([-1, -1, 1, 1]), truth, 2)
    assert (silent.accuracy, silent.log_loss, silent.reliability()) == (0.5, None, [])
    assert silent.confusion[0].tolist() == [0, 0, 2]


# From data to a version


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A backbone that looks at the mean colours of a picture's corners."""
    monkeypatch.setenv("ONCLOCK_CACHE", str(tmp_path / "cache"))
    model = onnx_models.backbone(inputs=12, width=WIDTH)

    def prepare(examples: Any) -> dict[str, Any]:
        from models.transfer.data import decoded

        rows = [np.asarray(decoded(e.content).resize((2, 2)), np.float32).ravel() / 255 for e in examples]
        return {"x": np.stack(rows)}

    entry = Entry("tiny", "max_batch_size: 32\ndynamic_batching {}\n", {}, {"model.onnx": model.SerializeToString()})
    made = Backbone(
        name="tiny",
        kind="images",
        model=model.SerializeToString(),
        prepare=prepare,
        prepared_by="tiny",
        preparation="none",
        source="here",
        licence="none",
        labels=("a", "other", "thing"),
        scores="scores",
        entry=entry,
    )
    monkeypatch.setitem(backbones.BACKBONES, "tiny", lambda: made)


def photographs(root: Path, count: int = 20) -> Path:
    """Two classes: dark and bright pictures."""
    from io import BytesIO

    from PIL import Image

    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("bright", 200)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise = rng.integers(-30, 30, (16, 16, 3))
            content = BytesIO()
            Image.fromarray((level + noise).astype(np.uint8)).save(content, "PNG")
            (root / name / f"{number}.png").write_bytes(content.getvalue())
    return root


def options(tmp_path: Path, **more: Any) -> Options:
    given = {"name": "light", "backbone": "tiny", "head": "logistic", "report": tmp_path / "report", **more}
    return Options(data=photographs(tmp_path / "data"), repository=tmp_path / "repository", **given)


def test_from_pictures_to_a_version(tiny: None, tmp_path: Path) -> None:
    """The model answers as its pieces, beside it is what it was made of; the second time it is the next version."""
    result = transfer(options(tmp_path))
    assert result.scores[0].accuracy == 1.0
    assert [one.name.partition(":")[0] for one in result.scores[1:3]] == ["unchanged network", "pixels (32 x 32) alone"]
    assert result.version == tmp_path / "repository" / "light" / "1"
    facts = json.loads((result.version / "provenance.json").read_text())
    assert facts["cut"] == "features"
    assert facts["classes"] == ["bright", "dark"]
    assert (facts["train"], facts["test"]) == (30, 10)
    page = result.page.read_text()
    assert page.count("<img") == 4
    assert (tmp_path / "repository" / "light" / "labels.txt").read_text() == "bright\ndark\n"
    assert onclock(["check", str(tmp_path / "repository")]) == 0
    again = transfer(Options(tmp_path / "data", "light", tmp_path / "repository", "tiny", head="svm"))
    assert again.version.name == "2"
    first, second = (json.loads((v / "provenance.json").read_text()) for v in (result.version, again.version))
    assert first["data"] == second["data"]


def test_four_examples_of_a_class_will_do(tiny: None, tmp_path: Path) -> None:
    """As few as are accepted: three are learned from, one is tested with, and heads that need more are left out."""
    photographs(tmp_path / "few", 4)
    result = transfer(Options(tmp_path / "few", "light", tmp_path / "repository", "tiny", report=tmp_path / "report"))
    assert result.scores[0].accuracy == 1.0
    assert any("the head 'svm' does not suit: it needs 3 examples of each class" in note for note in result.notes)
    rows = "\n".join(f"{n},{'' if n % 7 else 1},{n % 2}" for n in range(8))
    (tmp_path / "few.csv").write_text(f"size,seldom,kind\n{rows}\n")
    transfer(of_table(tmp_path, tmp_path / "few.csv", head="auto"))


def test_texts_without_words_are_compared_with_no_words() -> None:
    texts = Dataset("text", ("a", "b"), [Example("", content, at % 2, str(at)) for at, content in enumerate("?!?!")])
    assert baselines.plain(texts, texts, 0).name == "the most frequent class, always"


def test_a_head_on_the_shared_network(tiny: None, tmp_path: Path) -> None:
    """Kilobytes, with the network beside it, that name it and its digest."""
    result = transfer(options(tmp_path, shared=True))
    assert (result.version / "model.onnx").stat().st_size < 4096
    assert (tmp_path / "repository" / "tiny" / "1" / "model.onnx").exists()
    config = (tmp_path / "repository" / "light" / "config.pbtxt").read_text()
    assert 'key: "backbone" value { string_value: "tiny" }' in config
    assert onclock(["check", str(tmp_path / "repository")]) == 0


def test_another_set_of_classes_is_another_model(tiny: None, tmp_path: Path) -> None:
    transfer(options(tmp_path))
    write_folders(tmp_path / "other", {"x": 8, "y": 8, "z": 8})
    with pytest.raises(PublishError, match="is a model of other classes"):
        transfer(Options(tmp_path / "other", "light", tmp_path / "repository", "tiny", head="logistic"))
    assert sorted(p.name for p in (tmp_path / "repository" / "light").iterdir() if p.is_dir()) == ["1"]


@pytest.fixture
def unlearned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is learned: what is refused is refused before."""

    def learned(*_: Any) -> None:
        raise AssertionError("this was found out too late")

    monkeypatch.setattr(pipeline, "extract", learned)
    monkeypatch.setattr(pipeline, "fit", learned)


def test_a_head_alone_is_no_version_of_a_whole_model(
    tiny: None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    transfer(options(tmp_path))
    request.getfixturevalue("unlearned")
    with pytest.raises(PublishError, match="says otherwise about"):
        transfer(Options(tmp_path / "data", "light", tmp_path / "repository", "tiny", shared=True))
    assert not (tmp_path / "repository" / "tiny").exists()


def test_a_model_of_another_origin_gets_no_version(tiny: None, unlearned: None, tmp_path: Path) -> None:
    publish(backbones.BACKBONES["tiny"]().entry, tmp_path / "repository")  # type: ignore[arg-type]
    with pytest.raises(PublishError, match="was not made by transfer learning"):
        transfer(options(tmp_path, name="tiny"))


def test_the_network_that_is_there_must_be_the_one_that_is_shared(tiny: None, unlearned: None, tmp_path: Path) -> None:
    """In its newest version; and a head has a name of its own."""
    entry = backbones.BACKBONES["tiny"]().entry
    assert entry is not None
    there = publish(entry, tmp_path / "repository")
    (there / "2").mkdir()
    other = onnx_models.backbone(inputs=12, width=WIDTH, layers=2)
    (there / "2" / "model.onnx").write_bytes(other.SerializeToString())
    with pytest.raises(PublishError, match="2: is not the 'tiny' that the head is made for; remove it"):
        transfer(options(tmp_path, shared=True))
    for version in ("1", "2"):
        (there / version / "model.onnx").unlink()
    with pytest.raises(PublishError, match=r"is to be shared and cannot be served: .*no version to serve"):
        transfer(Options(tmp_path / "data", "light", tmp_path / "repository", "tiny", shared=True))
    with pytest.raises(PublishError, match="give the head another one"):
        transfer(Options(tmp_path / "data", "tiny", tmp_path / "elsewhere", "tiny", shared=True))


def test_the_network_is_published_last_but_one(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the report cannot be written nothing is in the repository."""
    (tmp_path / "report").write_text("a file")
    with pytest.raises(OSError, match="report"):
        transfer(options(tmp_path, shared=True))
    assert not (tmp_path / "repository").exists()


def test_other_columns_are_another_model(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Also if there are as many: clients send them by their places."""
    transfer(of_table(tmp_path, payments(tmp_path / "t.csv", 0, 100)))
    request.getfixturevalue("unlearned")
    other = payments(tmp_path / "o.csv", 0, 100, ("weight", "colour", "kind"))
    with pytest.raises(PublishError, match=r"its clients send other data \(`numbers` in this order: size; `categ"):
        transfer(of_table(tmp_path, other))
    both = payments(tmp_path / "b.csv", 0, 100, ("weight", "size", "colour", "kind"))
    with pytest.raises(PublishError, match="says otherwise about input"):
        transfer(of_table(tmp_path, both))


def payments(path: Path, first: int, count: int, columns: tuple[str, ...] = ("size", "colour", "kind")) -> Path:
    """A table whose label is in its numbers and categories."""
    rng = np.random.default_rng(first)
    lines = [",".join(columns)]
    for _ in range(count):
        size, colour = rng.standard_normal(), ("red", "blue")[int(rng.integers(2))]
        row = {"size": f"{size:.4f}", "colour": colour, "kind": "yes" if (size > 0) == (colour == "red") else "no"}
        row["weight"] = f"{rng.standard_normal():.4f}"
        lines.append(",".join(row[column] for column in columns))
    path.write_text("\n".join(lines) + "\n")
    return path


def of_table(tmp_path: Path, data: Path, **more: Any) -> Options:
    given = {"label": "kind", "head": "neighbours", "report": tmp_path / "report", **more}
    return Options(data=data, name="paid", repository=tmp_path / "repository", **given)


def test_a_table_is_tested_with_another_file(tmp_path: Path) -> None:
    """Its columns are in another order, beside one more; what the data would have tested with is said to be unused."""
    data = payments(tmp_path / "train.csv", 0, 400)
    test = payments(tmp_path / "test.csv", 1, 60, ("kind", "weight", "colour", "size"))
    result = transfer(of_table(tmp_path, data, test=test))
    assert len(result.scores[0].truth) == 60
    assert result.scores[0].accuracy > 0.9
    assert onclock(["check", str(tmp_path / "repository")]) == 0
    split = payments(tmp_path / "split.csv", 2, 200)
    lines = split.read_text().splitlines()
    parts = ["part", *(("train", "test")[number % 4 == 0] for number in range(200))]
    split.write_text("\n".join(f"{line},{part}" for line, part in zip(lines, parts, strict=True)))
    result = transfer(of_table(tmp_path, split, test=test, split_column="part"))
    assert len(result.scores[0].truth) == 60
    assert any("50 test examples of" in note and "--test names others" in note for note in result.notes)


def test_equal_rows_are_not_known_by_heart(tmp_path: Path) -> None:
    """Chance, ten times over, looks like chance: in the test, and in the choice of a head."""
    rng = np.random.default_rng(0)
    rows = [f"{rng.standard_normal():.4f},{'ab'[int(rng.integers(2))]}" for _ in range(80)] * 10
    (tmp_path / "t.csv").write_text("\n".join(["size,kind", *rows]) + "\n")
    result = transfer(of_table(tmp_path, tmp_path / "t.csv"))
    assert result.scores[0].accuracy < 0.8
    assert result.fitted.scores["neighbours (5)"] > 1
    assert any("rows equal an earlier one; they may be different cases, so all count" in note for note in result.notes)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--data", "absent", "--name", "m", "--backbone", "tiny"], 1, "absent: no such file or directory"),
        (["--data", "data", "--name", "m"], 1, "holds images; name a network to build on (--backbone)"),
        (["--data", "data", "--name", "m", "--backbone", "tiny", "--cut", "nowhere"], 1, "no tensor 'nowhere'"),
        (["--data", "absent", "--name", "a/b"], 2, "'a/b' is not a model's name; expected 1 to 255 letters"),
        (["--example", "payments", "--name", ".hidden"], 2, "'.hidden' is not a model's name"),
        (
            ["--data", "absent", "--name", "m", "--slo-ms", "0"],
            2,
            "an objective of 0 ms is not accepted; expected milli",
        ),
        (["--data", "absent", "--name", "m", "--slo-ms", "nan"], 2, "an objective of nan ms is not accepted"),
        (["--data", "data", "--name", "m", "--shared"], 2, "--shared needs --backbone"),
        (["--data", "data", "--name", "m", "--backbone", "tiny", "--cut", "m0", "--shared"], 1, "leave --shared out"),
    ],
)
def test_errors_of_the_command_say_what_to_do(
    arguments: list[str],
    status: int,
    said: str,
    tiny: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photographs(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    assert code == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "build" / "zoo").exists(), "nothing is half published"


def test_what_the_server_would_refuse_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for wrong in ({"name": "a b"}, {"slo_ms": 4e6}, {"slo_ms": -1.0}):
        with pytest.raises(OptionError, match="expected"):
            transfer(Options(**{"data": tmp_path / "absent", "name": "m", "repository": tmp_path, **wrong}))


def test_a_failure_publishes_nothing(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before anything is written."""

    def wrong(*_: Any) -> None:
        raise ComposeError("it answers otherwise")

    monkeypatch.setattr(pipeline, "check", wrong)
    with pytest.raises(ComposeError):
        transfer(options(tmp_path))
    assert not (tmp_path / "repository").exists()


def test_a_picture_is_a_picture() -> None:
    """The pictures of these tests can be read, and differ."""
    assert picture(1) != picture(2)
