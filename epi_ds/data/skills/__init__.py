"""Five families of generated tasks whose answers a program can check, and a small tokenizer for them."""

from epi_ds.data.skills.registry import SKILLS, get_skill, rows
from epi_ds.data.skills.task import Message, Row, Skill, Split, row_from_dict, row_to_dict, split_of
from epi_ds.data.skills.tokenization import load_tokenizer

__all__ = [
    "SKILLS",
    "Message",
    "Row",
    "Skill",
    "Split",
    "get_skill",
    "load_tokenizer",
    "row_from_dict",
    "row_to_dict",
    "rows",
    "split_of",
]
