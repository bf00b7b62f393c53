"""The text encoder against transformers called by hand, and the word-level tokenizer."""

import pytest
import torch
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from model.text import TextEncoder, clean_prompt, word_tokenizer

WORDS = "a the red green circle square moves right left up down and to on black background".split()


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = UMT5EncoderModel(config).eval()
    for parameter in model.parameters():  # transformers starts some of them at values that hide mistakes
        parameter.data = torch.randn_like(parameter) * 0.2
    return TextEncoder(model, word_tokenizer(WORDS), text_tokens=12)


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("  A  red\n\tcircle ", "A red circle"),
        ("&amp;lt;b&amp;gt; red", "<b> red"),  # two rounds of HTML
        ("l\u2019\u00c3\u00a9cole", "l'\u00e9cole"),  # mojibake and a curly quote
        ("red\u00a0circle\u3000moves", "red circle moves"),
        ("", ""),
    ],
)
def test_clean_prompt(raw, clean):
    assert clean_prompt(raw) == clean


def test_matches_transformers_on_the_unpadded_prompt(encoder):
    """Each prompt alone, without any padding, is the independent twin of the padded batch."""
    prompts = ["a red circle moves right", "", "a green square moves up and to the left on the black background"]
    out = encoder(prompts)
    assert out.shape == (3, 12, 16)
    for row, prompt in zip(out, prompts, strict=True):
        ids = encoder.tokenizer(prompt).input_ids
        ids = ids if len(ids) <= 12 else ids[:11] + [1]
        with torch.no_grad():
            alone = encoder.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(row[: len(ids)], alone, rtol=0, atol=1e-5)
        assert (row[len(ids) :] == 0).all()


def test_gradient_reaches_the_encoder(encoder):
    encoder.embed(*encoder.tokenize(["a red circle"])).square().sum().backward()
    assert encoder.encoder.shared.weight.grad.abs().sum() > 0


def test_word_tokenizer(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    ids = tokenizer("A RED-circle, moves:  right!").input_ids
    assert ids == [3 + WORDS.index(w) for w in ("a", "red", "circle", "moves", "right")] + [1]
    assert tokenizer("a zebra").input_ids == [3, 2, 1]
    assert tokenizer("").input_ids == [1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    padded = tokenizer("red circle", padding="max_length", truncation=True, max_length=5)
    assert padded.input_ids[2:] == [1, 0, 0] and padded.attention_mask == [1, 1, 1, 0, 0]
    assert word_tokenizer([*WORDS, *WORDS, "zebra"])("a zebra").input_ids == [3, 3 + len(WORDS), 1]


def test_word_tokenizer_survives_saving_beside_the_encoder(tmp_path, encoder):
    encoder.encoder.config.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    prompt = "A red circle, moves zebra"
    assert again(prompt).input_ids == encoder.tokenizer(prompt).input_ids
    assert again(prompt, padding="max_length", max_length=9).input_ids[-1] == 0
