"""PERFT: adapters beside the experts of a frozen Mixture-of-Experts model (arXiv 2411.08212, 2508.02587).

The frozen block computes y = sum over e in TopK(x) of G(x)_e E_e(x)  (moe.py, eq. 1). PERFT adds small two-matrix
adapters Delta: D -> r -> D that read the same input x, outside of the experts, and differ in who is asked:

    perft_s   y += Delta(x)                                              one adapter for every token        (single)
    perft_d   y += sum over j = 1..M of Delta_j(x)                       all M, weight 1 each               (dense)
    perft_r   y += sum over j in TopK~(x) of G~(x)_j Delta_j(x)          M, with a router of their own      (routed)
    perft_e   y += sum over e in TopK(x) of G(x)_e Delta_e(x)            one an expert, under its weight    (embedded)

The unit:  lora       Delta(x) = (dropout(x) A^T) B^T * alpha / r
           parallel   Delta(x) = silu(dropout(x A^T)) B^T                (A, B are the papers' W1, W2; no scale)

All four are one computation with a different gate g (N, M), so one class holds them: the bottlenecks of all M adapters
are one product x A^T (N, M*r), the gate masks it, one product with B^T leads back. All M are computed, also those that
a token did not choose: cheaper than sorting tokens while M*r stays in the hundreds. perft_e has an adapter for each of
many experts (OLMoE, r = 16: M*r = 1,024), so it computes the chosen ones, in the rows that moe.py has sorted by expert;
on a GPU, for which products are cheap, only where they are more than that (PerftMoE.computes_all).

It is not LoRA on the experts: an adapter never touches an expert's own matrices, it stands beside the whole expert.
So perft_e needs nothing of the expert but the router's choice and weight. For the same reason adapters (other than
lora_qv) cannot be merged into the base: no weight of a SwiGLU expert is the sum of the expert and a network beside it.

Baselines in the same file: lora_qv (LoRA on the attention's q and v projections), router (only the pretrained routers),
frozen_experts (everything but the experts, MoFE), full (everything).

Notation: the papers' A, B, r, alpha, M, Top K of M. Shapes: N tokens, D hidden_size, E num_experts, M adapters, r rank.
Adapters and their router are float32 whatever the base is, and are cast for the product: at a learning rate of 1e-5
most steps are too small to change a bfloat16 number.

Three facts, each an option here and never silent:
  * The released OLMoE code of PERFT-R weights the adapters by the *base* router's K largest weights, rank by rank, so
    that its own router chooses but never learns from the task. adapter_weights="own" is the paper, "base" that code.
  * With K = 1 and a base that renormalises (Mixtral), the one weight is x / x = 1: again nothing to learn from. Warned.
  * init="paper": A ~ N(0, 2/r), B ~ 1e-6 N(0, 1), router ~ N(0, 0.02^2); init="lora": Kaiming-uniform A, B = 0, with
    which every variant is the base model bit for bit. The two want different learning rates.

Against the authors' code: its adapters draw a dropout mask each, here they share one. Left out: E with S, D or R.

    python perft.py        the lesson: what each variant trains, by formula and by count, and the identities holding
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoint import read_json, read_safetensors, write_safetensors, write_text
from data.report import report as report
from data.report import what_trains
from model import Config, MoETransformer, active_parameters
from moe import DispatchedProduct, GroupedProduct, MoE, Order, Router, Routing

PERFT = ("perft_s", "perft_d", "perft_r", "perft_e")
BASELINES = ("lora_qv", "router", "frozen_experts", "full")


class Adapters(nn.Module):
    """M adapters of one layer: A (M, r, D), B (M, D, r), float32, and for PERFT-R a router (M, D)."""

    def __init__(self, hidden_size: int, num_adapters: int, rank: int, kind: str, scale: float, dropout: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(num_adapters, rank, hidden_size, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(num_adapters, hidden_size, rank, dtype=torch.float32))
        self.kind, self.scale, self.dropout = kind, scale, dropout
        self.router: Router | None = None

    def init_weights(self, init: str):
        if init == "paper":
            nn.init.normal_(self.A, std=math.sqrt(2 / self.A.shape[1]))
            nn.init.normal_(self.B, std=1e-6)
        else:
            nn.init.uniform_(self.A, -(self.A.shape[2] ** -0.5), self.A.shape[2] ** -0.5)  # Kaiming with a = sqrt(5)
            nn.init.zeros_(self.B)
        if self.router is not None:
            nn.init.normal_(self.router.weight, std=0.02)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """sum over j of gate_j Delta_j(x): x (N, D), gate (N, M) or None for weight 1 -> (N, D). Computes all M."""
        M, r, D = self.A.shape
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        hidden = self.bend(F.linear(self.drop(x), A.reshape(M * r, D)))  # (N, M*r), the bottlenecks of all adapters
        if gate is not None:
            hidden = hidden * gate.repeat_interleave(r, dim=1)
        return hidden @ B.transpose(1, 2).reshape(M * r, D)

    def grouped(self, x, experts: torch.Tensor | None, rows, order: Order, weight) -> torch.Tensor:
        """The same where adapter j stands beside experts[j] (None: beside expert j) and is asked when that one is: the
        chosen ones alone, under the expert's weight, (R, D). rows, order, weight: what experts_grouped has (moe.py)."""
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        if experts is not None:  # an expert without an adapter has one of zeros
            A, B = (p.new_zeros(len(order.ends), *p.shape[1:]).index_copy(0, experts, p) for p in (A, B))
        pad = -self.A.shape[1] % 8
        A, B = F.pad(A, (0, 0, 0, pad)), F.pad(B, (0, pad))  # rows of 16 bytes, see can_group
        dropped = self.drop(x)
        hidden = DispatchedProduct.apply(dropped, rows.detach() if dropped is x else None, A, order)  # (R, r)
        return GroupedProduct.apply(self.bend(hidden) * weight, B, order.ends)

    def drop(self, x):
        return F.dropout(x, self.dropout) if self.kind == "lora" and self.training and self.dropout else x

    def bend(self, hidden):
        if self.kind == "lora":
            return hidden * self.scale
        return F.silu(F.dropout(hidden, self.dropout, self.training))


class PerftMoE(nn.Module):
    """A frozen MoE block with adapters beside it. `adapter_weights` matters to PERFT-R only: see the opening page."""

    def __init__(self, base: MoE, adapters: Adapters, variant: str, adapter_weights: str, experts: list[int] | None):
        super().__init__()
        self.base, self.adapters, self.variant, self.adapter_weights = base, adapters, variant, adapter_weights
        ids = None if experts is None else torch.tensor(experts, device="cpu")
        self.register_buffer("experts", ids, persistent=False)  # perft_e: adapter j is experts[j]'s; None: all have one

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        if self.variant == "perft_e" and not self.computes_all(flat):
            return self.base(x, partial(self.adapters.grouped, flat, self.experts))
        y, routing = self.base(x)
        gate = None  # S and D: every adapter, weight 1
        if self.variant == "perft_e":
            gate = spread(routing.routing_weights, routing.selected_experts, routing.router_logits.shape[1])
            gate = gate if self.experts is None else gate.index_select(1, self.experts)
        elif self.variant == "perft_r":
            own = self.adapters.router(flat)
            weights = own.routing_weights
            if self.adapter_weights == "base":
                weights = routing.routing_weights[:, : weights.shape[1]]  # as in the released OLMoE code
            gate = spread(weights, own.selected_experts, own.router_logits.shape[1])
            routing = Routing(*routing[:3], own)  # torch 2.11 cannot compile a _replace that is returned
        return y + self.adapters(flat, gate).view_as(x), routing

    def computes_all(self, x: torch.Tensor) -> bool:
        """Must perft_e compute all adapters, or should it? The chosen ones cost passes over K rows a token, all of them
        products of M*r columns, and a GPU counts fast and moves slowly (an H100: 266 operations a byte). The limit is
        an estimate, not measured here."""
        M, r, _ = self.adapters.A.shape
        return not self.base.experts.groups(x) or (x.is_cuda and M * r <= 128 * self.base.router.top_k)


def spread(weights: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    """(N, K) weights of the chosen ids -> (N, count), 0 where not chosen."""
    return weights.new_zeros(len(weights), count).scatter(1, ids, weights)


class LoraLinear(nn.Module):
    """A frozen linear map plus (dropout(x) A^T) B^T * alpha/r (LoRA, arXiv 2106.09685); A (r, in), B (out, r)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(base.out_features, rank, dtype=torch.float32))

    def init_weights(self):
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x):
        dropped = F.dropout(x, self.dropout, self.training)
        delta = F.linear(F.linear(dropped, self.A.to(x.dtype)), self.B.to(x.dtype))
        return self.base(x) + delta * self.scale


# Attaching -----------------------------------------------------------------------------------------------------------


@dataclass
class PerftConfig:
    """What was attached: the options of `apply_perft`, and the content of adapter_config.json."""

    variant: str
    rank: int = 16
    alpha: float | None = None  # None: 2 * rank, as in the papers
    num_adapters: int = 4  # M of perft_d and perft_r; perft_s has one, perft_e one for each expert
    top_k: int = 2  # K of perft_r
    kind: str = "lora"
    init: str = "paper"
    adapter_weights: str = "own"
    dropout: float = 0.05
    train_router: bool = False  # also train the pretrained routers
    experts: list[list[int]] | None = None  # perft_e: adapters for these experts of each layer only

    def __post_init__(self):
        """ValueError, in one line, for options that no model could have."""
        choices = {"variant": PERFT + BASELINES, "kind": ("lora", "parallel"), "init": ("paper", "lora"),
                   "adapter_weights": ("own", "base")}  # fmt: skip
        for name, allowed in choices.items():
            need(getattr(self, name) in allowed, f"{name} is {getattr(self, name)!r}; choose from {', '.join(allowed)}")
        for name in ("rank", "num_adapters", "top_k"):
            value = getattr(self, name)
            need(isinstance(value, int) and value >= 1, f"{name} is {value!r}; it must be a whole number from 1")
        self.alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        for name, end in (("dropout", 1), ("alpha", math.inf)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and 0 <= value < end
            need(number, f"{name} is {value!r}; it must be a number from 0, less than {end}")
        routers = self.variant == "lora_qv" and self.train_router
        need(not routers, "lora_qv is saved in PEFT's layout, which has no place for routers; drop train_router")
        K, M = self.top_k, self.num_adapters
        possible = self.variant != "perft_r" or K <= M
        need(possible, f"top_k {K} of num_adapters {M}: there are not so many to choose from; lower top_k")

    def check(self, base: Config):
        """ValueError, in one line, for options that this base cannot have."""
        k = base.num_experts_per_tok
        few = self.variant == "perft_r" and self.adapter_weights == "base" and self.top_k > k
        need(not few, f"adapter_weights 'base' has {k} weights a token, top_k {self.top_k} needs as many")
        if self.experts is not None:
            L, E = base.num_hidden_layers, base.num_experts
            need(self.variant == "perft_e", f"experts are chosen for perft_e only, variant is {self.variant}")
            need(len(self.experts) == L, f"experts are given for {len(self.experts)} layers, the model has {L}")
            for i, ids in enumerate(self.experts):
                bad = [e for e in ids if not 0 <= e < E]
                need(not bad, f"layer {i}: expert {bad and bad[0]} is outside 0..{E - 1}")
                need(ids and len(set(ids)) == len(ids), f"layer {i}: experts {ids} are none, or one of them twice")


def need(condition, message):
    if not condition:
        raise ValueError(message)


def apply_perft(model: MoETransformer, variant: str, **options) -> MoETransformer:
    """Freeze `model`, attach `variant` to every layer, in place, and return it. Options: the fields of PerftConfig.

    ValueError for an option that cannot be, and for a model that already carries adapters. Attach when the base has its
    dtype: a later model.to(dtype) would cast the float32 adapters too.
    """
    config = PerftConfig(variant, **options)
    config.check(model.config)
    need(not hasattr(model, "adapter_config"), "the model already carries adapters; load the base again")
    dtype = model.norm.weight.dtype
    fits = variant not in ("full", "frozen_experts") or dtype == torch.float32
    need(fits, f"{variant} trains the base's own weights, and {dtype} would lose small steps; load the base in float32")
    model.requires_grad_(False)
    for i, block in enumerate(model.layers):
        if variant in PERFT:
            block.moe = attach(block.moe, config, model.config, config.experts and config.experts[i])
        elif variant == "lora_qv":
            attention = block.self_attn
            for name in ("q_proj", "v_proj"):
                lora = LoraLinear(getattr(attention, name), config.rank, config.alpha / config.rank, config.dropout)
                lora.init_weights()
                setattr(attention, name, settle(lora, model.norm.weight.device))
    for name, p in model.named_parameters():
        if ".moe.router." in name or ".moe.base.router." in name:
            if variant == "router" or config.train_router:
                p.data = p.data.float()  # a float32 master, for the reason of the opening page
                p.requires_grad_(True)
        if variant == "full" or (variant == "frozen_experts" and ".experts." not in name):
            p.requires_grad_(True)
    model.adapter_config = config
    return model.train(model.training)  # the new parts too: dropout must not be on in a model that is in eval mode


def attach(moe: MoE, config: PerftConfig, base: Config, experts: list[int] | None) -> PerftMoE:
    """One layer's MoE block -> the block with its adapters."""
    counts = {"perft_s": 1, "perft_e": len(experts) if experts else base.num_experts}
    M = counts.get(config.variant, config.num_adapters)
    adapters = Adapters(base.hidden_size, M, config.rank, config.kind, config.alpha / config.rank, config.dropout)
    if config.variant == "perft_r":
        adapters.router = Router(base.hidden_size, M, config.top_k, base.norm_topk_prob)
    adapters.init_weights(config.init)
    return settle(PerftMoE(moe, adapters, config.variant, config.adapter_weights, experts), moe.router.weight.device)


def settle(module: nn.Module, device: torch.device) -> nn.Module:
    """Move what was attached, drawn on the CPU and so alike on every device, to its base. If that has no memory yet
    (the meta device), it stays: no file will fill it later."""
    return module if device.type == "meta" else module.to(device)


def warnings_for(config: PerftConfig, base: Config) -> list[str]:
    """What a user should know before training with this configuration (facts 1 and 2 of the opening page)."""
    if config.variant != "perft_r":
        return []
    if config.adapter_weights == "base":
        return ["adapter_weights 'base': the adapter router chooses, but has no gradient from the task"]
    if config.top_k == 1 and (base.norm_topk_prob or config.num_adapters == 1):
        return ["top_k 1 and a weight that is always 1: the adapter router has no gradient from the task"]
    return []


# Files ---------------------------------------------------------------------------------------------------------------


def fingerprint(base: Config) -> dict:
    """What an adapter must find again: the keys of the base's config.json that shape its logits (not its weights)."""
    beside = ("extra", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "router_aux_loss_coef")
    keys = {k: v for k, v in asdict(base).items() if k not in beside}  # these change no logit
    numbers = {k: float(v) if type(v) is int else v for k, v in keys.items()}  # 10000 and 10000.0 are one theta
    return keys | {"config_sha256": hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()}


def config_of(model: MoETransformer) -> PerftConfig:
    need(hasattr(model, "adapter_config"), "the model carries no adapters; attach some with apply_perft")
    return model.adapter_config


def save_adapter(model: MoETransformer, folder: str | Path):
    """Write adapter_config.json and adapter_model.safetensors (float32; only what trains) into `folder`.

    lora_qv is written in PEFT's own layout and loads there. The others carry a peft_type of their own: PEFT refuses it.
    """
    config = config_of(model)
    content = {"peft_type": "PERFT", **asdict(config), "base": fingerprint(model.config)}
    if config.variant == "lora_qv":
        content |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.rank, "lora_alpha": config.alpha,
                    "lora_dropout": config.dropout, "target_modules": ["q_proj", "v_proj"], "bias": "none"}  # fmt: skip
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_safetensors(Path(folder) / "adapter_model.safetensors", adapter_tensors(model), torch.float32)
    write_text(Path(folder) / "adapter_config.json", json.dumps(content, indent=2) + "\n")


def load_adapter(model: MoETransformer, folder: str | Path) -> MoETransformer:
    """Attach the adapter saved in `folder` to its base, in place, and return the model in eval mode.

    ValueError naming both sides for another base, or for tensors that are missing, extra or misshaped.
    """
    path = Path(folder) / "adapter_config.json"
    content = read_json(path)
    names = [name for name in PerftConfig.__dataclass_fields__ if name in content]
    need(
        "variant" in names and isinstance(content.get("base"), dict),
        f"{path}: not written by this project's save_adapter",
    )
    here = fingerprint(model.config)
    wrong = [f"{k} {content['base'].get(k)!r} against {v!r}" for k, v in here.items() if content["base"].get(k) != v]
    need(not wrong, f"{path}: the adapter was made for another base; adapter against base: {', '.join(wrong)}")
    options, file = {name: content[name] for name in names}, Path(folder) / "adapter_model.safetensors"
    with torch.device("meta"):  # find every fault before the model is touched
        read_safetensors(file, adapter_tensors(apply_perft(MoETransformer(model.config), **options)), check_only=True)
    apply_perft(model, **options)
    read_safetensors(file, adapter_tensors(model))
    return model.eval()


def adapter_tensors(model: MoETransformer) -> dict[str, torch.Tensor]:
    """Tensor name in adapter_model.safetensors -> the trained parameter it is."""
    tensors = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    if model.adapter_config.variant != "lora_qv":
        return tensors
    return {f"base_model.model.model.{name[:-1]}lora_{name[-1]}.weight": t for name, t in tensors.items()}


def merge(model: MoETransformer) -> MoETransformer:
    """Fold lora_qv into the base weights, in place: W += B A * alpha/r. What is left is a plain model.

    ValueError for every other variant: an adapter beside a non-linear expert is not a change of its weights.
    """
    config = config_of(model)
    need(config.variant == "lora_qv", f"{config.variant} cannot be merged: it stands beside a non-linear expert")
    for block in model.layers:
        for name in ("q_proj", "v_proj"):
            lora = getattr(block.self_attn, name)
            weight = lora.base.weight.data
            weight += (lora.B.data @ lora.A.data * lora.scale).to(weight.dtype)
            setattr(block.self_attn, name, lora.base)
    del model.adapter_config
    return model


# The lesson ----------------------------------------------------------------------------------------------------------

OLMOE_1B_7B = Config(
    model_type="olmoe", vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
    num_attention_heads=16, num_experts=64, num_experts_per_tok=8,
)  # fmt: skip
MIXTRAL_8X7B = Config(
    model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
)  # fmt: skip


def formula(config: PerftConfig, base: Config) -> tuple[int, int]:
    """(trainable, activated) parameters of a PERFT variant or lora_qv, as the papers count them."""
    L, D, E, k = base.num_hidden_layers, base.hidden_size, base.num_experts, base.num_experts_per_tok
    M, K, r = config.num_adapters, config.top_k, config.rank
    q, v = base.num_attention_heads * base.head_dim, base.num_key_value_heads * base.head_dim  # output sizes
    unit, qv = 2 * D * r, (D + q + D + v) * r
    trained, met = {"perft_s": (unit, unit), "perft_d": (M * unit, M * unit), "perft_e": (E * unit, k * unit),
                    "perft_r": (M * unit + M * D, K * unit + M * D), "lora_qv": (qv, qv)}[config.variant]  # fmt: skip
    return L * trained, L * met


def main():
    tiny = Config.from_folder(Path(__file__).resolve().parent / "data" / "tiny_olmoe")
    bases = {"OLMoE-1B-7B": OLMOE_1B_7B, "Mixtral-8x7B": MIXTRAL_8X7B, "data/tiny_olmoe": tiny}
    for name, base in bases.items():
        with torch.device("meta"):  # shapes without memory, so the sizes of the real models cost nothing
            model = MoETransformer(base)
        total, active = sum(p.numel() for p in model.parameters()), active_parameters(model)
        print(f"\n{name}: {total:,} parameters, {active:,} active; adapters of rank 16 train")
        for variant in (*PERFT, "lora_qv"):
            with torch.device("meta"):
                adapted = apply_perft(MoETransformer(base), variant)
            config, rows = adapted.adapter_config, what_trains(adapted)
            trained, met = sum(row.parameters for row in rows), sum(row.activated for row in rows)
            same = "as the formula says" if (trained, met) == formula(config, base) else "NOT WHAT THE FORMULA SAYS"
            top = f" (Top{config.top_k}/{config.num_adapters})" * (variant == "perft_r")
            print(f"  {variant + top:18} {trained:12,} parameters ({trained / total:7.3%}), "
                  f"{met:11,} met by a token ({met / active:7.3%}), {same}")  # fmt: skip

    print("\nidentities (largest difference of the outputs of one layer, relative; 0 is bit for bit)")
    torch.manual_seed(0)
    N, D, E, k, r = 64, 32, 8, 2, 4
    base = replace(OLMOE_1B_7B, hidden_size=D, intermediate_size=16, num_experts=E, num_experts_per_tok=k,
                   norm_topk_prob=True)  # fmt: skip
    moe, x = MoE(base), torch.randn(1, N, D)
    for p in moe.parameters():
        nn.init.normal_(p, std=0.2)

    def layer(variant, shared=None, **options):
        """A layer with adapters of which each is a copy of `shared` (A, B), or random."""
        wrapped = attach(moe, PerftConfig(variant, rank=r, dropout=0.0, **options), base, None)
        if shared is not None:
            for p, value in zip((wrapped.adapters.A, wrapped.adapters.B), shared):
                p.data.copy_(value)
        else:
            nn.init.normal_(wrapped.adapters.B)
        return wrapped

    one = torch.randn(r, D), torch.randn(D, r)
    y = moe(x)[0]
    delta = layer("perft_s", one)(x)[0] - y
    mean = layer("perft_r", num_adapters=4, top_k=4)
    mean.adapters.router.weight.data.zero_()
    dense = layer("perft_d", (mean.adapters.A.data, mean.adapters.B.data), num_adapters=4)
    pairs = {
        "R (1 of 1) = S": (layer("perft_r", one, num_adapters=1, top_k=1)(x)[0], y + delta),
        "D (1) = S": (layer("perft_d", one, num_adapters=1)(x)[0], y + delta),
        "D of 4 equal adapters = 4 S": (layer("perft_d", one, num_adapters=4)(x)[0], y + 4 * delta),
        "R (4 of 4), zero router = mean of the adapters": (mean(x)[0], y + (dense(x)[0] - y) / 4),
        "E of equal adapters, renormalised base = S": (layer("perft_e", one)(x)[0], y + delta),
        **{f"{v}, B = 0: the base": (layer(v, (one[0], 0 * one[1]))(x)[0], y) for v in PERFT},
    }
    for name, (left, right) in pairs.items():
        print(f"  {name:48} {(left - right).abs().max() / right.abs().max():.1e}")


if __name__ == "__main__":
    main()
