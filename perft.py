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

perft_r's own router G~ renormalises its Top K weights if and only if the base does.

It is not LoRA on the experts: an adapter never touches an expert's own matrices, it stands beside
the whole expert. So perft_e needs nothing of the expert but the router's choice and weight. For the
same reason adapters (other than lora_qv) cannot be merged into the base: no weight of a SwiGLU
expert is the sum of the expert and a network beside it.

Baselines in the same file: lora_qv (LoRA on the attention's q and v projections), router (only the
pretrained routers), frozen_experts (everything but the experts, MoFE), full (everything).

Notation: the papers' A, B, r, alpha, M, Top K of M. Shapes: N tokens, D hidden_size, E num_experts,
M adapters, r rank. Adapters and their router are float32 whatever the base is, and are cast for the
product: at a learning rate of 1e-5 most steps are too small to change a bfloat16 number. The
float32 copy of a weight of the base that trains is called its master.

Three facts, never silent here:
  1. The released OLMoE code of PERFT-R weights the adapters by the *base* router's K largest
     weights, rank by rank, so that its own router chooses but never learns from the task.
     adapter_weights="own" is the paper, "base" that code.
  2. With top_k = 1 and a base that renormalises (Mixtral), the one weight is x / x = 1: again
     nothing to learn from. Warned.
  3. init="paper": A ~ N(0, 2/r), B ~ 1e-6 N(0, 1), router ~ N(0, 0.02^2); init="lora":
     Kaiming-uniform A, B = 0, with which every variant is the base model bit for bit. The two want
     different learning rates.

Against the authors' code: its adapters draw a dropout mask each, here they share one. Left out: E
with S, D or R.

To add a variant: its name in PERFT, its line in PerftMoE.forward, its M in count_adapters, what a
token meets in share_met, and its flags and learning rate in train.py.

To attach this to a model of your own, take moe.py and this file along. The model needs `layers`,
each with a `moe` (and `self_attn.q_proj`, `v_proj` for lora_qv), `norm.weight`, and a `config` with
num_hidden_layers, hidden_size, num_experts, num_experts_per_tok and norm_topk_prob.

    python perft.py        the lesson: what each variant trains, and identities between them
"""

import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from moe import (
    Combine,
    GroupedProduct,
    MoE,
    Router,
    Routing,
    can_group,
    grouped_mm,
    packed,
    sort_by_expert,
    weight_of_rows,
)

PERFT = ("perft_s", "perft_d", "perft_r", "perft_e")
BASELINES = ("lora_qv", "router", "frozen_experts", "full")


class PerftRouting(NamedTuple):
    """moe.Routing of the experts, and beside it what the adapters' own router decided."""

    router_logits: torch.Tensor  # (N, E)
    routing_weights: torch.Tensor  # (N, K)
    selected_experts: torch.Tensor  # (N, K)
    adapter: Routing  # of perft_r's router: (N, M), (N, Top K), (N, Top K)


class Adapters(nn.Module):
    """M adapters of one layer: A (M, r, D), B (M, D, r), float32; for PERFT-R a router (M, D)."""

    def __init__(
        self,
        hidden_size: int,
        num_adapters: int,
        rank: int,
        kind: str,
        scale: float,
        dropout: float,
    ):
        super().__init__()
        M, r, D = num_adapters, rank, hidden_size
        self.A = nn.Parameter(torch.empty(M, r, D, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(M, D, r, dtype=torch.float32))
        self.kind = kind
        self.scale = scale
        self.dropout = dropout
        self.router: Router | None = None  # wrap_moe gives perft_r one

    def init_weights(self, init: str):
        _, r, D = self.A.shape
        if init == "paper":
            nn.init.normal_(self.A, std=math.sqrt(2 / r))
            nn.init.normal_(self.B, std=1e-6)
        else:
            # kaiming_uniform_ with a = sqrt(5), which would take r*D for the fan-in
            nn.init.uniform_(self.A, -(D**-0.5), D**-0.5)
            nn.init.zeros_(self.B)
        if self.router is not None:
            nn.init.normal_(self.router.weight, std=0.02)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """sum over j of gate_j Delta_j(x), all M computed.

        x (N, D), gate (N, M) or None for weight 1 -> (N, D)
        """
        M, r, D = self.A.shape
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        hidden = self.after_A(F.linear(self.before_A(x), A.reshape(M * r, D)))  # (N, M*r)
        if gate is not None:
            hidden = hidden * gate.repeat_interleave(r, dim=1)
        return hidden @ B.transpose(1, 2).reshape(M * r, D)

    def beside_experts(self, x, routing: Routing, expert_of_adapter: torch.Tensor | None):
        """The same for perft_e, only the chosen computed: adapter j stands beside an expert (None:
        beside expert j) and is asked when that one is, under its weight.

        x (N, D), routing of the experts -> (N, D)
        """
        E = routing.router_logits.shape[-1]
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        if expert_of_adapter is not None:  # an expert without an adapter has one of zeros
            A = A.new_zeros(E, *A.shape[1:]).index_copy(0, expert_of_adapter, A)
            B = B.new_zeros(E, *B.shape[1:]).index_copy(0, expert_of_adapter, B)
        pad = (-A.shape[1]) % 8  # to a rank that can_group takes in any dtype
        A, B = F.pad(A, (0, 0, 0, pad)), F.pad(B, (0, pad))

        order = sort_by_expert(routing.selected_experts, E)
        hidden = self.after_A(GatheredProduct.apply(self.before_A(x), A, order))  # (R, r)
        hidden = hidden * weight_of_rows(routing, order)
        return Combine.apply(GroupedProduct.apply(hidden, B, order.ends), order)

    def before_A(self, x):
        if self.kind == "parallel":
            return x  # whose dropout comes behind the first matrix
        return F.dropout(x, self.dropout, self.training)

    def after_A(self, hidden):
        if self.kind == "lora":
            return hidden * self.scale
        return F.silu(F.dropout(hidden, self.dropout, self.training))


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

    def __init__(
        self,
        base: MoE,
        adapters: Adapters,
        variant: str,
        adapter_weights: str = "own",
        experts: list[int] | None = None,
    ):
        super().__init__()
        self.router = base.router
        self.experts = base.experts
        self.adapters = adapters
        self.variant = variant
        self.adapter_weights = adapter_weights
        # perft_e: adapter j stands beside expert_of_adapter[j]; None: every expert has one. Real
        # even if the base is on meta: no checkpoint has these ids, so nothing would fill them
        ids = None if experts is None else torch.tensor(experts, device="cpu")
        self.register_buffer("expert_of_adapter", ids, persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing | PerftRouting]:
        """x (B, T, D) -> y (B, T, D), and the Routing (or PerftRouting) of the N = B*T tokens."""
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        routing = self.router(flat)
        y = self.experts(flat, routing)
        if self.variant == "perft_e":
            if can_group(flat, flat.shape[-1]):
                y = y + self.adapters.beside_experts(flat, routing, self.expert_of_adapter)
            else:
                y = y + self.adapters(flat, self.gate_of_experts(routing))
        elif self.variant == "perft_r":
            own = self.adapters.router(flat)
            y = y + self.adapters(flat, self.gate_of_adapters(own, routing))
            routing = PerftRouting(*routing, own)
        else:  # perft_s and perft_d: every adapter, weight 1
            y = y + self.adapters(flat, None)
        return y.view_as(x), routing

    def gate_of_experts(self, routing) -> torch.Tensor:
        """(N, M): the weight of the expert that an adapter stands beside, 0 if not chosen."""
        E = routing.router_logits.shape[1]
        gate = spread(routing.routing_weights, routing.selected_experts, E)
        if self.expert_of_adapter is None:
            return gate
        return gate.index_select(1, self.expert_of_adapter)

    def gate_of_adapters(self, own, routing) -> torch.Tensor:
        """(N, M): the weights of the adapters that their own router chose, 0 for the others."""
        M, K = own.router_logits.shape[1], own.routing_weights.shape[1]
        weights = own.routing_weights
        if self.adapter_weights == "base":
            weights = routing.routing_weights[:, :K]  # as in the released OLMoE code
        return spread(weights, own.selected_experts, M)


def spread(weights: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    """(N, K) weights of the chosen ids -> (N, count), 0 where not chosen."""
    return weights.new_zeros(len(weights), count).scatter(1, ids, weights)


class LoraLinear(nn.Module):
    """A frozen linear map plus (dropout(x) A^T) B^T * alpha/r (LoRA, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__()
        self.weight = base.weight  # it keeps its name
        self.A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(base.out_features, rank, dtype=torch.float32))
        self.scale = scale
        self.dropout = dropout

    def init_weights(self):
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x):
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))
        delta = F.linear(hidden, self.B.to(x.dtype))
        return F.linear(x, self.weight) + delta * self.scale


# Attaching ---------------------------------------------------------------------------------------


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
    experts: list[list[int]] | None = None  # perft_e: adapters for these experts of each layer only

    def __post_init__(self):
        choices = {
            "variant": PERFT + BASELINES,
            "kind": ("lora", "parallel"),
            "init": ("paper", "lora"),
            "adapter_weights": ("own", "base"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                self.refuse(name, f"choose from {', '.join(allowed)}")
        for name in ("rank", "num_adapters", "top_k"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**31:
                self.refuse(name, "it must be a whole number from 1")
        if self.alpha is None:
            self.alpha = 2.0 * self.rank
        for name, end in (("dropout", 1), ("alpha", math.inf)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < end:
                self.refuse(name, f"it must be a number from 0, less than {end}")
        if self.variant == "lora_qv" and self.train_router:
            self.refuse(
                "train_router", "PEFT's layout, which lora_qv has, has no place for routers"
            )
        if self.variant == "perft_r" and self.top_k > self.num_adapters:
            self.refuse("top_k", f"there are {self.num_adapters} adapters to choose from; lower it")

    def refuse(self, name: str, why: str):
        raise ValueError(f"{name} is {str(getattr(self, name))[:100]}; {why}")

    def check_base(self, base):
        """ValueError, in one line, for options that this base (a model.Config) cannot have."""
        k = base.num_experts_per_tok
        if self.variant == "perft_r" and self.adapter_weights == "base" and self.top_k > k:
            self.refuse("top_k", f"with adapter_weights 'base' there are {k} weights a token")
        if self.experts is not None and self.variant != "perft_e":
            self.refuse("variant", "experts are chosen for perft_e only")
        if self.experts is not None:
            check_experts(self.experts, base)

    def count_adapters(self, base, layer: int) -> int:
        """M of a layer."""
        if self.variant == "perft_s":
            return 1
        if self.variant == "perft_e":
            return base.num_experts if self.experts is None else len(self.experts[layer])
        return self.num_adapters


def check_experts(chosen, base):
    """ValueError unless `chosen` has a list of different expert ids of `base` for each layer."""
    L, E = base.num_hidden_layers, base.num_experts
    if not isinstance(chosen, list) or len(chosen) != L:
        raise ValueError(f"experts are not given for each of the model's {L} layers")
    for i, ids in enumerate(chosen):
        known = isinstance(ids, list) and all(type(e) is int and 0 <= e < E for e in ids)
        if not known or not ids or len(set(ids)) < len(ids):
            text = str(ids)[:100]
            raise ValueError(f"layer {i}: {text} is no list of different experts from 0..{E - 1}")


def apply_perft(model, variant: str, **options):
    """Freeze `model`, attach `variant` to every layer, in place, and return it.

    options: the fields of PerftConfig. ValueError for an option that cannot be, and for a model
    that already carries adapters. Attach when the base has its dtype: a later model.to(dtype) would
    cast the float32 adapters too.
    """
    config = PerftConfig(variant, **options)
    config.check_base(model.config)
    refuse_second(model)
    dtype = model.norm.weight.dtype
    if variant in ("full", "frozen_experts") and dtype != torch.float32:
        raise ValueError(
            f"{variant} trains the base's own weights, and {dtype} would lose small steps; "
            "load the base in float32"
        )
    model.requires_grad_(False)
    for i, block in enumerate(model.layers):
        if variant in PERFT:
            block.moe = wrap_moe(block.moe, config, model.config, i)
        if variant == "lora_qv":
            attention = block.self_attn
            attention.q_proj = wrap_linear(attention.q_proj, config)
            attention.v_proj = wrap_linear(attention.v_proj, config)
        if variant == "router" or config.train_router:
            train_master(block.moe.router.weight)
    if variant == "full":
        model.requires_grad_(True)
    if variant == "frozen_experts":
        for name, p in model.named_parameters():
            p.requires_grad_(".experts." not in name)
    model.adapter_config = config
    return model.train(model.training)  # the new parts too: no dropout in a model in eval mode


def refuse_second(model):
    if hasattr(model, "adapter_config"):
        raise ValueError("the model already carries adapters; load the base again")


def wrap_moe(moe: MoE, config: PerftConfig, base, layer: int) -> PerftMoE:
    """One layer's MoE block -> the block with its adapters."""
    M = config.count_adapters(base, layer)
    scale = config.alpha / config.rank
    D = base.hidden_size
    adapters = Adapters(D, M, config.rank, config.kind, scale, config.dropout)
    if config.variant == "perft_r":
        adapters.router = Router(D, M, config.top_k, base.norm_topk_prob)
    adapters.init_weights(config.init)
    experts = None if config.experts is None else config.experts[layer]
    wrapped = PerftMoE(moe, adapters, config.variant, config.adapter_weights, experts)
    return settle(wrapped, moe.router.weight.device)


def wrap_linear(base: nn.Linear, config: PerftConfig) -> LoraLinear:
    lora = LoraLinear(base, config.rank, config.alpha / config.rank, config.dropout)
    lora.init_weights()
    return settle(lora, base.weight.device)


def settle(module: nn.Module, device: torch.device) -> nn.Module:
    """Move what was attached, drawn on the CPU and so alike on every device, to its base. If the
    base is on meta, the adapter stays with its drawn values; MoETransformer.allocate moves it."""
    return module if device.type == "meta" else module.to(device)


def train_master(p: nn.Parameter):
    """Let a weight of the base train in float32, for the reason of the opening page."""
    p.data = p.data.float()
    p.requires_grad_(True)


def warnings_for(config: PerftConfig, base) -> list[str]:
    """What a user should know before training (facts 1 and 2 of the opening page)."""
    if config.variant != "perft_r":
        return []
    if config.adapter_weights == "base":
        return [
            "adapter_weights 'base': the adapter router chooses, but has no gradient from the task"
        ]
    if config.top_k == 1 and (base.norm_topk_prob or config.num_adapters == 1):
        return [
            "top_k 1, a weight that is always 1: the adapter router has no gradient from the task"
        ]
    return []


# What trains -------------------------------------------------------------------------------------
#
# A parameter that is stacked (experts [E, ., .], adapters [M, ., .]) trains as a whole, yet one
# token meets only K of its E or M parts. Both numbers are counted from the model as it is; nothing
# here knows a formula, so that the tests can hold the papers' formulas against it.


class Trained(NamedTuple):
    """One line of the table of what trains: the same parameter of every layer."""

    module: str  # with * for the layer
    count: int
    shape: str  # 1x16x128; 2..4x96x128 where the layers differ
    parameters: int
    activated: int  # of them, those that one token meets


def what_trains(model) -> list[Trained]:
    """The trainable parameters, one line a kind."""
    kinds: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = re.sub(r"\.\d+\.", ".*.", name)
            kinds.setdefault(kind, []).append(p)
    rows = []
    for kind, parameters in kinds.items():
        total = sum(p.numel() for p in parameters)
        met = sum(p.numel() * share_met(model, kind, p) for p in parameters)
        rows.append(Trained(kind, len(parameters), shape_of(parameters), total, round(met)))
    return rows


def share_met(model, name: str, p: nn.Parameter) -> float:
    """The share of a parameter that one token meets: at most K of what is stacked in it."""
    config = getattr(model, "adapter_config", None)
    variant = getattr(config, "variant", "")
    stacked_adapters = name.endswith((".adapters.A", ".adapters.B"))
    if variant == "perft_r" and stacked_adapters:
        return config.top_k / len(p)
    if ".experts." in name or (variant == "perft_e" and stacked_adapters):
        return min(model.config.num_experts_per_tok, len(p)) / len(p)
    return 1.0


def shape_of(parameters: list[nn.Parameter]) -> str:
    lengths = [len(p) for p in parameters]
    first, last = min(lengths), max(lengths)
    length = str(first) if first == last else f"{first}..{last}"
    return "x".join([length, *map(str, parameters[0].shape[1:])])


def report(model) -> str:
    """The table of what trains, with shares of the base; ValueError if nothing does."""
    from model import active_parameters, parameter_count

    rows = what_trains(model)
    if not rows:
        raise ValueError("nothing trains: no parameter has requires_grad")
    total, active = parameter_count(model.config), active_parameters(model.config)
    count, parameters, activated = (sum(row[i] for row in rows) for i in (1, 3, 4))
    rows.append(Trained("all that trains", count, "", parameters, activated))
    lines = [f"{'module':40} count            shape    parameters  % total % active"]
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


def fingerprint(base) -> dict:
    """What an adapter must find again: the keys of the base's config.json that shape its logits
    (not its weights)."""
    no_logits = ("extra", "bos_token_id", "eos_token_id", "pad_token_id")
    no_logits += ("initializer_range", "router_aux_loss_coef")
    return {name: value for name, value in asdict(base).items() if name not in no_logits}


def check_fingerprint(theirs, base, path: Path):
    """ValueError naming both sides if an adapter's base was another one."""
    from data import run

    if not isinstance(theirs, dict):
        raise ValueError(f"{path}: does not say for which base it was made; not written by save")
    changed = run.changes(theirs, fingerprint(base))
    if changed:
        raise ValueError(f"{path}: was made for another base: {changed}")


def config_of(model) -> PerftConfig:
    config = getattr(model, "adapter_config", None)
    if not isinstance(config, PerftConfig):
        raise ValueError("the model carries no adapters; attach some with apply_perft")
    return config


def save_adapter(model, folder: str | Path):
    """Write adapter_config.json and adapter_model.safetensors (float32; only what trains).

    lora_qv is written in PEFT's own layout and loads there. The others carry a peft_type of their
    own: PEFT refuses it.
    """
    from data import hub, run
    from data import shard as processes

    config = config_of(model)
    content = {"peft_type": "PERFT", **asdict(config), "base": fingerprint(model.config)}
    if config.variant == "lora_qv":
        content |= {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "target_modules": ["q_proj", "v_proj"],
            "bias": "none",
        }
    Path(folder).mkdir(parents=True, exist_ok=True)
    hub.write_tensors(Path(folder) / WEIGHTS, adapter_places(model), torch.float32)
    if processes.RANK == 0:
        run.write_json(Path(folder) / CONFIG, content, indent=2)


def load_adapter(model, folder: str | Path):
    """Attach the adapter saved in `folder` to its base, in place, and return it in eval mode.

    ValueError naming both sides for another base, or for tensors that are missing, extra or
    misshaped; the model is then as it was.
    """
    from data import hub

    options = read_options(Path(folder) / CONFIG, model.config)
    refuse_second(model)
    weights = hub.Tensors(Path(folder) / WEIGHTS, [Path(folder) / WEIGHTS])
    with torch.device("meta"):  # find every fault before the model is touched
        trial = apply_perft(type(model)(model.config), **options)
    weights.check(adapter_places(trial))
    apply_perft(model, **options)
    weights.fill(adapter_places(model))
    return model.eval()


def read_options(path: Path, base) -> dict:
    """An adapter_config.json -> the options of apply_perft."""
    from data import run

    content = run.read_json(path)
    options = {name: content[name] for name in PerftConfig.__dataclass_fields__ if name in content}
    if "variant" not in options or "base" not in content:
        raise ValueError(f"{path}: not written by this project's save_adapter")
    check_fingerprint(content["base"], base, path)
    try:
        PerftConfig(**options).check_base(base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return options


def adapter_places(model) -> dict:
    """Tensor name in adapter_model.safetensors -> the place of the trained parameter it is."""
    from data.hub import Place

    table = {name: Place(p) for name, p in model.named_parameters() if p.requires_grad}
    if model.adapter_config.variant != "lora_qv":
        return table
    # layers.0.self_attn.q_proj.A -> base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    return {
        f"base_model.model.model.{name[:-1]}lora_{name[-1]}.weight": place
        for name, place in table.items()
    }


def merge(model):
    """Fold lora_qv into the base weights, in place: W += B A * alpha/r. What is left is a plain
    model.

    ValueError for every other variant: an adapter beside a non-linear expert is not a change of its
    weights.
    """
    config = config_of(model)
    if config.variant != "lora_qv":
        raise ValueError(f"{config.variant} cannot be merged: only lora_qv is a change of weights")
    for block in model.layers:
        for name in ("q_proj", "v_proj"):
            lora = getattr(block.self_attn, name)
            delta = lora.B.data @ lora.A.data * lora.scale
            with torch.device("meta"):
                plain = nn.Linear(lora.A.shape[1], lora.B.shape[0], bias=False)
            plain.weight = lora.weight
            plain.weight.data += delta.to(plain.weight.dtype)
            setattr(block.self_attn, name, plain)
    del model.adapter_config
    return model


# The lesson --------------------------------------------------------------------------------------

# of the published config.json files
OLMOE_1B_7B = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
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


def lesson_parameters(name: str, base):
    """What each variant trains on a base of these sizes, counted on a model without memory."""
    from model import MoETransformer, active_parameters, parameter_count

    total, active = parameter_count(base), active_parameters(base)
    print(f"\n{name}: {total:,} parameters, {active:,} active; adapters of rank 16 train")
    for variant in (*PERFT, "lora_qv"):
        with torch.device("meta"):
            rows = what_trains(apply_perft(MoETransformer(base), variant))
        trained = sum(row.parameters for row in rows)
        met = sum(row.activated for row in rows)
        print(
            f"  {variant:8} {trained:12,} parameters ({trained / total:7.3%}), "
            f"{met:11,} met by a token ({met / active:7.3%})"
        )


def lesson_identities(base):
    """Variants with equal adapters that must give the same numbers, on one random layer."""
    torch.manual_seed(0)
    moe, x = MoE(base), torch.randn(1, 64, base.hidden_size)
    for p in moe.parameters():
        nn.init.normal_(p, std=0.2)
    A, B = torch.randn(4, base.hidden_size), torch.randn(base.hidden_size, 4)

    def added(variant, **options):
        """What the adapters add to the frozen block."""
        config = PerftConfig(variant, rank=4, dropout=0.0, **options)
        layer = wrap_moe(moe, config, base, 0)
        layer.adapters.A.data.copy_(A)
        layer.adapters.B.data.copy_(B)
        return layer(x)[0] - moe(x)[0]

    single = added("perft_s")
    same = {
        "R (Top1/1) = S": added("perft_r", num_adapters=1, top_k=1),
        "R (Top2/4), renormalised = S": added("perft_r"),
        "D (4) = 4 S": added("perft_d") / 4,
        "E, renormalised = S": added("perft_e"),
    }
    print("\nequal adapters (largest difference, relative)")
    for name, y in same.items():
        print(f"  {name:30} {(y - single).abs().max() / single.abs().max():.1e}")


def main():
    from data.hub import make_config
    from model import EMBEDDED, Config

    olmoe = make_config(OLMOE_1B_7B, Config)
    lesson_parameters("OLMoE-1B-7B", olmoe)
    lesson_parameters("Mixtral-8x7B", make_config(MIXTRAL_8X7B, Config))
    lesson_parameters("data/tiny_olmoe", Config.from_folder(EMBEDDED))
    small = {"hidden_size": 32, "intermediate_size": 16, "num_experts": 8, "head_dim": None}
    lesson_identities(replace(olmoe, **small, norm_topk_prob=True))


if __name__ == "__main__":
    from data import run

    run.Parser(description="What each variant trains, and identities between them.").parse_args()
    main()
