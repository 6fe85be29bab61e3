"""Files of SiT's trainers: whose they are, their names, their conventions."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from haste.errors import UserError
from haste.models import CheckpointFile, SiT, get_family, infer_config
from haste.models.dit_checkpoints import DiTCheckpoints
from haste.models.sit_checkpoints import SiTCheckpoints
from haste.training.checkpoint import loaded_model, read_checkpoint
from small_models import SHAPE, WITH_PROJECTORS, random_sit

CHECKPOINTS = SiTCheckpoints()

EMBED = torch.ones(16, 4, 2, 2)
PLAIN = {"x_embedder.proj.weight": EMBED, "final_layer.linear.weight": torch.ones(16, 16),
         "pos_embed": torch.ones(1, 16, 16), "y_embedder.embedding_table.weight": torch.ones(1001, 16)}  # fmt: skip
ZEROS = torch.cat([torch.ones(4, 4, 16), torch.zeros(4, 4, 16)], dim=1).view(32, 16)
UNTRAINED = {**PLAIN, "final_layer.linear.weight": ZEROS}
TRAINED = {**PLAIN, "final_layer.linear.weight": torch.ones(32, 16)}
NEW = {**PLAIN, "final_layer.linear.weight": torch.zeros(32, 16)}
PROJECTED = {**PLAIN, "projectors.0.0.weight": torch.ones(8, 16)}

SIT_ARGS = {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "train_eps": 1e-5, "image_size": 256,
            "vae": "ema", "cfg_scale": 4.0, "num_classes": 1000, "model": "SiT-XL/2", "epochs": 1400}  # fmt: skip
REPA_ARGS = {"path_type": "linear", "prediction": "v", "enc_type": "dinov2-vit-b", "proj_coeff": 0.5}


DIT_ARGS = {"data_path": "/imagenet/train", "results_dir": "results", "model": "DiT-XL/2", "image_size": 256,
            "num_classes": 1000, "epochs": 1400, "global_batch_size": 256, "global_seed": 0, "vae": "ema",
            "num_workers": 4, "log_every": 100, "ckpt_every": 50_000}  # fmt: skip


def found(weights=PLAIN, args=None, content=None, name="last.pt", given=None):
    """By the one of SiT and DiT whose file it is; never by both."""
    file = CheckpointFile(weights, args or {}, content or {}, Path("exps") / name, given)
    answers = [reader.find_convention(file) for reader in (CHECKPOINTS, DiTCheckpoints())]
    assert None in answers and (answers[0] is None) == (answers[1] == "dit")
    return answers[0] or answers[1]


@pytest.mark.parametrize(
    ("case", "convention"),
    [
        ({"content": {"model_config": {"depth": 1}}}, "repa"),
        ({"content": {"steps": 4}}, "repa"),
        ({"args": REPA_ARGS}, "repa"),
        ({"weights": PROJECTED}, "repa"),
        ({"args": SIT_ARGS}, "sit"),  # also without learn_sigma, when its shapes are REPA's
        ({"args": {"path_type": "GVP"}}, "sit"),
        ({"args": {"prediction": "velocity"}}, "sit"),
        ({"weights": UNTRAINED}, "sit"),  # what predicts sigma is still as it was initialised
        ({"weights": TRAINED, "name": "SiT-XL-2-256x256.pt"}, "sit"),
        ({"given": "sit"}, "sit"),
        ({"given": "repa"}, "repa"),
        ({"weights": TRAINED, "given": "sit"}, "sit"),
        ({"args": DIT_ARGS, "weights": TRAINED}, "dit"),
        ({"args": DIT_ARGS, "weights": NEW, "name": "SiT.pt"}, "dit"),
        ({"content": {"steps": 4}, "args": {"model": "DiT-B/4"}, "weights": TRAINED}, "dit"),
        ({"content": {"model_config": {"family": "dit"}}}, "dit"),
        ({"content": {"model_config": {"family": "dit"}}, "given": "dit"}, "dit"),
        ({"weights": TRAINED, "name": "DiT-XL-2-256x256.pt"}, "dit"),
        ({"weights": TRAINED, "given": "dit"}, "dit"),
        ({"weights": UNTRAINED, "name": "DiT-XL-2-256x256.pt", "given": "sit"}, "sit"),
        ({"weights": PLAIN, "name": "DiT-flow.pt", "given": "repa"}, "repa"),
    ],
)
def test_whose_it_is(case, convention):
    assert found(**case) == convention


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"weights": TRAINED},
        {"weights": NEW},
        {"name": "SiT-XL-2-256x256.pt"},
        {"weights": UNTRAINED, "name": "DiT-XL-2-256x256.pt"},  # the name is DiT's, the content SiT's
    ],
)
def test_where_nothing_tells_the_flag_is_asked_for(case):
    with pytest.raises(UserError, match=r"--convention must be given for exps/.*: repa .* sit .* dit "):
        found(**case)


OF = {
    "repa": [{"args": REPA_ARGS}, {"content": {"steps": 4}}],
    "sit": [{"args": SIT_ARGS}, {"weights": UNTRAINED}, {"weights": TRAINED, "name": "SiT-XL-2-256x256.pt"}],
    "dit": [{"args": DIT_ARGS}, {"weights": TRAINED, "name": "DiT-XL-2-256x256.pt"},
            {"content": {"model_config": {"family": "dit"}}}],
}  # fmt: skip


@pytest.mark.parametrize(("whose", "given"), list(itertools.permutations(OF, 2)))
def test_a_flag_against_what_the_file_tells_is_refused_and_both_are_named(whose, given):
    for case in OF[whose]:
        with pytest.raises(UserError, match=rf"--convention must be {whose} \(.*exps/.*\.pt, got {given}$"):
            found(**case, given=given)


def test_a_sits_file_of_unknown_trainer_is_no_dits():
    args = {"model": "SiT-XL/2"}
    with pytest.raises(UserError, match=r"--convention must be repa or sit for exps/last\.pt, of a SiT-XL/2, got dit"):
        found(TRAINED, args, given="dit")
    assert found(TRAINED, args, given="sit") == "sit"


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ({"args": {**SIT_ARGS, "path_type": "VP"}}, "--path-type VP"),
        ({"args": {**SIT_ARGS, "prediction": "noise"}}, "--prediction noise"),
        ({"args": {**SIT_ARGS, "prediction": "score"}}, "--prediction score"),
    ],
)
@pytest.mark.parametrize("given", [None, "sit"])
def test_what_predicts_no_known_velocity_is_refused_by_name(case, name, given):
    with pytest.raises(UserError, match=name):
        found(**case, given=given)


def test_sits_settings_under_our_names():
    assert CHECKPOINTS.convert_settings({**SIT_ARGS, "path_type": "GVP"}, "sit") == {
        "model": "SiT-XL/2", "num_classes": 1000, "resolution": 256, "path_type": "cosine", "prediction": "v",
    }  # fmt: skip
    assert CHECKPOINTS.convert_settings({}, "sit") == {"path_type": "linear", "prediction": "v"}
    assert CHECKPOINTS.convert_settings(REPA_ARGS, "repa") == REPA_ARGS


def test_sits_sampler_guides_three_of_more_channels():
    assert [CHECKPOINTS.guided_channels("sit", n) for n in (1, 3, 4)] == [None, None, 3]
    assert CHECKPOINTS.guided_channels("repa", 4) is None


@pytest.fixture(autouse=True)
def _a_known_size_of_that_shape(monkeypatch):
    size = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
    monkeypatch.setitem(get_family("sit").sizes, "SiT-Tiny/2", size)


class PublicSiT(SiT):
    """SiT's own: eight output channels, of which four predict sigma; x0 - noise at time 0 for noise, 1 for data."""

    def __init__(self, **shape) -> None:
        super().__init__(**shape)
        self.final_layer.linear = torch.nn.Linear(shape["hidden_size"], 2 * shape["patch_size"] ** 2 * 4)

    def finish(self, tokens, c):
        patches = self.final_layer(tokens, c)
        images = torch.einsum("nhwpqc->nchpwq", patches.view(-1, 4, 4, 2, 2, 8)).reshape(-1, 8, 8, 8)
        return images.chunk(2, dim=1)[0]


def test_sits_weights_predict_our_velocity_after_the_conversion():
    torch.manual_seed(0)
    public = PublicSiT(**SHAPE).double().eval()
    for parameter in public.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = SiT(**SHAPE).double().eval()
    ours.load_state_dict(CHECKPOINTS.convert_weights(public.state_dict(), "sit"))
    x, t, y = torch.randn(5, 4, 8, 8).double(), torch.tensor([0.0, 0.1, 0.5, 0.93, 1.0]).double(), torch.arange(5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y).prediction, -public(x, 1 - t, y).prediction, rtol=1e-10, atol=1e-10)


def test_sits_weights_without_learn_sigma_too():
    torch.manual_seed(0)
    public, ours = random_sit().double(), SiT(**SHAPE).double().eval()
    ours.load_state_dict(CHECKPOINTS.convert_weights(public.state_dict(), "sit"))
    x, t, y = torch.randn(3, 4, 8, 8).double(), torch.tensor([0.0, 0.3, 1.0]).double(), torch.arange(3)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y).prediction, -public(x, 1 - t, y).prediction, rtol=1e-10, atol=1e-10)


def test_repas_older_names():
    names = [*(f"blocks.{n}.mlp.fc1.bias" for n in range(8)), "decoder_blocks.0.mlp.fc1.bias",
             "decoder_blocks.12.mlp.fc1.bias", "pos_embed"]  # fmt: skip
    renamed = list(CHECKPOINTS.rename(dict.fromkeys(names)))
    assert renamed == [*names[:8], "blocks.8.mlp.fc1.bias", "blocks.20.mlp.fc1.bias", "pos_embed"]


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"class_dropout_prob": 0.0}, WITH_PROJECTORS])
def test_the_shape_is_read_from_the_weights(changes):
    model = random_sit(**changes)
    args = {"encoder_depth": 2, "num_classes": 10}
    config = infer_config(CheckpointFile(model.state_dict(), args, convention="repa"))
    again = SiT(**config, z_dims=changes.get("z_dims", ()))
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.encoder_depth == 2 and again.null_label == model.null_label


def test_without_settings_a_null_class_is_assumed():
    assert infer_config(CheckpointFile(random_sit().state_dict(), convention="repa"))["num_classes"] == 10


def test_what_is_no_sit_of_a_known_size_is_refused():
    with pytest.raises(UserError, match="must be those of one of .*SiT.*, and the first one is w"):
        infer_config(CheckpointFile({"w": torch.ones(2)}))
    with pytest.raises(UserError, match="depth 2 and width 16, which none of the known sizes has"):
        infer_config(CheckpointFile(random_sit(depth=2).state_dict(), convention="sit"))


def test_a_bare_file_of_sits_weights_can_be_sampled_from(tmp_path):
    public = PublicSiT(**SHAPE)
    torch.save(public.state_dict(), tmp_path / "SiT.pt")
    model = loaded_model(read_checkpoint(tmp_path / "SiT.pt"))
    assert model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([3, 10])).prediction.shape == (2, 4, 8, 8)
