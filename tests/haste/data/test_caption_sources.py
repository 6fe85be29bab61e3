"""Images with captions in MS-COCO's layout, in pairs of files, in tars, and in a Hugging Face data set."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
from haste.data.caption_sources import open_captioned
from haste.data.images import decode_image
from haste.errors import BadFile, UserError
from image_files import captions_of, photographs, write_coco, write_hub_captions, write_pairs, write_tars
from PIL import Image

WRITERS = {
    "coco": write_coco,
    "pairs": write_pairs,
    "tars": write_tars,
    "tar": lambda path: next(iter(write_tars(path, per_tar=6).iterdir())),
    "zip": lambda path: Path(shutil.make_archive(str(path), "zip", write_pairs(path))),
    "hub": write_hub_captions,
}


@pytest.fixture(params=WRITERS)
def captioned(request, tmp_path):
    return open_captioned(WRITERS[request.param](tmp_path / "data"))


def test_every_form_has_the_images_and_their_captions_in_order(captioned):
    assert len(captioned.images) == 6
    for index, expected in enumerate(photographs(6)):
        image = decode_image(captioned.images.read(index), captioned.images.name(index))
        assert image.size == expected.size
        difference = sum(abs(a - b) for a, b in zip(image.tobytes(), expected.tobytes(), strict=True))
        assert difference / len(expected.tobytes()) < 12  # JPEG's
        assert captioned.captions(index) == captions_of(index)
    assert captioned.digest() == pickle.loads(pickle.dumps(captioned)).digest()
    assert "data" in captioned.origin


def test_every_form_notices_other_captions_or_files(tmp_path):
    path = write_coco(tmp_path / "coco")
    before = open_captioned(path).digest()
    path.write_text(path.read_text().replace("temple", "palace"))
    assert open_captioned(path).digest() != before
    write_pairs(tmp_path / "pairs")
    before = open_captioned(tmp_path / "pairs").digest()
    (tmp_path / "pairs" / "00.png").rename(tmp_path / "pairs" / "zz.png")
    (tmp_path / "pairs" / "00.txt").rename(tmp_path / "pairs" / "zz.txt")
    assert open_captioned(tmp_path / "pairs").digest() != before


# ---- COCO ----


@pytest.mark.parametrize("place", ["beside", "images/split", "images", "zip", "source"])
def test_cocos_images_are_found_where_they_usually_lie(tmp_path, place):
    path, split = write_coco(tmp_path), tmp_path / "train2014"
    images = None
    if place == "images/split":
        (tmp_path / "images").mkdir()
        split.rename(tmp_path / "images" / "train2014")
    elif place == "images":
        split.rename(tmp_path / "images")
    elif place == "zip":
        shutil.make_archive(str(split), "zip", tmp_path, "train2014")
        shutil.rmtree(split)
    elif place == "source":
        images = split.rename(tmp_path / "elsewhere")
    assert open_captioned(path, images).captions(2) == captions_of(2)
    assert len(open_captioned(tmp_path, images).images) == 6
    shutil.rmtree(tmp_path / "annotations")
    with pytest.raises(UserError, match="--captions must be"):
        open_captioned(tmp_path, images)


def test_of_several_annotations_one_must_be_named(tmp_path):
    for split in ("train2014", "val2014"):
        write_coco(tmp_path, split=split)
    with pytest.raises(UserError, match="--captions must be one of captions_train2014.json, captions_val2014.json in"):
        open_captioned(tmp_path)


def test_annotations_and_images_that_do_not_match_are_refused_or_skipped(tmp_path, caplog):
    path = write_coco(tmp_path)
    shutil.rmtree(tmp_path / "train2014")
    with pytest.raises(
        UserError, match="--captions must lie beside its images, in .*train2014.* or come with --source"
    ):
        open_captioned(path)
    write_pairs(tmp_path / "other")
    with pytest.raises(UserError, match="--captions must be the captions of the images in .*other.*lists none of them"):
        open_captioned(path, tmp_path / "other")
    write_coco(tmp_path)
    (tmp_path / "train2014" / "COCO_train2014_000000000030.jpg").unlink()
    with pytest.raises(UserError, match="1 of the images that .* lists are missing.*0030.jpg; restore.*--on-bad-file"):
        open_captioned(path)
    source = open_captioned(path, on_bad_file="skip")
    assert [source.captions(index) for index in range(5)] == [captions_of(index) for index in (0, 1, 3, 4, 5)]
    write_coco(tmp_path)
    content = json.loads(path.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 20]
    content["annotations"].append({"image_id": 999, "caption": "of nothing"})
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="2 images or captions have no counterpart"):
        open_captioned(path)
    assert len(open_captioned(path, on_bad_file="skip").images) == 5
    photographs(1)[0].save(tmp_path / "train2014" / "extra.jpg")
    with caplog.at_level("INFO"):
        open_captioned(path, on_bad_file="skip")
    assert "1 images in" in caplog.text and "are not listed" in caplog.text


@pytest.mark.parametrize(
    "content",
    ["nonsense", "[]", "{}", '{"images": 3, "annotations": []}', '{"images": [3], "annotations": []}',
     '{"images": [{"id": "1", "file_name": "x.jpg"}], "annotations": []}',
     '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
     '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": 3}]}'],
)  # fmt: skip
def test_what_are_no_annotations_is_refused(tmp_path, content):
    path = write_coco(tmp_path)
    path.write_text(content)
    with pytest.raises(UserError, match="captions_train2014.json must be"):
        open_captioned(path)


# ---- pairs ----


def test_pairs_may_lie_in_folders_and_apart(tmp_path):
    write_pairs(tmp_path / "images" / "deep")
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    assert open_captioned(tmp_path / "images").captions(3) == captions_of(3)
    for path in (tmp_path / "images").rglob("*.txt"):
        path.rename(tmp_path / "texts" / "deep" / path.name)
    assert open_captioned(tmp_path / "texts", tmp_path / "images").captions(3) == captions_of(3)
    with pytest.raises(UserError, match="--captions must be .* where no .txt has an image beside it"):
        open_captioned(tmp_path / "texts")


def test_pairs_without_a_counterpart_are_refused_or_skipped(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "01.txt").unlink()
    (tmp_path / "04.png").unlink()
    with pytest.raises(UserError, match="2 images or captions have no counterpart, the first being .*01.jpg; restore"):
        open_captioned(tmp_path)
    source = open_captioned(tmp_path, on_bad_file="skip")
    assert [source.captions(index) for index in range(4)] == [captions_of(index) for index in (0, 2, 3, 5)]
    (tmp_path / "02.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="--captions must have one image for a caption, got 02.jpg and 02.png"):
        open_captioned(tmp_path, on_bad_file="skip")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [(b"", "must hold a caption"), (b" \n\n", "must hold a caption"), (b"caf\xe9", "must be UTF-8"),
     (b"x" * (2**20 + 1), "at most 1 MiB of captions")],
)  # fmt: skip
def test_captions_that_cannot_be_used_are_bad_files(tmp_path, data, sentence):
    write_pairs(tmp_path)
    (tmp_path / "02.txt").write_bytes(data)
    source = open_captioned(tmp_path)
    with pytest.raises(BadFile, match=f"02.txt.*{sentence}"):
        source.captions(2)
    (tmp_path / "02.txt").write_bytes("\ufeffcafé\r\n\r\n two ".encode())
    assert source.captions(2) == ["café", "two"]


# ---- tars ----


def test_tars_may_have_captions_in_json(tmp_path):
    source = open_captioned(write_tars(tmp_path, kind="json"))
    assert [source.captions(index) for index in range(6)] == [captions_of(index)[:1] for index in range(6)]


def test_tars_that_are_compressed_or_cut_short_are_refused_or_read_as_far_as_they_go(tmp_path, caplog):
    write_tars(tmp_path)
    first, second = sorted(tmp_path.iterdir())
    whole = first.read_bytes()
    first.write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match="00000.tar is no whole, uncompressed tar .*--on-bad-file skip"):
        open_captioned(tmp_path)
    assert len(open_captioned(tmp_path, on_bad_file="skip").images) == 2
    assert "skipped: " in caplog.text and "00000.tar" in caplog.text
    first.write_bytes(whole)
    source = open_captioned(tmp_path)
    second.write_bytes(second.read_bytes()[:600])
    with pytest.raises(BadFile, match="is truncated"):
        [source.images.read(index) for index in range(6)]
    with pytest.raises(UserError, match="00001.tar is no whole"):
        open_captioned(tmp_path)


def test_a_tar_has_only_files_and_hidden_ones_are_left_out(tmp_path):
    write_tars(tmp_path, 2)
    with tarfile.open(tmp_path / "00001.tar", "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("._b.jpg", "b/.c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert len(open_captioned(tmp_path).images) == 2
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(UserError, match="--captions must hold tars of images, got nothing"):
        open_captioned(tmp_path)


def test_source_is_refused_where_images_come_along(tmp_path):
    write_pairs(tmp_path / "images")
    for path in (write_tars(tmp_path / "tars"), write_hub_captions(tmp_path / "hub")):
        with pytest.raises(UserError, match="--source must be left out with --captions of"):
            open_captioned(path, tmp_path / "images")
    with pytest.raises(UserError, match="--captions must be captions that exist"):
        open_captioned(tmp_path / "nowhere")


# ---- Hugging Face ----


def test_the_column_of_captions_is_known_by_its_name_or_the_only_text(tmp_path):
    source = open_captioned(write_hub_captions(tmp_path / "texts", column="text", lists=False))
    assert [source.captions(index) for index in range(6)] == [captions_of(index)[:1] for index in range(6)]
    with pytest.raises(UserError, match="--captions must have a column of text named captions or .*, got note, label"):
        open_captioned(write_hub_captions(tmp_path / "other", column="note"))


def test_rows_without_a_caption_are_bad_files(tmp_path):
    import datasets

    values = {"image": photographs(3), "caption": ["one", None, " "]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(values, features).save_to_disk(tmp_path)
    source = open_captioned(tmp_path)
    assert source.captions(0) == ["one"]
    for index in (1, 2):
        with pytest.raises(BadFile, match=f"caption of image {index} of .* must hold a caption"):
            source.captions(index)


def write_folders(root, present, listed, captions=("black", "white")):
    """COCO's form of grey images: present[i] is a path of brightness 255·i, listed[i] has captions[i]."""
    (root / "images").mkdir(parents=True)
    for number, name in enumerate(present):
        (root / "images" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (255 * number,) * 3).save(root / "images" / name)
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(listed)],
        "annotations": [{"image_id": number, "caption": caption} for number, caption in enumerate(captions)],
    }
    (root / "captions.json").write_text(json.dumps(content))
    return root


def brightness(source) -> list[tuple[str, int]]:
    images = (Image.open(io.BytesIO(source.images.read(index))) for index in range(len(source.images)))
    return [(source.captions(index)[0], image.getpixel((0, 0))[0]) for index, image in enumerate(images)]


def test_images_of_one_name_in_several_folders_keep_their_captions(tmp_path):
    names = ["a/1.png", "b/1.png"]
    assert brightness(open_captioned(write_folders(tmp_path, names, names))) == [("black", 0), ("white", 255)]


def test_a_missing_image_is_not_replaced_by_another_folder_s(tmp_path):
    path = write_folders(tmp_path, ["b/1.png", "c/2.png"], ["a/1.png", "b/1.png"])
    with pytest.raises(UserError, match="1 of the images .* are missing.*a/1.png"):
        open_captioned(path)
    assert brightness(open_captioned(path, on_bad_file="skip")) == [("white", 0)]


def test_a_name_that_several_images_have_is_refused(tmp_path):
    with pytest.raises(UserError, match="must list images by their paths .* got 1.png"):
        open_captioned(write_folders(tmp_path, ["a/1.png", "b/1.png"], ["1.png"], ["black"]))


def test_half_an_emoji_becomes_a_question_mark(tmp_path):
    path = write_folders(tmp_path, ["1.png"], ["1.png"], ["a cat \ud83d"])
    assert open_captioned(path).captions(0) == ["a cat ?"]
