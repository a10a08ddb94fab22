"""Pictures of runs as SVG, which is text: curves, heat maps, the experts of a prompt.

Coordinates are pixels, x to the right and y downwards. A panel is its shapes and its height;
`picture` puts panels under each other. Colours stand in a style at the head, by class, so that a
page in dark mode gets its own. There is no legend: a name stands beside what it names, in its
colour, and a pointer that rests on a shape is told its numbers.

    python data/pictures.py RUN    RUN/run.svg: loss, accuracy, and how the experts are used

tests/results.py draws the pictures of results with what stands here.
"""

import sys
from collections import defaultdict
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, this folder is on it

from data import run  # noqa: E402

WIDTH = 640  # of every picture; a page may scale it
CELL = 14  # the side of a cell
LETTER = 7  # the width of a letter, rather more than less
STYLE = """<style>
svg { color: #444 } text { font: 12px sans-serif; fill: currentColor }
path { fill: none; stroke: currentColor; stroke-width: 2 } .thin { stroke-width: 0.5 }
.level { stroke-width: 0.5; stroke-opacity: 0.4 }
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
# of a plot, from (60, bottom) to the right and upwards
FRAME = """<text x="60" y="20" text-anchor="start">{}</text>
<text x="60" y="38" text-anchor="start">{}</text>
<text x="{}" y="{}" text-anchor="end">{}</text>"""
LEVEL = """<text x="54" y="{1:.1f}" text-anchor="end">{0:.3g}</text>
<path class="level" d="M 60,{2:.1f} H {3}"/>"""
LINE = '<path class="{}" d="M {}"/>'
DOT = """<circle class="{} {}" cx="{:.1f}" cy="{:.1f}" r="{}">
<title>{}: {:.7g}, {:.7g}</title></circle>"""
# a name, tied to its place
NAME = """<path class="thin {0}" d="M {1:.1f},{2:.1f} L {3:.1f},{4:.1f}"/>
<text class="{0}" x="{3:.1f}" y="{5:.1f}" text-anchor="start">{6}</text>"""
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


def plot(groups, x_label, y_label, title, unit=float, x_ticks=(), top=0, height=250):
    """A panel of groups (name, points (x, y), look): a "line" with a dot at each point, a "bar",
    without, or "ring"s. A name stands beside the last point of the last group that has it, and has
    the colour of its first word. x has the range of x_ticks (of the points), y begins at 0.
    unit: log10 for a logarithmic x."""
    points = [point for _, group, _ in groups for point in group]
    xs = x_ticks or sorted({x for x, _ in points})
    top = max(top, *(y for _, y in points)) or 1
    bottom, right = height - 50, WIDTH - 20 - LETTER * max(len(name) for name, *_ in groups)
    x_at = scale(xs[0], xs[-1], 60, right, unit)
    y_at = scale(0, top, bottom, 60)
    shapes = [FRAME.format(title, y_label, right, height - 14, x_label)]
    for level in (0, 0.25, 0.5, 0.75, 1):
        y = y_at(level * top)
        shapes.append(LEVEL.format(level * top, y + 4, y, right))
    shapes += labels([(x_at(x), f"{x:,.7g}") for x in xs], bottom + 18, 50)

    colours, names, dots = {}, {}, []
    for name, group, look in groups:
        word = name.split()[0]
        colour = colours.setdefault(word, f"c{len(colours) % 11}")
        places = [(x_at(x), y_at(y)) for x, y in group]
        if look != "ring":
            path = " ".join("{:.1f},{:.1f}".format(*place) for place in places)
            shapes.append(LINE.format(colour, path))
        if look != "bar":
            size = 5 if look == "ring" else 3
            for point, place in zip(group, places):
                shapes.append(DOT.format(colour, look, *place, size, shown(word), *point))
            dots += places
        x, y = places[-1]
        names[name] = y, x, colour, shown(name)
    return shapes + names_beside(names.values(), dots), height


def labels(places, y, room):
    """Words (x, words) that have room beside those before them."""
    shapes, free = [], 0
    for x, words in places:
        if x >= free:
            shapes.append(text(x, y, words, "middle"))
            free = x + room
    return shapes


def names_beside(names, dots):
    """Names (y, x, colour, words) right of their places, or below the dots and names that stand
    there already."""
    shapes = []
    taken = [(x - 4, x + 4, y) for x, y in dots]  # from, to, and the middle of its height
    for y, x, colour, words in sorted(names):
        start, end, down = x + 9, x + 9 + LETTER * len(words), y
        while any(start < t and f < end and abs(down - m) < 13 for f, t, m in taken):
            down += 1
        taken.append((start, end, down))
        shapes.append(NAME.format(colour, x, y, start, down, down + 4, words))
    return shapes


def scale(low, high, start, end, unit=float):
    """-> a function that takes `low` to the pixel `start`, and `high` to `end`."""
    span = unit(high) - unit(low) or 1
    return lambda value: start + (end - start) * (unit(value) - unit(low)) / span


# Experts -----------------------------------------------------------------------------------------


def heat_map(scores, chosen: list, title="expert scores") -> str:
    """scores: (L, E), not negative. chosen: for each layer the experts to outline."""
    return picture([heat(f"{title}; outlined: chosen", layers(scores), layers(chosen))])


def layers(values):
    return {f"layer {i}": value for i, value in enumerate(values)}


def heat(title, rows, chosen, which="expert"):
    """A row a layer, a column an expert, the score as opacity (it suits dark pages)."""
    values = list(rows.values())
    largest = max(map(max, values)) or 1.0
    return grid(
        f"{title}; full colour: {largest:.4f}",
        which,
        range(len(values[0])),
        rows,
        chosen,
        SCORE,
        CELL,
        1 / largest,
    )


def routing_picture(tokens: list[str], ids: list[list[int]], num_experts: int) -> str:
    """A column a token, a row a layer; a cell has the number and the colour of the token's first
    expert. ids: (L, T)."""
    title = f"A token's first of {num_experts} experts"
    panels = []
    for first in range(0, len(tokens), 12):
        part = slice(first, first + 12)
        heads = [token.replace(" ", "␣")[:6] for token in tokens[part]]
        rows = layers([row[part] for row in ids])
        # degrees of the colour wheel, so that neighbours have unlike colours
        panels.append(grid(title, "token", heads, rows, {}, EXPERT, 48, 137.5))
    return picture(panels)


def grid(title, corner, heads, rows, chosen, template, width, scale):
    """heads: words above the columns, and `corner` says what they are. rows: {name: values}.
    chosen: {name: columns to outline}. scale: makes of a value what the template shows as colour.
    """
    left = 8 + LETTER * max(map(len, rows))
    width = min(width, (WIDTH - 4 - left) // len(heads))
    middles = [(left + width * (column + 0.5), head) for column, head in enumerate(heads)]
    shapes = [text(8, 20, title), text(left - 6, 40, corner, "end"), *labels(middles, 40, 24)]
    y = 46
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
    """What metrics.jsonl holds (train.py): loss, accuracy, and the load of the experts. Accuracies
    before and after the run are of other rows, those of the test, and so apart from the line."""
    from data.skills import FAMILIES

    series = defaultdict(list)
    step = 0  # of what is measured before the first
    for record in records:
        step = record.get("step", step)
        test = "accuracy" in record and record["event"] in ("before", "after")
        for name, value in (record | record.get("accuracy", {})).items():
            series[name, "ring" if test else "line"].append((step, value))

    def groups(names):
        found = []
        for (name, look), points in sorted(series.items()):
            if name in names:
                _, last = series.get((name, "ring"), points)[-1]
                found.append((f"{name} {last:.3g}", points, look))
        return found

    losses = groups(("cross_entropy", "held_out"))
    panels = [plot(losses, "step", "cross-entropy of a token of the answer", "Loss")]
    if "accuracy" in records[0]:
        label = "share right: of validation rows on the way (lines), of test rows (rings)"
        shares = groups({"kept", *records[0]["accuracy"]}.difference(FAMILIES))
        panels.append(plot(shares, "step", label, "Accuracy", top=1))
    for which in ("expert", "adapter"):
        loads = series[f"{which}_load", "line"]
        for step, load in loads[:1] + loads[-1:]:
            title = f"Each {which}'s share of its layer's choices, step {step}"
            panels.append(heat(title, layers(load), {}, which))
    return picture(panels)


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
