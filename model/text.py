"""Prompts to embeddings: cleaning, tokens, UMT5, and the tiny world's word-level tokenizer.

prompts  list of B strings
text     [B, text_tokens, dim]; rows after a prompt's end are zero (the transformer attends to them too)
"""

import html
import re
from collections.abc import Iterable, Sequence

import ftfy
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5EncoderModel

MAX_KNOWN_WORDS = 1000  # a larger vocabulary is that of a model of any text
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5


def clean_prompt(prompt: str) -> str:
    """Repair broken Unicode and HTML entities and collapse whitespace, as Wan was trained; case is kept."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """UMT5 and its tokenizer as one function. Weights, device and dtype are those of `encoder`."""

    def __init__(self, encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, text_tokens: int):
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.text_tokens = text_tokens

    @property
    def dim(self) -> int:
        return self.encoder.config.d_model

    def to(self, *args, **kwargs) -> "TextEncoder":
        """As `torch.nn.Module.to`."""
        self.encoder.to(*args, **kwargs)
        return self

    @property
    def known_words(self) -> list[str]:
        """All words of a tokenizer with a small vocabulary, such as the tiny world's; [] for any other."""
        words = self.tokenizer.get_vocab().keys() - set(self.tokenizer.all_special_tokens)
        return sorted(words) if len(words) <= MAX_KNOWN_WORDS else []

    def unknown_words(self, prompt: str) -> list[str]:
        """The parts of `prompt` that become unknown tokens, each once, in order."""
        if not self.tokenizer.is_fast:  # it does not say where its tokens come from
            return []
        text = clean_prompt(prompt)
        tokens = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        spans = zip(tokens.input_ids, tokens.offset_mapping, strict=True)
        return list(dict.fromkeys(text[a:b] for token, (a, b) in spans if token == self.tokenizer.unk_token_id))

    def count_tokens(self, prompt: str) -> int:
        """Number of tokens of a prompt before truncation."""
        return len(self.tokenizer(clean_prompt(prompt), verbose=False).input_ids)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, text_tokens] on the encoder's device. Long prompts are truncated and end with EOS."""
        batch = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.text_tokens,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = self.encoder.device
        return batch.input_ids.to(device), batch.attention_mask.to(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_tokens, dim] in the encoder's dtype, zeros after each prompt's end."""
        return self.embed(*self.tokenize(prompts))

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As `__call__`, but from ids and mask [B, text_tokens], and with an autograd graph, for training."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden * mask.unsqueeze(-1).to(hidden.dtype)


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, no punctuation, EOS appended, `<unk>` for words that are not in `words`.

    Ids are 0 `<pad>`, 1 `</s>`, 2 `<unk>`, then the distinct `words` in the given order, so that appending words to a
    vocabulary does not change existing ids.
    """
    vocabulary = {PAD: 0, EOS: 1, UNKNOWN: 2}
    for word in words:
        vocabulary.setdefault(word.lower(), len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="right"
    )
