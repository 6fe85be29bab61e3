import pytest
from haste.alignment import LayerMap, choose_layer_map
from haste.errors import UserError


@pytest.mark.parametrize(
    ("model", "student", "teacher"),
    [
        ("SiT-B/2", (2, 3, 4), (7, 9, 11)),
        ("SiT-L/2", (4, 5, 6, 7), (8, 9, 10, 11)),
        ("SiT-XL/2", (4, 5, 6, 7), (8, 9, 10, 11)),
    ],
)
def test_the_papers_maps(model, student, teacher):
    assert choose_layer_map("", model) == LayerMap(student, teacher)


def test_a_typed_map_is_read_and_written_back():
    layer_map = choose_layer_map("4:8, 5:9", "SiT-B/2")
    assert layer_map == LayerMap((4, 5), (8, 9))
    assert LayerMap.parse(str(layer_map)) == layer_map


@pytest.mark.parametrize("text", ["4", "4:8:9", "a:b", "4:8,", ","])
def test_a_malformed_map_is_refused(text):
    with pytest.raises(UserError, match="--layer-map is .* it must be pairs student:teacher"):
        LayerMap.parse(text)


def test_a_model_without_a_published_map_needs_one():
    with pytest.raises(UserError, match="no published layer map for SiT-S/2"):
        choose_layer_map("", "SiT-S/2")


def test_a_layer_that_the_student_lacks_is_refused():
    LayerMap((0, 5), (0, 1)).check_student(6)
    with pytest.raises(UserError, match="asks for layer 6 of the student, which has 6 layers"):
        LayerMap((5, 6), (0, 1)).check_student(6)
