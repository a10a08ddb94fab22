"""Pictures are XML that any viewer shows, and what they show is what was measured."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from data import pictures

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"
# Three layers of five experts; the largest score is 0.8.
SCORES = torch.tensor(
    [[0.1, 0.2, 0.4, 0.0, 0.1], [0.8, 0.0, 0.0, 0.1, 0.1], [0.3, 0.3, 0.2, 0.1, 0.1]],
    dtype=torch.float64,
)
CHOSEN = [[2, 1], [0], [1, 0, 2]]


def draw(scores=SCORES, chosen=CHOSEN, title="a title"):
    return ElementTree.fromstring(pictures.heat_map(scores, chosen, title))


def rects(picture, kind):
    return [r.attrib for r in picture.iter(f"{SVG}rect") if r.get("class") == kind]


def place(rect):
    return float(rect["x"]), float(rect["y"])


def words(picture):
    return {text.text: place(text.attrib) for text in picture.iter(f"{SVG}text")}


def test_a_cell_stands_in_the_row_of_its_layer_and_the_column_of_its_expert():
    cells = [place(r) for r in rects(draw(), "cell")]
    left, top = cells[0]
    expected = [(left + 14 * e, top + 14 * layer) for layer in range(3) for e in range(5)]
    assert cells == expected


def test_opacity_is_the_share_of_the_largest_score():
    opacity = [float(r["fill-opacity"]) for r in rects(draw(), "cell")]
    expected = (SCORES / 0.8).flatten().tolist()
    assert opacity == pytest.approx(expected, abs=5e-4)


def test_the_chosen_are_outlined_on_top_of_their_cells():
    picture = draw()
    kinds = [r.get("class") for r in picture.iter(f"{SVG}rect")]
    assert kinds.index("chosen") > max(i for i, kind in enumerate(kinds) if kind == "cell")
    cells = [place(r) for r in rects(picture, "cell")]
    outlined = [divmod(cells.index(place(r)), 5) for r in rects(picture, "chosen")]
    assert outlined == [(layer, e) for layer, experts in enumerate(CHOSEN) for e in experts]


def test_a_pointer_on_a_cell_tells_layer_expert_and_score():
    titles = [t.text for t in draw().iter(f"{SVG}title")]
    assert "layer 1, expert 0: 0.8000" in titles and "layer 0, expert 2: 0.4000" in titles


def test_words_are_escaped_and_name_the_axes_and_the_largest_score():
    found = words(draw(title="<a & b>"))
    assert {"<a & b>", "layer", "expert", "0.8000", "chosen: these train"} <= found.keys()


def test_of_many_experts_every_fourth_has_its_number():
    numbers = {text for text in words(draw(torch.rand(2, 12), [[], []])) if text.isdigit()}
    assert numbers == {"0", "1", "4", "8"}  # 1: the second layer


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (16, 64)])
def test_everything_lies_inside_the_picture(shape):
    picture = draw(torch.rand(shape), [[shape[1] - 1]] * shape[0])
    width, height = float(picture.get("width")), float(picture.get("height"))
    for rect in picture.iter(f"{SVG}rect"):
        x, y = place(rect.attrib)
        assert 0 <= x <= width - 14 and 0 <= y <= height - 14


def test_scores_that_are_all_zero_can_be_drawn():
    assert {r["fill-opacity"] for r in rects(draw(torch.zeros(2, 3), [[], []]), "cell")} == {
        "0.000"
    }


def test_a_dark_page_gets_its_own_colours():
    assert "prefers-color-scheme: dark" in pictures.heat_map(SCORES, CHOSEN, "")


def test_it_does_not_load_torch():
    code = "import sys; import data.pictures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
