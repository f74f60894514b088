from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys

import pytest

from epi_ds.data.skills import SKILLS, Message, Row, Split, get_skill, row_from_dict, row_to_dict, rows, split_of
from epi_ds.data.skills.coding import Code
from epi_ds.data.skills.logic import LETTERS, TEMPLATES, Literal, Premise, entails, right_options
from epi_ds.data.skills.task import draw_rows
from epi_ds.data.skills.words import CITIES, COLOURS, FOODS, NAMES, PETS

FAMILIES = list(SKILLS)

DIGEST = """
import hashlib, json
from epi_ds.data.skills import SKILLS, Split, row_to_dict, rows
drawn = [row_to_dict(r) for n in SKILLS for s in Split for r in rows(n, split=s, size=50, seed=7)]
print(hashlib.sha256(json.dumps(drawn).encode()).hexdigest())
"""


class Fixed:
    """A skill with the given questions only."""

    name = "fixed"

    def __init__(self, questions: list[str]) -> None:
        self.questions = questions

    def draw(self, rng: random.Random) -> Row:
        question = rng.choice(self.questions)
        return Row((Message(role="user", content=question), Message(role="assistant", content="yes")), "yes")

    def check(self, row: Row, answer: str) -> bool:
        return answer == row.reference


def prompts(drawn: list[Row]) -> list[str]:
    return [json.dumps(row.prompt) for row in drawn]


def test_rows_do_not_depend_on_the_hash_seed() -> None:
    digests = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_drawing_rows_does_not_import_transformers() -> None:
    code = "import sys, epi_ds.data.skills; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_disjoint_for_any_seeds(family: str) -> None:
    train = {p for seed in range(3) for p in prompts(rows(family, split=Split.TRAIN, size=1000, seed=seed))}
    test = {p for seed in range(3) for p in prompts(rows(family, split=Split.TEST, size=300, seed=seed))}
    assert train
    assert test
    assert not train & test


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", Split)
def test_a_larger_size_extends_a_smaller_one(family: str, split: Split) -> None:
    large = rows(family, split=split, size=120, seed=3)
    assert rows(family, split=split, size=50, seed=3) == large[:50]
    assert rows(family, split=split, size=0, seed=3) == []
    assert rows(family, split=split, size=120, seed=4) != large
    assert {split_of(row) for row in large} == {split}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_thousands_of_prompts_and_test_rows_are_distinct(family: str) -> None:
    test = prompts(rows(family, split=Split.TEST, size=1000, seed=0))
    assert len(set(test)) == len(test)
    rng = random.Random(0)
    assert len(set(prompts([SKILLS[family].draw(rng) for _ in range(6000)]))) > 2000


def test_test_rows_repeat_once_they_are_used_up() -> None:
    skill = Fixed([f"question {number}" for number in range(40)])
    drawn = draw_rows(skill, split=Split.TEST, size=30, seed=0)
    distinct = {question for question in skill.questions if split_of(Row(_turns(question), "yes")) is Split.TEST}
    assert 0 < len(distinct) < 30
    assert {row.messages[0]["content"] for row in drawn[: len(distinct)]} == distinct
    assert len(drawn) == 30


def test_a_skill_without_rows_in_a_split_is_reported() -> None:
    train_only = next(q for q in map(str, range(100)) if split_of(Row(_turns(q), "")) is Split.TRAIN)
    with pytest.raises(ValueError, match="'fixed' gave no test row"):
        draw_rows(Fixed([train_only]), split=Split.TEST, size=1, seed=0)


def _turns(question: str) -> tuple[Message, ...]:
    return (Message(role="user", content=question), Message(role="assistant", content="yes"))


@pytest.mark.parametrize("family", FAMILIES)
def test_references_pass_and_other_answers_fail(family: str) -> None:
    skill = get_skill(family)
    drawn = rows(family, split=Split.TEST, size=300, seed=1)
    by_reference = {row.reference: row for row in drawn}
    for row in drawn:
        assert skill.check(row, row.answer)
        assert skill.check(row, f" {row.answer}\n")
        assert not skill.check(row, "")
        for other in random.Random(0).sample(sorted(by_reference), 10 if len(by_reference) > 10 else 2):
            if other != row.reference:
                assert not skill.check(row, by_reference[other].answer), (row, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_plain_conversations(family: str) -> None:
    for row in rows(family, split=Split.TRAIN, size=100, seed=0):
        roles = [message["role"] for message in row.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"] == message["content"].strip() != "" for message in row.messages)
        assert row_from_dict(json.loads(json.dumps(row_to_dict(row)))) == row


def test_rows_survive_a_dataset() -> None:
    from datasets import Dataset

    drawn = [row for family in FAMILIES for row in rows(family, split=Split.TEST, size=5, seed=0)]
    assert [row_from_dict(record) for record in Dataset.from_list([row_to_dict(row) for row in drawn])] == drawn


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"'arithmatic'; did you mean 'arithmetic'\?; there are .*code, logic"):
        get_skill("arithmatic")
    with pytest.raises(ValueError, match=r"size=-1 .*must be 0 or more"):
        rows("logic", split=Split.TRAIN, size=-1, seed=0)
    with pytest.raises(ValueError, match=r"lacks \['reference'\]"):
        row_from_dict({"messages": []})


def test_arithmetic_is_right_and_takes_the_last_number() -> None:
    skill = get_skill("arithmetic")
    for row in rows("arithmetic", split=Split.TRAIN, size=300, seed=0):
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", row.answer)
        assert steps
        for left, sign, right, result in steps:
            expected = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right))
            assert expected == int(result) < 100
        assert steps[-1][-1] == row.reference
        number = int(row.reference)
        for wrong in (f"The answer is {number + 1}.", f"-{number + 1}", f"{number}5", f"{number}.5", "No idea."):
            assert not skill.check(row, wrong)
        assert skill.check(row, f"1 + 1 = 2. So {number}.")
        assert not skill.check(row, f"{number}, or maybe {number + 1}")


def test_logic_has_one_right_option_under_every_assignment() -> None:
    """Compare with a second enumeration, read back from the text of the puzzles."""
    skill = get_skill("logic")
    seen = set()
    for row in rows("logic", split=Split.TRAIN, size=300, seed=0):
        *options, premises, question = row.prompt[0]["content"].split("\n")
        assert [option[0] for option in options] == list(LETTERS)
        assert len(set(options)) == len(LETTERS)
        sentences = re.findall(r"[^.]+\.", premises)
        names = sorted(set(re.findall(r"\b[A-D]\b", premises)) | set(re.findall(r"If \w, then ([a-z ]+)\.", premises)))
        worlds = [
            world
            for values in itertools.product((False, True), repeat=len(names))
            if all(_holds(sentence, world := dict(zip(names, values, strict=True))) for sentence in sentences)
        ]
        assert worlds
        asked = question == "Which other one must be true?"
        given = {s.split()[0] for s in sentences if re.fullmatch(rf" ?\w is {str(asked).lower()}\.", s)}
        right = [n for n in names if n in LETTERS and n not in given and all(world[n] is asked for world in worlds)]
        assert right == [row.reference]
        seen.add(row.reference)
        assert all(skill.check(row, letter) is (letter == row.reference) for letter in LETTERS)
        assert not skill.check(row, "A, B, C and D")
        assert skill.check(row, f"The answer is {row.reference}.")
    assert seen == set(LETTERS)


def _holds(sentence: str, world: dict[str, bool]) -> bool:
    text = sentence.strip(" .")
    if found := re.fullmatch(r"If (.+), then (.+)", text):
        return not world[found[1]] or world[found[2]]
    if found := re.fullmatch(r"(\w) or (\w) is true", text):
        return world[found[1]] or world[found[2]]
    if found := re.fullmatch(r"(\w) and (\w) are not both true", text):
        return not (world[found[1]] and world[found[2]])
    found = re.fullmatch(r"(\w) is (true|false)", text)
    assert found, text
    return world[found[1]] is (found[2] == "true")


def test_entailment_refuses_invalid_forms() -> None:
    rule = Premise((Literal("A", False), Literal("B")), "If A, then B.")
    assert entails([rule, Premise((Literal("A"),), "A is true.")], Literal("B"))
    assert entails([rule, Premise((Literal("B", False),), "B is false.")], Literal("A", False))
    assert not entails([rule, Premise((Literal("B"),), "B is true.")], Literal("A"))
    assert not entails([rule, Premise((Literal("A", False),), "A is false.")], Literal("B", False))
    assert not entails([rule], Literal("C"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_has_one_right_option(template) -> None:
    for letters in itertools.permutations(LETTERS, 3):
        assert len(right_options(template(*letters, "it rains"))) == 1


def test_instructions_are_checked_exactly() -> None:
    skill = get_skill("instruct")
    for row in rows("instruct", split=Split.TRAIN, size=300, seed=0):
        assert row.answer == row.reference
        for wrong in (row.answer + ",", row.answer[:-1], row.answer.swapcase() + "x", f"Sure: {row.answer}"):
            assert not skill.check(row, wrong)


def test_dialogue_recalls_a_stated_fact() -> None:
    skill = get_skill("dialogue")
    values = [*NAMES, *PETS, *CITIES, *COLOURS, *FOODS]
    assert len({value.lower() for value in values}) == len(values)
    turns = set()
    for row in rows("dialogue", split=Split.TRAIN, size=300, seed=0):
        turns.add(len(row.messages))
        stated = [m["content"] for m in row.prompt[:-1] if m["role"] == "user"]
        assert sum(row.reference in statement for statement in stated) == 1
        for right in (row.reference, row.reference.upper(), f"It is {row.reference.lower()}!"):
            assert skill.check(row, right)
        other = next(value for value in values if value != row.reference)
        for wrong in (row.reference + "x", f"{row.reference} or {other}", row.answer.replace(row.reference, other)):
            assert not skill.check(row, wrong)
    assert turns == {4, 6, 8}


def test_code_is_told_from_its_neighbours() -> None:
    skill = Code()
    for row in rows("code", split=Split.TRAIN, size=300, seed=0):
        head, expression = row.answer.split("\n    return ")
        number = re.search(r"\d+", expression)
        assert number
        wrong = [
            row.answer.replace(number[0], str(int(number[0]) + step)) for step in (-1, 1) if number[0] in expression
        ]
        swaps = {" + ": " - ", " - ": " + ", " * ": " + ", " > ": " >= ", " == ": " != ", "max": "min", "[:": "["}
        wrong += [f"{head}\n    return {expression.replace(*swap)}" for swap in swaps.items() if swap[0] in expression]
        wrong += [
            row.answer.replace("def ", "def my"),
            f"{head}\n    return {number[0]}",
            f"{head}\n    return ({expression}) * 1.0",
            f"{head}\n    {expression}",
            head,
            "import os",
        ]
        assert len(wrong) >= 8
        for source in wrong:
            assert not skill.check(row, source), source
        assert skill.check(row, f"{head}:\n  return ({expression})".replace("::", ":"))


def test_code_with_other_text_of_the_same_meaning_passes() -> None:
    row = Row(
        (
            Message(role="user", content="Write a Python function f(x) that returns the larger of x and 3."),
            Message(role="assistant", content="def f(x):\n    return max(x, 3)"),
        ),
        json.dumps({"name": "f", "cases": [[2, 3], [3, 3], [9, 9]]}),
    )
    assert Code().check(row, "def f(y): return y if y > 3 else 3")
    assert not Code().check(row, "def f(y): return y")
