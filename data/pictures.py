"""Pictures of runs as SVG, which is text: curves, heat maps, the experts of a prompt.

Coordinates are pixels, x to the right and y downwards. A panel is its shapes and its height;
`picture` puts panels under each other. Colours stand in a style at the head, by class, so that a
page in dark mode gets its own. A name stands beside what it names, in its colour, and a pointer
that rests on a shape is told its numbers.

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
text[class] { paint-order: stroke; stroke: #fff; stroke-width: 3; stroke-opacity: 0.8 }
circle, rect { fill: currentColor } .ring { fill: none; stroke: currentColor; stroke-width: 2 }
.cell, .chosen { color: #0072b2 } .chosen { stroke: #e07b00; stroke-width: 1.5 }
.c0 { color: #0072b2 } .c1 { color: #c25400 } .c2 { color: #00805f } .c3 { color: #a3427f }
.c4 { color: #7a6a00 } .c5 { color: #5b4fc0 } .c6 { color: #222 }
.c7 { color: #a14a2a } .c8 { color: #2b7a99 } .c9 { color: #c2185b } .c10 { color: #4d7a00 }
.c11 { color: #777 } path.c11 { stroke-width: 1; stroke-dasharray: 7 4 }
@media (prefers-color-scheme: dark) {
svg { color: #ccc } text[class] { stroke: #111 } .cell, .chosen { color: #56b4e9 }
.c0 { color: #56b4e9 } .c1 { color: #f0915a } .c2 { color: #2fc39b } .c3 { color: #e08fc4 }
.c4 { color: #d8c64a } .c5 { color: #a9a0f5 } .c6 { color: #eee }
.c7 { color: #bf8a6f } .c8 { color: #bcd3de } .c9 { color: #ff5c5c } .c10 { color: #a5d64f }
.c11 { color: #999 }
}
</style>
<linearGradient id="shades" gradientUnits="userSpaceOnUse" x1="42" x2="112">
<stop class="cell" stop-color="currentColor" stop-opacity="0"/>
<stop class="cell" stop-color="currentColor" offset="1"/></linearGradient>"""
PAGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}">
{2}
{3}
</svg>
"""
PANEL = '<g transform="translate(0 {})">'
TEXT = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
TICK = """<text x="{1:.1f}" y="{2:.1f}" text-anchor="middle">{0:,.9g}</text>
<path class="level" d="M {1:.1f},{3:.1f} V {4:.1f}"/>"""
LEVEL = """<text x="54" y="{1:.1f}" text-anchor="end">{0:.7g}</text>
<path class="level" d="M 60,{2:.1f} H {3}"/>"""
PATH = '<path class="c{} {}" d="M {}"/>'
DOT = """<circle class="c{} {}" cx="{:.1f}" cy="{:.1f}" r="{}">
<title>{}: {:.7g}, {:.7g}</title></circle>"""
# tied to its place
LABEL = """<path class="thin c{0}" d="M {1:.1f},{2:.1f} L {3:.1f},{4:.1f}"/>
<text class="c{0}" x="{3:.1f}" y="{5:.1f}" text-anchor="{6}">{7}</text>"""
SCORE = """<rect class="{kind}" x="{x}" y="{y}" width="{inner}" height="13" \
style="fill-opacity: {shade:.3f}">
<title>{name}, column {column}: {value:.4g}</title></rect>"""
# from nothing to the largest
SHADES = """<path style="stroke: url(#shades); stroke-width: 12" d="M 42,{2} h 70"/>
<text x="36" y="{2}" dy="4" text-anchor="end">0%</text>
<text x="118" y="{2}" dy="4" text-anchor="start">{0:.2%}, the largest {1}</text>"""
EXPERT = """<rect class="{kind}" x="{x}" y="{y}" width="{inner}" height="13" \
style="fill: hsl({shade:.1f}, 80%, 50%); fill-opacity: 0.35">
<title>{name}, column {column}: {value}</title></rect>\
<text x="{x}" y="{y}" dx="24" dy="11" text-anchor="middle">{value}</text>"""


def picture(panels):
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


def head(x, lines):
    return [text(x, 20 + 18 * i, line) for i, line in enumerate(lines)]


# Curves ------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    label: str
    ticks: Sequence[float]  # from its beginning to its end
    unit: Callable = float  # math.log10: a logarithmic axis


class Line(NamedTuple):
    name: str  # what a pointer is told beside the numbers
    points: list  # (x, y)
    colour: int
    look: str = "line"  # with dots; "bar": without; "ring": rings and no line
    label: str = ""  # beside the last point of the last line that has the name


def scale(axis, start, end):
    """-> a function that takes the first tick to the pixel `start`, and the last to `end`."""
    low, *_, high = map(axis.unit, axis.ticks)
    return lambda value: start + (end - start) * (axis.unit(value) - low) / (high - low)


def frame(x, y, x_at, y_at):
    bottom, right = y_at(y.ticks[0]), x_at(x.ticks[-1])
    shapes = [text(right, bottom + 36, x.label, "end")]
    for tick in x.ticks:
        shapes.append(TICK.format(tick, x_at(tick), bottom + 18, bottom, y_at(y.ticks[-1])))
    for tick in y.ticks:
        shapes.append(LEVEL.format(tick, y_at(tick) + 4, y_at(tick), right))
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


def to_the_right(labels, paths, heights):
    """Labels (x, y, colour, words) beside their places, in the order of these, as near as others
    leave room: where all lines end at the right."""
    shapes, free, left = [], heights[0], len(labels)
    for x, y, colour, words in sorted(labels, key=lambda label: label[1]):
        left -= 1
        middle = min(max(y, free), heights[-1] - 13 * left)  # those that are left need room below
        free = middle + 13
        shapes.append(LABEL.format(colour, x, y, x + 9, middle, middle + 4, "start", words))
    return shapes


def plot(heads, lines, x, y, height=250, right=460, labelled=to_the_right):
    """A panel: what it shows and what y is, a frame, lines with their dots, and labels, in this
    order from back to front. labelled: how labels find their places."""
    top, bottom = 42 + 18 * len(heads), height - 50
    x_at, y_at = scale(x, 60, right), scale(y, bottom, top)
    shapes = head(60, [*heads, y.label]) + frame(x, y, x_at, y_at)
    labels, paths = {}, []
    for line in lines:
        path = [(x_at(a), y_at(b)) for a, b in line.points]
        shapes += drawn(line, path)
        paths.append(path)
        if line.label:
            labels[line.name] = (*path[-1], line.colour, shown(line.label))
    return shapes + labelled(labels.values(), paths, range(top - 10, bottom)), height


# Experts -----------------------------------------------------------------------------------------


def heat_map(scores, chosen, title="expert scores"):
    """scores: (L, E), not negative. chosen: for each layer the experts to outline."""
    return picture([heat([title, "Outlined: chosen"], "score", layers(scores), layers(chosen))])


def layers(values, of=""):
    return {f"{of}layer {i}": value for i, value in enumerate(values)}


def heat(heads, what, rows, chosen, which="expert"):
    """A row a layer, a column an expert, its share as opacity (it suits dark pages), and below them
    what that is."""
    columns = range(max(map(len, rows.values())))
    largest = max(map(max, rows.values()))
    shapes, height = grid(heads, which, columns, rows, chosen, SCORE, CELL, 1 / (largest or 1))
    return [*shapes, SHADES.format(largest, what, height)], height + 2 * CELL


def routing_picture(tokens, ids, num_experts):
    """A column a token, a row a layer; a cell has the number and the colour of the token's first
    expert. ids: (L, T)."""
    title = f"Of {num_experts} experts the first that a token goes to, layer by layer"
    panels = []
    for first in range(0, len(tokens), 12):
        part = slice(first, first + 12)
        heads = [token.replace(" ", "␣")[:6] for token in tokens[part]]
        rows = layers([row[part] for row in ids])
        # degrees of the colour wheel, so that neighbours have unlike colours
        panels.append(grid([title], "token", heads, rows, {}, EXPERT, 48, 137.5))
    return picture(panels)


def grid(heads, corner, columns, rows, chosen, template, width, scale):
    """columns: words above them, and `corner` says what they are. rows: {name: values}; of names
    such as "a, b" and "a, c" the second one stands there as "c". chosen: {name: columns to
    outline}. scale: makes of a value what the template shows as colour."""
    left = 8 + LETTER * max(map(len, rows))
    width = min(width, (WIDTH - 4 - left) // len(columns))
    shapes = [*head(8, heads), text(left - 6, 60, corner, "end")]
    for column in range(0, len(columns), math.ceil(24 / width)):
        shapes.append(text(left + width * (column + 0.5), 60, columns[column], "middle"))
    y, above = 66, ""
    for name, row in rows.items():
        group, _, label = name.rpartition(", ")
        if group != above:
            above, label, y = group, name, y + 6
        shapes.append(text(left - 6, y + 11, label, "end"))
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


def run_picture(records):
    """What metrics.jsonl holds (train.py): loss, accuracy, and the load of the experts."""
    from data.skills import FAMILIES

    found = series(records)
    last, _ = found["step", "line"][-1]
    steps = Axis("step →", whole_ticks(last))

    losses = lines_of(found, ["cross_entropy", "held_out"])
    largest = max(loss for line in losses for _, loss in line.points)
    y = Axis("↑ cross-entropy of a token of the answer (less is better)", whole_ticks(largest))
    panels = [plot(["Loss"], losses, steps, y)]

    if "accuracy" in records[0]:
        names = [name for name in (*records[0]["accuracy"], "kept") if name not in FAMILIES]
        y = Axis(
            "↑ share right: of validation rows on the way (lines), of test rows (rings)",
            (0, 0.25, 0.5, 0.75, 1),
        )
        title = "Accuracy on what is new, and on the skills it had (kept)"
        panels.append(plot([title], lines_of(found, names), steps, y))

    for which in ("expert", "adapter"):
        loads = found[f"{which}_load", "line"]
        rows = {}
        for step, load in loads[:1] + loads[-1:]:
            rows |= layers(load, f"step {step}, ")
        if rows:
            heads = [f"How the {which}s are used", "at the first line of the log and at the last"]
            panels.append(heat(heads, "share of a layer's choices", rows, {}, which))
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


def draw(folder):
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
