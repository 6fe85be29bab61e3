from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from haste.data.images import open_images, write_image
from haste.errors import UserError
from haste.metrics import features as features_module
from haste.metrics.features import (
    Features,
    InceptionExtractor,
    TeacherExtractor,
    extract,
    feature_dimension,
    load_extractor,
    resize_smoothly,
)
from haste.metrics.inception import Inception
from PIL import Image

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}


def random_images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    """Made for 56 pixels, 4 x 4 patches."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teachers") / "dino"
    tf.Dinov2Model(tf.Dinov2Config(**SHAPE, image_size=56, patch_size=14)).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_teacher_gives_its_class_token_after_the_final_norm(dinov2):
    extractor = TeacherExtractor(str(dinov2))
    images = random_images(3, 56)
    found = extractor(images)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    expected = tf.Dinov2Model.from_pretrained(dinov2)(pixels).pooler_output  # the normalised class token
    assert found.values == pytest.approx(expected.numpy(), abs=1e-5) and found.probabilities is None
    assert found.dimension == extractor.dimension == 24
    assert "class token" in extractor.describe() and "56 pixels" in extractor.describe()


def test_an_encoder_without_class_token_gives_the_mean_of_its_patches(tmp_path):
    config = tf.IJepaConfig(**SHAPE, image_size=16, patch_size=8)
    tf.IJepaModel(config).save_pretrained(tmp_path / "jepa")
    extractor = TeacherExtractor(str(tmp_path / "jepa"))
    images = random_images(2, 16)
    with torch.no_grad():
        tokens = extractor.teacher(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).patch_tokens
    assert extractor(images).values == pytest.approx(tokens.mean(dim=1).numpy(), abs=1e-5)
    assert "mean patch token" in extractor.describe()


def test_encoders_made_for_more_see_224_pixels(tmp_path):
    tf.Dinov2Model(tf.Dinov2Config(**SHAPE, image_size=518, patch_size=14)).save_pretrained(tmp_path / "large")
    assert TeacherExtractor(str(tmp_path / "large")).pixels == 224


def test_grey_encoders_see_the_mean_of_the_channels(tmp_path):
    config = tf.ViTConfig(**SHAPE, image_size=8, patch_size=4, num_channels=1)
    tf.ViTModel(config).save_pretrained(tmp_path / "grey")
    extractor = TeacherExtractor(str(tmp_path / "grey"))
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[..., 0] = 90
    assert extractor(image).values == pytest.approx(extractor(np.full_like(image, 30)).values, abs=1e-5)


def test_images_are_resized_as_pillow_does():
    image = 64 + random_images(1, 40)[0] // 2  # within bounds, also between Pillow's two passes, which round to bytes
    for size in (16, 56):
        pillow = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)).astype(np.float32)
        ours = resize_smoothly(torch.from_numpy(image).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0).numpy()
        assert np.abs(ours - pillow).max() <= 1 and np.abs(ours - pillow).mean() < 0.25


def test_the_key_tells_the_weights(dinov2, tmp_path):
    first, again = TeacherExtractor(str(dinov2)), TeacherExtractor(str(dinov2))
    model = tf.Dinov2Model.from_pretrained(dinov2)
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "dino")
    assert first.key == again.key != TeacherExtractor(str(tmp_path / "dino")).key
    assert "/" not in first.key


def test_inception_classifies(tmp_path):
    images = random_images(1)
    network = Inception().eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    extractor = InceptionExtractor(tmp_path / "weights.pth")
    with torch.no_grad():
        expected, spatial, probabilities = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    found = extractor(images)
    assert found.values == pytest.approx(expected.numpy(), abs=1e-5) and found.values.shape == (1, 2048)
    assert found.probabilities == pytest.approx(probabilities.numpy(), abs=1e-6)
    assert found.spatial == pytest.approx(spatial.numpy(), abs=1e-5)


def test_features_do_not_depend_on_the_batch(network):
    images = random_images(10)
    whole = extract(network, images, batch_size=10)
    parts = extract(network, images, batch_size=3)
    assert (whole.values == parts.values).all() and (whole.probabilities == parts.probabilities).all()


def test_what_was_extracted_is_kept_and_only_changed_images_are_looked_at_again(tmp_path, network, monkeypatch):
    monkeypatch.setattr(features_module, "SHARD", 4)
    folder, cache = tmp_path / "set", tmp_path / "features"
    images = random_images(11)

    def look(expected_work: int, count: int) -> Features:
        network.seen = 0
        found = extract(network, open_images(folder, "--samples"), 2, cache)
        assert network.seen == expected_work and len(found) == count
        assert (found.values == network(images[:count]).values).all()
        return found

    for index, image in enumerate(images[:9]):
        write_image(folder / f"{index:06d}.png", image)
    first = look(9, 9)
    assert (look(0, 9).probabilities == first.probabilities).all()
    for index in (9, 10):
        write_image(folder / f"{index:06d}.png", images[index])
    look(3, 11)  # the last shard grew
    (folder / "000001.png").unlink()
    write_image(folder / "000001.png", images[1])
    look(4, 11)
    network.key = "another"
    look(11, 11)


def test_what_was_kept_without_spatial_features_is_looked_at_again(tmp_path, network):
    images = random_images(4)
    extract(network, images, cache=tmp_path)
    network.spatial, network.seen = True, 0  # as of a version that has them
    assert extract(network, images, cache=tmp_path).spatial is None and network.seen == 4


def test_a_killed_command_goes_on(tmp_path, network, monkeypatch):
    monkeypatch.setattr(features_module, "SHARD", 4)
    images = random_images(10)

    class Killed(type(network)):
        def __call__(self, images: np.ndarray) -> Features:
            if self.seen == 8:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        extract(Killed(), images, 2, tmp_path)
    assert len(extract(network, images, 2, cache=tmp_path)) == 10 and network.seen == 2


def test_features_that_are_not_finite_are_refused(network, tmp_path):
    class Broken(type(network)):
        def __call__(self, images: np.ndarray) -> Features:
            return Features(np.full((len(images), 3), np.nan))

    with pytest.raises(UserError, match="features of mean colours are not finite"):
        extract(Broken(), random_images(2), cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "--features must be inception:PATH, .* or a teacher, got nothing: a teacher must be"),
        ("inception", "--features must be inception:PATH"),
        ("weights.pth", "--features must be inception:PATH"),
        ("inception:nowhere.pth", "nowhere.pth, which is no file"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load_extractor(name, tmp_path)


def test_dimensions_are_known_before_a_network_is_loaded(dinov2, tmp_path):
    assert feature_dimension("digits") == load_extractor("digits", tmp_path).dimension
    assert feature_dimension("inception:nowhere.pth") == 2048
    assert feature_dimension("dinov2-vit-l") == 1024
    assert feature_dimension(str(dinov2)) == TeacherExtractor(str(dinov2)).dimension
    assert feature_dimension("nobody/knows") is None
