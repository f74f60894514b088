"""The packaged tokenizer: a small byte-level BPE made for the task families."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD = "<|pad|>"
START = "<|start|>"
END = "<|end|>"

TOKENIZER_DIR = Path(__file__).parent / "tokenizer"


def load_tokenizer() -> "PreTrainedTokenizerBase":
    """Load the packaged tokenizer; nothing is downloaded."""
    # Drawing and checking rows needs the standard library only, and importing transformers takes seconds.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)
