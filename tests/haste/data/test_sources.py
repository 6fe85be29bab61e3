import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import datasets
import pytest
from haste.data.sources import open_source
from haste.errors import BadFile, UserError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import photographs, write_classes


def test_classes_are_the_folders_at_the_top_in_order(class_folder):
    (class_folder / "notes.txt").write_text("not an image")
    source = open_source(class_folder, "--data-dir")
    assert len(source) == 12 and source.num_classes == 3
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert source.name(4) == str(class_folder / "bee" / "01.png")
    assert source.read(4) == (class_folder / "bee" / "01.png").read_bytes()


def test_a_zip_of_class_folders_is_the_same_data(class_folder):
    packed = Path(shutil.make_archive(str(class_folder), "zip", class_folder))
    folder, zipped = open_source(class_folder, "--data-dir"), open_source(packed, "--data-dir")
    assert folder.digest() == zipped.digest()
    assert [folder.read(i) for i in range(12)] == [zipped.read(i) for i in range(12)]


def test_dataset_json_goes_before_folder_names(class_folder):
    names = [path.relative_to(class_folder).as_posix() for path in sorted(class_folder.rglob("*.png"))]
    labels = {name: index % 5 for index, name in enumerate(names)}
    (class_folder / "dataset.json").write_text(json.dumps({"labels": list(labels.items())}))
    source = open_source(class_folder, "--data-dir")
    assert source.labels.tolist() == list(labels.values()) and source.num_classes == 5


def test_a_flat_folder_is_one_class(tmp_path):
    for index, image in enumerate(photographs(2)):
        image.save(tmp_path / f"{index}.jpg")
    source = open_source(tmp_path, "--data-dir")
    assert source.labels is None and source.num_classes == 1 and len(source) == 2


def test_the_digest_tells_a_change_of_names_or_labels(class_folder):
    before = open_source(class_folder, "--data-dir").digest()
    (class_folder / "ant").rename(class_folder / "dog")
    assert open_source(class_folder, "--data-dir").digest() != before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("nonsense", "dataset.json must be .*, but is no JSON"),
        ('{"labels": [["cat/02.png"]]}', "must be .*for a pair"),
        ('{"labels": {"cat/02.png": 1}}', "got labels of type dict"),
        ('[["cat/02.png", 1]]', "a JSON object, got list"),
        (
            '{"labels": [["cat/02.png", 1]]}',
            "dataset.json must have a label for each file, got none for ant/00.png and 10 others",
        ),
    ],
)
def test_a_broken_dataset_json_is_refused(class_folder, content, sentence):
    (class_folder / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        open_source(class_folder, "--data-dir")


@pytest.mark.parametrize("label", [-1, 0.5, [0, 1], None, True, 1_000_000])
def test_labels_that_are_no_classes_are_refused(tmp_path, label):
    write_classes(tmp_path, 1)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["ant/00.png", label]]}))
    with pytest.raises(UserError, match="must have labels from 0 to .*for ant/00.png"):
        open_source(tmp_path, "--data-dir")


def test_folders_that_are_no_class_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="--data-dir must hold images"):
        open_source(tmp_path, "--data-dir")
    write_classes(tmp_path, classes=("train", "val"))
    with pytest.raises(UserError, match="--data-dir must be one of the folders train and val"):
        open_source(tmp_path, "--data-dir")
    photographs(1)[0].save(tmp_path / "lone.png")
    with pytest.raises(UserError, match="--data-dir must hold images in class folders .*lone.png"):
        open_source(tmp_path, "--data-dir")


def test_a_zip_with_the_folder_itself_in_it_is_one_class_and_says_so(class_folder, caplog):
    packed = shutil.make_archive(str(class_folder), "zip", class_folder.parent, class_folder.name)
    assert open_source(Path(packed), "--data-dir").num_classes == 1
    assert "has one class, photos" in caplog.text
    caplog.clear()
    assert open_source(class_folder, "--data-dir").num_classes == 3
    shutil.rmtree(class_folder / "bee")
    shutil.rmtree(class_folder / "cat")
    assert open_source(class_folder, "--data-dir").num_classes == 1
    assert not caplog.text


def test_the_layout_of_repa_one_folder_further_down_is_not_taken_for_images(repa_folder):
    packed = shutil.make_archive(str(repa_folder), "zip", repa_folder.parent, repa_folder.name)
    for path in (repa_folder.parent, Path(packed)):
        with pytest.raises(UserError, match="--data-dir must be repa in .*, which holds vae-sd"):
            open_source(path, "--data-dir")


# ---- Hugging Face ----


def hugging_face(count: int = 4, **columns) -> datasets.Dataset:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    values = {"image": photographs(count), "label": [index % 2 for index in range(count)]}
    return datasets.Dataset.from_dict(values, datasets.Features(features)).rename_columns(columns)


def test_a_hugging_face_data_set(tmp_path):
    hugging_face(image="image", label="kind").save_to_disk(tmp_path)
    source = open_source(tmp_path, "--data-dir")
    assert len(source) == 4 and source.labels.tolist() == [0, 1, 0, 1]
    assert source.num_classes == 3  # as the set tells, also where a class has no image
    assert source.read(2)[:4] == b"\x89PNG"
    assert source.name(2) == f"image 2 of {tmp_path}"
    assert open_source(tmp_path, "--data-dir").digest() == source.digest()


def test_classes_keep_their_names_where_they_have_any(class_folder, tmp_path):
    names = sorted(path.name for path in class_folder.iterdir())
    assert open_source(class_folder, "--data-dir").class_names == names
    hugging_face().save_to_disk(tmp_path / "hub")
    assert open_source(tmp_path / "hub", "--data-dir").class_names == ["x", "y", "z"]
    (tmp_path / "flat").mkdir()
    photographs(1)[0].save(tmp_path / "flat" / "0.png")
    assert open_source(tmp_path / "flat", "--data-dir").class_names is None


def test_of_several_splits_the_one_named_train_is_taken(tmp_path):
    datasets.DatasetDict(test=hugging_face(2), train=hugging_face(3)).save_to_disk(tmp_path / "both")
    assert len(open_source(tmp_path / "both", "--data-dir")) == 3
    datasets.DatasetDict(a=hugging_face(2), b=hugging_face(3)).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="--data-dir must be one of the splits a, b"):
        open_source(tmp_path / "other", "--data-dir")
    assert len(open_source(tmp_path / "other" / "b", "--data-dir")) == 3


def test_a_hugging_face_row_without_an_image_is_a_bad_file(tmp_path):
    values = {"image": [photographs(1)[0], None]}
    datasets.Dataset.from_dict(values, datasets.Features({"image": datasets.Image()})).save_to_disk(tmp_path)
    source = open_source(tmp_path, "--data-dir")
    assert source.labels is None
    with pytest.raises(BadFile, match="image 1 of .* is missing"):
        source.read(1)


def test_hugging_face_columns_that_do_not_fit(tmp_path):
    hugging_face().remove_columns("image").save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match=r"--data-dir must have one column of images, got label \(ClassLabel\)"):
        open_source(tmp_path / "none", "--data-dir")
    text = hugging_face().cast_column("label", datasets.Value("string"))
    text.save_to_disk(tmp_path / "text")
    with pytest.raises(UserError, match="--data-dir must have labels from 0 to .* in label"):
        open_source(tmp_path / "text", "--data-dir")


def test_without_the_package_datasets_one_sentence_says_so(tmp_path, monkeypatch):
    hugging_face().save_to_disk(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install 'haste.datasets.'"):
        open_source(tmp_path, "--data-dir")


def test_a_damaged_hugging_face_data_set_is_refused(tmp_path):
    hugging_face().save_to_disk(tmp_path)
    next(tmp_path.glob("*.arrow")).write_bytes(b"")
    with pytest.raises(UserError, match="--data-dir must be loadable by datasets"):
        open_source(tmp_path, "--data-dir")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("state.json", "[]", "state.json must be the state of a Hugging Face data set"),
        ("state.json", '{"_data_files": 3}', "_data_files of .*state.json must be"),
        ("state.json", '{"_data_files": [{"filename": "../../x.arrow"}]}', "state.json must list files in its folder"),
        (
            "state.json",
            '{"_data_files": [{"filename": "pipe"}]}',
            "state.json must list files in its folder, got 'pipe'",
        ),
        ("dataset_info.json", '{"features": {"image": {"_type": "None"}}}', "--data-dir must be loadable by datasets"),
        ("dataset_dict.json", '{"splits": "train"}', "splits of .*dataset_dict.json must be"),
        ("dataset_dict.json", '{"splits": ["nowhere"]}', "nowhere/state.json must be the state"),
    ],
)
def test_odd_records_of_a_hugging_face_data_set_are_refused(tmp_path, file, content, sentence):
    hugging_face().save_to_disk(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=sentence):
        open_source(tmp_path, "--data-dir")


def test_a_damaged_table_is_a_refusal_or_a_bad_file(tmp_path):
    hugging_face(40).save_to_disk(tmp_path)
    table = next(tmp_path.glob("*.arrow"))
    whole = table.read_bytes()
    for start in range(0, len(whole), len(whole) // 12):
        table.write_bytes(whole[:start] + bytes(64) + whole[start + 64 :])
        with contextlib.suppress(UserError, BadFile):
            source = open_source(tmp_path, "--data-dir")
            for index in range(len(source)):
                source.read(index)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["ant/00.png", "labels"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("labels"), inner, max_size=1), max_leaves=8,
).map(lambda content: json.dumps(content).encode()))  # fmt: skip
def test_any_bytes_in_dataset_json_are_labels_or_a_refusal(tmp_path, content):
    if not (tmp_path / "ant").exists():
        write_classes(tmp_path, 1)
    (tmp_path / "dataset.json").write_bytes(content)
    with contextlib.suppress(UserError):
        source = open_source(tmp_path, "--data-dir")
        assert source.labels is None or (source.labels.shape == (1,) and source.num_classes > source.labels[0] >= 0)


def test_images_of_formats_that_are_not_read_are_counted(class_folder, caplog):
    photographs(1)[0].save(class_folder / "ant" / "x.tga")
    assert len(open_source(class_folder, "--data-dir")) == 12
    assert "skipped 1 files of other formats, such as ant/x.tga" in caplog.text
