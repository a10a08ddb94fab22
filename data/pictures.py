"""Pictures of runs as SVG, which is text: curves, points, heat maps, the experts of a prompt.

Coordinates are pixels, x to the right and y downwards. A panel is its shapes and its height;
`picture` puts panels under each other. Colours stand in a style at the head, by class, so that a
page in dark mode gets its own. There is no legend: a name stands beside what it names, in its
colour, and a pointer that rests on a shape is told its numbers.

    python data/pictures.py RUN    RUN/run.svg: loss, accuracy, and how the experts are used
"""

import sys
from collections import defaultdict
from html import escape
from math import ceil, log10
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, this folder is on it

from data import run  # noqa: E402

WIDTH, HEIGHT = 640, 250  # of every picture (a page may scale it), and of a plot
LEFT = 60  # where maps begin
CELL = 14  # the side of a cell
STYLE = """<style>
svg { color: #444 } text { font: 12px sans-serif; fill: currentColor }
path { fill: none; stroke: currentColor; stroke-width: 2 } .thin { stroke-width: 0.5 }
circle, rect { fill: currentColor } .cell, .chosen { color: #0072b2 }
.chosen { stroke: #e07b00; stroke-width: 1.5 }
.c0 { color: #0072b2 } .c1 { color: #c25400 } .c2 { color: #00805f } .c3 { color: #a3427f }
.c4 { color: #7a6a00 } .c5 { color: #5b4fc0 } .c6 { color: #666 }
.c7 { color: #a14a2a } .c8 { color: #2b7a99 }
@media (prefers-color-scheme: dark) {
svg { color: #ccc } .cell, .chosen { color: #56b4e9 }
.c0 { color: #56b4e9 } .c1 { color: #f0915a } .c2 { color: #2fc39b } .c3 { color: #e08fc4 }
.c4 { color: #d8c64a } .c5 { color: #a9a0f5 } .c6 { color: #aaa }
.c7 { color: #d99a7f } .c8 { color: #8cc8de }
}
</style>"""
PAGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}">
{2}
{3}
</svg>
"""
PANEL = '<g transform="translate(0 {})">\n{}\n</g>'
TEXT = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
# of a plot, from (60, 200) to the right and upwards: its title, axes and highest value
FRAME = """<text x="60" y="20" text-anchor="start">{}</text>
<text x="60" y="38" text-anchor="start">{}</text>
<text x="54" y="54" text-anchor="end">{:.3g}</text>
<text x="54" y="204" text-anchor="end">0</text>
<text x="420" y="236" text-anchor="end">{}</text>
<path class="thin" d="M 60,200 H 420"/>"""
LINE = '<path class="{}" d="M {}"/>'
DOT = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}: {:.7g}, {:.7g}</title></circle>'
# a name behind the plot, tied to its place
NAME = """<path class="thin {0}" d="M {1:.1f},{2:.1f} L 427,{3:.1f}"/>
<text class="{0}" x="430" y="{4:.1f}" text-anchor="start">{5}</text>"""
RECT = """<rect class="{kind}" x="{x}" y="{y}" width="{inner}" height="13" style="LOOK">
<title>layer {layer}, column {column}: {value:.4g}</title></rect>"""
SCORE = RECT.replace("LOOK", "fill-opacity: {shade:.3f}")
EXPERT = RECT.replace("LOOK", "fill: hsl({shade:.1f}, 80%, 50%); fill-opacity: 0.35")
EXPERT += '<text x="{middle}" y="{base}" text-anchor="middle">{value}</text>'


def picture(panels) -> str:
    body, top = [], 0
    for shapes, height in panels:
        body.append(PANEL.format(top, "\n".join(shapes)))
        top += height
    return PAGE.format(WIDTH, top, STYLE, "\n".join(body))


def shown(words):
    return escape("".join(c if c.isprintable() else "·" for c in str(words)))


def text(x, y, words, anchor="start"):
    """Words on a base line at y, that start, have their middle, or end at x."""
    return TEXT.format(x, y, anchor, shown(words))


# Curves and points -------------------------------------------------------------------------------


def curves(series: dict, x_label: str, y_label: str, title="", log_x=False) -> str:
    """Lines, of each its name at its end. series: {name: points}, and a point is (x, y), or
    (x, y, label): the label stands beside the name, and no value. Of several seeds draw each, a bar
    would hide how few they are."""
    return picture([plot(series, x_label, y_label, title, log_x)])


def scatter(points: dict, x_label: str, y_label: str, title="", log_x=False) -> str:
    return picture([plot(points, x_label, y_label, title, log_x, lines=False)])


def plot(series, x_label, y_label, title, log_x=False, lines=True):
    points = sum(series.values(), [])
    xs = sorted({x for x, *_ in points})
    top = max(y for _, y, *_ in points) or 1
    x_at = scale(xs[0], xs[-1], 60, 420, log10 if log_x else float)
    y_at = scale(0, top, 200, 50)
    shapes = [FRAME.format(shown(title), shown(y_label), top, shown(x_label))]
    free = 0
    for x in xs:  # those that have room
        if x_at(x) >= free:
            shapes.append(text(x_at(x), 218, f"{x:,.7g}", "middle"))
            free = x_at(x) + 60

    names = []
    for i, (name, group) in enumerate(series.items()):
        colour = f"c{i % 9}"
        places = [(x_at(x), y_at(y)) for x, y, *_ in group]
        if lines:
            path = " ".join("{:.1f},{:.1f}".format(*place) for place in places)
            shapes.append(LINE.format(colour, path))
        for (x, y, *label), place in zip(group, places):
            shapes.append(DOT.format(colour, *place, shown(name), x, y))
            if label or place is places[-1]:
                words = label[0] if label else f"{y:.3g}"
                names.append((colour, *place, shown(f"{name} {words}")))
    return shapes + names_beside(names), HEIGHT


def names_beside(names):
    """Names (colour, x, y, words) of places, in a column: each pushes the next one down."""
    shapes, free = [], 0
    for colour, x, y, words in sorted(names, key=lambda name: name[2]):
        free = max(y, free + 14)
        shapes.append(NAME.format(colour, x, y, free, free + 4, words))
    return shapes


def scale(low, high, start, end, unit=float):
    """-> a function that takes `low` to the pixel `start`, and `high` to `end`."""
    span = unit(high) - unit(low) or 1
    return lambda value: start + (end - start) * (unit(value) - unit(low)) / span


# Experts -----------------------------------------------------------------------------------------


def heat_map(scores, chosen: list, title="expert scores") -> str:
    """scores: (L, E), not negative. chosen: for each layer the experts to outline."""
    return picture([heat(f"{title}; outlined: chosen", scores, chosen)])


def heat(title, scores, chosen=(), which="expert"):
    """A row a layer, a column an expert, the score as opacity (it suits dark pages)."""
    largest = max(map(max, scores)) or 1.0
    E = len(scores[0])
    title = f"{title}; full colour: {largest:.4f}"
    return grid(title, which, range(E), scores, min(CELL, 560 // E), SCORE, 1 / largest, chosen)


def routing_picture(tokens: list[str], ids: list[list[int]], num_experts: int) -> str:
    """A column a token, a row a layer; a cell has the number and the colour of the token's first
    expert. ids: (L, T)."""
    title = f"A token's first of {num_experts} experts"
    panels = []
    for first in range(0, len(tokens), 12):
        part = slice(first, first + 12)
        heads = [token.replace(" ", "␣")[:6] for token in tokens[part]]
        rows = [row[part] for row in ids]
        # degrees of the colour wheel, so that neighbours have unlike colours
        panels.append(grid(title, "token", heads, rows, 48, EXPERT, 137.5))
    return picture(panels)


def grid(title, corner, heads, rows, width, template, scale, outlined=()):
    """heads: words above the columns, and `corner` says what they are. scale: makes of a value what
    the template shows as colour."""
    shapes = [text(LEFT, 20, title), text(LEFT - 6, 40, corner, "end")]
    for column in range(0, len(heads), ceil(24 / width)):
        shapes.append(text(LEFT + width * (column + 0.5), 40, heads[column], "middle"))
    for layer, row in enumerate(rows):
        y = 46 + CELL * layer
        shapes.append(text(LEFT - 6, y + 11, f"layer {layer}", "end"))
        for column, value in enumerate(row):
            x = LEFT + width * column
            rect = template.format(
                kind="chosen" if outlined and column in outlined[layer] else "cell",
                x=x,
                y=y,
                inner=width - 1,
                middle=x + width / 2,
                base=y + 11,
                layer=layer,
                column=column,
                value=value,
                shade=value * scale,
            )
            shapes.append(rect)
    return shapes, 60 + CELL * len(rows)


# A run -------------------------------------------------------------------------------------------


def run_picture(records: list[dict]) -> str:
    """What metrics.jsonl holds (train.py): loss, accuracy, and the load of the experts."""
    from data.skills import FAMILIES

    series = defaultdict(list)
    step = 0  # of what is measured before the first
    for record in records:
        step = record.get("step", step)
        for name, value in (record | record.get("accuracy", {})).items():
            series[name].append((step, value))

    losses = {name: series[name] for name in ("cross_entropy", "held_out") if name in series}
    tasks = [name for name in records[0].get("accuracy", {}) if name not in FAMILIES]
    shares = {name: series[name] for name in (*tasks, "kept") if name in series}
    panels = [plot(losses, "step", "cross-entropy of a token of the answer", "Loss")]
    if shares:
        panels.append(plot(shares, "step", "share of the rows answered right", "Accuracy"))
    for which in ("expert", "adapter"):
        loads = series[f"{which}_load"]
        for step, load in loads[:1] + loads[-1:]:
            title = f"Each {which}'s share of its layer's choices, step {step}"
            panels.append(heat(title, load, which=which))
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
def main(argv=None):
    parser = run.Parser(description="Draw RUN/run.svg: loss, accuracy, and the load of the experts")
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    draw(parser.parse_args(argv).run)


if __name__ == "__main__":
    main()
