"""What a run shows: the table of what trains, with shares of the base, the memory that it will take, and the heat map
of ESFT's expert scores.

A parameter that is stacked (experts [E, ., .], adapters [M, ., .]) trains as a whole, yet one token meets only K of its
E or M parts. Both numbers are counted, from the model as it is: nothing here knows a formula, so that perft.py can hold
the formulas of the papers against it.
"""

import copy
import re
from html import escape
from typing import NamedTuple

import torch
import torch.nn as nn

from model import CrossEntropy, MoETransformer, Rotary, active_parameters


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


# Memory --------------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes on one device at the peak of a step, the backward pass of the last micro-batch's last layers."""

    weights: int  # frozen ones
    trained: int  # float32 adapters, masters, or weights of the base
    gradients: int
    optimizer: int  # AdamW's two moments
    gathered: int  # of several devices: the layers that are whole at a time, the one at work and the next
    activations: int  # of a micro-batch
    tokens: int  # of it

    @property
    def total(self) -> int:
        return sum(self[:-1])

    def __str__(self):
        working = f"activations {self.tokens:,} tokens x {self.activations / self.tokens / 2**20:.2f} MiB ="
        parts = {"weights": self.weights, "trains": self.trained, "gradients + AdamW": self.gradients + self.optimizer,
                 "gathered": self.gathered, working: self.activations}  # fmt: skip
        text = ", ".join(f"{name} {n / 1e9:,.2f}" for name, n in parts.items() if n)
        return f"memory in GB a device: {text}, total {self.total / 1e9:,.1f}"


def memory_estimate(model: MoETransformer, batch: int, length: int, compiled=False, devices=1) -> Memory:
    """What a step on (batch, length) tokens will take; `model` with all that trains attached, best on "meta", before
    its weights are loaded. Left out: the CUDA context (about 0.5 GB) and what the allocator wastes (5 to 10 %)."""
    c, tokens, dtype = model.config, batch * length, model.norm.weight.dtype
    everything, trained = (sum(p.nbytes for p in model.parameters() if p.requires_grad >= only) for only in (0, 1))
    layers = [sum(p.nbytes * (1 + p.requires_grad) for p in block.parameters()) for block in model.layers]
    root = everything - sum(p.nbytes for p in model.layers.parameters())
    gathered = root + sum(layers[:2]) if devices > 1 else 0  # with the gradients not yet given away

    kept = kept_compiled(model) if compiled else kept_by(model.layers[0], model)  # bytes a token
    inputs, L = c.hidden_size * dtype.itemsize, c.num_hidden_layers
    # the layers, and in passing about as much again for the one whose gradients are being made
    activations = tokens * (L * inputs + 2 * kept if model.checkpoint_activations else (L + 1) * kept)
    activations += tokens * (3 * inputs + 4 * c.hidden_size)  # last norm, rows with a label (all, at most), gradient
    activations += min(tokens, CrossEntropy.CHUNK) * c.vocab_size * (4 + dtype.itemsize)  # logits in passing
    activations += 8 * model.lm_head.weight.numel() * model.lm_head.weight.requires_grad  # its gradient, a chunk's too
    frozen, trained = (everything - trained) // devices, trained // devices
    return Memory(frozen, trained, trained, 2 * trained, gathered, round(activations), tokens)


def kept_by(block: nn.Module, model: MoETransformer, tokens=(8, 24)) -> float:
    """Bytes a token that autograd keeps of one block, found by running it on a CPU, with zeros for weights: they take
    no memory before they are written. Two lengths, as adapters cast to the base's dtype count once, not by token."""
    layer, c, dtype, kept = copy.deepcopy(block), model.config, model.norm.weight.dtype, []
    layer._apply(lambda t: torch.zeros(t.shape, dtype=t.dtype, device="cpu")).train()
    for T in tokens:
        rotary = Rotary.at(torch.arange(T), c, dtype)
        storages, x = {}, torch.zeros(1, T, c.hidden_size, dtype=dtype, requires_grad=True)

        def note(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = layer(x, rotary)
        for t in (*layer.parameters(), *layer.buffers()):
            storages.pop(t.untyped_storage().data_ptr(), None)
        kept.append(sum(storages.values()))
        del out
    return (kept[1] - kept[0]) / (tokens[1] - tokens[0])


def kept_compiled(model: MoETransformer) -> int:
    """The same of a compiled block: it keeps the results of matrix products and makes what lies between them again.
    Numbers a token: the two norms' inputs; q, k, v and the attention's result; q and k before OLMoE's norms; gate and
    up of K experts; and where weights train, the inputs of their products."""
    c, trains = model.config, {name for name, p in model.layers[0].named_parameters() if p.requires_grad}
    q, kv, K = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.num_experts_per_tok
    numbers = 2 * c.hidden_size + 2 * q + 2 * kv + (q + kv) * (c.model_type == "olmoe") + 2 * K * c.intermediate_size
    if any(".experts." in name for name in trains):
        numbers += K * (c.hidden_size + c.intermediate_size)
    for name, p in model.layers[0].named_parameters():  # the bottlenecks of adapters
        numbers += p.shape[:-1].numel() if name in trains and name.endswith(".A") else 0
    return numbers * model.norm.weight.dtype.itemsize


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
