"""Pictures are XML that any viewer shows; what they show is what was measured, and can be read."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import results

from data import pictures, run
from data.pictures import Axis, Line

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"
# Three layers of five experts; the largest score is 0.8.
SCORES = [[0.1, 0.2, 0.4, 0.0, 0.1], [0.8, 0.0, 0.0, 0.1, 0.1], [0.3, 0.3, 0.2, 0.1, 0.1]]
CHOSEN = [[2, 1], [0], [1, 0, 2]]
FULL = "esft<&>full"
RATES = [
    Line("perft_s r4", [(3e-5, 0.125), (3e-4, 60.5), (3e-3, 99.75)], 0, label="perft_s r4"),
    Line("perft_e", [(3e-5, 20.5), (3e-4, 80.25), (3e-3, 99.5)], 1, label="perft_e 99"),
    Line("perft_e", [(1e-3, 93.5)], 1, "ring", label="perft_e 93"),
    Line("perft_e", [(1e-3, 91.0), (1e-3, 96.0)], 1, "bar"),
    Line(FULL, [(1e-4, 40), (1e-3, 99.625)], 2, label=FULL),
]
UP = Axis("% right", range(0, 101, 25))
RATE = Axis("learning rate", (1e-5, 1e-4, 1e-3, 1e-2), math.log10)
TOKENS = ["bob", " is", " the", " brother", " of\n", " dan", "\x00", "<b>", "&", " .", *"abcdefgh"]
IDS = [[(7 * t + layer) % 32 for t in range(len(TOKENS))] for layer in range(4)]


def even(layers, experts):
    return [[1 / experts] * experts for _ in range(layers)]


RECORDS = [
    {"event": "before", "accuracy": {"kinship_new": 0.0, "sort": 0.99}, "kept": 0.9127},
    {"event": "step", "step": 20, "cross_entropy": 4.1017, "expert_load": SCORES},
    {"event": "eval", "step": 30, "accuracy": {"kinship_new": 0.5, "sort": 0.98}, "kept": 0.85},
    {"event": "step", "step": 40, "cross_entropy": 1.0330, "expert_load": even(3, 5)},
    {"event": "step", "step": 60, "cross_entropy": 0.3275, "expert_load": SCORES[::-1]},
    {"event": "after", "accuracy": {"kinship_new": 0.975, "sort": 0.9}, "kept": 0.7964},
    {"event": "saved", "file": "x", "bytes": 3},
]
ROUTED = [r | {"adapter_load": even(3, 4)} if r["event"] == "step" else r for r in RECORDS]
ON_FILE = [
    {"event": "before", "held_out": 2.5},
    {"event": "step", "step": 5, "cross_entropy": 2.25, "expert_load": even(16, 64)},
    {"event": "epoch", "step": 5, "held_out": 2.125},
    {"event": "after", "held_out": 1.75},
]
MANY = [
    Line(f"method_{i} r{i}", [(i, 50 + i / 100), (31, 90.0)], i, label=f"method_{i} r{i}")
    for i in range(9)
]
CROWD = [Line("m", [(50 + i % 4, 90 + i % 3)], 0, label=f"m{i} r{i}") for i in range(12)]
CROWD = [line._replace(name=line.label) for line in CROWD]
PICTURES = {
    "heat map": lambda: pictures.heat_map(SCORES, CHOSEN, "a title"),
    "heat map of OLMoE": lambda: pictures.heat_map(even(16, 64), [[63]] * 16, "a title"),
    "heat map of zeros": lambda: pictures.heat_map([[0.0, 0.0]], [[]]),
    "curves": lambda: drawn(RATES, RATE),
    "nine lines that end together": lambda: drawn(MANY),
    "a crowd of points": lambda: drawn(CROWD, height=500),
    "curves, labelled around": lambda: drawn(RATES, RATE, labelled=results.around),
    "nine lines, labelled around": lambda: drawn(MANY, labelled=results.around),
    "a crowd, labelled around": lambda: drawn(CROWD, height=500, labelled=results.around),
    "one point": lambda: drawn([Line("a", [(1, 0)], 0, "ring", label="a")]),
    "routing": lambda: pictures.routing_picture(TOKENS, IDS, 32),
    "run": lambda: pictures.run_picture(RECORDS),
    "run of perft_r": lambda: pictures.run_picture(ROUTED),
    "run on a file": lambda: pictures.run_picture(ON_FILE),
}


def drawn(lines, x=Axis("rows", range(0, 101, 50)), y=UP, **options):  # noqa: B008
    return pictures.picture([pictures.plot(["rates"], lines, x, y, **options)])


every_picture = pytest.mark.parametrize("name", PICTURES)


def shapes(svg, kind):
    """(element, x, y) of a kind, where its panel stands."""
    root = ElementTree.fromstring(svg)
    for panel in root.findall(f"{SVG}g"):
        down = float(re.fullmatch(r"translate\(0 (.+)\)", panel.get("transform"))[1])
        for shape in panel.iter(SVG + kind):
            x, y = shape.get("x", shape.get("cx")), shape.get("y", shape.get("cy"))
            dx, dy = float(shape.get("dx", 0)), float(shape.get("dy", 0))
            yield shape, float(x) + dx, float(y) + dy + down


def words(svg):
    return [shape.text or "" for shape, _, _ in shapes(svg, "text")]


def told(svg):
    """What a pointer is told."""
    return [title.text for title in ElementTree.fromstring(svg).iter(f"{SVG}title")]


def boxes(svg):
    """(left, top, right, bottom) of each text, with 7 pixels a letter of 12 pixels' height."""
    for shape, x, y in shapes(svg, "text"):
        width = 7 * len(shape.text or "")
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[shape.get("text-anchor")]
        yield left, y - 9, left + width, y + 2, shape.text


@every_picture
def test_no_two_words_overlap_and_all_stand_inside(name):
    svg = PICTURES[name]()
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}"  # else a page would cut, not scale
    for left, top, right, bottom, text in boxes(svg):
        assert -3 <= left and right <= width and 0 <= top and bottom <= height, text
    for a, b in itertools.combinations(boxes(svg), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (a, b)
    for shape, x, y in [*shapes(svg, "rect"), *shapes(svg, "circle")]:
        assert 0 <= x <= width - float(shape.get("width", 0)) and 0 <= y <= height


@every_picture
def test_a_picture_has_colours_for_a_dark_page_and_no_background(name):
    svg = PICTURES[name]()
    assert "prefers-color-scheme: dark" in svg and "<svg" in svg
    assert all(float(rect.get("width")) < 60 for rect, _, _ in shapes(svg, "rect"))


@every_picture
def test_the_same_data_give_the_same_picture(name):
    assert PICTURES[name]() == PICTURES[name]()


# Heat maps ---------------------------------------------------------------------------------------


def test_a_cell_stands_in_the_row_of_its_layer_and_the_column_of_its_expert():
    cells = [(x, y) for _, x, y in shapes(PICTURES["heat map"](), "rect")]
    left, top = cells[0]
    assert cells == [(left + 14 * e, top + 14 * layer) for layer in range(3) for e in range(5)]


def test_opacity_is_the_share_of_the_largest_score_and_the_chosen_are_outlined():
    rects = [rect for rect, _, _ in shapes(PICTURES["heat map"](), "rect")]
    opacity = [float(rect.get("style").removeprefix("fill-opacity: ")) for rect in rects]
    assert opacity == pytest.approx([score / 0.8 for row in SCORES for score in row], abs=5e-4)
    outlined = [divmod(i, 5) for i, rect in enumerate(rects) if rect.get("class") == "chosen"]
    assert outlined == [(i, e) for i, experts in enumerate(CHOSEN) for e in sorted(experts)]


def test_a_pointer_on_a_cell_is_told_layer_expert_and_score():
    assert {"layer 1, column 0: 0.8", "layer 0, column 2: 0.4"} <= set(told(PICTURES["heat map"]()))
    assert {"layer 0", "layer 2", "expert"} <= set(words(PICTURES["heat map"]()))


def test_a_heat_map_has_a_scale_of_its_colour_from_nothing_to_the_largest():
    svg = PICTURES["heat map"]()
    assert words(svg)[-2:] == ["0%", "80.00%, the largest score"]
    stops = list(ElementTree.fromstring(svg).iter(f"{SVG}stop"))
    assert [stop.get("stop-opacity", "1") for stop in stops] == ["0", "1"]
    assert {stop.get("class") for stop in stops} == {"cell"}  # the colour of the cells


def test_rows_of_one_group_stand_together_and_name_it_once():
    rows = {f"{group}, {name}": [0.5] for group in ("a", "b") for name in ("x", "y")}
    svg = pictures.picture([pictures.heat(["title"], "share", rows, {})])
    assert [text for text in words(svg) if text[-1] in "xy"] == ["a, x", "y", "b, x", "y"]
    a, b, c, d = [y for _, _, y in shapes(svg, "rect")]
    assert b - a == d - c == 14 < c - b


# Curves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [float, math.log10])
def test_all_numbers_and_labels_are_in_the_picture_and_places_keep_their_order(unit):
    svg = drawn(RATES, RATE._replace(unit=unit))
    with_dots = [line for line in RATES if line.look != "bar"]
    assert told(svg) == [f"{line.name}: {x:g}, {y:g}" for line in with_dots for x, y in line.points]
    # of a name the last label
    found = [text for text in words(svg) if text.startswith(("perft", "esft"))]
    assert sorted(found) == [FULL, "perft_e 93", "perft_s r4"]
    dots = [(x, y) for _, x, y in shapes(svg, "circle")]
    data = [point for line in with_dots for point in line.points]
    for (a, p), (b, q) in itertools.combinations(zip(data, dots), 2):
        assert (a[0] < b[0]) == (p[0] < q[0]) and (a[1] < b[1]) == (p[1] > q[1])


def test_a_line_goes_through_its_points_and_none_through_rings():
    svg = drawn(RATES, RATE)
    places = {(x, y) for _, x, y in shapes(svg, "circle")}
    lines = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if path.get("class").startswith("c"):
            corners = path.get("d").removeprefix("M ").split()
            lines.append([tuple(map(float, corner.split(","))) for corner in corners])
    assert [len(line) for line in lines] == [3, 3, 2, 2]
    bar = lines.pop(2)
    (ring,) = [shape for shape in shapes(svg, "circle") if "ring" in shape[0].get("class")]
    assert ring[0][0].text == "perft_e: 0.001, 93.5"
    assert {place for line in lines for place in line} == places - {ring[1:]}
    assert bar[0][0] == bar[1][0] == ring[1] and bar[0][1] > ring[2] > bar[1][1]


@pytest.mark.parametrize("of", ["x", "y"])
@pytest.mark.parametrize("unit, middle", [(math.log10, 1 / 2), (float, 9 / 99)])
def test_distances_are_those_of_the_numbers_or_of_their_logarithms(of, unit, middle):
    axis, other = Axis("", (1, 10, 100), unit), Axis("", (0, 100))
    points = [(1, 0), (10, 50), (100, 100)]
    if of == "y":
        points = [(y, x) for x, y in points]
    svg = drawn([Line("a", points, 0)], *((axis, other) if of == "x" else (other, axis)))
    places = [(x, y) for _, x, y in shapes(svg, "circle")]
    if of == "y":
        places = [(y, x) for x, y in places]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert (x1 - x0) / (x2 - x0) == pytest.approx(middle, abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(1 / 2, abs=1e-3)


def test_the_axes_are_as_asked_for():
    """Half of the way between two ticks is half of the numbers, whatever the points are; an axis
    may fall."""
    ticks = (0, 0.25, 0.5, 0.75, 1)
    for ups, point in ((ticks, 0.375), (ticks[::-1], 0.375)):
        svg = drawn([Line("a", [(0.75, point)], 0)], Axis("", (0.5, 1.0)), Axis("", ups))
        across, up = {}, {}
        for shape, x, y in shapes(svg, "text"):
            (across if shape.get("text-anchor") == "middle" else up)[shape.text] = (x, y)
        ((_, x, y),) = shapes(svg, "circle")
        assert x == pytest.approx((across["0.5"][0] + across["1"][0]) / 2, abs=0.1)
        assert y == pytest.approx((up["0.25"][1] + up["0.5"][1]) / 2 - 4, abs=0.1)  # a base line
        assert (up["0"][1] > up["1"][1]) == (ups == ticks)


def test_labels_have_the_colour_of_their_lines_and_are_tied_to_them():
    svg = PICTURES["nine lines that end together"]()
    root = ElementTree.fromstring(svg)
    colours = set()
    for line in MANY:
        dots = [c for c in root.iter(f"{SVG}circle") if c[0].text.startswith(f"{line.name}:")]
        (label,) = [t for t in root.iter(f"{SVG}text") if t.text == line.label]
        assert {dot.get("class").split()[0] for dot in dots} == {label.get("class")}
        colours.add(label.get("class"))
    assert len(colours) == len(MANY)
    ties = [p for p in root.iter(f"{SVG}path") if p.get("class").startswith("thin c")]
    assert len(ties) == len(MANY)


def test_a_label_is_right_of_its_point_at_the_same_height_where_there_is_room():
    svg = drawn([Line("a", [(50, 50)], 0, label="word")])
    (label,) = [shape for shape in shapes(svg, "text") if shape[0].text == "word"]
    ((_, x, y),) = shapes(svg, "circle")
    assert label[0].get("text-anchor") == "start" and label[1] == x + 9
    assert label[2] == pytest.approx(y + 4, abs=1)


@pytest.mark.parametrize(
    "taken, anchor, dx",
    [
        ([], "start", 9),
        ([[(50, 50), (100, 50)]], "end", -9),
        ([[(0, 50), (100, 50)]], "start", 9),
    ],
)
def test_around_a_point_a_label_stands_beside_all_lines(taken, anchor, dx):
    """To the right, or else to the left; where a line goes through the point, off that."""
    lines = [Line("a", [(50, 50)], 0, label="word")]
    lines += [Line("b", points, 1, "bar") for points in taken]
    svg = drawn(lines, labelled=results.around)
    (label,) = [shape for shape in shapes(svg, "text") if shape[0].text == "word"]
    ((_, x, y),) = shapes(svg, "circle")
    assert label[0].get("text-anchor") == anchor and label[1] == x + dx
    off = abs(label[2] - 4 - y)
    assert 10 <= off <= 12 if taken and taken[0][0][0] == 0 else off <= 1


# The experts of a prompt -------------------------------------------------------------------------


def test_each_token_has_a_column_with_its_experts_numbers_and_an_expert_has_one_colour():
    svg = PICTURES["routing"]()
    found = words(svg)
    assert "bob" in found and "␣is" in found and "␣broth" in found and "<b>" in found
    at = {(x, y): shape.text for shape, x, y in shapes(svg, "text")}
    colours = {}
    cells = list(shapes(svg, "rect"))
    assert len(cells) == 4 * len(TOKENS)
    for rect, x, y in cells:
        number = at[x + 24, y + 11]
        assert colours.setdefault(number, rect.get("style")) == rect.get("style")
    assert len(set(colours.values())) == len(colours)
    for layer, row in enumerate(IDS):
        numbers = [f"layer {layer}, column {t % 12}: {e}" for t, e in enumerate(row)]
        assert sorted(numbers) == sorted(t for t in told(svg) if t.startswith(f"layer {layer},"))


# A run -------------------------------------------------------------------------------------------


def test_the_picture_of_a_run_has_every_loss_and_accuracy_and_the_first_and_last_load():
    found = set(told(PICTURES["run of perft_r"]()))
    losses = {"cross_entropy: 20, 4.1017", "cross_entropy: 40, 1.033", "cross_entropy: 60, 0.3275"}
    task = {"kinship_new: 0, 0", "kinship_new: 30, 0.5", "kinship_new: 60, 0.975"}
    kept = {"kept: 0, 0.9127", "kept: 30, 0.85", "kept: 60, 0.7964"}
    assert losses | task | kept <= found and not any(text.startswith("sort") for text in found)
    shown = words(PICTURES["run of perft_r"]())
    titles = [text for text in shown if text.startswith("How the ")]
    assert [title.split(" are used")[0] for title in titles] == [
        "How the experts",
        "How the adapters",
    ]
    assert sum("the largest share of a layer's choices" in text for text in shown) == 2
    rows = [text for text in shown if "layer " in text]
    once = ["step 20, layer 0", "layer 1", "layer 2", "step 60, layer 0", "layer 1", "layer 2"]
    assert [row for row in rows if row[-1].isdigit()] == once * 2
    assert "step 20, layer 1, column 0: 0.8" in found
    assert not any("adapter" in text for text in words(PICTURES["run"]()))


def test_what_test_rows_showed_is_a_ring_apart_from_the_line_of_validation_rows():
    circles = [c for c, _, _ in shapes(PICTURES["run"](), "circle")]
    rings = [c[0].text for c in circles if "ring" in c.get("class")]
    assert sorted(rings) == [
        "kept: 0, 0.9127",
        "kept: 60, 0.7964",
        "kinship_new: 0, 0",
        "kinship_new: 60, 0.975",
    ]
    assert {"kept 0.80", "kinship_new 0.97"} <= set(words(PICTURES["run"]()))


def test_a_run_on_a_file_shows_the_loss_of_its_held_out_rows():
    found = told(PICTURES["run on a file"]())
    assert [text for text in found if text.startswith("held_out")] == [
        "held_out: 0, 2.5",
        "held_out: 5, 2.125",
        "held_out: 5, 1.75",
    ]
    assert not any(text.startswith("Accuracy") for text in words(PICTURES["run on a file"]()))


@pytest.mark.parametrize("top", [0, 0.3, 1, 4.1, 11.8, 40, 230, 400, 31_932])
def test_the_ticks_of_an_axis_are_few_whole_numbers_that_reach_the_top(top):
    ticks = pictures.whole_ticks(top)
    assert 2 <= len(ticks) <= 7 and ticks[0] == 0 and ticks[-2] < max(top, 1) <= ticks[-1]


def test_the_command_draws_what_the_log_holds(tmp_path):
    log = "".join(json.dumps(record) + "\n" for record in ROUTED)
    (tmp_path / "metrics.jsonl").write_text(log + '{"event": "st')  # cut off, as by a kill
    command = [sys.executable, ROOT / "data" / "pictures.py", tmp_path]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    assert (tmp_path / "run.svg").read_text() == pictures.run_picture(ROUTED)


def test_a_log_that_is_none_is_told_in_one_line_that_names_it(tmp_path):
    """200 logs with a value replaced, a key gone or a byte flipped: a picture that is XML, or an
    error with the file's name."""
    rng = random.Random(0)
    file = tmp_path / "metrics.jsonl"
    odd = [None, True, "x", [], {}, [[]], -1, 0, 1e308, float("nan"), float("inf"), 10**400]
    outcomes = set()
    for _ in range(200):
        records = json.loads(json.dumps(ROUTED))
        record = rng.choice(records)
        key = rng.choice(list(record))
        record[key] = rng.choice(odd)
        if rng.random() < 0.3:
            del record[key]
        text = bytearray("".join(json.dumps(record) + "\n" for record in records).encode())
        if rng.random() < 0.3:
            text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        file.write_bytes(text)
        try:
            pictures.draw(tmp_path)
            ElementTree.parse(tmp_path / "run.svg")
            outcomes.add("drawn")
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in run.one_line(error)
            outcomes.add("refused")
    assert outcomes == {"drawn", "refused"}


def test_it_does_not_load_torch():
    code = "import sys; import data.pictures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# The pictures of the README ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", sorted((ROOT / "assets").glob("*.svg")), ids=lambda file: file.name
)
def test_a_picture_of_the_readme_is_xml_and_has_colours_for_a_dark_page(file):
    root = ElementTree.parse(file).getroot()
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    assert "prefers-color-scheme: dark" in file.read_text()
    whole = [r for r in root.iter(f"{SVG}rect") if r.get("width") == root.get("width")]
    assert whole == []  # a white slab


@pytest.mark.parametrize("name", ["frontier", "parameters"])
def test_no_label_of_the_results_stands_on_a_line_or_on_another_word(name):
    svg = (ROOT / "assets" / f"{name}.svg").read_text()
    labels = [box for box, shape in zip(boxes(svg), shapes(svg, "text")) if shape[0].get("class")]
    assert len(labels) > 10
    for a, b in itertools.product(labels, boxes(svg)):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert a == b or apart, (a, b)
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if not path.get("class").startswith("c"):
            continue  # a level, or what ties a label to its place
        corners = path.get("d").removeprefix("M ").split()
        corners = [tuple(map(float, corner.split(","))) for corner in corners]
        for (x, y), (to_x, to_y) in itertools.pairwise(corners):
            for i in range(101):
                px, py = x + (to_x - x) * i / 100, y + (to_y - y) * i / 100
                for left, top, right, bottom, text in labels:
                    assert not (left < px < right and top < py < bottom), (text, px, py)
