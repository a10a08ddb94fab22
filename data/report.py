"""What a run shows: the table of what trains, with shares of the base, and the heat map of ESFT's expert scores.

A parameter that is stacked (experts [E, ., .], adapters [M, ., .]) trains as a whole, yet one token meets only K of its
E or M parts. Both numbers are counted, from the model as it is: nothing here knows a formula, so that perft.py can hold
the formulas of the papers against it.
"""

import re
from html import escape
from typing import NamedTuple

import torch
import torch.nn as nn

from model import MoETransformer, active_parameters


class Trained(NamedTuple):
    """One line of the table of what trains: the same parameter of every layer."""

    module: str  # with * for the layer
    count: int
    shape: str  # 1x16x128; 2..4x96x128 where the layers differ
    parameters: int
    activated: int  # of them, those that one token meets


def what_trains(model: MoETransformer) -> list[Trained]:
    """The trainable parameters, one line a kind."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(p)
    rows = []
    for name, ps in groups.items():
        met = sum(p.numel() * share_met(model, name, p) for p in ps)
        first, last = min(len(p) for p in ps), max(len(p) for p in ps)
        shape = "x".join(map(str, (first if first == last else f"{first}..{last}", *ps[0].shape[1:])))
        rows.append(Trained(name, len(ps), shape, sum(p.numel() for p in ps), round(met)))
    return rows


def share_met(model: MoETransformer, name: str, p: nn.Parameter) -> float:
    """The share of a parameter that one token meets: at most K of the experts (adapters) that are stacked in it."""
    variant = getattr(getattr(model, "adapter_config", None), "variant", "")
    if ".adapters." in name and name[-1] in "AB" and variant == "perft_r":
        return model.adapter_config.top_k / len(p)
    if ".experts." in name or (".adapters." in name and variant == "perft_e"):
        return min(model.config.num_experts_per_tok, len(p)) / len(p)
    return 1.0


def report(model: MoETransformer) -> str:
    """The table of what trains; ValueError if nothing does."""
    rows = what_trains(model)
    if not rows:
        raise ValueError("nothing trains: no parameter has requires_grad")
    sums = {key: sum(getattr(row, key) for row in rows) for key in ("count", "parameters", "activated")}
    rows.append(Trained("all that trains", shape="", **sums))
    with torch.device("meta"):  # the base by itself, whatever was attached to this one
        total = sum(p.numel() for p in MoETransformer(model.config).parameters())
    active = active_parameters(model)
    lines = [f"{'module':40} {'count':>5} {'shape':>16} {'parameters':>13} {'% total':>8} {'% active':>8}"]
    for module, count, shape, parameters, activated in rows:
        lines.append(f"{module:40} {count:5} {shape:>16} {parameters:13,} "
                     f"{100 * parameters / total:8.3f} {100 * activated / active:8.3f}")  # fmt: skip
    return "\n".join(lines + [f"base model: {total:,} parameters, {active:,} active for a token"])


# The heat map --------------------------------------------------------------------------------------------------------

STYLE = """<style>
text { font: 11px sans-serif; fill: #555 } rect { fill: #0072b2; stroke: #888; stroke-width: 0.3 }
.chosen, .key { fill: none; stroke: #e07b00; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #bbb } .cell, .step { fill: #56b4e9 } }
</style>"""


def heat_map(scores: torch.Tensor, chosen: list[list[int]], title="expert scores") -> str:
    """An SVG: a row a layer, a column an expert, the score as opacity (it suits dark pages); the chosen outlined."""
    (L, E), largest = scores.shape, scores.max().item() or 1.0

    def rect(kind, column, row, opacity=0.0, about=""):
        place = f'x="{50 + 14 * column}" y="{50 + 14 * row}" width="14" height="14"'
        return f'<rect class="{kind}" {place} fill-opacity="{opacity:.3f}"><title>{about}</title></rect>'

    def text(column, row, words, anchor="middle"):
        place = f'x="{50 + 14 * column:g}" y="{50 + 14 * row:g}"'
        return f'<text {place} text-anchor="{anchor}">{escape(str(words))}</text>'

    parts = [text(0, -2.5, title, "start"), text(E / 2, -1.3, "expert"), text(-0.5, -0.3, "layer", "end")]
    parts += [text(e + 0.5, -0.3, e) for e in range(0, E, 1 if E <= 8 else 4)]
    for i, layer in enumerate(scores.tolist()):
        parts.append(text(-0.5, i + 0.8, i, "end"))
        parts += [rect("cell", e, i, s / largest, f"layer {i}, expert {e}: {s:.4f}") for e, s in enumerate(layer)]
    parts += [rect("chosen", e, i) for i, ids in enumerate(chosen) for e in ids]
    parts += [text(-0.5, L + 1.8, "0", "end"), *(rect("step", i, L + 1, i / 8) for i in range(9))]  # the legend
    parts += [text(9.5, L + 1.8, f"{largest:.4f}", "start"), text(15.5, L + 1.8, "chosen: these train", "start")]
    parts.append(rect("key", 14, L + 1))
    size = f'width="{60 + 14 * max(E, 26)}" height="{90 + 14 * L}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', STYLE, *parts, "</svg>\n"])
