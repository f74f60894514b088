"""Conversations that ask for a fact the user stated some turns before, modelled after UltraChat."""

import random
import re
from typing import NamedTuple

from epi_ds.data.skills.task import Message, Row
from epi_ds.data.skills.words import CITIES, COLOURS, FOODS, NAMES, PETS

_WORD = re.compile(r"\w+")


class _Topic(NamedTuple):
    values: tuple[str, ...]
    statement: str
    reply: str
    question: str
    answer: str


_TOPICS = (
    _Topic(NAMES, "My name is {}.", "Nice to meet you, {}.", "What is my name?", "Your name is {}."),
    _Topic(PETS, "I have a {}.", "A {} is a nice pet.", "What pet do I have?", "You have a {}."),
    _Topic(CITIES, "I live in {}.", "{} is a nice city.", "Where do I live?", "You live in {}."),
    _Topic(COLOURS, "I like the colour {}.", "I like {} too.", "What colour do I like?", "You like {}."),
    _Topic(FOODS, "I love to eat {}.", "I hear {} is tasty.", "What do I love to eat?", "You love {}."),
)
_VALUES = frozenset(value.lower() for topic in _TOPICS for value in topic.values)


class Dialogue:
    """Conversations in which the user states one to three facts and then asks for one of them."""

    name = "dialogue"

    def draw(self, rng: random.Random) -> Row:
        """Draw one conversation."""
        facts = [(topic, rng.choice(topic.values)) for topic in rng.sample(_TOPICS, rng.choice((1, 2, 2, 3, 3)))]
        messages = []
        for topic, value in facts:
            messages.append(Message(role="user", content=topic.statement.format(value)))
            messages.append(Message(role="assistant", content=topic.reply.format(value)))
        topic, value = rng.choice(facts)
        messages.append(Message(role="user", content=topic.question))
        messages.append(Message(role="assistant", content=topic.answer.format(value)))
        return Row(messages=tuple(messages), reference=value)

    def check(self, row: Row, answer: str) -> bool:
        """Tell whether ``answer`` names the value asked for and no other that somebody could have stated."""
        named = _VALUES.intersection(_WORD.findall(answer.lower()))
        return named == {row.reference.lower()}
