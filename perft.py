"""PERFT: adapters beside the experts of a frozen MoE model (arXiv 2411.08212, 2508.02587).

The frozen block computes y = sum over e in TopK(x) of G(x)_e FFN_e(x)  (moe.py, eq. 1, where
G(x)_e is called w_e). PERFT adds small two-matrix adapters Delta: D -> r -> D that read the same
input x, outside of the experts, and differ in who is asked:

    perft_s   y += Delta(x)                                       one adapter for all      (single)
    perft_d   y += sum over j = 1..M of Delta_j(x)                all M, weight 1 each     (dense)
    perft_r   y += sum over j in TopK~(x) of G~(x)_j Delta_j(x)   M, own router            (routed)
    perft_e   y += sum over e in TopK(x) of G(x)_e Delta_e(x)     one an expert          (embedded)

The unit:  lora       Delta(x) = (dropout(x) A^T) B^T * alpha / r
           parallel   Delta(x) = silu(dropout(x A^T)) B^T          (A, B are the papers' W1, W2)

S, D and R are one computation: the bottlenecks of all M adapters are one product x A^T (N, M*r), a
gate (N, M) weighs it (R; S and D have none), one product with B^T leads back. All M are computed,
also those that a token did not choose: cheaper than sorting tokens while M*r stays in the hundreds.
perft_e has an adapter for each of many experts (OLMoE, r = 16: M*r = 1,024), so it sorts the tokens
by expert, as moe.py does, and computes the chosen ones.

perft_r's own router G~ renormalises its Top K weights if and only if the base does. With equal
adapters, R of one is S, D of M is M times S, and where the base renormalises R and E are S.

It is not LoRA on the experts: an adapter never touches an expert's own matrices, it stands beside
the whole expert. So perft_e needs nothing of the expert but the router's choice and weight. For the
same reason PERFT cannot be merged into the base: no weight of a SwiGLU expert is the sum of the
expert and a network beside it.

Baselines in the same file. LoRA, W + B A alpha/r, which can be merged, and is saved as PEFT saves
it: lora_qv on the attention's q and v projections, lora_experts on the gate_up and down matrix of
each expert e, W_e + B_e A_e alpha/r. Then router (only the pretrained routers), frozen_experts
(everything but the experts, MoFE), full (everything).

A token meets K experts, so of lora_experts K times rank r; papers that compare at an equal budget
take r/K. shared_outer: the halves that face the token, A of gate_up and B of down, are one for all
experts of a layer, and are met once.

Notation: the papers' A, B, r, alpha, M, Top K of M. Shapes: N tokens, D hidden_size, F
intermediate_size, E num_experts, R = N*K rows, M adapters, r rank. What is attached is float32
whatever the base is, and is cast for the product: at a learning rate of 1e-5 most steps are too
small to change a bfloat16 number. The float32 copy of a weight of the base that trains is called
its master.

Three facts, never silent here:
  1. The released OLMoE code of PERFT-R weights the adapters by the *base* router's K largest
     weights, rank by rank, so that its own router chooses but never learns from the task.
     adapter_weights="own" is the paper, "base" that code.
  2. With top_k = 1 and a base that renormalises (Mixtral), the one weight is x / x = 1: again
     nothing to learn from. Warned.
  3. init="paper": A ~ N(0, 2/r), B ~ 1e-6 N(0, 1); init="lora": Kaiming-uniform A, B = 0, with
     which every variant is the base model bit for bit. The two want different learning rates.
     (R's own router ~ N(0, 0.02^2) with both.)

Against the authors' code: its adapters draw a dropout mask each, here they share one. Left out: E
with S, D or R.

To add a variant: its name in PERFT, its line in PerftMoE.forward, its M in Adapters, what a token
meets in share_met, and its flags and learning rate in train.py.

To attach this to a model of your own, take moe.py and this file along. The model needs `layers`,
each with a `moe` (and `self_attn.q_proj`, `v_proj` for lora_qv), `norm.weight`, and a `config` with
num_hidden_layers, hidden_size, num_experts, num_experts_per_tok and norm_topk_prob.

    python perft.py        the lesson: what each variant trains
    python perft.py merge RUN_FOLDER NEW_FOLDER [BASE]
                           a LoRA that train.py or PEFT saved, in its base, as a Hugging Face folder
"""

import json
import math
import re
import shutil
from dataclasses import asdict, dataclass
from functools import partial
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
    Experts,
    GroupedProduct,
    Router,
    Routing,
    grouped_mm,
    packed,
    sort_by_expert,
    weight_of_rows,
)

PERFT = ("perft_s", "perft_d", "perft_r", "perft_e")
LORA = {  # and what PEFT calls the weights that change
    "lora_qv": {"target_modules": ["q_proj", "v_proj"]},
    "lora_experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    },
}
BASELINES = (*LORA, "router", "frozen_experts", "full")
NUMBERS = range(1, 65_537)
CHOICES = {
    "variant": PERFT + BASELINES,
    "kind": ("lora", "parallel"),
    "init": ("paper", "lora"),
    "adapter_weights": ("own", "base"),
    "rank": NUMBERS,
    "num_adapters": NUMBERS,
    "top_k": NUMBERS,
}
# Options that most variants do not have. (PEFT's layout, which LoRA has, has no place for routers.)
OF_SOME = {
    "train_router": PERFT,
    "shared_outer": ("lora_experts",),
    "experts": ("perft_e", "lora_experts"),
}


@dataclass
class PerftConfig:
    """What was attached: the options of `apply_perft`, and the content of adapter_config.json.

    ValueError, in one line, for options that no model could have.
    """

    variant: str
    rank: int = 16
    alpha: float | None = None  # None: 2 * rank, as in the papers
    num_adapters: int = 4  # M of perft_d and perft_r
    top_k: int = 2  # K of perft_r
    kind: str = "lora"
    init: str = "paper"
    adapter_weights: str = "own"
    dropout: float = 0.05
    train_router: bool = False  # also train the pretrained routers
    shared_outer: bool = False  # of lora_experts
    # perft_e and lora_experts: for these experts of each layer only
    experts: list[list[int]] | None = None

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if type(value) not in (int, str) or value not in allowed:
                self.refuse(name, f"it must be in {allowed}")
        if self.alpha is None:
            self.alpha = 2.0 * self.rank
        for name, end in (("alpha", 1e300), ("dropout", 1)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < end:
                self.refuse(name, f"it must be a number from 0, less than {end}")
        if self.variant in LORA:
            self.init = "lora"
        if self.top_k > self.num_adapters and self.variant == "perft_r":
            self.refuse("top_k", f"there are {self.num_adapters} adapters to choose from; lower it")
        for name, variants in OF_SOME.items():
            if getattr(self, name) and self.variant not in variants:
                self.refuse("variant", f"{name} is of {', '.join(variants)} only")

    def refuse(self, name, why):
        raise ValueError(f"{name} is {str(getattr(self, name))[:100]}; {why}")

    def check_base(self, base):
        """ValueError, in one line, for options that this base (a model.Config) cannot have."""
        k = base.num_experts_per_tok
        if self.variant == "perft_r" and self.adapter_weights == "base" and self.top_k > k:
            self.refuse("top_k", f"with adapter_weights 'base' there are {k} weights a token")
        if self.experts is not None:
            check_experts(self.experts, base)


def check_experts(chosen, base, place="experts"):
    """ValueError unless `chosen` has a list of different expert ids of `base` for each layer."""
    L, E = base.num_hidden_layers, base.num_experts
    if type(chosen) is not list or len(chosen) != L:
        raise ValueError(f"{place}: not given for each of the model's {L} layers")
    for i, ids in enumerate(chosen):
        is_list = type(ids) is list and all(type(e) is int for e in ids)
        if not is_list or not 0 < len(ids) == len(set(ids).intersection(range(E))):
            text = f"{str(ids)[:100]} is no list of different experts from 0..{E - 1}"
            raise ValueError(f"{place}: layer {i}: {text}")


# PERFT -------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A (r, in) and B (out, r), or stacks of them, float32: in -> r -> out.

    Row j of a stack is that of expert `experts[j]` of a layer's E (None: of expert j).
    """

    def __init__(self, config, A, B, experts=None, E=None):
        """A, B: their shapes."""
        super().__init__()
        self.A = nn.Parameter(torch.empty(A, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(B, dtype=torch.float32))
        self.E = E
        # real even if the base is on meta: no checkpoint has these ids, so nothing would fill them
        ids = None if experts is None else torch.tensor(experts, device="cpu")
        self.register_buffer("experts", ids, persistent=False)
        self.scale = config.alpha / config.rank
        self.drop = nn.Dropout(config.dropout)
        if config.init == "paper":
            nn.init.normal_(self.A, std=math.sqrt(2 / config.rank))
            nn.init.normal_(self.B, std=1e-6)
        else:
            # kaiming_uniform_ with a = sqrt(5), which would take r*D of a stack for the fan-in
            bound = A[-1] ** -0.5
            nn.init.uniform_(self.A, -bound, bound)
            nn.init.zeros_(self.B)

    def of_experts(self, dtype):
        """A and B of all experts, for rows that are sorted by expert; of a rank that F.grouped_mm
        takes in any dtype."""
        pad = (-self.A.shape[1]) % 8
        A = F.pad(self.A.to(dtype), (0, 0, 0, pad))
        B = F.pad(self.B.to(dtype), (0, pad))
        return self.spread(A), self.spread(B)

    def spread(self, stack):
        """A stack of some experts -> of all, zeros for the others; or of one for all, repeated."""
        if self.experts is None or len(stack) < len(self.experts):
            return stack.expand(self.E, -1, -1).contiguous()
        ids = self.experts.to(stack.device)
        return stack.new_zeros(self.E, *stack.shape[1:]).index_copy(0, ids, stack)


class PerftRouting(NamedTuple):
    """moe.Routing of the experts, and beside it what the adapters' own router decided."""

    router_logits: torch.Tensor  # (N, E)
    routing_weights: torch.Tensor  # (N, K)
    selected_experts: torch.Tensor  # (N, K)
    adapter: Routing  # of perft_r's router: (N, M), (N, Top K), (N, Top K)


class Adapters(Pair):
    """M adapters of one layer: A (M, r, D), B (M, D, r); for PERFT-R a router (M, D)."""

    def __init__(self, config, base, layer):
        experts = config.experts and config.experts[layer]  # None: all
        r, D, E = config.rank, base.hidden_size, base.num_experts
        counts = {"perft_s": 1, "perft_e": len(experts or range(E))}
        M = counts.get(config.variant, config.num_adapters)
        super().__init__(config, (M, r, D), (M, D, r), experts, E)
        self.kind = config.kind
        self.router = None
        if config.variant == "perft_r":
            self.router = Router(D, M, config.top_k, base.norm_topk_prob)
            nn.init.normal_(self.router.weight, std=0.02)

    def forward(self, x, gate):
        """sum over j of gate_j Delta_j(x), all M computed.

        x (N, D), gate (N, M) or None for weight 1 -> (N, D)
        """
        M, r, D = self.A.shape
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        hidden = self.after_A(F.linear(self.before_A(x), A.reshape(M * r, D)))  # (N, M*r)
        if gate is not None:
            hidden = hidden * gate.repeat_interleave(r, dim=1)
        return hidden @ B.transpose(1, 2).reshape(M * r, D)

    def beside_experts(self, x, routing):
        """The same for perft_e, only the chosen computed: an adapter is asked when its expert is,
        under its weight.

        x (N, D), routing of the experts -> (N, D)
        """
        A, B = self.of_experts(x.dtype)
        order = sort_by_expert(routing.selected_experts, self.E)
        hidden = self.after_A(GatheredProduct.apply(self.before_A(x), A, order))  # (R, r)
        hidden = hidden * weight_of_rows(routing, order)
        return Combine.apply(GroupedProduct.apply(hidden, B, order.ends), order)

    def before_A(self, x):
        return self.drop(x) if self.kind == "lora" else x

    def after_A(self, hidden):
        return hidden * self.scale if self.kind == "lora" else F.silu(self.drop(hidden))


class GatheredProduct(torch.autograd.Function):
    """GroupedProduct of Dispatch's rows: x (N, D), weight (E, r, D) -> (R, r). It keeps x for the
    weight's gradient, and not the rows, which are K times as many."""

    @staticmethod
    def forward(ctx, x, weight, order):
        ctx.save_for_backward(x, weight, order.token, order.inverse, order.ends)
        return grouped_mm(x.index_select(0, order.token), weight.mT, order.ends)

    @staticmethod
    def backward(ctx, grad):
        x, weight, token, inverse, ends = ctx.saved_tensors
        grad = packed(grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = F.embedding_bag(inverse, grouped_mm(grad, weight, ends), mode="sum")
        return grad_x, grouped_mm(grad.t(), x.index_select(0, token), ends), None


class PerftMoE(nn.Module):
    """A MoE block with adapters beside its experts; router and experts keep their names.

    adapter_weights matters to PERFT-R only: see the opening page.
    """

    def __init__(self, moe, config, base, layer):
        super().__init__()
        self.router = moe.router
        self.experts = moe.experts
        self.adapters = Adapters(config, base, layer)  # on the CPU
        self.variant = config.variant
        self.adapter_weights = config.adapter_weights

    def forward(self, x):
        """x (B, T, D) -> y (B, T, D), and the Routing (or PerftRouting) of the N = B*T tokens."""
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        routing = self.router(flat)
        y = self.experts(flat, routing)
        if self.variant == "perft_e":
            added = self.adapters.beside_experts(flat, routing)
        elif self.variant == "perft_r":
            own = self.adapters.router(flat)
            added = self.adapters(flat, self.gate_of_adapters(own, routing))
            routing = PerftRouting(*routing, own)
        else:  # perft_s, perft_d: every adapter, weight 1
            added = self.adapters(flat, None)
        return (y + added).view_as(x), routing

    def gate_of_adapters(self, own, routing):
        """(N, M): the weights of the adapters that their own router chose, 0 for the others."""
        weights = own.routing_weights  # (N, K)
        if self.adapter_weights == "base":  # as in the released OLMoE code
            weights = routing.routing_weights[:, : weights.shape[1]]
        gate = weights.new_zeros(own.router_logits.shape)
        return gate.scatter(1, own.selected_experts, weights)


# LoRA --------------------------------------------------------------------------------------------


class LoraLinear(Pair):
    """A frozen linear map plus (dropout(x) A^T) B^T * alpha/r (LoRA, arXiv 2106.09685)."""

    def __init__(self, base, config):
        r = config.rank
        super().__init__(config, (r, base.in_features), (base.out_features, r))
        self.weight = base.weight  # it keeps its name

    def forward(self, x):
        hidden = F.linear(self.drop(x), self.A.to(x.dtype))
        delta = F.linear(hidden, self.B.to(x.dtype))
        return F.linear(x, self.weight) + delta * self.scale

    def merged(self):
        self.weight += self.B @ self.A * self.scale
        plain = nn.Linear(*self.weight.shape[::-1], bias=False, device="meta")
        plain.weight = self.weight
        return plain


class LoraExperts(nn.Module):
    """moe.Experts with LoRA on both matrices of each expert, or of the chosen ones. No W + B A is
    ever made: a row goes through A, is r wide, and goes through B."""

    def __init__(self, base, config, layer):
        super().__init__()
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj  # they keep names
        E, D, F_ = base.down_proj.shape
        ids = config.experts and config.experts[layer]  # None: all
        n, r = len(ids or range(E)), config.rank
        outer = 1 if config.shared_outer else n
        self.gate_up_lora = Pair(config, (outer, r, D), (n, 2 * F_, r), ids, E)
        self.down_lora = Pair(config, (n, r, F_), (outer, D, r), ids, E)

    def forward(self, x, routing):
        """x (N, D), Routing -> y (N, D): moe.experts_grouped, and what LoRA adds to its products"""
        lora = self.gate_up_lora
        order = sort_by_expert(routing.selected_experts, lora.E)
        A, B = lora.of_experts(x.dtype)
        hidden = GatheredProduct.apply(lora.drop(x), A, order) * lora.scale  # (R, r)
        rows = GroupedProduct.apply(Dispatch.apply(x, order), self.gate_up_proj, order.ends)
        gate, up = (rows + GroupedProduct.apply(hidden, B, order.ends)).chunk(2, dim=-1)
        rows = F.silu(gate) * up * weight_of_rows(routing, order)  # (R, F)

        lora = self.down_lora
        A, B = lora.of_experts(x.dtype)
        hidden = GroupedProduct.apply(lora.drop(rows), A, order.ends) * lora.scale  # (R, r)
        rows = GroupedProduct.apply(rows, self.down_proj, order.ends)
        return Combine.apply(rows + GroupedProduct.apply(hidden, B, order.ends), order)

    def merged(self):
        with torch.device("meta"):
            plain = Experts(*self.down_proj.shape)
        plain.gate_up_proj, plain.down_proj = self.gate_up_proj, self.down_proj
        pairs = (plain.gate_up_proj, self.gate_up_lora), (plain.down_proj, self.down_lora)
        for stack, lora in pairs:
            for W, A, B in zip(stack, *lora.of_experts(torch.float32)):
                W += B @ A * lora.scale
        return plain


# Attaching ---------------------------------------------------------------------------------------


def apply_perft(model, variant: str, **options):
    """Freeze `model`, attach `variant` to every layer, in place, and return it.

    options: the fields of PerftConfig. ValueError for an option that cannot be, and for a model
    that already carries adapters. Attach when the base has its dtype: a later model.to(dtype) would
    cast the float32 adapters too.
    """
    config = PerftConfig(variant, **options)
    config.check_base(model.config)
    others = variant in ("full", "frozen_experts")
    train_base(model, experts=variant == "full", others=others)
    for i, block in enumerate(model.layers):
        if variant in PERFT:
            block.moe = PerftMoE(block.moe, config, model.config, i)
        if variant == "lora_experts":
            block.moe.experts = LoraExperts(block.moe.experts, config, i)
        if variant == "lora_qv":
            attention = block.self_attn
            attention.q_proj = LoraLinear(attention.q_proj, config)
            attention.v_proj = LoraLinear(attention.v_proj, config)
        if variant == "router" or config.train_router:
            train_master(block.moe.router.weight)
    return settle(model, config)


def train_base(model, experts=False, others=False):
    """Freeze a base's weights, but those of the experts, or all others, that are to train."""
    if hasattr(model, "adapter_config"):
        raise ValueError("the model already carries adapters; load the base again")
    dtype = model.norm.weight.dtype
    if others and dtype != torch.float32:
        raise ValueError(f"weights of {dtype} would lose small steps; load the base in float32")
    for name, p in model.named_parameters():
        p.requires_grad_(experts if ".experts." in name else others)


def train_master(p):
    """Let a weight of the base train in float32, for the reason of the opening page."""
    p.data = p.data.float()
    p.requires_grad_(True)


def settle(model, config):
    """The end of attaching: the new parts get the model's device, and its mode (no dropout in a
    model in eval mode).

    They were drawn on the CPU, and so are alike on every device. If the base is on meta, they stay
    there; MoETransformer.allocate moves them.
    """
    model.adapter_config = config
    if model.norm.weight.device.type != "meta":
        model.to(model.norm.weight.device)
    return model.train(model.training)


def warnings_for(config: PerftConfig, base) -> list[str]:
    """What a user should know before training (facts 1 and 2 of the opening page)."""
    if config.variant != "perft_r":
        return []
    if config.adapter_weights == "base":
        cause = "adapter_weights 'base'"
    elif config.top_k == 1 and (base.norm_topk_prob or config.num_adapters == 1):
        cause = "top_k 1, a weight that is always 1"
    else:
        return []
    return [f"{cause}: the adapter router chooses, but has no gradient from the task"]


# What trains -------------------------------------------------------------------------------------
#
# A parameter that is stacked (experts [E, ., .], adapters [M, ., .]) trains as a whole, yet one
# token meets only K of its E or M parts. Both numbers are counted from the model as it is; nothing
# here knows a formula, so that the tests can hold the papers' formulas against it.


class Trained(NamedTuple):
    """One line of the table of what trains: the same parameter of every layer."""

    module: str  # with * for the layer
    count: int
    shape: str  # 1x16x128; "" if they differ
    parameters: int
    activated: int  # of them, those that one token meets


def what_trains(model) -> list[Trained]:
    """The trainable parameters, one line a kind."""
    kinds = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = re.sub(r"\.\d+\.", ".*.", name)
            shape = "x".join(map(str, p.shape))
            met = round(p.numel() * share_met(model, name, p))
            kinds.setdefault(kind, []).append(Trained(kind, 1, shape, p.numel(), met))
    return [summed(kind, rows) for kind, rows in kinds.items()]


def summed(module, rows):
    """Several lines as one."""
    shapes = {row.shape for row in rows}
    shape = shapes.pop() if len(shapes) == 1 else ""
    count, parameters, activated = (sum(row[i] for row in rows) for i in (1, 3, 4))
    return Trained(module, count, shape, parameters, activated)


def share_met(model, name, p):
    """The share of a parameter that one token meets: at most K of what is stacked in it."""
    K, met = model.config.num_experts_per_tok, len(p)
    if name.endswith((".adapters.A", ".adapters.B")):
        config = model.adapter_config
        met = {"perft_r": config.top_k, "perft_e": K}.get(config.variant, met)
    elif ".experts." in name:
        met = K
    return min(met, len(p)) / len(p)


def report(model) -> str:
    """The table of what trains, with shares of the base; ValueError if nothing does."""
    from model import active_parameters, parameter_count

    rows = what_trains(model)
    if not rows:
        raise ValueError("nothing trains: no parameter has requires_grad")
    total, active = parameter_count(model.config), active_parameters(model.config)
    lines = [f"{'module':40} count            shape    parameters  % total % active"]
    rows.append(summed("all that trains", rows)._replace(shape=""))
    for row in rows:
        lines.append(
            f"{row.module:40} {row.count:5} {row.shape:>16} {row.parameters:13,} "
            f"{100 * row.parameters / total:8.3f} {100 * row.activated / active:8.3f}"
        )
    lines.append(f"base model: {total:,} parameters, {active:,} active for a token")
    return "\n".join(lines)


# Files -------------------------------------------------------------------------------------------
#
# Attaching and training need moe.py alone, so that both files can be taken elsewhere; what the
# table, saving and loading need of model.py and data/ is imported where it is used.

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# How the names of those files begin that a model needs beside its weights.
BESIDE_A_MODEL = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "generation_config",
    "chat_template",
)

# Of PEFT's adapter_config.json: what is read here, of which kind, and what changes no logits. Every
# other key may be there if it says nothing.
PEFT_KINDS = {
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float,
    "use_rslora": bool,
    "target_modules": list,
    "target_parameters": list,
}
IDLE = """peft_type task_type auto_mapping base_model_name_or_path revision inference_mode
    peft_version megatron_core qalora_group_size""".split()


def fingerprint(base):
    """What an adapter must find again: the keys of the base's config.json that shape its logits
    (not its weights)."""
    no_logits = {
        "extra",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "router_aux_loss_coef",
    }
    return {name: value for name, value in asdict(base).items() if name not in no_logits}


def check_fingerprint(path, base):
    """ValueError naming both sides if what was saved beside this file had another base."""
    from data import run

    theirs = run.read_json(path, base=dict).get("base")
    if theirs is None:
        raise ValueError(f"{path}: does not say for which base it was made; not written by save")
    # a key that is not known here may have shaped its logits
    changed = run.changes(theirs, dict.fromkeys(theirs) | fingerprint(base))
    if changed:
        raise ValueError(f"{path}: was made for another base: {changed}")


def config_of(model, kind):
    """What was attached to a model; ValueError unless it is of this kind."""
    config = getattr(model, "adapter_config", None)
    if not isinstance(config, kind):
        raise ValueError(
            "the model carries no adapters, or chosen experts, of this kind; call apply_perft, "
            "apply_esft or load first"
        )
    return config


def save_adapter(model, folder: str | Path):
    """Write adapter_config.json and adapter_model.safetensors (float32; only what trains).

    LoRA is written in PEFT's own layout and loads there. The others carry a peft_type of their own:
    PEFT refuses it.
    """
    config = config_of(model, PerftConfig)
    content = {"peft_type": "PERFT", **asdict(config), "base": fingerprint(model.config)}
    if config.variant in LORA:
        content |= {
            **LORA[config.variant],
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": config.rank,
            "lora_alpha": config.alpha,
            # PEFT knows none on experts; `dropout` says what was used here
            "lora_dropout": config.dropout if config.variant == "lora_qv" else 0.0,
            "bias": "none",
        }
    text = json.dumps(content, indent=2)
    write_files(Path(folder) / CONFIG, text, WEIGHTS, adapter_places(model), torch.float32)


def load_adapter(model, folder: str | Path):
    """Attach the adapter saved in `folder`, by save_adapter or by PEFT, to its base, in place, and
    return it in eval mode.

    ValueError naming both sides for another base, or for tensors that are missing, extra, misshaped
    or not finite; the model is then as it was.
    """
    options = read_options(Path(folder) / CONFIG, model.config)
    edit = partial(apply_perft, **options)
    return attach_file(model, Path(folder) / WEIGHTS, edit, adapter_places)


def write_files(path, text, weights, places, dtype):
    """Write what trains: the text of a JSON file, and beside it its tensors."""
    from data import hub, run
    from data import shard as processes

    path.parent.mkdir(parents=True, exist_ok=True)
    hub.write_tensors(path.with_name(weights), places, dtype)
    if processes.RANK == 0:
        run.write_text(path, text + "\n")


def attach_file(model, path, edit, places):
    """edit(model), and fill what then trains, places(model), from a file. Every fault is found on a
    model without memory, before this one is touched."""
    from data import hub

    weights = hub.Tensors(path)
    with torch.device("meta"):
        trial = edit(type(model)(model.config))
    weights.fill(places(trial))  # checks names, shapes and numbers, and copies nothing
    edit(model)
    weights.fill(places(model))
    return model.eval()


def read_options(path, base):
    """An adapter_config.json, ours or PEFT's -> the options of apply_perft."""
    from data import run

    content = run.read_json(path, train_router=bool, shared_outer=bool, **PEFT_KINDS)
    content = {name: value for name, value in content.items() if value is not None}
    if "variant" in content:
        check_fingerprint(path, base)
        for name, of_peft in (("alpha", "lora_alpha"), ("rank", "r")):
            if of_peft in content and content[of_peft] != content.get(name):
                raise ValueError(f"{path}: {name} and {of_peft}, PEFT's name for it, differ")
    try:
        options = content if "variant" in content else options_of_peft(content)
        names = PerftConfig.__dataclass_fields__.keys() & options
        options = {name: options[name] for name in names}
        PerftConfig(**options).check_base(base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return options


def options_of_peft(content):
    """PEFT's adapter_config.json -> the options of apply_perft that are the same LoRA."""
    from data import run

    targets = content.get("target_modules", []) + content.get("target_parameters", [])
    changed = " ".join(sorted(str(name).split(".")[-1] for name in targets))
    variant = {"q_proj v_proj": "lora_qv", "down_proj gate_up_proj": "lora_experts"}.get(changed)
    kind = content.get("peft_type")
    if kind != "LORA" or variant is None:
        raise ValueError(
            f"peft_type {run.shown(kind)} on {run.shown(changed)}: of PEFT's adapters, LoRA of "
            "q_proj and v_proj, or of both stacks of the experts, loads"
        )
    for name in content.keys() - PEFT_KINDS.keys() - set(IDLE):
        # a LoRA that starts in another way changes the base too
        fine = [True, "gaussian"] if name == "init_lora_weights" else [False, "none", [], {}]
        if content[name] not in fine:
            raise ValueError(f"{name} is {run.shown(content[name])}, which has no counterpart here")
    rank, alpha = content.get("r", 8), content.get("lora_alpha", 8)
    if content.get("use_rslora"):
        alpha *= abs(rank) ** 0.5  # its scale is alpha / sqrt(r)
    dropout = content.get("lora_dropout", 0.0)
    return {"variant": variant, "rank": rank, "alpha": alpha, "dropout": dropout}


class PeftPlace(NamedTuple):
    """The place of the A or B of a layer's experts in PEFT's layout: A (E, r, in) as (E*r, in), and
    B (E, out, r) as (out, r*E). What some experts have, or all share, is written for each."""

    parameter: torch.Tensor
    pair: Pair
    is_B: bool

    @property
    def shape(self):
        return list(self.of(torch.empty(self.parameter.shape, device="meta")).shape)

    def of(self, stack):
        stack = self.pair.spread(stack)
        return stack.permute(1, 2, 0).flatten(1) if self.is_B else stack.flatten(0, 1)

    def fill(self, source):
        if self.is_B:
            stack = source.unflatten(1, (-1, self.pair.E)).permute(2, 0, 1)
        else:
            stack = source.unflatten(0, (self.pair.E, -1))
        if self.pair.experts is not None:
            stack = stack[self.pair.experts]
        self.parameter.data.copy_(stack[: len(self.parameter)])


def adapter_places(model):
    """Tensor name in adapter_model.safetensors -> the place of the trained parameter it is."""
    from data.hub import Place

    table = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        place = Place(p)
        if "_lora." in name:
            place = PeftPlace(p, model.get_submodule(name[:-2]), name.endswith("B"))
        if model.adapter_config.variant in LORA:
            name = name.replace("moe.experts.gate_up_lora", "mlp.experts.base_layer")
            name = name.replace("moe.experts.down_lora", "mlp.experts")
            name = f"base_model.model.model.{name[:-1]}lora_{name[-1]}.weight"
        table[name] = place
    return table


@torch.no_grad()
def merge(model):
    """Fold LoRA into the base weights, in place: W += B A * alpha/r, of which the sum is float32,
    and rounded once. What is left is a plain model.

    ValueError for every other variant: an adapter beside a non-linear expert is not a change of its
    weights.
    """
    variant = config_of(model, PerftConfig).variant
    if variant not in LORA:
        raise ValueError(
            f"{variant} cannot be merged: only LoRA ({', '.join(LORA)}) is a change of weights; "
            "what stands beside the experts, or a router of its own, is a network more"
        )
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if hasattr(part, "merged"):
                setattr(module, name, part.merged())
    del model.adapter_config
    return model


# Commands ----------------------------------------------------------------------------------------


def read_run(folder):
    """The settings of the run of train.py that made a folder; {} where there are none (it was saved
    by hand). ValueError for values that no run writes."""
    from data import run
    from model import DTYPES

    file = folder / "config.json"
    if not file.exists():
        return {}
    settings = run.read_json(file, base=str, dtype=str, task=str, template=str, eval_rows=int)
    if settings.get("variant") == "scratch":
        raise ValueError(f"{folder} holds a whole model, no adapter: use --base {folder}/model")
    base, dtype = settings.get("base") or "", settings.get("dtype") or "float32"
    # of a base with so long a name, the system's own message would be nothing but that name
    if dtype not in DTYPES or len(base) > 900:
        raise ValueError(
            f"{file}: dtype is {run.shown(dtype)}, base is {run.shown(base)}; expected "
            f"{' or '.join(DTYPES)}, and a folder"
        )
    return settings


def check_new(folder):
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists and is not an empty folder; choose a new one")


def write_folder(model, folder, base=None):
    """Write a model as a Hugging Face folder, new or empty, with the tokenizer files of the folder
    `base`."""
    from data import hub

    check_new(Path(folder))
    files = list(Path(base).iterdir()) if base else []  # before anything is written
    hub.write_model(folder, model, model.norm.weight.dtype)
    for file in files:
        if file.name.startswith(BESIDE_A_MODEL):
            shutil.copy(file, folder)


def script(argv, lesson, command, about, attach):
    """A file's command line: its lesson; or a run in its base, as a Hugging Face folder.

    attach(base, the run's folder) -> the model to be written.
    """
    from data import run
    from model import DTYPES, EMBEDDED, MoETransformer

    parser = run.Parser(description="Without arguments: the lesson of the file's first page.")
    commands = parser.add_subparsers(dest="command")
    add = commands.add_parser(command, help=about, description=about).add_argument
    add("RUN_FOLDER", type=Path, help="of train.py, or what was saved by hand")
    add("NEW_FOLDER", type=Path)
    add("BASE", nargs="?", help="(the run's)")
    args = parser.parse_args(argv)
    if args.command is None:
        return lesson()
    folder, new = args.RUN_FOLDER, args.NEW_FOLDER
    check_new(new)
    settings = read_run(folder)
    base = args.BASE or settings.get("base") or EMBEDDED
    dtype = DTYPES[settings.get("dtype") or "float32"]
    model = attach(MoETransformer.from_pretrained(base, dtype), folder)
    write_folder(model, new, base)
    print(f"wrote {new}: {base} with what {folder} trained")


# The lesson --------------------------------------------------------------------------------------

# of the published config.json files
OLMOE_1B_7B = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def lesson():
    """What each variant trains on three bases, counted on models without memory."""
    from data.hub import make_config
    from model import EMBEDDED, Config, MoETransformer, active_parameters, parameter_count

    bases = {
        "OLMoE-1B-7B": make_config(OLMOE_1B_7B, Config),
        "Mixtral-8x7B": make_config(MIXTRAL_8X7B, Config),
        "data/tiny_olmoe": Config.from_folder(EMBEDDED),
    }
    for name, base in bases.items():
        total, active = parameter_count(base), active_parameters(base)
        print(f"\n{name}: {total:,} parameters, {active:,} active; adapters of rank 16 train")
        for variant in (*PERFT, "lora_qv"):
            with torch.device("meta"):
                row = summed(variant, what_trains(apply_perft(MoETransformer(base), variant)))
            counts = f"{row.parameters:12,} parameters, {row.activated:11,} met by a token"
            print(f"  {variant:8} {counts}")


def main(argv=None):
    about = "fold a LoRA into its base's weights, and write them as a Hugging Face folder"
    script(argv, lesson, "merge", about, lambda base, folder: merge(load_adapter(base, folder)))


if __name__ == "__main__":
    run.command(main)()
