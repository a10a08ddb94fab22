"""Pictures of runs as SVG, which is text: curves, heat maps, the experts of a prompt.

Coordinates are pixels, x to the right and y downwards. A panel is its shapes and its height;
`picture` puts panels under each other. Colours stand in a style at the head, by class, so that a
page in dark mode gets its own. There is no legend: a name stands beside what it names, in its
colour, and a pointer that rests on a shape is told its numbers.

    python data/pictures.py RUN    RUN/run.svg: loss, accuracy, and how the experts are used

tests/results.py draws the pictures of results with what stands here.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, this folder is on it

from data import run  # noqa: E402

WIDTH = 640  # of every picture; a page may scale it
CELL = 14  # the side of a cell
LETTER = 7  # the width of a letter, rather more than less
STYLE = """<style>
svg { color: #444 } text { font: 12px sans-serif; fill: currentColor }
path { fill: none; stroke: currentColor; stroke-width: 2 } .thin { stroke-width: 0.5 }
.level { stroke-width: 0.5; stroke-opacity: 0.4 }
.dashes { stroke-dasharray: 7 4 }
text[class] { paint-order: stroke; stroke: #fff; stroke-width: 3; stroke-opacity: 0.7 }
circle, rect { fill: currentColor } .ring { fill: none; stroke: currentColor; stroke-width: 2 }
.cell, .chosen { color: #0072b2 } .chosen { stroke: #e07b00; stroke-width: 1.5 }
.c0 { color: #0072b2 } .c1 { color: #c25400 } .c2 { color: #00805f } .c3 { color: #a3427f }
.c4 { color: #7a6a00 } .c5 { color: #5b4fc0 } .c6 { color: #666 }
.c7 { color: #a14a2a } .c8 { color: #2b7a99 } .c9 { color: #c2185b } .c10 { color: #4d7a00 }
@media (prefers-color-scheme: dark) {
svg { color: #ccc } text[class] { stroke: #111 } .cell, .chosen { color: #56b4e9 }
.c0 { color: #56b4e9 } .c1 { color: #f0915a } .c2 { color: #2fc39b } .c3 { color: #e08fc4 }
.c4 { color: #d8c64a } .c5 { color: #a9a0f5 } .c6 { color: #aaa }
.c7 { color: #d99a7f } .c8 { color: #8cc8de } .c9 { color: #ff80ab } .c10 { color: #a5d64f }
}
</style>"""
PAGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}">
{2}
{3}
</svg>
"""
PANEL = '<g transform="translate(0 {})">'
TEXT = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
HEAD = """<text x="{0}" y="20" text-anchor="start">{1}</text>
<text x="{0}" y="38" text-anchor="start">{2}</text>"""
LEVEL = """<text x="54" y="{1:.1f}" text-anchor="end">{0:.7g}</text>
<path class="level" d="M 60,{2:.1f} H 460"/>"""
PATH = '<path class="c{} {}" d="M {}"/>'
DOT = """<circle class="c{} {}" cx="{:.1f}" cy="{:.1f}" r="{}">
<title>{}: {:.7g}, {:.7g}</title></circle>"""
# tied to its place
LABEL = """<path class="thin c{0}" d="M {1:.1f},{2:.1f} L {3:.1f},{4:.1f}"/>
<text class="c{0}" x="{3:.1f}" y="{5:.1f}" text-anchor="{6}">{7}</text>"""
SCORE = """<rect class="{kind}" x="{x}" y="{y}" width="{inner}" height="13" \
style="fill-opacity: {shade:.3f}">
<title>{name}, column {column}: {value:.4g}</title></rect>"""
EXPERT = """<rect class="{kind}" x="{x}" y="{y}" width="{inner}" height="13" \
style="fill: hsl({shade:.1f}, 80%, 50%); fill-opacity: 0.35">
<title>{name}, column {column}: {value}</title></rect>\
<text x="{x}" y="{y}" dx="24" dy="11" text-anchor="middle">{value}</text>"""


def picture(panels) -> str:
    body, top = [], 0
    for shapes, height in panels:
        body += [PANEL.format(top), *shapes, "</g>"]
        top += height
    return PAGE.format(WIDTH, top, STYLE, "\n".join(body))


def shown(words):
    return escape("".join(c if c.isprintable() else "·" for c in str(words)))


def text(x, y, words, anchor="start"):
    """Words on a base line at y, that start, have their middle, or end at x."""
    return TEXT.format(x, y, anchor, shown(words))


# Curves ------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    label: str
    ticks: Sequence[float]  # from its beginning to its end
    unit: Callable = float  # math.log10: a logarithmic axis


class Line(NamedTuple):
    name: str  # what a pointer is told beside the numbers
    points: list  # (x, y)
    colour: int
    look: str = "line"  # with dots, as "dashes"; "bar": without; "ring": rings and no line
    label: str = ""  # beside the last point of the last line that has the name,
    side: str = "start"  # which is the label's start, or its "end"


def plot(title, lines: list[Line], x: Axis, y: Axis, height=250):
    """A panel: frame, lines with their dots, and labels, in this order from back to front."""
    x_at, y_at = scale(x, 60, 460), scale(y, height - 50, 60)
    shapes = frame(title, x, y, x_at, y_at)
    labels, dots = {}, []
    for line in lines:
        places = [(x_at(a), y_at(b)) for a, b in line.points]
        shapes += drawn(line, places)
        if line.look != "bar":
            dots += places
        if line.label:
            labels[line.name] = (*places[-1], line.colour, line.side, shown(line.label))
    return shapes + labels_beside(labels.values(), dots, range(50, height - 40)), height


def scale(axis, start, end):
    """-> a function that takes the first tick to the pixel `start`, and the last to `end`."""
    low, *_, high = map(axis.unit, axis.ticks)
    return lambda value: start + (end - start) * (axis.unit(value) - low) / (high - low)


def frame(title, x, y, x_at, y_at):
    bottom = y_at(y.ticks[0])
    shapes = [HEAD.format(60, title, y.label), text(460, bottom + 36, x.label, "end")]
    for tick in x.ticks:
        shapes.append(text(x_at(tick), bottom + 18, f"{tick:,.9g}", "middle"))
    for tick in y.ticks:
        shapes.append(LEVEL.format(tick, y_at(tick) + 4, y_at(tick)))
    return shapes


def drawn(line, places):
    shapes = []
    if line.look != "ring":
        path = " ".join("{:.1f},{:.1f}".format(*place) for place in places)
        shapes.append(PATH.format(line.colour, line.look, path))
    if line.look != "bar":
        radius = 5 if line.look == "ring" else 3
        for place, point in zip(places, line.points):
            shapes.append(
                DOT.format(line.colour, line.look, *place, radius, shown(line.name), *point)
            )
    return shapes


def labels_beside(labels, dots, heights):
    """Labels (x, y, colour, side, words) beside their places, or above or below, as near as dots
    and other labels leave room."""
    shapes = []
    taken = [(x - 4, x + 4, y) for x, y in dots]  # from, to, and the middle of its height
    for x, y, colour, side, words in sorted(labels, reverse=True):
        width = LETTER * len(words)
        tie, start = (x + 9, x + 9) if side == "start" else (x - 9, x - 9 - width)
        near = [m for left, right, m in taken if start < right and left < start + width]
        free = [height for height in heights if all(abs(height - m) > 12 for m in near)]
        middle = min(free, key=lambda height: abs(height - y), default=y)
        taken.append((start, start + width, middle))
        shapes.append(LABEL.format(colour, x, y, tie, middle, middle + 4, side, words))
    return shapes


# Experts -----------------------------------------------------------------------------------------


def heat_map(scores, chosen: list, title="expert scores") -> str:
    """scores: (L, E), not negative. chosen: for each layer the experts to outline."""
    note = "Outlined: chosen. Colour: the score"
    return picture([heat(title, note, layers(scores), layers(chosen))])


def layers(values, of=""):
    return {f"{of}layer {i}": value for i, value in enumerate(values)}


def heat(title, note, rows, chosen, which="expert"):
    """A row a layer, a column an expert, its share as opacity (it suits dark pages)."""
    columns = range(max(map(len, rows.values())))
    largest = max(map(max, rows.values()))
    note = f"{note}, {largest:.1%} at most"
    return grid(title, note, which, columns, rows, chosen, SCORE, CELL, 1 / (largest or 1))


def routing_picture(tokens: list[str], ids: list[list[int]], num_experts: int) -> str:
    """A column a token, a row a layer; a cell has the number and the colour of the token's first
    expert. ids: (L, T)."""
    title = f"Of {num_experts} experts the first that a token goes to, layer by layer"
    panels = []
    for first in range(0, len(tokens), 12):
        part = slice(first, first + 12)
        heads = [token.replace(" ", "␣")[:6] for token in tokens[part]]
        rows = layers([row[part] for row in ids])
        # degrees of the colour wheel, so that neighbours have unlike colours
        panels.append(grid(title, "", "token", heads, rows, {}, EXPERT, 48, 137.5))
    return picture(panels)


def grid(title, note, corner, heads, rows, chosen, template, width, scale):
    """heads: words above the columns, and `corner` says what they are. rows: {name: values}.
    chosen: {name: columns to outline}. scale: makes of a value what the template shows as colour.
    """
    left = 8 + LETTER * max(map(len, rows))
    width = min(width, (WIDTH - 4 - left) // len(heads))
    shapes = [HEAD.format(8, shown(title), note), text(left - 6, 60, corner, "end")]
    for column in range(0, len(heads), math.ceil(24 / width)):
        shapes.append(text(left + width * (column + 0.5), 60, heads[column], "middle"))
    y = 66
    for name, row in rows.items():
        shapes.append(text(left - 6, y + 11, name, "end"))
        for column, value in enumerate(row):
            rect = template.format(
                kind="chosen" if column in chosen.get(name, ()) else "cell",
                x=left + width * column,
                y=y,
                inner=width - 1,
                name=shown(name),
                column=column,
                value=value,
                shade=value * scale,
            )
            shapes.append(rect)
        y += CELL
    return shapes, y + CELL


# A run -------------------------------------------------------------------------------------------


def run_picture(records: list[dict]) -> str:
    """What metrics.jsonl holds (train.py): loss, accuracy, and the load of the experts."""
    from data.skills import FAMILIES

    found = series(records)
    last, _ = found["step", "line"][-1]
    steps = Axis("step", whole_ticks(last))

    losses = lines_of(found, ["cross_entropy", "held_out"])
    largest = max(loss for line in losses for _, loss in line.points)
    y = Axis("cross-entropy of a token of the answer (less is better)", whole_ticks(largest))
    panels = [plot("Loss", losses, steps, y)]

    if "accuracy" in records[0]:
        names = [name for name in (*records[0]["accuracy"], "kept") if name not in FAMILIES]
        label = "share right: of validation rows on the way (lines), of test rows (rings)"
        y = Axis(label, (0, 0.25, 0.5, 0.75, 1))
        title = "Accuracy on what is new, and on the skills it had (kept)"
        panels.append(plot(title, lines_of(found, names), steps, y))

    for which in ("expert", "adapter"):
        loads = found[f"{which}_load", "line"]
        rows = {}
        for step, load in loads[:1] + loads[-1:]:
            rows |= layers(load, f"step {step}, ")
        if rows:
            note = f"Colour: each {which}'s share of its layer's choices"
            panels.append(heat(f"How the {which}s are used", note, rows, {}, which))
    return picture(panels)


def whole_ticks(top):
    """From 0 to `top` or a little more."""
    top = max(1, math.ceil(top))
    step = math.ceil(top / 5)
    return range(0, top + step, step)


def series(records):
    """-> {(name, look): [(step, value), ...]}. Accuracies before and after the run, which are of no
    step, are of other rows, those of the test, and so rings apart from the line."""
    found = defaultdict(list)
    step = 0  # of what is measured before the first
    for record in records:
        step = record.get("step", step)
        test = "accuracy" in record and "step" not in record
        for name, value in (record | record.get("accuracy", {})).items():
            found[name, "ring" if test else "line"].append((step, value))
    return found


def lines_of(found, names):
    """The lines and, after them, rings of some names, labelled with their last numbers."""
    return [
        Line(name, points, names.index(name), look, f"{name} {points[-1][1]:.2f}")
        for (name, look), points in sorted(found.items())
        if name in names
    ]


def draw(folder: str | Path):
    """Write RUN/run.svg from RUN/metrics.jsonl."""
    file = Path(folder) / "metrics.jsonl"
    records = [run.parse_json(line, file) for line in run.whole_lines(file)]
    try:
        svg = run_picture(records)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: is no log of train.py's, or damaged ({error!r})") from None
    run.write_text(Path(folder) / "run.svg", svg)


@run.command
def main():
    parser = run.Parser(description="Draw RUN/run.svg: loss, accuracy, and the load of the experts")
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    draw(parser.parse_args().run)


if __name__ == "__main__":
    main()
