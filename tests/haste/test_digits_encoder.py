"""The small CLIP of the digits: it is a CLIP folder as any other, and learns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from haste.digits import encoder
from haste.digits.captions import Look, captioned_digits, captions
from haste.digits.encoder import (
    TOKENS,
    EncoderConfig,
    contrastive_loss,
    load_captioned,
    make_tokenizer,
    prepare_encoder,
    save_encoder,
    tokenized,
    train_encoder,
)
from haste.errors import UserError
from haste.text import TextEncoder, TextFormat
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPModel

SMALL = EncoderConfig(hidden_size=16, num_attention_heads=2, steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_encoder(tmp_path_factory.mktemp("encoders"), SMALL)


def test_words_are_tokens_and_every_caption_fits():
    tokenizer = make_tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenized(tokenizer, ["A bold seven, leaning right!", "a bold seven leaning right", "", "quux"]).tolist()
    assert ids[0] == ids[1] and ids[0][0] == start and ids[0][6:] == [end] * (TOKENS - 6)
    assert ids[2] == [start, *[end] * (TOKENS - 1)] and ids[3][1] == tokenizer.unk_token_id
    every = [caption for held_out in (False, True) for own in captioned_digits(held_out).captions for caption in own]
    plain = tokenizer(every)["input_ids"]
    assert max(map(len, plain)) <= TOKENS and not any(tokenizer.unk_token_id in own for own in plain)


def test_it_is_trained_once_and_loads_as_any_text_encoder(folder, monkeypatch):
    monkeypatch.setattr(encoder, "train_encoder", lambda settings: pytest.fail("trained a second time"))
    assert prepare_encoder(folder.parent, SMALL) == folder and [*folder.parent.iterdir()] == [folder]
    text = TextFormat.of(str(folder))
    assert (text.tokens, text.width) == (TOKENS, SMALL.hidden_size)
    features = TextEncoder(text).encode(["a bold seven, leaning right", "a thin seven, leaning right", ""])
    assert features.shape == (3, TOKENS, SMALL.hidden_size)
    assert torch.equal(features[0, 0], features[2, 0]) and not torch.equal(features[0, 2], features[1, 2])


def test_transformers_loads_both_halves(folder):
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    data = captioned_digits()
    loss = contrastive_loss(model, data.images[:4], tokenized(tokenizer, [own[0] for own in data.captions[:4]]))
    assert loss.isfinite()


def test_other_settings_are_another_encoder(folder):
    assert prepare_encoder(folder.parent, EncoderConfig(hidden_size=16, num_attention_heads=2, steps=1)) != folder


def test_training_is_reproducible_and_leaves_the_global_random_state_alone(folder):
    before = torch.get_rng_state()
    again = train_encoder(SMALL)[0].state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    kept = CLIPModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(kept[name], again[name]) for name in again)


def test_it_learns_which_caption_is_whose():
    model, tokenizer = train_encoder(EncoderConfig(steps=150))
    data = captioned_digits()
    chosen = [number for number, own in enumerate(data.captions) if len(own) > 5][:200]
    looks = [Look(digit, None, None) for digit in range(10)]
    tokens = tokenized(tokenizer, [captions(look)[0] for look in looks])
    with torch.no_grad():
        images = data.images[chosen].expand(-1, 3, -1, -1)
        best = model(input_ids=tokens, pixel_values=images).logits_per_image.argmax(dim=1)
    assert (best == torch.tensor([data.looks[number].digit for number in chosen])).float().mean() > 0.5  # by chance 0.1


def test_the_data_set_names_its_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "prepare_encoder", lambda folder: folder / "one")
    data = load_captioned(tmp_path)
    assert data.encoder == str(tmp_path / "one") and len(data.images) == len(data.captions)
    assert data.images.min() == -1 and data.images.max() == 1


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    """safetensors has errors of its own."""

    def fail(folder):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match="No space left on device"):
        save_encoder(SimpleNamespace(save_pretrained=fail), SimpleNamespace(), tmp_path / "clip")
    assert list(tmp_path.iterdir()) == []
