import pytest
from haste.errors import UserError
from haste.teachers import resolve_teacher


def test_published_names_become_hub_names():
    assert resolve_teacher("dinov2-vit-b") == "facebook/dinov2-base"


def test_a_name_of_repa_that_transformers_lacks_is_refused_with_what_would_do():
    with pytest.raises(UserError, match=r"--enc-type must be .* saved as a ViTModel .*, got mocov3-vit-b"):
        resolve_teacher("mocov3-vit-b")


@pytest.mark.parametrize("name", ["pe-vit-g", "langpe-vit-l", "spatialpe-vit-b", "sam2-vit-s"])
def test_a_name_of_irepa_that_transformers_lacks_is_refused_and_says_why(name):
    with pytest.raises(UserError, match=rf"--enc-type must be a model of transformers, wh?i.*, got {name}$"):
        resolve_teacher(name)


def test_irepas_names_are_the_hubs():
    assert resolve_teacher("webssl-vit-dino1b_full2b_224") == "facebook/webssl-dino1b-full2b-224"
    assert resolve_teacher("dinov3-vit-b16") == resolve_teacher("dinov3-vit-b")


def test_hub_names_and_folders_stay(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_teacher("somebody/some-vit") == "somebody/some-vit"
    assert resolve_teacher(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "dinov2-vit-z", "a/b/c", ""])
def test_what_is_neither_is_refused_with_the_known_names(name):
    with pytest.raises(UserError, match="--enc-type must be a folder .* one of dinov2-vit-s"):
        resolve_teacher(name)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--enc-type must be .* without config\.json"):
        resolve_teacher(str(tmp_path))
