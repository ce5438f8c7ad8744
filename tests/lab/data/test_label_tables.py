"""Data sets of a CSV file, and what is said of one that cannot be used."""

import pytest

from conftest import COLOURS, make_config, save_picture
from lab.base.errors import RequestError
from train_ast import build_datasets, build_validation, train


def csv_config(path, *overrides):
    return make_config("dataset.type=csv", f"dataset.name={path}", *overrides)


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures in a folder of their own, and the lines of a table of them."""
    lines = []
    for label, (name, colour) in enumerate(COLOURS.items()):
        for i in range(4):
            (tmp_path / "photos").mkdir(exist_ok=True)
            save_picture(tmp_path / "photos" / f"{name}, {i}.jpg", colour, 10 * label + i)
            lines.append(f'"photos/{name}, {i}.jpg",{name},{"val" if i == 0 else "train"}')
    return tmp_path, ["file,label,split", *lines]


def written(photos, lines=None, encoding="utf-8", **changes):
    folder, whole = photos
    path = folder / "table.csv"
    path.write_bytes("\n".join(whole if lines is None else lines).encode(encoding))
    return path


def test_files_labels_and_splits_are_read(photos, monkeypatch):
    folder, lines = photos
    path = written(photos)
    train_set, val = build_datasets(csv_config(path).dataset)
    assert train_set.classes == val.classes == list(COLOURS)
    assert (len(train_set), len(val)) == (9, 3)
    for source, label in [*train_set.samples, *val.samples]:
        assert source.name.startswith(train_set.classes[label])
        assert source.parent == folder / "photos"
    assert {source.name[-5] for source, _ in val.samples} == {"0"}
    monkeypatch.chdir(folder)
    assert len(build_datasets(csv_config("table.csv").dataset)[0]) == 9
    swapped = csv_config(path, "dataset.split_train=valid", "dataset.split_val=train")
    assert [len(each) for each in build_datasets(swapped.dataset)] == [3, 9]
    tested = [line.replace(",val", ",test") if "red" in line else line for line in lines]
    assert len(build_datasets(csv_config(written(photos, tested)).dataset)[1]) == 2


def test_a_table_without_splits_is_split_by_a_fraction(photos):
    path = written(photos, [line.rpartition(",")[0] for line in photos[1]])
    train_set, val = build_datasets(csv_config(path, "dataset.val_fraction=0.25").dataset)
    assert (len(train_set), len(val)) == (9, 3)
    assert sorted(label for _, label in val.samples) == [0, 1, 2]
    assert len(build_validation(csv_config(path).dataset).dataset) == 12
    with pytest.raises(RequestError, match="no column 'split'; add it, or set dataset.val_frac"):
        build_datasets(csv_config(path).dataset)


def test_a_bom_blank_lines_windows_line_ends_and_other_names_are_no_matter(photos):
    lines = [*photos[1][:5], "", *photos[1][5:], ",,", ""]
    lines[0] = "picture,kind,split"
    path = photos[0] / "table.csv"
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    asked = ["dataset.image_key=picture", "dataset.label_key=kind"]
    assert [len(each) for each in build_datasets(csv_config(path, *asked).dataset)] == [9, 3]


def test_one_of_several_columns_of_labels_is_used(photos):
    """Whether or not another one is called `label`."""
    lines = [f"{line},{'second' if number else 'other'}" for number, line in enumerate(photos[1])]
    path = written(photos, [*lines[:-1], lines[-1].replace("second", "first")])
    whole = csv_config(path, "dataset.label_key=other", "dataset.split_val=train")
    assert build_datasets(whole.dataset)[0].classes == ["first", "second"]
    assert build_datasets(csv_config(path).dataset)[0].classes == list(COLOURS)


BAD = {  # what is done to the lines, and what is said
    "a missing file": (
        lambda lines: [*lines, "gone.jpg,red,train"],
        "row 14: {}/gone.jpg: no such",
    ),
    "missing files": (lambda lines: [*lines, "a,red,val", "b,red,val"], "file (and 1 more)"),
    "a doubled row": (lambda lines: [*lines, lines[2]], "blue, 1.jpg is in row 3 already"),
    "another name of one file": (
        lambda lines: [*lines, lines[2].replace("photos/", "./photos/../photos/")],
        "row 14: {}/photos/blue, 1.jpg is in row 3 already",
    ),
    "an unknown split": (
        lambda lines: [lines[0], lines[1].replace(",val", ",dev"), *lines[2:]],
        "row 2: unknown split 'dev'; known: test, train, validation",
    ),
    "no label": (lambda lines: [*lines, "photos/x.jpg,,train"], "row 14 has no label"),
    "a short row": (lambda lines: [*lines, "photos/x.jpg"], "row 14 has no label"),
    "a long row": (lambda lines: [*lines, "a,b,train,d"], "Expected 3 fields in line 14, saw 4"),
    "semicolons": (
        lambda lines: [line.replace(",", ";") for line in lines],
        "no column 'file'; its columns are 'file;label;split'",
    ),
    "no rows": (lambda lines: lines[:1], "no rows in it"),
    "nothing": (lambda lines: [], "No columns to parse from file"),
}


def refused(config):
    with pytest.raises(RequestError) as caught:
        build_datasets(config.dataset)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", BAD)
def test_a_table_that_cannot_be_used_is_named(kind, photos):
    change, complaint = BAD[kind]
    said = refused(csv_config(written(photos, change(photos[1]))))
    assert said.startswith(f"dataset.name: {photos[0]}/table.csv: ")
    assert complaint.format(photos[0]) in said


def test_another_encoding_and_no_file_are_named(photos):
    lines = [*photos[1], "photos/caf\u00e9.jpg,red,train"]
    assert "byte 0xe9 is not UTF-8" in refused(csv_config(written(photos, lines, "latin-1")))
    assert "byte 0xff is not UTF-8" in refused(csv_config(written(photos, lines, "utf-16")))
    assert "No such file or directory" in refused(csv_config("/nowhere.csv"))
    assert "Is a directory" in refused(csv_config(photos[0]))
    with pytest.raises(RequestError, match="dataset.name: dataset.type=csv needs the file"):
        make_config("dataset.type=csv")


def test_splits_that_do_not_fit_are_named(photos):
    path = written(photos)
    said = refused(csv_config(path, "dataset.split_val=test"))
    assert said.startswith("dataset.split_val: no split 'test' in ")
    assert said.endswith(", which has train, validation")
    assert "has a column 'split'; leave out one" in refused(
        csv_config(path, "dataset.val_fraction=0.5")
    )
    fewer = [line for line in photos[1] if not line.endswith("red,train")]
    assert refused(csv_config(written(photos, fewer))) == (
        "dataset.split_val: class 'red' is not among the training classes"
    )


def test_missing_files_may_be_allowed_and_a_run_trains_on_a_table(photos, tmp_path):
    path = written(photos, [*photos[1], "gone.jpg,red,train"])
    small = ["model.name=test_resnet", "training.epochs=1", "ast.mode=dense"]
    small += ["training.num_workers=0", "dataset.image_size=16", "dataset.max_bad_images=1"]
    result, _ = train(csv_config(path, *small, f"logging.output_dir={tmp_path}/out"))
    assert result["status"] == "completed"
    assert result["classes"]["val_samples"] == [1, 1, 1]
    assert result["val_split"] is None
