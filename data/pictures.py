"""ESFT's expert scores as a picture: SVG, made of text.

Coordinates are pixels, x to the right and y downwards. Colours stand in a style at the head of each
picture, by class, so that a page in dark mode gets its own.
"""

from html import escape

CELL = 14  # pixels, the side of a cell
MARGIN = 50  # pixels, to the left of the cells and above them
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}">
<style>
text {{ font: 11px sans-serif; fill: #555 }} \
rect {{ fill: #0072b2; stroke: #888; stroke-width: 0.3 }}
.chosen, .key {{ fill: none; stroke: #e07b00; stroke-width: 2 }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #bbb }} .cell, .step {{ fill: #56b4e9 }} }}
</style>"""


def heat_map(scores, chosen: list, title="expert scores") -> str:
    """A row a layer, a column an expert, the score as opacity (it suits dark pages).

    scores: a tensor (L, E), not negative. chosen: for each layer the experts to outline.
    """
    L, E = scores.shape
    largest = scores.max().item() or 1.0
    columns = max(E, 26)  # the key needs so many
    shapes = [
        HEAD.format(MARGIN + CELL * columns + 10, MARGIN + CELL * L + 40),
        label(0, -2.5, escape(title), "start"),
        label(E / 2, -1.3, "expert"),
        label(-0.5, -0.3, "layer", "end"),
    ]
    every = 1 if E <= 8 else 4
    for e in range(0, E, every):
        shapes.append(label(e + 0.5, -0.3, e))
    for layer, row in enumerate(scores.tolist()):
        shapes.append(label(-0.5, layer + 0.8, layer, "end"))
        for e, score in enumerate(row):
            about = f"layer {layer}, expert {e}: {score:.4f}"
            shapes.append(cell("cell", e, layer, score / largest, about))
    for layer, experts in enumerate(chosen):  # later shapes lie on earlier ones
        for e in experts:
            shapes.append(cell("chosen", e, layer))

    # The key, below: the opacities from no score to the largest, and the outline.
    shapes.append(label(-0.5, L + 1.8, "0", "end"))
    for step in range(9):
        shapes.append(cell("step", step, L + 1, step / 8))
    shapes += [
        label(9.5, L + 1.8, f"{largest:.4f}", "start"),
        label(15.5, L + 1.8, "chosen: these train", "start"),
        cell("key", 14, L + 1),
    ]
    return "\n".join([*shapes, "</svg>\n"])


def cell(kind, column, row, opacity=0.0, about=""):
    """A square of a class `kind`; `about` is shown when the pointer rests on it."""
    x, y = MARGIN + CELL * column, MARGIN + CELL * row
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL}" height="{CELL}" '
        f'fill-opacity="{opacity:.3f}"><title>{about}</title></rect>'
    )


def label(column, row, words, anchor="middle"):
    """Words on a base line, that end, have their middle, or start at a place among the cells."""
    x, y = MARGIN + CELL * column, MARGIN + CELL * row
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'
