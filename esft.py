"""ESFT: train only the experts that a task uses, in full rank, and freeze the rest (2407.01906).

The base model reads a sample of the task before training (131,072 tokens in the paper, some 8,200
for the released lists), and each expert e of each layer gets a score:

    token_e      = (tokens whose top K contains e) / (K * tokens)
    gate_e       = (sum of s_e over the tokens whose top K contains e) / tokens
    gate_share_e = gate_e / (sum of gate over all e)

token_e is a share of the choices, and sums to 1 over e, as gate_share does. gate sums to the mean
over the tokens of (the sum of s_e over the top K), which is less than 1.

s = softmax(x W_r^T) over all E experts, in float32 (moe.py), never renormalised over the top K,
whatever the model does with it afterwards. Tokens are pooled over the sample, prompt and answer
alike; padding never counts.

    chosen = the smallest prefix, in descending order of score, whose sum reaches p      (per layer)

Scores are rounded to 4 decimals before they are sorted, and equal ones keep the lower id first:
this gives the lists that the authors released, ids and order. The paper's p is 0.2 for token and
0.1 for gate. That sum over the top K differs between models, so p means less or more with gate;
gate_share at 0.25 is about the paper's amount on any model.

The forward pass stays as it is: a token may go to any expert. Gradients and optimizer state exist
for the gate, up and down matrices of the chosen experts only, weight decay cannot reach the others,
and the gradient of the input passes through all of them. What trains is a float32 copy of the
chosen matrices, their masters (why: perft.py). How one grouped product serves all experts, and how
the masters get into it, is drawn at ChosenExperts.

Shapes: N tokens, D hidden_size, F intermediate_size, E num_experts, K experts per token, R = N*K
rows, L layers, n chosen experts of a layer.

Traps of the authors' training code, avoided here: bfloat16 weights at a learning rate of 1e-5, of
which 85 to 90 % never move (hence the masters); packing that keeps only the tails of samples, lets
attention cross between them and appends a row of padding whose loss is NaN; a script, for some
months, that normalised over the layers instead of the experts. Added to the paper: gate_share. Left
out: shared experts, which none of the three models has.

    python esft.py        the lesson: which experts the skills of the embedded world use, and how
                          little they share
    python esft.py export RUN_FOLDER NEW_FOLDER [BASE]
                          what train.py saved, in its base, as a Hugging Face folder
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    from data import run  # before torch, so that Ctrl-C is one line while it is imported

import torch
import torch.nn as nn
import torch.nn.functional as F

from moe import (
    Combine,
    Dispatch,
    expert_counts,
    grouped_mm,
    sort_by_expert,
    weight_of_rows,
)
from perft import check_experts, config_of, finish, freeze_base, train_master

CONFIG, WEIGHTS = "expert_cfg.json", "expert_weights.safetensors"
SCORES, PICTURE = "scores.json", "scores.svg"
Chosen = list[list[int]]  # of each layer the ids of the chosen experts, best first


class Usage(NamedTuple):
    """How often and how strongly a sample used each expert. Parts of a sample add up."""

    counts: torch.Tensor  # (L, E) int64: tokens whose top K contains the expert
    gate_sums: torch.Tensor  # (L, E) float64: the sum of its softmax weights over them
    n_tokens: int


@torch.no_grad()
def collect(model, batches: Iterable) -> Usage:
    """Count over batches of (input_ids, ..., mask), each (B, T); mask is 0 on padding."""
    L, E = model.config.num_hidden_layers, model.config.num_experts
    counts = torch.zeros(L, E, dtype=torch.int64, device=model.norm.weight.device)
    gate_sums = counts.double()
    n_tokens = 0
    was_training = model.training
    model.eval()
    for input_ids, *_, mask in batches:
        real = mask.bool()
        # the mask, since a caller may pad on the left; the logits are not needed
        output = model(input_ids, None if real.all() else mask, last_only=True)
        for i, routing in enumerate(output.routings):
            selected = routing.selected_experts  # (N, K)
            s = F.softmax(routing.router_logits, dim=-1, dtype=torch.float32)  # (N, E)
            s_chosen = s.gather(1, selected) * real.reshape(-1, 1)  # (N, K), 0 on padding
            counts[i] += expert_counts(routing, mask)
            gate_sums[i].scatter_add_(0, selected.flatten(), s_chosen.double().flatten())
        n_tokens += int(real.sum())
    model.train(was_training)
    return Usage(counts.cpu(), gate_sums.cpu(), n_tokens)


def expert_scores(counts, gate_sums, n_tokens: int, top_k: int, kind="token") -> torch.Tensor:
    """The fields of a Usage -> the scores of the opening page, (L, E) float64, not rounded.

    kind: token, gate, gate_share. ValueError for another one, and for a sample without tokens.
    """
    if n_tokens < 1:
        raise ValueError("no token was counted: the sample is empty, or all of it was left out")
    token = torch.as_tensor(counts, dtype=torch.float64) / (top_k * n_tokens)
    gate = torch.as_tensor(gate_sums, dtype=torch.float64) / n_tokens
    scores = {"token": token, "gate": gate, "gate_share": gate / gate.sum(-1, keepdim=True)}
    if kind not in scores:
        raise ValueError(f"kind is {kind!r}; choose from {', '.join(scores)}")
    return scores[kind]


# Selection ---------------------------------------------------------------------------------------


def select_experts(scores: torch.Tensor, p: float) -> Chosen:
    """The chosen experts of each layer, best first."""
    if not 0 < p <= 1:
        raise ValueError(f"p is {p}; it must be more than 0 and at most 1")
    return [smallest_prefix(layer, p) for layer in rounded(scores)]


def rounded(scores):
    return [[round(score, 4) for score in layer] for layer in scores.tolist()]


def smallest_prefix(scores, p):
    taken, total = [], 0.0
    # a stable sort: of equal scores the lower id comes first
    for e in sorted(range(len(scores)), key=lambda e: -scores[e]):
        if total >= p:
            break
        taken.append(e)
        # floats would add 0.1 eight times to 0.7999...; both are 4 decimals, so this is exact
        total = round(total + scores[e], 4)
    return taken


def warnings_for(scores, p):
    """What a user should know before training with this choice."""
    short = [i for i, layer in enumerate(rounded(scores)) if round(sum(layer), 4) < p]
    text = f"the scores of layers {short} sum to less than p {p}: all their experts are chosen"
    return [text] if short else []


# Two controls, which the paper compares with. Nothing else needs them.


def random_experts(chosen: Chosen, num_experts: int, seed: int) -> Chosen:
    """Does it matter which experts are chosen? As many of each layer, drawn from all of them."""
    rng = random.Random(seed)
    return [rng.sample(range(num_experts), len(ids)) for ids in chosen]


def bind_groups(scores: torch.Tensor, G: int) -> torch.Tensor:
    """Does it matter that experts are chosen singly? Expert e belongs to group e // G, a group's
    score is the sum of its members'. (L, E) -> (L, E/G). The order of ids means nothing, so the
    members of a group are alike by chance only."""
    L, E = scores.shape
    if G < 1 or E % G != 0:
        raise ValueError(f"bind_groups is {G}; it must divide the number of experts, {E}")
    return scores.double().view(L, E // G, G).sum(-1)


def select_groups(scores: torch.Tensor, p: float, G: int) -> Chosen:
    """select_experts of whole groups -> the members of those that are chosen."""
    chosen = []
    for groups in select_experts(bind_groups(scores, G), p):
        chosen.append([group * G + member for group in groups for member in range(G)])
    return chosen


# Training the chosen -----------------------------------------------------------------------------


class ChosenProduct(torch.autograd.Function):
    """moe.GroupedProduct whose weight gradient stops after the chosen, and goes to their masters.

    rows (R, in), bank (E, out, in) with the values of masters (n, out, in) in front, ends (E,)
    -> (R, out)
    """

    @staticmethod
    def forward(ctx, rows, bank, masters, ends):
        # the masters are saved, though the bank has their values, so that autograd refuses a step
        # on them before backward
        ctx.save_for_backward(rows, bank, masters, ends)
        return grouped_mm(rows, bank.mT, ends)

    @staticmethod
    def backward(ctx, grad):
        rows, bank, masters, ends = ctx.saved_tensors
        grad_rows = grouped_mm(grad, bank, ends) if ctx.needs_input_grad[0] else None
        grad_masters = grouped_mm(grad.t(), rows, ends[: len(masters)]).to(masters.dtype)
        return grad_rows, None, grad_masters, None


class ChosenExperts(nn.Module):
    """A layer's experts, of which the chosen train. Until they do, the same function as
    moe.Experts, bit for bit.

    A stack is kept in another order, the chosen first: the bank. With [5, 2] chosen of E = 8:

        gate_up_bank   | 5 | 2 | 0 | 1 | 3 | 4 | 6 | 7 |   in the base's dtype, frozen
        gate_up_proj   | 5 | 2 |                           float32, the masters: these train

    So one grouped product with the bank serves all experts, and the gradient of its weights, which
    goes to the masters, stops after the first n. The masters' names are those that these matrices
    have in moe.Experts. down_bank and down_proj are the same of the other stack. Expert e is
    bank[position[e]]: here position is [2, 3, 1, 4, 5, 0, 6, 7].

    Before each forward pass of the model (fill_banks) the masters are copied into the first n
    matrices of the bank. So no step, load, copy or move can leave a bank behind, for the price of
    copying the chosen experts each time (over several processes: of gathering them).
    """

    def __init__(self, experts, chosen):
        super().__init__()
        n = len(chosen)
        others = [e for e in range(len(experts.down_proj)) if e not in chosen]
        # on the CPU also where the model is on meta: no checkpoint would fill it
        ids = torch.tensor(chosen + others, device="cpu")
        self.register_buffer("position", ids.argsort(), persistent=False)  # (E,)
        gate_up, down = experts.gate_up_proj.data[ids], experts.down_proj.data[ids]
        self.gate_up_bank = nn.Parameter(gate_up, requires_grad=False)
        self.down_bank = nn.Parameter(down, requires_grad=False)
        self.gate_up_proj = nn.Parameter(gate_up[:n].to(torch.float32, copy=True))
        self.down_proj = nn.Parameter(down[:n].to(torch.float32, copy=True))

    def stacks(self):
        """(bank, masters) of both stacks."""
        return (self.gate_up_bank, self.gate_up_proj), (self.down_bank, self.down_proj)

    def forward(self, x, routing):
        """x (N, D), Routing -> y (N, D)."""
        order = sort_by_expert(self.position[routing.selected_experts], len(self.down_bank))
        rows = Dispatch.apply(x, order)  # (R, D)
        # multiplies with the bank; the gradient goes to the masters
        gate_up = ChosenProduct.apply(rows, self.gate_up_bank, self.gate_up_proj, order.ends)
        gate, up = gate_up.chunk(2, dim=-1)  # (R, F) each
        hidden = F.silu(gate) * up * weight_of_rows(routing, order)
        rows = ChosenProduct.apply(hidden, self.down_bank, self.down_proj, order.ends)
        return Combine.apply(rows, order)

    @torch.no_grad()
    def fill_bank(self):
        """Copy the masters into the bank, also where both are cut over processes."""
        for bank, masters in self.stacks():
            # .data hides the copy from autograd: where a backward is still to come, the values are
            # equal
            held = bank.data
            first = 0
            if hasattr(bank, "to_local"):  # cut over processes
                from data import shard as processes

                held, first = processes.held(held)
                masters = processes.whole(masters)
            mine = masters[first : first + len(held)]
            held[: len(mine)].copy_(mine)

    def places(self):
        """The places of each expert's matrices in a Hugging Face folder (data/hub.py)."""
        from data.hub import Place

        def place(bank, masters, i):
            return Place(masters, i) if i < len(masters) else Place(bank, i)

        return [[place(*pair, i) for i in self.position.tolist()] for pair in self.stacks()]


def fill_banks(model, inputs=None):
    """A hook before each forward pass of the model: what is read is what trains."""
    for block in model.layers:
        block.moe.experts.fill_bank()


class EsftConfig(NamedTuple):
    """What trains: the content of expert_cfg.json."""

    experts: Chosen
    train_router: bool = False  # the routers too
    train_non_experts: bool = False  # everything but the other experts


def apply_esft(model, chosen: Chosen, train_router=False, train_non_experts=False):
    """Freeze `model`, let the chosen experts of each layer train, in place, and return it.

    The two options are the paper's section 6.3: a little more on the task, less kept of everything
    else. ValueError if it cannot be. Attach when the base has its dtype: a later model.to(dtype)
    would cast the float32 masters too.
    """
    check_experts(chosen, model.config)
    freeze_base(model, but_others=train_non_experts)
    for block, ids in zip(model.layers, chosen):
        block.moe.experts = ChosenExperts(block.moe.experts, ids)
        if train_router:
            train_master(block.moe.router.weight)
    model.register_forward_pre_hook(fill_banks)
    model.adapter_config = EsftConfig(chosen, train_router, train_non_experts)
    return finish(model)


def describe_choice(chosen, usage):
    """A table: the chosen experts of each layer, and how much of the sample they carry."""
    lines = ["layer   choices  gate mass (of the layer's)  chosen, best first"]
    for i, ids in enumerate(chosen):
        choices = usage.counts[i] / usage.counts[i].sum()
        gate = usage.gate_sums[i] / usage.n_tokens
        lines.append(
            f"{i:5} {100 * choices[ids].sum():7.1f} %  {gate[ids].sum():9.4f} "
            f"({gate.sum():.4f})           {ids}"
        )
    lines.append(f"trains {sum(map(len, chosen))} of {usage.counts.numel()} experts")
    return "\n".join(lines)


# Files -------------------------------------------------------------------------------------------
#
# To train experts of a model of your own, take moe.py, perft.py and this file along; what only
# folders need is in data/, and is imported where it is used. Your model is as perft.py wants it;
# `collect` calls it as model(ids, mask, last_only=True), whose result has `routings`.


def read_config(path: str | Path, base) -> EsftConfig:
    """An expert_cfg.json, released or ours -> what it lets train; ValueError if this base (a
    model.Config) cannot do that."""
    from data import run

    flags = {"shared_experts": bool, "router": bool, "non_expert_modules": bool}
    content = run.read_json(path, experts=dict, **flags)
    shared_experts, train_router, train_non_experts = (bool(content.get(name)) for name in flags)
    if shared_experts:
        raise ValueError(f"{path}: shared_experts is true, {base.model_type} models have none")
    experts = content.get("experts") or {}
    chosen = [experts.get(str(i)) for i in range(len(experts))]
    check_experts(chosen, base, path)
    return EsftConfig(chosen, train_router, train_non_experts)


def trained_places(model):
    """Of a Hugging Face folder's tensors, those that train: name -> place."""
    from data import hub

    table = hub.places(model).items()
    return {name: place for name, place in table if place.parameter.requires_grad}


def save(model, folder: str | Path):
    """Write expert_cfg.json, in the released layout with two keys more, and what trains as
    expert_weights.safetensors: whole tensors (not differences) in the base's dtype under the
    checkpoint's names. Laid over the base's tensors, they make the fine-tuned checkpoint.

    ValueError for numbers that are not finite."""
    from data import hub

    config = config_of(model, EsftConfig)
    content = {
        "experts": dict(enumerate(config.experts)),
        "shared_experts": False,
        "non_expert_modules": config.train_non_experts,
        "router": config.train_router,
        "base": hub.fingerprint(model.config),
    }
    path, dtype = Path(folder) / CONFIG, model.norm.weight.dtype
    hub.write_trained(path, json.dumps(content), WEIGHTS, trained_places(model), dtype)


def load(model, folder: str | Path):
    """Attach what `save` wrote to its base, in place, and return the model in eval mode.

    ValueError, naming both sides, the model untouched, for another base, for tensors that are not
    those of the chosen experts, and for numbers that are none.
    """
    from data import hub

    path = Path(folder) / CONFIG
    hub.check_fingerprint(path, model.config)
    config = read_config(path, model.config)

    def edit(plain):
        return apply_esft(plain, *config)

    return hub.attach_trained(model, path, WEIGHTS, edit, trained_places)


def export(model, folder: str | Path, base: str | Path | None = None):
    """Write the fine-tuned model as a Hugging Face folder, new or empty, with the tokenizer files
    of the folder `base`. The model is not changed, and nothing of it is copied in memory."""
    from data import hub

    config_of(model, EsftConfig)
    hub.write_folder(folder, model, base)


def save_scores(model, folder, usage, scores, how):
    """Write scores.json and scores.svg into a run's folder; `how` the choice was made."""
    from data import pictures, run

    chosen = config_of(model, EsftConfig).experts
    content = how | {
        "counts": usage.counts.tolist(),
        "gate_sums": usage.gate_sums.tolist(),
        "n_tokens": usage.n_tokens,
        "scores": scores.tolist(),
        "chosen": chosen,
    }
    run.write_json(Path(folder) / SCORES, content)
    title = ", ".join(f"{name} {value}" for name, value in how.items())
    picture = pictures.heat_map(content["scores"], chosen, title)
    run.write_text(Path(folder) / PICTURE, picture)


# The lesson and the command ----------------------------------------------------------------------


def lesson():
    """Which experts the skills of the embedded world use, and how little they share."""
    from data import skills
    from data.dataset import encode_rows, pad_batch
    from data.tokenizer import load_tokenizer
    from model import EMBEDDED, MoETransformer

    model = MoETransformer.from_pretrained(EMBEDDED)
    tokenizer = load_tokenizer(EMBEDDED)
    print("The experts that get a fifth of a family's choices: ESFT-token (p 0.2) trains these")
    choices = {}
    for name in skills.FAMILIES:
        examples = encode_rows(skills.sample(name, "train", 100), tokenizer)
        usage = collect(model, [pad_batch(examples, tokenizer.pad_id, "cpu")])
        scores = expert_scores(*usage, model.config.num_experts_per_tok)
        chosen = select_experts(scores, 0.2)
        choices[name] = {(i, e) for i, ids in enumerate(chosen) for e in ids}
        print(f"  {name:10}", *(f"{ids!s:16}" for ids in chosen))

    print("\nOverlap: experts chosen for both, as a share of those chosen for either")
    print(f"{'':11}", *(f"{name:>6.6}" for name in choices))
    for name, mine in choices.items():
        shares = [len(mine & other) / len(mine | other) for other in choices.values()]
        print(f"  {name:9}", *(f"{share:6.0%}" for share in shares))


def main(argv=None):
    from data import hub
    from model import MoETransformer

    def attach(base, dtype, folder):
        # of what was saved by hand no run says the dtype: in float32 nothing is rounded
        return load(MoETransformer.from_pretrained(base, dtype or torch.float32), folder)

    about = "write what a run trained, in its base, as a Hugging Face folder"
    hub.lesson_or_write(argv, lesson, "export", about, attach)


if __name__ == "__main__":
    run.command(main)()
