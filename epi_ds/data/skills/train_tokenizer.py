"""Train the packaged tokenizer: ``python -m epi_ds.data.skills.train_tokenizer [OUT_DIR]``.

The result is the same on every run, so that the packaged files can be checked against their source.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from epi_ds.data.skills.registry import SKILLS, rows
from epi_ds.data.skills.task import Split
from epi_ds.data.skills.tokenization import END, PAD, START, TOKENIZER_DIR

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 1024
ROWS_PER_SKILL = 4000
SEED = 0

# The tags mark what assistant-only losses train on; the end token is inside, so that models learn to stop.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{START}' + message['role'] + '\\n' }}}}"
    "{% if message['role'] == 'assistant' %}"
    f"{{% generation %}}{{{{ message['content'] + '{END}' }}}}{{% endgeneration %}}"
    "{% else %}"
    f"{{{{ message['content'] + '{END}' }}}}"
    "{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\\n' }}}}{{% endif %}}"
)


def _texts() -> Iterator[str]:
    for name in SKILLS:
        for row in rows(name, split=Split.TRAIN, size=ROWS_PER_SKILL, seed=SEED):
            for message in row.messages:
                # The role starts a line of its own, as in the chat template.
                yield f"{message['role']}\n{message['content']}\n"


def train() -> "Tokenizer":
    """Train the byte-level BPE on training rows of all task families."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def write(folder: Path) -> None:
    """Train the tokenizer and write it, as transformers does, into a folder that is made if it is missing."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train(), eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Read the command line and write the tokenizer."""
    parser = argparse.ArgumentParser(description="Train the tokenizer of the task families.")
    parser.add_argument("out_dir", nargs="?", type=Path, default=TOKENIZER_DIR, help="folder to write to")
    write(parser.parse_args().out_dir)


if __name__ == "__main__":
    main()
