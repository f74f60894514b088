"""``epi-ds report`` of real runs, opened in a real browser: one run, several side by side, on every screen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.end_to_end.recipes import RANKS, write_recipe
from tests.support.browser import PROGRAM, Browser
from tests.support.forks import epi_ds
from tests.support.once import made_once
from tests.support.processes import checked

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow, pytest.mark.browser]

# Of every element with text of its own: what it says, its contrast with what is behind it, and what it needs (WCAG AA).
CONTRASTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const found = rgba(getComputedStyle(element).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255, 255];
  };
  for (const one of document.querySelectorAll("details")) one.open = true;
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.getClientRects().length || element.closest("script, style")) continue;
    const style = getComputedStyle(element);
    const ink = rgba(element instanceof SVGElement ? style.fill : style.color);
    const size = parseFloat(style.fontSize), is_large = size >= 24 || (size >= 18.7 && style.fontWeight >= 700);
    found.push([element.textContent.trim().slice(0, 40), contrast(ink, behind(element)), is_large ? 3 : 4.5]);
  }
  for (const mark of document.querySelectorAll("path.line:not(.faint), path.mark, rect.bar:not(.soft)")) {
    const style = getComputedStyle(mark);
    const ink = rgba(mark.matches(".line, .hollow") ? style.stroke : style.fill);
    found.push([mark.getAttribute("class"), contrast(ink, behind(mark.closest("svg").parentElement)), 3]);
  }
  return found;
})()
"""


class Pages(NamedTuple):
    """What was reported, and of what."""

    run: Path
    """Two stages, isolation, rows that are kept, replayed and scored, and an anchor."""
    one: Path
    both: Path
    """Beside a run of the short recipe."""
    figures: Path


@pytest.fixture(scope="module")
def pages(undisturbed: Path, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Pages of a small real run. To be read only."""

    def make(folder: Path) -> None:
        keep = {"data": [{"skill": "logic", "rows": 16}], "windows": 2, "replay": 0.25}
        recipe = write_recipe(
            folder,
            small_base,
            method={"keep": keep, "epi": {"ratio": 0.1, "refresh_interval": 2, "anchor": {"strength": 2}}},
            evaluation={"rows": 4, "max_new_tokens": 4, "skills": ["code"], "every": 1},
            stages=[{"name": name, "data": {"skill": name, "rows": 16}} for name in ("arithmetic", "dialogue")],
            train={"save_steps": 1},
        )
        checked(epi_ds("train", str(recipe), num_ranks=RANKS))
        run, base = folder / "run", str(small_base)
        checked(epi_ds("report", str(run), "--audit", "--base", base, "--figures", str(folder / "figures")))
        checked(epi_ds("report", str(undisturbed), str(run), "-o", str(folder / "both.html")))

    folder = made_once(tmp_path_factory, "reported", make)
    return Pages(folder / "run", folder / "run" / "report.html", folder / "both.html", folder / "figures")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for all of these tests."""
    if PROGRAM is None:
        pytest.skip("needs Chromium; apt-get install chromium")
    with Browser() as opened:
        yield opened


def lines_of(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("name", ["one", "both"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_and_nothing_is_asked_of_a_network(
    pages: Pages, browser: Browser, name: str, width: int
) -> None:
    page: Path = getattr(pages, name)
    browser.open(page, width=width)
    # With all that is folded, too.
    browser.ask("for (const one of document.querySelectorAll('details')) one.open = true")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.console == []
    assert {url.split("#")[0] for url in browser.requests} <= {pages.one.as_uri(), pages.both.as_uri(), "data:,"}
    # No mark beyond the edge of its drawing.
    beyond = """[...document.querySelectorAll("svg .mark")].filter((mark) => {
        const [one, all] = [mark.getBoundingClientRect(), mark.closest("svg").getBoundingClientRect()];
        return one.top < all.top || one.bottom > all.bottom || one.right > all.right || one.left < all.left;
    }).length"""
    assert browser.ask(beyond) == 0
    assert browser.ask("document.querySelectorAll('figure svg .mark').length") > 10


@pytest.mark.parametrize(("scheme", "media"), [("light", "screen"), ("dark", "screen"), ("dark", "print")])
def test_everything_stands_out_from_what_is_behind_it(pages: Pages, browser: Browser, scheme: str, media: str) -> None:
    for page in (pages.one, pages.both):
        browser.open(page, width=1280, scheme=scheme, media=media)
        found = browser.ask(CONTRASTS)
        assert len(found) > 200
        assert [one for one in found if one[1] < one[2]] == []
        # What is printed is black on white, whatever the screen is.
        is_dark = browser.ask("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert is_dark is (scheme == "dark" and media == "screen")


def test_values_and_explanations_are_under_the_pointer(pages: Pages, browser: Browser) -> None:
    browser.open(pages.one, width=1280)

    def pointed_at(selector: str) -> str:
        # Two frames: whoever scrolls points at something else.
        where = f"""(async () => {{
            const mark = document.querySelector({selector!r});
            mark.scrollIntoView({{ block: "center" }});
            for (const _ of [1, 2]) await new Promise(requestAnimationFrame);
            const box = mark.getBoundingClientRect();
            return [box.left + box.width / 2, box.top + box.height / 2];
        }})()"""
        browser.point_at(0, 0)
        browser.point_at(*browser.ask(where))
        assert browser.ask("document.getElementById('tip').hidden") is False
        box = browser.ask(
            "(({ left, right }) => [left, right])(document.getElementById('tip').getBoundingClientRect())"
        )
        assert 0 <= box[0] < box[1] <= 1280
        said: str = browser.ask("document.getElementById('tip').textContent")
        return said

    first = lines_of(pages.run, "step")[0]
    assert pointed_at("#chart-loss .band") == f"step 1\nrun: {first['loss']:.4g}"
    layer = next(iter(lines_of(pages.run, "refresh")[0]["layer_numel"]))
    assert pointed_at("#chart-isolated-by-layer .cell").startswith(f"{layer}, after step 0: ")
    assert "Tasks that a stage of this run trains" in pointed_at("#outcome .term")
    assert pointed_at("#effort .stack span").startswith("steps: ")
    # Nothing says a thing twice, and all that is named is explained by the keyboard, too.
    assert browser.ask("document.querySelectorAll('[title], svg title').length") == 0
    assert browser.ask("[...document.querySelectorAll('.term')].every((one) => one.tabIndex === 0)") is True


def test_the_page_says_what_the_metrics_say(pages: Pages, browser: Browser) -> None:
    browser.open(pages.one, width=1280)
    rows = (
        """[...document.querySelectorAll("%s tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent))"""
    )
    first, *_, last = lines_of(pages.run, "evaluation")
    shown = {row[0]: row for row in browser.ask(rows % "#outcome")}
    assert set(shown) == {"arithmetic", "dialogue", "base/logic", "code"}
    for name, row in shown.items():
        ends = [line["scores"][name] for line in (first, last)]
        assert row[2:4] == [f"{score['value']:.1%}" for score in ends]
        turned = [list(zip(*(s["solved"] for s in ends), strict=True)).count(pair) for pair in (("1", "0"), ("0", "1"))]
        assert row[5:] == [str(count) for count in turned]
    ended = [line for line in lines_of(pages.run, "evaluation") if line["stage_ended"]]
    matrix = {row[0]: row[1:-1] for row in browser.ask(rows % "#forgetting > .wide")}
    assert matrix["code"] == [f"{line['scores']['code']['value']:.1%}" for line in ended]
    # Its own stage of each task: the first stage ends in the second column.
    cells = "[...document.querySelectorAll('#forgetting > .wide td.own')]"
    own = browser.ask(f"{cells}.map((cell) => [cell.parentElement.rowIndex, cell.cellIndex])")
    assert own == [[2, 2], [3, 3]]
    text = re.sub(r"\s+", " ", browser.ask("document.body.innerText"))
    saves = lines_of(pages.run, "save")
    assert [line["step"] for line in saves] == [1, 2, 3, 4]
    assert f"saves {sum(line['seconds'] for line in saves):.3g} s" in text
    (summary,) = lines_of(pages.run, "summary")
    assert summary["peak_bytes"]["host"] > 1e8
    for said in (
        "Finished: step 4 of 4, 2 ranks",
        "Verdict: not one bit of an isolated weight moved",
        f"torch {lines_of(pages.run, 'run')[-1]['environment']['torch']}",
        "method.epi.anchor.strength 2.0",
    ):
        assert said in text
    assert browser.ask("document.querySelectorAll('#chart-displacement .hit').length") > 2


def test_runs_side_by_side_share_charts(pages: Pages, browser: Browser) -> None:
    browser.open(pages.both, width=1280)
    names = browser.ask("[...document.querySelectorAll('#chart-loss .legend li')].map((one) => one.textContent.trim())")
    assert names == ["undisturbed/run", "reported/run"]
    assert "Where the runs differ" in browser.ask("document.body.innerText")
    assert browser.ask("document.querySelector('#chart-plane .hit') !== null") is True


def test_figures_are_there_for_a_paper(pages: Pages) -> None:
    assert {path.suffix for path in pages.figures.iterdir()} == {".svg", ".png"}
    assert (pages.figures / "displacement.svg").exists()
    assert len(list(pages.figures.iterdir())) >= 20
