from __future__ import annotations

from pathlib import Path

import pytest

from epi_ds.data.hub import is_hub_id
from epi_ds.data.scoring import exact_match, final_number, same_final_number
from epi_ds.data.sources import SkillRows, find_files, is_local, skill_conversations
from epi_ds.errors import UserError


def test_a_missing_file_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("no.jsonl", "./no", "data/no.json.gz", str(tmp_path / "no"), "a/b/c"):
        with pytest.raises(UserError, match="there is no data file"):
            find_files(name)


def test_what_exists_is_never_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "gsm8k").touch()
    assert is_hub_id("openai/gsm8k")
    assert is_local("openai/gsm8k")
    assert find_files("openai/gsm8k") == (Path("openai/gsm8k"),)
    assert not is_local("openai/other")
    with pytest.raises(UserError, match="is one split called train; give the files of the other split"):
        find_files("openai/gsm8k", split="test")


def test_skills_end_with_the_assistant() -> None:
    for row in skill_conversations(SkillRows("dialogue", split="train", size=5, seed=1)):
        assert row.messages[-1]["role"] == "assistant"
        assert len(row.messages) > 2


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and 4\n#### 1,234", 1234),
        ("#### -2.5 dollars", -2.5),
        ("so 3 and 4\n#### 5 of 7", 5),
        ("first 3, then 12.", 12),
        ("none", None),
        ("####", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_answers_are_compared() -> None:
    assert same_final_number("I think 7, no, 8", "5+3\n#### 8")
    assert not same_final_number("I do not know", "#### 8")
    assert exact_match(" B\n", "B")
    assert not exact_match("b", "B")
