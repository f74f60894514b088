"""A model of three words that knows how turns end: it writes rows in no time, and some are cut, empty or repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from epi_ds.demo.base_model import small_llama

VOCABULARY = {"<|end|>": 0, "<|user|>": 1, "<|assistant|>": 2, "yes": 3, "no": 4, "so": 5, "<|pad|>": 6}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def few_words(*, template: str | None = TEMPLATE) -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    core = Tokenizer(WordLevel(VOCABULARY, unk_token="so"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=template,
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    # With tied embeddings it would say the same word again and again.
    model = small_llama(len(VOCABULARY), tie_word_embeddings=False, **sizes)
    return model, tokenizer


def save_few_words(folder: Path) -> Path:
    """Save both, for ranks to load."""
    for part in few_words():
        part.save_pretrained(folder)
    return folder
