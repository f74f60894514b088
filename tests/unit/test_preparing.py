"""Rows become tokens once: what a store holds, what is counted, and who waits for whom."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from epi_ds.data import apart, once, preparing, store
from epi_ds.data.apart import prepare_all
from epi_ds.data.conversation import conversation_of
from epi_ds.data.once import once_per_node
from epi_ds.data.preparing import Tokens, prepare
from epi_ds.data.rendering import Learnt, Renderer
from epi_ds.data.skills import load_tokenizer
from epi_ds.data.sources import SkillRows
from epi_ds.data.store import NOT_LEARNT, open_store
from epi_ds.data.table import Table
from epi_ds.errors import LostRankError, RemedyError, UserError
from tests.support.tables import write_lines


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


def tokens_of(tokenizer: Any, **changes: Any) -> Tokens:
    values = {
        "tokenizer": tokenizer,
        "learnt": Learnt.LAST_TURN,
        "template": None,
        "max_length": 64,
        "keeps_end": False,
        "packing": None,
    }
    return Tokens(**{**values, **changes})


def rows_of(count: int, *, words: int = 3) -> list[dict[str, str]]:
    return [{"question": f"q{n} " + "word " * words, "answer": f"answer {n}"} for n in range(count)]


def table_of(path: Path, **settings: Any) -> Table:
    return Table(name=str(path), files=(path,), **settings)


def expected(tokenizer: Any, rows: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    renderer = Renderer(tokenizer, learnt=Learnt.LAST_TURN)
    found = []
    for row in rows:
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        ids, learnt, *_ = renderer.encode(conversation_of(turns))
        found.append((ids, [token if learn else NOT_LEARNT for token, learn in zip(ids, learnt, strict=True)]))
    return found


def content(rows: Dataset) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in rows]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_store_holds_the_rows_in_their_order(
    tmp_path: Path, tokenizer: Any, num_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "_SINGLE_ROWS", 200)
    rows = rows_of(1500)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    folder, summary = prepare(table_of(path), tokens_of(tokenizer), cache=tmp_path, num_processes=num_processes)
    found = content(open_store(folder))
    assert found == expected(tokenizer, rows)
    assert summary.num_rows == 1500
    assert summary.num_tokens == sum(len(ids) for ids, _ in found)
    assert summary.num_learnt == sum(label != NOT_LEARNT for _, labels in found for label in labels)
    assert sum(summary.lengths) == 1500
    assert summary.longest == max(len(ids) for ids, _ in found)
    assert list(summary.digests) == [str(path)]


def test_a_store_is_written_once_and_again_where_anything_changed(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows_of(5))

    def folder(table: Table | None = None, **changes: Any) -> Path:
        return prepare(table or table_of(path), tokens_of(tokenizer, **changes), cache=tmp_path, num_processes=1).folder

    first = folder()
    written = (first / store.ROWS).stat().st_mtime_ns
    assert folder() == first
    assert (first / store.ROWS).stat().st_mtime_ns == written
    others = {
        folder(max_length=32),
        folder(learnt=Learnt.EVERYTHING),
        folder(table_of(path, limit=3)),
        folder(table_of(path, where={"answer": ["answer 1", "answer 2"]})),
    }
    write_lines(path, rows_of(6))
    others.add(folder())
    assert len(others - {first}) == 5
    assert not list(tmp_path.glob("*.begun-*"))


def test_long_rows_are_cut_counted_and_told(tmp_path: Path, tokenizer: Any) -> None:
    long = [{"question": "q", "answer": "word " * 80}]
    lost = rows_of(2, words=80)
    path = write_lines(tmp_path / "rows.jsonl", [*rows_of(3), *long, *lost])
    folder, summary = prepare(table_of(path), tokens_of(tokenizer), cache=tmp_path, num_processes=1)
    whole = expected(tokenizer, [*rows_of(3), *long])
    assert content(open_store(folder)) == [*whole[:3], (whole[3][0][:64], whole[3][1][:64])]
    assert (summary.num_rows, summary.num_cut, summary.num_unlearnt) == (4, 1, 2)
    told = [text for level, text in summary.told if level == logging.WARNING]
    assert any("left out 2 of 6 rows, whose answers lie beyond train.max_length (64 tokens" in text for text in told)
    assert any("1 of 4 rows are longer than train.max_length" in text for text in told)
    folder, summary = prepare(table_of(path), tokens_of(tokenizer, keeps_end=True), cache=tmp_path, num_processes=1)
    assert (summary.num_rows, summary.num_cut, summary.num_unlearnt) == (6, 3, 0)
    assert all(len(ids) <= 64 for ids, _ in content(open_store(folder)))
    only = write_lines(tmp_path / "lost.jsonl", lost)
    with pytest.raises(UserError, match=r"the answers of all 2 rows lie beyond train\.max_length \(64 tokens"):
        prepare(table_of(only), tokens_of(tokenizer), cache=tmp_path, num_processes=1)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_rows_write_of_special_tokens_is_told_by_file_and_row(
    tmp_path: Path, tokenizer: Any, num_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "_SINGLE_ROWS", 1)
    rows = rows_of(4)
    for number in (2, 3):
        rows[number]["question"] += "<|end|>"
    first, second = write_lines(tmp_path / "a.jsonl", rows_of(3)), write_lines(tmp_path / "b.jsonl", rows)
    table = Table(name="both", files=(first, second))
    _, summary = prepare(table, tokens_of(tokenizer), cache=tmp_path / "cache", num_processes=num_processes)
    (told,) = [text for level, text in summary.told if level == logging.WARNING]
    assert told.startswith("both: 2 rows write the special token <|end|> in what they say")
    assert f"(first {second}, line 3)" in told


def test_a_loss_on_everything_by_accident_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """A template whose prompt differs from the first token on would train all prompts."""
    template = "{% if add_generation_prompt %}go{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = write_lines(tmp_path / "rows.jsonl", rows_of(3))
    with pytest.raises(UserError, match="the loss would be on every token of all rows, prompts included"):
        prepare(table_of(path), tokens_of(tokenizer, template=template), cache=tmp_path, num_processes=1)


def test_documents_are_learnt_whole(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": f"document {number}"} for number in range(20)])
    _, summary = prepare(table_of(path), tokens_of(tokenizer), cache=tmp_path, num_processes=1)
    assert (summary.num_rows, summary.num_learnt) == (20, summary.num_tokens)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_leaves_out_what_nothing_is_learnt_of(tmp_path: Path, tokenizer: Any, strategy: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [*rows_of(6, words=80), *rows_of(5)])
    folder, summary = prepare(table_of(path), tokens_of(tokenizer, packing=strategy), cache=tmp_path, num_processes=1)
    packed = content(open_store(folder))
    learnt = [sum(label != NOT_LEARNT for label in labels) for _, labels in packed]
    assert all(learnt)
    assert (summary.num_learnt, summary.num_tokens) == (sum(learnt), sum(len(ids) for ids, _ in packed))
    assert any("lie beyond train.max_length" in text or "packed sequences" in text for _, text in summary.told)


def fail_at_400(renderer: Renderer, place: str, row: Any) -> Any:
    if row.messages[0]["content"].startswith("q400 "):
        raise UserError(f"{place} is wrong")
    return ENCODE(renderer, place, row)


def die_at_400(renderer: Renderer, place: str, row: Any) -> Any:
    if row.messages[0]["content"].startswith("q400 "):
        os.kill(os.getpid(), signal.SIGKILL)
    return ENCODE(renderer, place, row)


ENCODE = preparing._encode


@pytest.mark.parametrize(
    ("encode", "kind", "said"),
    [(fail_at_400, UserError, "line 401 is wrong"), (die_at_400, RemedyError, "a process that tokenises was killed")],
)
def test_what_ends_one_of_several_processes_ends_all(
    tmp_path: Path, tokenizer: Any, encode: Any, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "_SINGLE_ROWS", 100)
    monkeypatch.setattr(preparing, "_encode", encode)
    path = write_lines(tmp_path / "rows.jsonl", rows_of(5000))
    with pytest.raises(kind, match=said):
        prepare(table_of(path), tokens_of(tokenizer), cache=tmp_path / "cache", num_processes=2)
    assert not list((tmp_path / "cache").glob("*.begun-*"))


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_hold_the_same_tokens(tmp_path: Path, tokenizer: Any, strategy: str) -> None:
    rows = rows_of(30)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    folder, _ = prepare(table_of(path), tokens_of(tokenizer, packing=strategy), cache=tmp_path, num_processes=1)
    packed = open_store(folder)
    tokens = sorted(token for row in packed for token in row["input_ids"])
    assert tokens == sorted(token for ids, _ in expected(tokenizer, rows) for token in ids)
    assert len(packed) < 30
    assert all(len(row["input_ids"]) <= 64 for row in packed)


def test_a_large_source_is_prepared_by_another_process(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows_of(20))
    sources: list[Table | SkillRows] = [table_of(path), SkillRows("logic", "train", 5, 0)]
    here = prepare_all(sources, tokens_of(tokenizer), cache=tmp_path / "here", num_processes=1)
    monkeypatch.setattr(apart, "_SMALL_BYTES", 0)
    there = prepare_all(sources, tokens_of(tokenizer), cache=tmp_path / "there", num_processes=2)
    assert [Path(one).name for one in here] == [Path(one).name for one in there]
    assert [content(open_store(Path(one))) for one in here] == [content(open_store(Path(one))) for one in there]
    write_lines(path, [{"question": "q", "answer": "\ud83d"}])
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: answer holds half of a character"):
        prepare_all([table_of(path)], tokens_of(tokenizer), cache=tmp_path, num_processes=1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RemedyError, match="ended with code 1 and left no message"):
        prepare_all([table_of(path)], tokens_of(tokenizer), cache=tmp_path, num_processes=1)


# --- several processes ---


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "_SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(once, "_BEAT_SECONDS", 0.1)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_and_stall(folder: Path, begun: Path) -> None:
    with store.claimed(folder):
        begun.touch()
        time.sleep(60)


def test_a_slow_writer_is_waited_for_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    writer = multiprocessing.get_context("fork").Process(target=write_and_stall, args=(folder, tmp_path / "begun"))
    writer.start()
    wait_for(tmp_path / "begun")
    found: list[bool] = []

    def claim() -> None:
        with store.claimed(folder) as begun:
            found.append(begun is not None)
            if begun is not None:
                (begun / store.ROWS).write_text("whole")
                store.seal(begun, preparing.Summary(*[0] * 6, (), {}, ()))

    waiting = [threading.Thread(target=claim) for _ in range(3)]
    for thread in waiting:
        thread.start()
    waiting[0].join(1.0)
    assert all(thread.is_alive() for thread in waiting)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    for thread in waiting:
        thread.join(20)
    assert sorted(found) == [False, False, True]
    # What the dead one had begun is gone.
    assert {path.name for path in tmp_path.iterdir()} == {"store", "store.lock", "begun"}


@pytest.mark.parametrize("damage", ["cut", "zeroed", "empty", "no summary", "empty summary", "no rows"])
def test_a_damaged_store_is_written_anew(
    tmp_path: Path, tokenizer: Any, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows_of(600))

    def folder() -> Path:
        return prepare(table_of(path), tokens_of(tokenizer), cache=tmp_path / "cache", num_processes=1).folder

    whole = content(open_store(folder()))
    rows, summary = folder() / store.ROWS, folder() / store.SUMMARY
    raw = rows.read_bytes()
    if damage == "cut":
        rows.write_bytes(raw[: len(raw) // 2])
    elif damage == "zeroed":
        rows.write_bytes(raw[:9000] + bytes(400) + raw[9400:])
    elif damage == "empty":
        rows.write_bytes(b"")
    elif damage == "no summary":
        summary.unlink()
    elif damage == "empty summary":
        summary.write_bytes(b"")
    else:
        rows.unlink()
    assert content(open_store(folder())) == whole
    assert "is damaged" in caplog.text
    assert "is written anew" in caplog.text


def run_once(attempt: Path, is_worker: bool, work: Any, outcomes: Any) -> None:
    try:
        outcomes.put((is_worker, once_per_node(attempt, work, is_worker=is_worker)))
    except (UserError, RemedyError, LostRankError) as error:
        outcomes.put((is_worker, f"{type(error).__name__}: {error}"))


def refuse() -> None:
    raise UserError("row 3 is wrong")


def fail() -> None:
    raise ZeroDivisionError("division by zero")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: ["folder"], ["folder"]),
        (refuse, "UserError: row 3 is wrong"),
        (fail, "RemedyError: division by zero"),
        (die, "LostRankError: the process that prepares the data on"),
    ],
    ids=["done", "refused", "failed", "died"],
)
def test_the_ranks_of_a_node_hear_what_one_of_them_did(tmp_path: Path, work: Any, said: Any) -> None:
    context = multiprocessing.get_context("fork")
    outcomes = context.SimpleQueue()
    processes = [
        context.Process(target=run_once, args=(tmp_path / "start", rank == 0, work, outcomes)) for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode is not None
    heard = []
    while not outcomes.empty():
        heard.append(outcomes.get())
    others = [outcome for is_worker, outcome in heard if not is_worker]
    assert len(others) == 2
    for outcome in others:
        assert outcome == said if isinstance(said, list) else outcome.startswith(said)
    own = [outcome for is_worker, outcome in heard if is_worker]
    assert own == ([others[0]] if said in (["folder"], "UserError: row 3 is wrong") else [])


def test_starts_of_days_ago_are_forgotten(tmp_path: Path) -> None:
    old = tmp_path / "starts" / "old"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert once_per_node(tmp_path / "starts" / "new", lambda: 1, is_worker=True) == 1
    assert [path.name for path in (tmp_path / "starts").iterdir()] == ["new"]
    assert json.loads(next((tmp_path / "starts" / "new").glob("*/done")).read_text()) == 1
