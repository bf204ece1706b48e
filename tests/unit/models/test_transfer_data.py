"""Reading examples, and keeping what was trained on out of the test."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.transfer.data import Column, DataError, Dataset, Example
from models.transfer.reading import read, read_test
from models.transfer.splits import separate


def picture(seed: int, size: int = 24, kind: str = "PNG") -> bytes:
    """A picture of its own: coarse random fields."""
    rng = np.random.default_rng(seed)
    fields = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    made = Image.fromarray(fields).resize((size, size), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    made.save(content, kind)
    return content.getvalue()


def write_folders(root: Path, counts: dict[str, int], first: int = 0) -> Path:
    for offset, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(picture(first + 1000 * offset + number, size=96))
    return root


def failing(path: Path, **how: str) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **how)  # type: ignore[arg-type]
    return str(caught.value)


def test_one_folder_for_each_class(tmp_path: Path) -> None:
    train, test = read(write_folders(tmp_path, {"b": 4, "a": 5}))
    assert test is None
    assert (train.kind, train.classes) == ("images", ("a", "b"))
    assert [example.label for example in train.examples] == [0] * 5 + [1] * 4


def test_train_and_test_folders(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"a": 4, "b": 4})
    write_folders(tmp_path / "val", {"a": 1}, first=50)
    write_folders(tmp_path / "test", {"b": 2}, first=100)
    train, test = read(tmp_path)
    assert test is not None
    assert (len(train.examples), len(test.examples)) == (9, 2)


def test_validation_folders_have_several_names(tmp_path: Path) -> None:
    write_folders(tmp_path / "Train", {"a": 4, "b": 4})
    write_folders(tmp_path / "valid", {"a": 1}, first=50)
    write_folders(tmp_path / "validation", {"b": 1}, first=70)
    train, test = read(tmp_path)
    assert test is None
    assert len(train.examples) == 10


def test_a_class_called_as_a_part_is_not_taken_for_one(tmp_path: Path) -> None:
    """The message says where to put it, and there it is read."""
    write_folders(tmp_path / "data", {"bus": 4, "train": 4})
    said = failing(tmp_path / "data")
    assert "'bus' is none; move the folders of all classes, one called 'train' as well, into" in said
    write_folders(tmp_path / "moved" / "train", {"bus": 4, "train": 4})
    assert read(tmp_path / "moved")[0].classes == ("bus", "train")
    assert read(write_folders(tmp_path / "results", {"test": 4, "quiz": 4}))[0].classes == ("quiz", "test")
    write_folders(tmp_path / "only" / "test", {"a": 4, "b": 4})
    assert "has test/ and no train/; name the folder that holds" in failing(tmp_path / "only")


def test_files_that_cannot_be_read_are_counted_by_kind(tmp_path: Path) -> None:
    """Those of the system are not; a class of nothing else is an error."""
    root = write_folders(tmp_path / "data", {"a": 4, "b": 4})
    for name in ("a/1.heic", "b/2.HEIC", "b/below.tif", "b/noise", "a/.DS_Store", "photo.png"):
        (root / name).write_bytes(b"x")
    (root / "a" / ".thumbnails").mkdir()
    (root / "a" / ".thumbnails" / "1.png").write_bytes(picture(0))
    train, _ = read(root)
    assert len(train.examples) == 8
    assert train.notes[0].startswith("4 files are left out (2 .heic, 1 .tif, 1 without a suffix); read are .jpg, ")
    assert train.notes[1] == "1 files that are in no class's folder are left out: photo.png"
    (root / "c").mkdir()
    assert "c: holds no picture and no .txt file; expected .jpg, " in failing(root)
    (root / "c" / "1.heic").write_bytes(b"x")
    assert "c: holds no picture and no .txt file (1 .heic); expected" in failing(root)


def test_texts_in_folders(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} text {number}")
    train, _ = read(tmp_path)
    assert train.kind == "text"
    assert train.examples[0].content == "bad text 0"


def test_a_table_of_numbers_and_categories(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = "\n".join(
        f"{n},{n / 2 if n != 3 else ''},{'red' if n % 2 else 'blue'},x{n},same,{n % 2}" for n in range(300)
    )
    path.write_text(f"id,size,colour,key,constant,kind\n{rows}\n")
    train, _ = read(path, label="kind", leave_out=("id",))
    assert train.kind == "table"
    assert train.columns == (Column("size", "number"), Column("colour", "category"))
    assert train.examples[3].content == (None, "red")
    assert any("'key' is left out: it has 300 values" in note for note in train.notes)
    assert any("'constant' is left out" in note for note in train.notes)


def test_texts_over_several_lines_in_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("kind,body\n" + "".join(f'{n % 2},"line one {n}\nline, two"\n' for n in range(12)))
    train, _ = read(path, label="kind", text="body")
    assert train.examples[5].content == "line one 5\nline, two"


@pytest.mark.parametrize(
    ("content", "how", "said"),
    [
        ("kind,x\na,1\n", {}, "which column has the labels? Say so with --label; there are kind, x"),
        ("kind,x\na,1\n", {"label": "kin"}, "has no column 'kin'; did you mean 'kind'?"),
        ("kind,x\n" + "a,1\na,2\n" * 4, {"label": "kind"}, "needs two classes at least, and there is only 'a'"),
        ("kind,x\n" + "a,1\nb,2\n" * 4 + "c,3\n", {"label": "kind"}, "'c' (1): fewer than 4 examples"),
        ("kind,x\n" + "a,1\nb,2\n" * 4 + ",3\n", {"label": "kind"}, "row 9 has no label (1 rows have none)"),
        ("kind,x\n", {"label": "kind"}, "has no rows"),
        ("kind,x\na,1,2\n", {"label": "kind"}, "cannot be read: CSV parse error"),
        ('kind,x\n"a\n",1\nb,2\n', {"label": "kind"}, "the class 'a\\n' has a line break in its name"),
        (
            "kind,x\na\u2028c,1\nb,2\n",
            {"label": "kind"},
            "has a line break in its name; labels are lines, so rename it",
        ),
        (
            "kind,x\n" + "a,1\nb,2\n" * 4 + "a,inf\n",
            {"label": "kind"},
            "row 9 has inf in column 'x'; expected a number",
        ),
        ("kind,x\n" + "a,1\nb,-1e300\n" * 4, {"label": "kind"}, "row 2 has -1e+300 in column 'x'; expected a number"),
        ("kind,x\n" + "a,1\nb,1\n" * 4, {"label": "kind"}, "no column is left to learn from"),
        ("kind,x\n" + "a,1\nb,2\n" * 4, {"label": "kind", "split_column": "x"}, "expected train, val or test"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(content: str, how: dict[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    assert said in failing(path, **how)


def test_what_is_wrong_with_a_directory_is_said(tmp_path: Path) -> None:
    assert "no such file or directory" in failing(tmp_path / "absent")
    (tmp_path / "data" / "a").mkdir(parents=True)
    assert "no pictures or .txt files in folders" in failing(tmp_path / "data")
    write_folders(tmp_path / "mixed", {"a": 4, "b": 4})
    (tmp_path / "mixed" / "a" / "note.txt").write_text("hello")
    assert "pictures and texts" in failing(tmp_path / "mixed")


def test_a_picture_that_cannot_be_read_is_left_out_and_many_are_an_error(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "few", {"a": 30, "b": 30})
    (root / "a" / "broken.png").write_bytes(b"no picture")
    train, _ = read(root)
    assert len(train.examples) == 60
    assert "1 pictures cannot be read and are left out: a/broken.png" in train.notes[0]
    for number in range(4):
        (root / "a" / f"broken{number}.jpg").write_bytes(b"no picture")
    assert "5 of 65 pictures cannot be read" in failing(root)


def test_test_classes_that_were_not_trained_are_an_error(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"a": 4, "b": 4})
    write_folders(tmp_path / "test", {"c": 2}, first=100)
    assert "the test data has the class 'c'" in failing(tmp_path)


# Test data of its own


def write_table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def training_table(path: Path) -> Dataset:
    """Number, category (post codes, some with a letter), a column that never changes, and the label."""
    rows = [f"{n},{'A1' if n % 3 else '0123'},same,{n % 2}" for n in range(12)]
    return read(write_table(path, "size,code,constant,kind", *rows), label="kind")[0]


def test_test_data_is_read_as_the_training_data_was(tmp_path: Path) -> None:
    """By the names of columns, in whatever order and beside whatever else; what was a text stays one; a single example
    of a class will do, and a column that is the same in all rows."""
    train = training_table(tmp_path / "train.csv")
    test = read_test(
        write_table(tmp_path / "test.csv", "kind,other,code,size", "1,x,0123,7", "0,y,0123,", "1,z,0123,7.5"),
        train,
        label="kind",
    )
    assert test.columns == train.columns
    assert test.classes == train.classes
    assert [e.content for e in test.examples] == [(7.0, "0123"), (None, "0123"), (7.5, "0123")]
    assert [e.label for e in test.examples] == [1, 0, 1]
    same = next(e for e in train.examples if e.content == (9.0, "0123"))
    again = read_test(write_table(tmp_path / "one.csv", "code,kind,size", "0123,1,9.0"), train, label="kind")
    assert again.examples[0].digest == same.digest, "the same values are found to be the same"


def test_labels_of_test_data_are_those_of_training(tmp_path: Path) -> None:
    """Fractions stay fractions, and codes stay texts."""
    halves = read(write_table(tmp_path / "h.csv", "x,kind", *(f"{n},{n % 2 / 2}" for n in range(12))), label="kind")[0]
    assert halves.classes == ("0.0", "0.5")
    whole = read_test(write_table(tmp_path / "h0.csv", "x,kind", "1,0", "2,0"), halves, label="kind")
    assert [e.label for e in whole.examples] == [0, 0]
    codes = read(
        write_table(tmp_path / "c.csv", "x,kind", *(f"{n},{('01', 'B')[n % 2]}" for n in range(12))), label="kind"
    )
    only = read_test(write_table(tmp_path / "c0.csv", "x,kind", "1,01"), codes[0], label="kind")
    assert [e.label for e in only.examples] == [0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (("size,kind", "1,0"), "has no column 'code', which the training data has; there are size, kind"),
        (("size,code,kind", "1,A1,2"), "the test data has the class '2', which the training data has not"),
        (("size,code,kind", "1,A1,0", "big,A1,0"), "row 1 has '1' in column 'size', which has numbers in the training"),
        (("size,code,kind", "1,A1,"), "row 1 has no label"),
        (("size,code,sort", "1,A1,0"), "has no column 'kind'; there are size, code, sort"),
    ],
)
def test_what_is_wrong_with_test_data_is_said(rows: tuple[str, ...], said: str, tmp_path: Path) -> None:
    train = training_table(tmp_path / "train.csv")
    with pytest.raises(DataError) as caught:
        read_test(write_table(tmp_path / "test.csv", *rows), train, label="kind")
    assert said in str(caught.value)


def test_test_data_of_another_kind_is_an_error(tmp_path: Path) -> None:
    train = training_table(tmp_path / "train.csv")
    with pytest.raises(DataError, match="holds pictures, and the training data rows of a table"):
        read_test(write_folders(tmp_path / "test", {"0": 1, "1": 1}), train, label="kind")
    pictures, _ = read(write_folders(tmp_path / "photos", {"0": 4, "1": 4}))
    with pytest.raises(DataError, match="holds rows of a table, and the training data pictures"):
        read_test(tmp_path / "train.csv", pictures, label="kind")


def test_all_of_test_data_is_tested_with(tmp_path: Path) -> None:
    """Folders, one with a single picture, and a class that is not in it."""
    train, _ = read(write_folders(tmp_path / "train", {"a": 4, "b": 4, "c": 4}))
    test = read_test(write_folders(tmp_path / "test", {"c": 1, "a": 2}, first=500), train)
    assert sorted(e.label for e in test.examples) == [0, 0, 2]
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of its pictures can be read"):
        read_test(tmp_path / "broken", train)


def test_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    assert "has several columns 'x'" in failing(write_table(tmp_path / "t.csv", "x,x,kind", "1,2,a"), label="kind")


def example(digest: int, label: int) -> Example:
    return Example(f"row {digest}", f"text {digest}", label, str(digest))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=20, max_size=80),
    st.one_of(st.none(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), min_size=1, max_size=20)),
    st.integers(0, 5),
)
def test_nothing_is_trained_on_and_tested(
    train: list[tuple[int, int]], test: list[tuple[int, int]] | None, seed: int
) -> None:
    """Each content is in one part at most, once; the same seed gives the same parts; nothing is made up."""
    data = Dataset("text", ("a", "b", "c"), [example(*row) for row in train])
    held_out = None if test is None else data.part([example(*row) for row in test])
    try:
        learned, tested, found = separate(data, held_out, seed)
    except DataError:
        return  # a class has nothing left to learn from
    ours, theirs = ([e.digest for e in part.examples] for part in (learned, tested))
    assert len(ours) == len(set(ours))
    assert len(theirs) == len(set(theirs))
    assert not set(ours) & set(theirs)
    assert set(ours) | set(theirs) == {str(d) for d, _ in train} | {str(d) for d, _ in test or ()}
    assert {e.label for e in learned.examples} == {0, 1, 2}
    again = separate(data, held_out, seed)
    assert [e.digest for e in again[1].examples] == theirs
    assert found.lines()


def test_leaks_are_reported(tmp_path: Path) -> None:
    """The same pixels in another file format, the same twice, another label for the same, and a nearly equal one."""
    write_folders(tmp_path / "train", {"a": 5, "b": 5})
    write_folders(tmp_path / "test", {"a": 2, "b": 2}, first=500)
    (tmp_path / "test" / "a" / "again.bmp").write_bytes(picture(0, size=96, kind="BMP"))
    (tmp_path / "train" / "b" / "twice.png").write_bytes(picture(1, size=96))
    (tmp_path / "test" / "b" / "saved-again.jpg").write_bytes(picture(1002, size=96, kind="JPEG"))
    train, test = read(tmp_path)
    _, _, found = separate(train, test, 0)
    assert (found.between, found.within_train, found.contradicting) == (1, 1, 1)
    assert len(found.near) == 1
    assert "saved-again.jpg" in found.near[0][1]
    assert any("not trained on" in line for line in found.lines())


def row(content: int, label: int, number: int) -> Example:
    return Example(f"row {number}", (float(content),), label, str(content))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), min_size=20, max_size=120), st.integers(0, 5))
def test_all_rows_of_a_table_count_and_equal_ones_are_in_one_part(rows: list[tuple[int, int]], seed: int) -> None:
    data = Dataset("table", ("a", "b", "c"), [row(*one, number) for number, one in enumerate(rows)])
    try:
        learned, tested, found = separate(data, None, seed)
    except DataError:
        return  # a class has nothing left to learn from
    assert sorted(e.source for part in (learned, tested) for e in part.examples) == sorted(
        e.source for e in data.examples
    )
    ours, theirs = ({e.digest for e in part.examples} for part in (learned, tested))
    assert not ours & theirs
    assert found.within_train == len(rows) - len({content for content, _ in rows})


def test_a_quarter_of_each_class_is_held_out_also_where_rows_are_equal() -> None:
    """Rows that are there ten times, and those that are of two classes, among them."""
    rows = [row(number % 40, int(number % 40 < 10), number) for number in range(400)]
    rows += [row(0, 0, 400), row(50, 1, 401)]
    learned, tested, found = separate(Dataset("table", ("a", "b"), rows), None, 0)
    assert (found.within_train, found.contradicting) == (361, 1)
    for label, count in ((0, 301), (1, 101)):
        assert sum(e.label == label for e in tested.examples) == pytest.approx(count / 4, abs=10)
    assert any("may be different cases, so all count" in line for line in found.lines())
    assert len(learned.examples) + len(tested.examples) == 402


def test_rows_of_given_parts_stay_where_they_are() -> None:
    """Those that are in both are reported."""
    train = Dataset("table", ("a", "b"), [row(number % 5, number % 2, number) for number in range(20)])
    test = train.part([row(1, 1, 20), row(1, 1, 21), row(9, 0, 22)])
    learned, tested, found = separate(train, test, 0)
    assert (len(learned.examples), len(tested.examples)) == (20, 3)
    assert (found.between, found.within_test) == (2, 1)
    assert any("2 test rows equal a training row" in line for line in found.lines())
