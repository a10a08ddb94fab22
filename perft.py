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

Notation: the papers' A, B, r, alpha, M. K is always the experts a token chooses; the adapters that
perft_r's router chooses for it, TopK~, are `top_k` of M. Shapes: N tokens, D hidden_size, F
intermediate_size, E num_experts, R = N*K rows, M adapters, r rank.

What it is not. An adapter never touches an expert's own matrices, it stands beside the whole
expert. So perft_e needs nothing of the expert but the router's choice and weight; and PERFT cannot
be merged into the base: no weight of a SwiGLU expert is the sum of the expert and a network beside
it.

How it is computed. perft_s, _d and _r are one computation: the bottlenecks of all M adapters are
one product x A^T (N, M*r), weights (N, M) of perft_r's router multiply it (the others have none),
one product with B^T leads back. All M are computed, also those that a token did not choose: cheaper
than sorting tokens while M*r stays in the hundreds. perft_e has an adapter for each of many experts
(OLMoE, r = 16: M*r = 1,024), so it sorts the tokens by expert, as moe.py does, and computes the
chosen ones.

What trains is float32 whatever the base is, and is cast for the product: at a learning rate of 1e-5
most steps are too small to change a bfloat16 number. The float32 copy of a weight of the base that
trains is called its master.

Three facts, never silent here:
  1. The released OLMoE code of PERFT-R weights the adapters by the *base* router's largest weights,
     rank by rank, so that its own router chooses but never learns from the task.
     adapter_weights="own" is the paper, "base" that code.
  2. perft_r's router renormalises the weights it chose if and only if the base does. With top_k = 1
     and a base that does (Mixtral), the one weight is x / x = 1: again nothing to learn from.
     Warned.
  3. init="paper": A ~ N(0, 2/r), B ~ 1e-6 N(0, 1); init="lora": Kaiming-uniform A, B = 0, with
     which every variant is the base model bit for bit. The two want different learning rates.
     (R's own router ~ N(0, 0.02^2) with both.)

With equal adapters, perft_r of one is perft_s, perft_d of M is M times perft_s, and where the base
renormalises perft_r and perft_e are perft_s.

Baselines in the same file. LoRA, W + B A alpha/r, which can be merged, and is saved as PEFT saves
it: lora_qv on the attention's q and v projections, lora_experts on the gate_up and down matrix of
each expert e, W_e + B_e A_e alpha/r. A token meets K experts, so K times rank r; papers that
compare at an equal budget take r/K. shared_outer: the halves that face the token, A of gate_up and
B of down, are one for all experts of a layer, and are met once. Then router (only the pretrained
routers), frozen_experts (everything but the experts, MoFE), full (everything).

Against the authors' code: its adapters draw a dropout mask each, here they share one. Left out:
perft_e together with another.

To add a variant: its name in PERFT, its line in PerftMoE.forward, its M in Adapters, what a token
meets in share_met, and its flags and learning rate in train.py.

    python perft.py        the lesson: what each variant trains
    python perft.py merge RUN_FOLDER NEW_FOLDER [BASE]
                           a LoRA that train.py or PEFT saved, or what router, frozen_experts and
                           full trained, in its base, as a Hugging Face folder: in the run's dtype,
                           else in that of the base's files (LoRA) or float32
"""

import json
import math
import re
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
    sort_by_expert,
    sum_of_rows,
    weight_of_rows,
)

PERFT = ("perft_s", "perft_d", "perft_r", "perft_e")
LORA = ("lora_qv", "lora_experts")
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
    top_k: int = 2  # of perft_r: the adapters a token chooses
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
        # a larger alpha times an activation may be more than float32 holds
        for name, end in (("alpha", 1e18), ("dropout", 1)):
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


class LowRank(nn.Module):
    """A (r, in) and B (out, r), or stacks of them, float32: in -> r -> out.

    Row j of a stack is that of expert `experts[j]` of a layer's E (None: of expert j).
    """

    def __init__(self, config, A, B, experts=None, num_experts=None):
        """A, B: their shapes."""
        super().__init__()
        self.A = nn.Parameter(torch.empty(A, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(B, dtype=torch.float32))
        self.num_experts = num_experts
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

    def padded_stacks(self, dtype):
        """A and B for all E experts, of a rank filled up with zeros to a multiple of 8: with that
        F.grouped_mm takes them in any dtype (moe.grouped_mm)."""
        pad = (-self.A.shape[1]) % 8
        A = F.pad(self.A.to(dtype), (0, 0, 0, pad))
        B = F.pad(self.B.to(dtype), (0, pad))
        return self.full_stack(A), self.full_stack(B)

    def full_stack(self, stack):
        """A or B -> (E, ., .): a single one is repeated, an expert that has none gets zeros."""
        E = self.num_experts
        if self.experts is None:
            return stack.expand(E, -1, -1).contiguous()
        stack = stack.expand(len(self.experts), -1, -1)
        ids = self.experts.to(stack.device)
        return stack.new_zeros(E, *stack.shape[1:]).index_copy(0, ids, stack)


class PerftRouting(NamedTuple):
    """moe.Routing of the experts, and beside it what the adapters' own router decided."""

    router_logits: torch.Tensor  # (N, E)
    routing_weights: torch.Tensor  # (N, K)
    selected_experts: torch.Tensor  # (N, K)
    adapter: Routing  # of perft_r's router: (N, M), (N, top_k), (N, top_k)


class Adapters(LowRank):
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

    def bottleneck(self, x, product, *operands):
        """The unit up to B. product(x, *operands) is x A^T, made in one of the two ways below."""
        if self.kind == "lora":
            return product(self.drop(x), *operands) * self.scale
        return F.silu(self.drop(product(x, *operands)))

    def forward(self, x, weights):
        """sum over j of weights_j Delta_j(x), all M computed.

        x (N, D), weights (N, M) or None for weight 1 -> (N, D)
        """
        M, r, D = self.A.shape
        A = self.A.to(x.dtype).reshape(M * r, D)
        B = self.B.to(x.dtype).transpose(1, 2).reshape(M * r, D)
        hidden = self.bottleneck(x, F.linear, A)  # (N, M*r)
        if weights is not None:
            hidden = hidden * weights.repeat_interleave(r, dim=1)
        return hidden @ B

    def beside_experts(self, x, routing):
        """The same for perft_e, only the chosen computed: an adapter is asked when its expert is,
        under its weight.

        x (N, D), routing of the experts -> (N, D)
        """
        A, B = self.padded_stacks(x.dtype)
        order = sort_by_expert(routing.selected_experts, self.num_experts)
        hidden = self.bottleneck(x, GatheredProduct.apply, A, order)  # (R, r)
        hidden = hidden * weight_of_rows(routing, order)
        return Combine.apply(GroupedProduct.apply(hidden, B, order.ends), order)


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
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = sum_of_rows(grouped_mm(grad, weight, ends), inverse)
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
            added = self.adapters(flat, self.weights_of_adapters(own, routing))
            routing = PerftRouting(*routing, own)
        else:  # perft_s, perft_d: every adapter, weight 1
            added = self.adapters(flat, None)
        return (y + added).view_as(x), routing

    def weights_of_adapters(self, own, routing):
        """(N, M): the weights of the adapters that their own router chose, 0 for the others."""
        of_chosen = own.routing_weights  # (N, top_k)
        if self.adapter_weights == "base":  # as in the released OLMoE code
            of_chosen = routing.routing_weights[:, : of_chosen.shape[1]]
        weights = of_chosen.new_zeros(own.router_logits.shape)
        return weights.scatter(1, own.selected_experts, of_chosen)


# LoRA --------------------------------------------------------------------------------------------


class LoraLinear(LowRank):
    """A frozen linear map plus (dropout(x) A^T) B^T * alpha/r (LoRA, arXiv 2106.09685)."""

    def __init__(self, linear, config):
        r = config.rank
        super().__init__(config, (r, linear.in_features), (linear.out_features, r))
        self.weight = linear.weight  # it keeps its name

    def forward(self, x):
        hidden = F.linear(self.drop(x), self.A.to(x.dtype))
        delta = F.linear(hidden, self.B.to(x.dtype))
        return F.linear(x, self.weight) + delta * self.scale

    def merged(self):
        """Fold A and B into the base's weight, in place -> the module without them."""
        self.weight += self.B @ self.A * self.scale
        plain = nn.Linear(*self.weight.shape[::-1], bias=False, device="meta")
        plain.weight = self.weight
        return plain


class LoraExperts(nn.Module):
    """moe.Experts with LoRA on both matrices of each expert, or of the chosen ones. No W + B A is
    ever made: a row goes through A, is r wide, and goes through B."""

    def __init__(self, experts, config, layer):
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj  # same names
        E, D, F_ = self.down_proj.shape
        ids = config.experts and config.experts[layer]  # None: all
        n, r = len(ids or range(E)), config.rank
        outer = 1 if config.shared_outer else n
        self.gate_up_lora = LowRank(config, (outer, r, D), (n, 2 * F_, r), ids, E)
        self.down_lora = LowRank(config, (n, r, F_), (outer, D, r), ids, E)

    def forward(self, x, routing):
        """x (N, D), Routing -> y (N, D): moe.experts_grouped with LoRA in both of its products."""
        order = sort_by_expert(routing.selected_experts, len(self.down_proj))
        gate, up = self.gate_up(x, order).chunk(2, dim=-1)  # (R, F) each
        rows = F.silu(gate) * up * weight_of_rows(routing, order)
        return Combine.apply(self.down(rows, order), order)

    def gate_up(self, x, order):
        """x (N, D) -> (R, 2F)."""
        lora = self.gate_up_lora
        A, B = lora.padded_stacks(x.dtype)
        hidden = GatheredProduct.apply(lora.drop(x), A, order) * lora.scale  # (R, r)
        rows = GroupedProduct.apply(Dispatch.apply(x, order), self.gate_up_proj, order.ends)
        return rows + GroupedProduct.apply(hidden, B, order.ends)

    def down(self, rows, order):
        """(R, F) -> (R, D)."""
        lora = self.down_lora
        A, B = lora.padded_stacks(rows.dtype)
        hidden = GroupedProduct.apply(lora.drop(rows), A, order.ends) * lora.scale  # (R, r)
        rows = GroupedProduct.apply(rows, self.down_proj, order.ends)
        return rows + GroupedProduct.apply(hidden, B, order.ends)

    def merged(self):
        """Fold A and B into the base's stacks, in place -> the module without them."""
        with torch.device("meta"):
            plain = Experts(*self.down_proj.shape)
        plain.gate_up_proj, plain.down_proj = self.gate_up_proj, self.down_proj
        for stack, lora in (
            (self.gate_up_proj, self.gate_up_lora),
            (self.down_proj, self.down_lora),
        ):
            for W, A, B in zip(stack, *lora.padded_stacks(torch.float32)):
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
    freeze_base(
        model,
        but_experts=variant == "full",
        but_others=variant in ("full", "frozen_experts"),
    )
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
    model.adapter_config = config
    return finish(model)


def freeze_base(model, but_experts=False, but_others=False):
    """Freeze a base's weights, but for those of the experts, or all others, that train
    nevertheless."""
    if hasattr(model, "adapter_config"):
        raise ValueError("the model already carries adapters; load the base again")
    dtype = model.norm.weight.dtype
    if but_others and dtype != torch.float32:
        raise ValueError(f"weights of {dtype} would lose small steps; load the base in float32")
    for name, p in model.named_parameters():
        p.requires_grad_(but_experts if ".experts." in name else but_others)


def train_master(p):
    """Let a weight of the base train in float32, for the reason of the opening page."""
    p.data = p.data.float()
    p.requires_grad_(True)


def finish(model):
    """The end of attaching: the new parts get the model's device, and its mode (no dropout in a
    model in eval mode).

    They were drawn on the CPU, and so are alike on every device. If the base is on meta, they stay
    there; MoETransformer.allocate moves them.
    """
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
    shape: str  # 1x16x128; "" if they differ
    count: int
    parameters: int
    activated: int  # of them, those that one token meets


def what_trains(model) -> list[Trained]:
    """The trainable parameters, one line for the same parameter of all layers."""
    modules = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            module = re.sub(r"\.\d+\.", ".*.", name)
            shape = "x".join(map(str, p.shape))
            met = round(p.numel() * share_met(model, name, p))
            modules.setdefault(module, []).append(Trained(module, shape, 1, p.numel(), met))
    return [summed(module, rows) for module, rows in modules.items()]


def summed(module, rows):
    """Several lines as one."""
    _, shapes, *numbers = zip(*rows)
    shape = shapes[0] if len(set(shapes)) == 1 else ""
    return Trained(module, shape, *map(sum, numbers))


def share_met(model, name, p):
    """The share of a parameter that one token meets, of what is stacked in it a part."""
    K = model.config.num_experts_per_tok
    if name.endswith((".adapters.A", ".adapters.B")):
        config = model.adapter_config
        if config.variant == "perft_r":
            return config.top_k / len(p)  # 2 of 4 adapters: a half
        of_experts = config.variant == "perft_e"
    else:
        of_experts = ".experts." in name
    return min(K / len(p), 1) if of_experts else 1  # 8 of OLMoE's 64 experts: an eighth


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


# Saved, loaded, merged ---------------------------------------------------------------------------
#
# To attach adapters to a model of your own, take moe.py and this file along. What only `report` and
# folders need is imported where it is used, from model.py and data/. Your model needs `layers`,
# each with a `moe` (and `self_attn.q_proj`, `v_proj` for lora_qv), `norm.weight`, and a `config`
# with num_hidden_layers, hidden_size, num_experts, num_experts_per_tok and norm_topk_prob.

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config_of(model, kind):
    """What was attached to a model; ValueError unless it is of this kind."""
    config = getattr(model, "adapter_config", None)
    if not isinstance(config, kind):
        raise ValueError(
            "the model carries no adapters, or chosen experts, of this kind; call apply_perft, "
            "apply_esft or load first"
        )
    return config


def adapter_places(model):
    """Tensor name in adapter_model.safetensors -> the place of the trained parameter it is."""
    from data import hub

    if model.adapter_config.variant in LORA:
        return hub.peft_places(model)
    return {name: hub.Place(p) for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model, folder: str | Path):
    """Write adapter_config.json and adapter_model.safetensors (float32; only what trains).

    LoRA is written in PEFT's own layout and loads there. The others carry a peft_type of their own:
    PEFT refuses it. ValueError for numbers that are not finite.
    """
    from data import hub

    config = config_of(model, PerftConfig)
    content = {"peft_type": "PERFT", **asdict(config), "base": hub.fingerprint(model.config)}
    if config.variant in LORA:
        content |= hub.peft_keys(config)
    text = json.dumps(content, indent=2)
    hub.write_trained(Path(folder) / CONFIG, text, WEIGHTS, adapter_places(model), torch.float32)


def load_adapter(model, folder: str | Path):
    """Attach the adapter saved in `folder`, by save_adapter or by PEFT, to its base, in place, and
    return it in eval mode.

    ValueError naming both sides for another base, or for tensors that are missing, extra, misshaped
    or not finite; the model is then as it was.
    """
    from data import hub

    path = Path(folder) / CONFIG
    content = hub.read_adapter_config(path, model.config)
    fields = PerftConfig.__dataclass_fields__.keys() & content
    edit = partial(apply_perft, **{name: content[name] for name in fields})
    return hub.attach_trained(model, path, WEIGHTS, edit, adapter_places)


@torch.no_grad()
def merge(model):
    """Make a plain model of it, in place. LoRA is folded into the base weights, W += B A * alpha/r,
    of which the sum is float32, and rounded once; what the other baselines trained is in its place.

    ValueError for PERFT.
    """
    check_merges(config_of(model, PerftConfig).variant)
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if hasattr(part, "merged"):
                setattr(module, name, part.merged())
    del model.adapter_config
    return model


def check_merges(variant):
    if variant in PERFT:
        raise ValueError(
            f"{variant} cannot be merged: an adapter beside a non-linear expert is no change of "
            f"its weights; {', '.join(BASELINES)} can"
        )


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
    from data import hub
    from model import Config, MoETransformer

    def attach(base, dtype, folder):
        adapter = hub.read_adapter_config(folder / CONFIG, Config.from_folder(base))
        check_merges(adapter["variant"])  # before the base is read, which may take minutes
        if dtype is None:  # of what PEFT saved no run says it: as in the base's own files
            is_lora = adapter["variant"] in LORA
            dtype = hub.Tensors(base).widest_dtype() if is_lora else torch.float32
        return merge(load_adapter(MoETransformer.from_pretrained(base, dtype), folder))

    about = "write what a run of a baseline trained, in its base, as a Hugging Face folder"
    hub.lesson_or_write(argv, lesson, "merge", about, attach)


if __name__ == "__main__":
    run.command(main)()
