"""PERFT adds what its equations say, trains what it says, and finds its adapters again; the base
stays as it was.

The reference of values and gradients is a loop over tokens and adapters in double precision; of
whole models, that loop inside transformers' OLMoE and Mixtral; of lora_qv files, PEFT. Models are
tiny and random, with large adapters: what is nearly zero compares nothing.
"""

import copy
import errno
import json
import math
import os
import shutil
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import moe
import perft
from data import hub
from model import EMBEDDED, Config, MoETransformer, active_parameters
from moe import load_balancing_loss
from perft import (
    MIXTRAL_8X7B,
    OLMOE_1B_7B,
    apply_perft,
    load_adapter,
    merge,
    report,
    save_adapter,
    warnings_for,
    what_trains,
)

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}
OLMOE = {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 3}
FAMILIES = {
    "olmoe": OLMOE,
    "olmoe_renormalised": OLMOE | {"norm_topk_prob": True},
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
    },
}
SOME_EXPERTS = [[3, 0], [1, 2]]  # of layer 0 and layer 1; ids that both families have
CASES = {
    "S": ("perft_s", {}),
    "D of 3": ("perft_d", {"num_adapters": 3}),
    "R 2 of 4": ("perft_r", {"num_adapters": 4, "top_k": 2}),
    "R 1 of 3": ("perft_r", {"num_adapters": 3, "top_k": 1}),
    "R 5 of 5": ("perft_r", {"num_adapters": 5, "top_k": 5}),
    "R 2 of 4, base weights": (
        "perft_r",
        {"num_adapters": 4, "top_k": 2, "adapter_weights": "base"},
    ),
    "E": ("perft_e", {}),
    "E of some experts": ("perft_e", {"experts": SOME_EXPERTS}),
}
LORA_EXPERTS = {
    "lora_experts": ("lora_experts", {}),
    "lora_experts, outer halves shared": ("lora_experts", {"shared_outer": True}),
    "lora_experts of some": ("lora_experts", {"experts": SOME_EXPERTS}),
    "lora_experts of some, shared": (
        "lora_experts",
        {"experts": SOME_EXPERTS, "shared_outer": True},
    ),
}
LORA = {"lora_qv": ("lora_qv", {})} | LORA_EXPERTS
WITH_LORA = CASES | LORA
BASELINES = {name: (name, {}) for name in ("router", "frozen_experts", "full")}
EVERYTHING = WITH_LORA | BASELINES | {"E and routers": ("perft_e", {"train_router": True})}
IDS = torch.randint(2, SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))

every_family = pytest.mark.parametrize("family", FAMILIES)
both_families = pytest.mark.parametrize("family", ["olmoe", "mixtral"])
every_kind = pytest.mark.parametrize("kind", ["lora", "parallel"])
every_lora = pytest.mark.parametrize("case", LORA)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make_base(family="olmoe", dtype=torch.float32, **changes):
    """A model with random weights, the same at each call."""
    model = MoETransformer(hub.make_config(SIZES | FAMILIES[family] | changes, Config))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        mean, std = (1, 0.3) if "norm" in name else (0, p.shape[-1] ** -0.5)
        p.data.normal_(mean, std, generator=generator)
    return model.to(dtype).eval()


def make_adapted(case, family="olmoe", dtype=torch.float32, seed=2, noise=0.3, **options):
    """A base with adapters in eval mode, everything that trains moved away from where it starts."""
    variant, own = EVERYTHING[case]
    torch.manual_seed(seed)
    model = apply_perft(make_base(family, dtype), variant, **{"rank": 3} | own | options).eval()
    for p in trained(model).values():
        p.data += noise * torch.randn_like(p)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapters(model):
    return [block.moe.adapters for block in model.layers]


def without_adapters(block, x):
    """What the frozen block under the adapters gives."""
    flat = x.reshape(-1, x.shape[-1])
    return block.experts(flat, block.router(flat)).view_as(x)


def gap(ours, theirs):
    """The largest difference, relative to the largest magnitude."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def one_line(error):
    """The message of an error raised on purpose."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


# The equations, token by token -------------------------------------------------------------------


def choose(x, router, K, renormalise):
    """One token's softmax over all, the K largest, perhaps divided by their sum -> ids, weights."""
    scores = router @ x
    exponentials = torch.exp(scores - scores.max().item())
    probs = exponentials / exponentials.sum()
    ids = sorted(range(len(probs)), key=lambda j: -probs[j].item())[:K]
    weights = [probs[j] for j in ids]
    return ids, [w / sum(weights) for w in weights] if renormalise else weights


def silu(x):
    return x / (1 + torch.exp(-x))


def delta(x, A, B, kind, scale):
    """The unit: D -> r -> D for one token."""
    return B @ silu(A @ x) if kind == "parallel" else B @ (A @ x) * scale


def frozen_layer(x, ids, weights, gate_up, down):
    """Eq. 1 for one token."""
    y = torch.zeros_like(x)
    for e, weight in zip(ids, weights):
        gate, up = (gate_up[e] @ x).chunk(2)
        y = y + weight * (down[e] @ (silu(gate) * up))
    return y


def added(x, A, B, own_router, ids, weights, layer, config, base):
    """What the variant adds to one token's y. ids, weights: the base router's; layer: its
    number."""
    M, unit = len(A), (config.kind, config.alpha / config.rank)
    if config.variant == "perft_s":
        return delta(x, A[0], B[0], *unit)
    if config.variant == "perft_d":
        return sum(delta(x, A[j], B[j], *unit) for j in range(M))
    if config.variant == "perft_r":
        own_ids, own_weights = choose(x, own_router, config.top_k, base.norm_topk_prob)
        used = own_weights if config.adapter_weights == "own" else weights  # rank by rank
        return sum(w * delta(x, A[j], B[j], *unit) for j, w in zip(own_ids, used))
    place = {
        e: j
        for j, e in enumerate(config.experts[layer] if config.experts else range(base.num_experts))
    }
    terms = [
        w * delta(x, A[place[e]], B[place[e]], *unit) for e, w in zip(ids, weights) if e in place
    ]
    return sum(terms, torch.zeros_like(x))


def always_one(config, base):
    """A single renormalised choice has weight x / x: its gradient is rounding, and rounding cannot
    be compared."""
    return config.variant == "perft_r" and config.top_k == 1 and base.norm_topk_prob


def leaf(p):
    """A float64 copy that collects a gradient."""
    return None if p is None else p.detach().double().clone().requires_grad_()


def assert_layer_is_the_reference(model):
    """Output and gradients of x, A, B, adapter router and pretrained router, for each layer of the
    model."""
    config, base = model.adapter_config, model.config
    for i, block in enumerate(model.layers):
        moe = block.moe
        x = torch.randn(1, 5, base.hidden_size, generator=torch.Generator().manual_seed(i))
        x.requires_grad_()
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
        own = moe.adapters.router and moe.adapters.router.weight
        y, routing = moe(x)
        parameters = {
            "x": x,
            "A": moe.adapters.A,
            "B": moe.adapters.B,
            "own": own,
            "router": moe.router.weight,
        }
        leaves = {name: leaf(p) for name, p in parameters.items()}
        rows = []
        for token in leaves["x"].reshape(-1, base.hidden_size):
            k, renormalise = base.num_experts_per_tok, base.norm_topk_prob
            ids, weights = choose(token, leaves["router"], k, renormalise)
            stacks = [p.double() for p in moe.experts.parameters()]
            frozen = frozen_layer(token, ids, weights, *stacks)
            own_parts = leaves["A"], leaves["B"], leaves["own"]
            rows.append(frozen + added(token, *own_parts, ids, weights, i, config, base))
        reference = torch.stack(rows).view(x.shape)
        assert gap(y, reference) < 1e-5
        size = (reference - without_adapters(moe, x)).abs().max()
        assert size > 0.01, "adapters that add nothing would compare nothing"
        (y * direction).sum().backward()
        (reference * direction).sum().backward()
        for name, p in parameters.items():
            if name == "own" and (p is None or config.adapter_weights == "base"):
                assert p is None or p.grad is leaves[name].grad is None
            elif name == "own" and always_one(config, base):
                assert p.grad.abs().max() < 1e-5
            else:
                assert gap(p.grad, leaves[name].grad) < 1e-5, name


@every_family
@every_kind
@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_the_loop_over_tokens_and_adapters_forward_and_backward(family, kind, case):
    """y and the gradients of x, A, B and both routers, to 1e-5, in double precision; ranks 1, 3 and
    16."""
    for rank, alpha in ((1, None), (3, 5.0), (16, None)):
        assert_layer_is_the_reference(
            make_adapted(
                case, family, rank=rank, alpha=alpha, kind=kind, train_router=True, seed=rank
            )
        )


@every_kind
def test_embedded_adapters_work_where_rows_cannot_be_grouped(kind):
    """A hidden size of 18, rows of 72 bytes, which F.grouped_mm refuses."""
    base = make_base(hidden_size=18, num_attention_heads=3)
    model = apply_perft(base, "perft_e", rank=3, kind=kind, train_router=True).eval()
    for stack in adapters(model):
        stack.B.data.normal_(std=0.3)
    assert_layer_is_the_reference(model)


def test_embedded_adapters_drop_the_same_features_of_x_for_all_experts_of_a_token():
    """Under one seed, y and gradients are those of all adapters computed on the same dropped x,
    weighed by the chosen experts' weights."""
    block = make_adapted("E", dropout=0.5).layers[0].moe.train()
    stack = block.adapters
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    torch.manual_seed(4)
    y, routing = block(x)
    torch.manual_seed(4)
    dropped = F.dropout(x[0], 0.5)
    gate = torch.zeros(7, 8).scatter(1, routing.selected_experts, routing.routing_weights)
    deltas = torch.einsum("nd,erd,eor->neo", dropped, stack.A, stack.B) * stack.scale
    dense = without_adapters(block, x) + torch.einsum("ne,neo->no", gate, deltas)
    assert gap(y, block.eval()(x)[0]) > 0.01, "nothing was dropped"
    leaves = (x, stack.A, stack.B)
    ours, theirs = (
        torch.autograd.grad(t.square().sum(), leaves, retain_graph=True) for t in (y, dense)
    )
    assert gap(y, dense) < 1e-5
    assert all(gap(a, b) < 1e-5 for a, b in zip(ours, theirs))


# LoRA on the experts -----------------------------------------------------------------------------


def whole_stacks(lora, num_experts):
    """A and B of every expert, float64: a single one for all, none is zeros."""
    stacks = []
    for p in (lora.A, lora.B):
        ids = range(num_experts) if lora.experts is None else lora.experts.tolist()
        rows = [torch.zeros_like(p[0]).double()] * num_experts
        for j, e in enumerate(ids):
            rows[e] = p.double()[j if len(p) == len(ids) else 0]
        stacks.append(torch.stack(rows))
    return stacks


def dense_experts(x, router, experts, K, renormalise):
    """Every expert of W + B A alpha/r for each token, in double precision, all formed; the weight
    of one that was not chosen is 0."""
    E, scale = len(experts.down_proj), experts.down_lora.scale
    A, B = whole_stacks(experts.gate_up_lora, E)
    gate_up = experts.gate_up_proj.double() + B @ A * scale
    A, B = whole_stacks(experts.down_lora, E)
    down = experts.down_proj.double() + B @ A * scale
    rows = []
    for token in x:
        ids, weights = choose(token, router, K, renormalise)
        rows.append(frozen_layer(token, ids, weights, gate_up, down))
    return torch.stack(rows)


LORA_WIDTHS = {
    "grouped": {},
    "rows of 72 and 28 bytes": {
        "hidden_size": 18,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "intermediate_size": 7,
    },
}


@every_family
@pytest.mark.parametrize("case", LORA_EXPERTS)
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("widths", LORA_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lora_on_experts_is_the_dense_sum_over_changed_experts(family, case, rank, widths, dtype):
    """y and the gradients of x, router, A and B of both stacks, against double precision. The
    adapters stay float32 on a float64 base, whose products are then exact to rounding."""
    variant, options = LORA_EXPERTS[case]
    torch.manual_seed(rank)
    base = make_base(family, dtype, **LORA_WIDTHS[widths])
    model = apply_perft(base, variant, rank=rank, alpha=2.5 * rank, dropout=0.0, **options)
    k, renormalise = base.config.num_experts_per_tok, base.config.norm_topk_prob
    for block in model.layers:
        block.moe.router.weight.requires_grad_()
        for p in block.moe.experts.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.3)
        x = torch.randn(1, 6, base.config.hidden_size, dtype=dtype).requires_grad_()
        direction = torch.randn_like(x)
        lora = [p for p in block.moe.experts.parameters() if p.requires_grad]
        assert len(lora) == 4 and {p.dtype for p in lora} == {torch.float32}
        leaves = [x, block.moe.router.weight, *lora]
        y = block.moe(x)[0]
        ours = torch.autograd.grad((y * direction).sum(), leaves)
        x64, router = leaf(x), leaf(block.moe.router.weight)
        dense = dense_experts(x64[0], router, block.moe.experts, k, renormalise)
        exact = torch.autograd.grad((dense * direction[0]).sum(), [x64, router, *lora])
        limit = 1e-5 if dtype == torch.float32 else 1e-6
        assert gap(y[0], dense) < limit
        for mine, theirs in zip(ours, exact):
            assert theirs.abs().max() > 0 and gap(mine, theirs) < limit


@pytest.mark.parametrize("case", LORA_EXPERTS)
def test_lora_on_experts_of_a_bfloat16_base_is_off_by_rounding_only(case):
    """Output and gradients of A and B within 2 % of the norm of those in float32, same weights."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_adapted(case, dtype=dtype, rank=5)
        if dtype == torch.float32:  # the values that bfloat16 has
            for p in model.parameters():
                if not p.requires_grad:
                    p.data = p.data.bfloat16().float()
        block = model.layers[0].moe
        x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
        routing = block.router(x[0].float())  # of float32 in both: no choice flips
        routing = routing._replace(routing_weights=routing.routing_weights.to(dtype))
        y = block.experts(x[0].to(dtype), routing)
        lora = [p for p in block.experts.parameters() if p.requires_grad]
        results.append([y.float(), *torch.autograd.grad(y.float().square().sum(), lora)])
    for exact, rounded in zip(*results):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_lora_on_experts_forms_no_changed_matrix_and_keeps_little():
    """Between forward and backward: x (N, D), bottlenecks (R, 8), gate_up and the input of down
    (R, F), and no row (R, D); of (E, 2F, D) and (E, D, F) the frozen stacks themselves."""
    block = apply_perft(make_base(intermediate_size=24), "lora_experts", rank=3).layers[0].moe
    x = torch.randn(1, 7, 32).requires_grad_()
    kept = kept_by(lambda: block(x))
    assert (7, 32) in kept and (21, 8) in kept and (21, 24) in kept and (21, 32) not in kept
    assert kept.count((8, 48, 32)) == kept.count((8, 32, 24)) == 1


@pytest.mark.parametrize("case", LORA_EXPERTS)
def test_dropout_of_lora_on_experts_is_on_the_input_of_both_matrices(case):
    """Rank 8, one feature in x: where it is dropped, gate_up adds nothing, else twice as much; of
    the down matrix alone, expectation over draws is what eval gives."""
    model = make_adapted(case, rank=8, dropout=0.5)
    experts = model.layers[0].moe.experts.train()
    experts.down_lora.B.data.zero_()
    x = torch.zeros(600, 32)
    x[:, 3] = 1.0
    ids = torch.full((600, 1), 3)
    routing = moe.Routing(torch.zeros(600, 8), torch.ones(600, 1), ids)
    rows = experts(x, routing)
    doubled = experts.eval()(x[:1], routing_of_one(routing))
    experts.gate_up_lora.B.data.zero_()
    frozen = experts(x[:1], routing_of_one(routing))
    dropped = (rows - frozen).abs().amax(-1) < 1e-5 * rows.abs().max()
    assert 0.4 < dropped.float().mean() < 0.6
    assert len(torch.unique(rows[~dropped].mul(1e4).round(), dim=0)) == 1
    assert not torch.allclose(rows[~dropped][:1], doubled, atol=1e-4), "it is scaled by 2"


def routing_of_one(routing):
    return moe.Routing(*(t[:1] for t in routing))


def test_lora_counts_of_olmoe_are_those_of_the_literature():
    """OLMoE-1B-7B, r = 16: 117 M trained with a pair for each expert, 51 M with shared outer
    halves; a token meets 8 of 64, and the shared halves once."""
    config = hub.make_config(OLMOE_1B_7B, Config)
    L, D, F_, E, K, r = 16, 2048, 1024, 64, 8, 16
    own, outer = 3 * F_ * r, 2 * D * r  # an expert's: inner halves 2F + F, outer halves D + D
    wanted = {
        False: (L * E * (own + outer), L * K * (own + outer)),
        True: (L * (E * own + outer), L * (K * own + outer)),
    }
    assert round(wanted[False][0] / 1e6) == 117 and round(wanted[True][0] / 1e6) == 51
    for shared, counts in wanted.items():
        with torch.device("meta"):
            model = MoETransformer(config)
            apply_perft(model, "lora_experts", rank=r, shared_outer=shared)
        rows = what_trains(model)
        assert (sum(r.parameters for r in rows), sum(r.activated for r in rows)) == counts


# What is kept ------------------------------------------------------------------------------------


def kept_by(forward):
    """The shapes of what is kept for the backward pass."""
    shapes = []

    def keep(t):
        shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return shapes


def test_a_gathered_product_is_the_product_of_dispatched_rows_and_keeps_x_alone():
    """Values and both gradients bit for bit; K times fewer rows wait for the backward pass."""
    torch.manual_seed(0)
    order = moe.sort_by_expert(torch.rand(7, 6).topk(3).indices, 6)  # R = 21 rows
    x, weight = torch.randn(7, 32).requires_grad_(), torch.randn(6, 8, 32).requires_grad_()

    def gathered():
        return perft.GatheredProduct.apply(x, weight, order)

    def dispatched():
        return moe.GroupedProduct.apply(moe.Dispatch.apply(x, order), weight, order.ends)

    assert (21, 32) in kept_by(dispatched)
    assert (7, 32) in kept_by(gathered) and (21, 32) not in kept_by(gathered)
    results = []
    for run in (gathered, dispatched):
        y = run()
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@every_kind
def test_embedded_adapters_keep_no_rows_of_the_hidden_size(kind):
    """In a whole layer: x (N, D) and bottlenecks (R, r) are kept, nothing (R, D)."""
    model = apply_perft(make_base(intermediate_size=24), "perft_e", rank=3, kind=kind).train()
    block = model.layers[0].moe
    x = torch.randn(1, 7, 32).requires_grad_()
    kept = kept_by(lambda: block(x))
    assert (7, 32) in kept and (21, 8) in kept and (21, 32) not in kept


class WithAdapters(nn.Module):
    """A transformers MoE block and, token by token, what a PERFT variant adds."""

    def __init__(self, block, layer, ours, model):
        super().__init__()
        self.block, self.layer = block, layer
        self.config, self.base = model.adapter_config, model.config
        self.A, self.B = nn.Parameter(ours.A.double()), nn.Parameter(ours.B.double())
        self.router = ours.router and nn.Parameter(ours.router.weight.double())

    def forward(self, x):
        rows = []
        for token in x.reshape(-1, x.shape[-1]):
            k, renormalise = self.base.num_experts_per_tok, self.base.norm_topk_prob
            ids, weights = choose(token, self.block.gate.weight, k, renormalise)
            own = self.A, self.B, self.router
            rows.append(added(token, *own, ids, weights, self.layer, self.config, self.base))
        return self.block(x) + torch.stack(rows).view_as(x)


class WithLora(nn.Module):
    """A transformers projection plus B A x alpha/r."""

    def __init__(self, linear, ours):
        super().__init__()
        self.linear, self.scale = linear, ours.scale
        self.A, self.B = nn.Parameter(ours.A.double()), nn.Parameter(ours.B.double())

    def forward(self, x):
        return self.linear(x) + x @ self.A.T @ self.B.T * self.scale


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Base folders, one a family."""
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        make_base(family).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def references(folders):
    """transformers' models of the same folders, in double precision."""
    transformers = pytest.importorskip("transformers")
    plain = {
        "attn_implementation": "eager",
        "experts_implementation": "eager",
        "dtype": torch.float64,
    }
    load = transformers.AutoModelForCausalLM.from_pretrained
    return {family: load(folder, **plain).eval() for family, folder in folders.items()}


def adapt_reference(reference, model):
    """transformers' model with the adapters of ours -> the model, {our name: its parameter}."""
    reference, pairs = copy.deepcopy(reference).requires_grad_(False), {}
    for i, (theirs, ours) in enumerate(zip(reference.model.layers, model.layers)):
        if model.adapter_config.variant == "lora_qv":
            for name in ("q_proj", "v_proj"):
                lora = WithLora(getattr(theirs.self_attn, name), getattr(ours.self_attn, name))
                setattr(theirs.self_attn, name, lora)
                pairs |= {f"layers.{i}.self_attn.{name}.{p}": getattr(lora, p) for p in ("A", "B")}
            continue
        theirs.mlp = block = WithAdapters(theirs.mlp, i, ours.moe.adapters, model)
        pairs |= {f"layers.{i}.moe.adapters.{p}": getattr(block, p) for p in ("A", "B")}
        if block.router is not None:
            pairs[f"layers.{i}.moe.adapters.router.weight"] = block.router
        if model.adapter_config.train_router:
            gate = block.block.gate.weight.requires_grad_()
            gate.data.copy_(ours.moe.router.weight)
            pairs[f"layers.{i}.moe.router.weight"] = gate
    return reference, pairs


@both_families
@every_kind
@pytest.mark.parametrize("case", [*CASES, "lora_qv", "E and routers"])
def test_a_whole_model_has_the_loss_and_gradients_of_transformers_with_adapters(
    references, family, kind, case
):
    """Loss to 1e-6, each trained tensor's gradient to 1e-5 of its largest; theirs in double
    precision."""
    if case == "lora_qv" and kind == "parallel":
        pytest.skip("lora_qv is LoRA")
    model = make_adapted(case, family, kind=kind, noise=0.1)
    reference, pairs = adapt_reference(references[family], model)
    ids = IDS[:, :4]
    labels = torch.where(torch.arange(4) < 2, -100, ids)
    loss, exact = model(ids, labels=labels).loss, reference(ids, labels=labels).loss
    assert abs(loss.item() / exact.item() - 1) < 1e-6
    loss.backward()
    exact.backward()
    assert trained(model).keys() == pairs.keys()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in pairs), (
        "frozen, yet a gradient"
    )
    for name, p in trained(model).items():
        if pairs[name].grad is None:
            assert p.grad is None, name
        elif "adapters.router" in name and always_one(model.adapter_config, model.config):
            assert p.grad.abs().max() < 1e-6
        else:
            assert pairs[name].grad.abs().max() > 0 and gap(p.grad, pairs[name].grad) < 1e-5, name


# Identities --------------------------------------------------------------------------------------


@every_family
@every_kind
@every_dtype
@pytest.mark.parametrize("case", WITH_LORA)
def test_with_zero_B_every_variant_is_the_base_bit_for_bit(family, kind, dtype, case):
    """Logits equal those of the model without adapters, in training mode too, where dropout is
    on."""
    variant, options = WITH_LORA[case]
    logits = make_base(family, dtype)(IDS).logits
    model = apply_perft(
        make_base(family, dtype), variant, kind=kind, init="lora", dropout=0.5, **options
    )
    for mode in (True, False):
        assert torch.equal(model.train(mode)(IDS).logits, logits)


def run_layer(variant, family, kind, A, B, **options):
    """Output of the first layer's block, its adapters being A, B: (r, D), (D, r) for all, or
    stacked."""
    model = apply_perft(make_base(family), variant, rank=A.shape[-2], kind=kind, **options).eval()
    (stack, _) = adapters(model)
    stack.A.data.copy_(A)
    stack.B.data.copy_(B)
    if stack.router is not None:
        stack.router.weight.data.zero_()
    block = model.layers[0].moe
    x = torch.randn(2, 7, SIZES["hidden_size"], generator=torch.Generator().manual_seed(5))
    return block(x)[0], without_adapters(block, x)


def random_adapters(*M, r=3):
    generator = torch.Generator().manual_seed(6)
    D = SIZES["hidden_size"]
    return torch.randn(*M, r, D, generator=generator), torch.randn(*M, D, r, generator=generator)


@every_family
@every_kind
def test_routed_one_of_one_and_dense_one_are_the_single_adapter(family, kind):
    """A softmax over one is 1, and a sum over one is its term."""
    one = random_adapters()
    single, y = run_layer("perft_s", family, kind, *one)
    assert gap(single, y) > 0.1
    for variant in ("perft_r", "perft_d"):
        assert (
            gap(run_layer(variant, family, kind, *one, num_adapters=1, top_k=1)[0], single) < 1e-6
        )


@every_family
@every_kind
def test_dense_copies_add_up_and_are_not_averaged(family, kind):
    """D of M equal adapters adds M times what S adds."""
    one = random_adapters()
    single, y = run_layer("perft_s", family, kind, *one)
    assert (
        gap(run_layer("perft_d", family, kind, *one, num_adapters=5)[0], y + 5 * (single - y))
        < 1e-6
    )


@every_family
@every_kind
def test_all_of_M_under_a_router_that_does_not_care_are_the_mean(family, kind):
    """R (M of M) with a zero router, against the mean of M models with one adapter each."""
    A, B = random_adapters(5)
    singles = [run_layer("perft_s", family, kind, A[j], B[j])[0] for j in range(5)]
    routed, _ = run_layer("perft_r", family, kind, A, B, num_adapters=5, top_k=5)
    assert gap(routed, torch.stack(singles).mean(0)) < 1e-6


@pytest.mark.parametrize("family", ["olmoe_renormalised", "mixtral"])
@every_kind
def test_equal_embedded_adapters_under_weights_that_sum_to_one_are_the_single_adapter(family, kind):
    """E = S where the base renormalises."""
    one = random_adapters()
    assert (
        gap(
            run_layer("perft_e", family, kind, *one)[0], run_layer("perft_s", family, kind, *one)[0]
        )
        < 1e-6
    )


@every_kind
def test_equal_embedded_adapters_are_less_than_the_single_one_on_olmoe(kind):
    """OLMoE keeps weights that sum to less than 1: y + (that sum) * Delta, the sum computed from
    the logits here."""
    one = random_adapters()
    model = apply_perft(make_base(), "perft_e", rank=3, kind=kind)
    x = torch.randn(2, 7, SIZES["hidden_size"], generator=torch.Generator().manual_seed(5))
    share = (
        F.linear(x, model.layers[0].moe.router.weight)
        .softmax(-1)
        .topk(3)
        .values.sum(-1, keepdim=True)
    )
    single, y = run_layer("perft_s", "olmoe", kind, *one)
    assert share.max() < 1
    assert gap(run_layer("perft_e", "olmoe", kind, *one)[0], y + share * (single - y)) < 1e-5


def test_the_routing_is_the_base_routers_and_only_R_adds_its_own():
    """Router logits of layer 0 equal the plain base's bit for bit; a routing with a part `adapter`
    is PERFT-R's alone."""
    plain = make_base()(IDS).routings[0]
    for case in CASES:
        routing = make_adapted(case)(IDS).routings[0]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(routing[:3], plain[:3]))
        assert hasattr(routing, "adapter") == case.startswith("R")
    own = make_adapted("R 2 of 4")(IDS).routings[0].adapter
    assert own.router_logits.shape == (24, 4)
    assert own.selected_experts.shape == own.routing_weights.shape == (24, 2)


# What reaches the adapter router -----------------------------------------------------------------


def router_gradients(family="olmoe", loss=None, **options):
    """The largest gradient at each layer's adapter router, of the cross-entropy unless `loss` is
    given."""
    model = make_adapted("R 2 of 4", family, **options)
    output = model(IDS, labels=IDS)
    (output.loss if loss is None else loss(output)).backward()
    gradients = [a.router.weight.grad for a in adapters(model)]
    return [0.0 if g is None else g.abs().max().item() for g in gradients]


@both_families
def test_with_the_bases_weights_the_adapter_router_learns_nothing_from_the_task(family):
    """The released OLMoE code: cross-entropy gives it a gradient of exactly zero. The paper's
    weighting does not."""
    assert router_gradients(family, adapter_weights="base") == [0.0, 0.0]
    assert min(router_gradients(family, adapter_weights="own")) > 1e-3


@both_families
def test_with_the_bases_weights_the_adapter_router_still_hears_the_balance_loss(family):
    """The balance loss is computed from its logits, whoever weights the adapters."""
    balance = lambda output: sum(load_balancing_loss(r.adapter) for r in output.routings)  # noqa: E731
    assert min(router_gradients(family, balance, adapter_weights="base")) > 1e-4


def test_one_renormalised_choice_teaches_the_adapter_router_nothing():
    """x / x = 1: zero up to rounding on Mixtral and a renormalising OLMoE; without renormalising it
    learns."""
    for family in ("mixtral", "olmoe_renormalised"):
        assert max(router_gradients(family, top_k=1)) < 1e-6
        assert min(router_gradients(family, top_k=2)) > 1e-3
    assert min(router_gradients("olmoe", top_k=1)) > 1e-3


def test_a_router_that_cannot_learn_is_warned_about_and_one_that_can_is_not():
    """warnings_for, for every family, K and weighting; variants without an adapter router have
    nothing to warn of."""
    for family in FAMILIES:
        base = make_base(family).config
        for K, weights in ((1, "own"), (2, "own"), (1, "base"), (2, "base")):
            config = perft.PerftConfig("perft_r", top_k=K, adapter_weights=weights)
            inert = weights == "base" or (K == 1 and family != "olmoe")
            notes = warnings_for(config, base)
            assert bool(notes) == inert, (family, K, weights)
            assert all("router" in note and "\n" not in note for note in notes)
            cause = "adapter_weights 'base'" if weights == "base" else "top_k 1, a weight"
            assert all(note.startswith(cause) for note in notes)
        assert warnings_for(perft.PerftConfig("perft_s", top_k=1), base) == []


def test_the_balance_loss_of_frozen_routers_reaches_the_adapters_before_them():
    """Layer 1's router is frozen, yet sees x through layer 0's adapters; layer 1's adapters come
    after every router."""
    model = make_adapted("S")
    sum(load_balancing_loss(r) for r in model(IDS).routings).backward()
    first, last = adapters(model)
    assert first.A.grad.abs().max() > 1e-6 and first.B.grad.abs().max() > 1e-6
    assert last.A.grad is None and last.B.grad is None


# Counting ----------------------------------------------------------------------------------------

# base, variant, options, trainable, activated: the numbers of the papers and of the authors' runs
COUNTS = [
    (OLMOE_1B_7B, "perft_s", {"rank": 8}, 65_536 * 8, 65_536 * 8),
    (OLMOE_1B_7B, "perft_d", {"rank": 3, "num_adapters": 5}, 5 * 65_536 * 3, 5 * 65_536 * 3),
    (OLMOE_1B_7B, "perft_r", {"rank": 16, "num_adapters": 4, "top_k": 2}, 4_325_376, 2_228_224),
    (
        OLMOE_1B_7B,
        "perft_r",
        {"rank": 3, "num_adapters": 8, "top_k": 3},
        8 * (65_536 * 3 + 32_768),
        3 * 65_536 * 3 + 8 * 32_768,
    ),
    (OLMOE_1B_7B, "perft_e", {"rank": 4}, 4_194_304 * 4, 65_536 * 8 * 4),
    (OLMOE_1B_7B, "lora_qv", {"rank": 32}, 131_072 * 32, 131_072 * 32),
    (MIXTRAL_8X7B, "perft_s", {"rank": 16}, 262_144 * 16, 262_144 * 16),
    (MIXTRAL_8X7B, "perft_d", {"rank": 16, "num_adapters": 4}, 4 * 262_144 * 16, 4 * 262_144 * 16),
    (
        MIXTRAL_8X7B,
        "perft_r",
        {"rank": 8, "num_adapters": 8, "top_k": 2},
        8 * (262_144 * 8 + 32 * 4096),
        2 * 262_144 * 8 + 8 * 32 * 4096,
    ),
    (MIXTRAL_8X7B, "perft_e", {"rank": 3}, 2_097_152 * 3, 2 * 262_144 * 3),
    (MIXTRAL_8X7B, "lora_qv", {"rank": 32}, 425_984 * 32, 425_984 * 32),
]


@pytest.mark.parametrize(("base", "variant", "options", "trainable", "activated"), COUNTS)
def test_the_real_models_train_as_many_parameters_as_the_papers_say(
    base, variant, options, trainable, activated
):
    """On the meta device, where sizes cost nothing: counted over requires_grad, and in
    what_trains."""
    with torch.device("meta"):
        model = apply_perft(MoETransformer(hub.make_config(base, Config)), variant, **options)
    assert sum(p.numel() for p in trained(model).values()) == trainable
    rows = what_trains(model)
    counted = sum(r.parameters for r in rows), sum(r.activated for r in rows)
    assert counted == (trainable, activated)


def formula(config, base):
    """(trainable, activated) parameters of a PERFT variant or lora_qv, as the papers count them."""
    D, E, k = base.hidden_size, base.num_experts, base.num_experts_per_tok
    M, K, r = config.num_adapters, config.top_k, config.rank
    q, v = base.num_attention_heads * base.head_dim, base.num_key_value_heads * base.head_dim
    unit, qv = 2 * D * r, (D + q + D + v) * r
    trained, met = {
        "perft_s": (unit, unit),
        "perft_d": (M * unit, M * unit),
        "perft_e": (E * unit, k * unit),
        "perft_r": (M * unit + M * D, K * unit + M * D),
        "lora_qv": (qv, qv),
    }[config.variant]
    return base.num_hidden_layers * trained, base.num_hidden_layers * met


@pytest.mark.parametrize("variant", [*perft.PERFT, "lora_qv"])
@pytest.mark.parametrize("base", ["OLMoE-1B-7B", "Mixtral-8x7B", "data/tiny_olmoe"])
def test_what_trains_is_what_the_papers_formulas_say(base, variant):
    """Of the models of the lesson, which counts them and knows no formula."""
    configs = {
        "OLMoE-1B-7B": hub.make_config(OLMOE_1B_7B, Config),
        "Mixtral-8x7B": hub.make_config(MIXTRAL_8X7B, Config),
        "data/tiny_olmoe": Config.from_folder(EMBEDDED),
    }
    with torch.device("meta"):
        model = apply_perft(MoETransformer(configs[base]), variant)
    rows = what_trains(model)
    counted = sum(r.parameters for r in rows), sum(r.activated for r in rows)
    assert counted == formula(model.adapter_config, model.config)


@pytest.mark.parametrize(
    ("base", "total", "active"),
    [(OLMOE_1B_7B, 6_919_161_856, 1_282_017_280), (MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248)],
)
def test_the_real_models_have_the_published_sizes_with_and_without_adapters(base, total, active):
    """Total and activated; the report shows both, and adapters are no part of them."""
    with torch.device("meta"):
        model = MoETransformer(hub.make_config(base, Config))
        assert sum(p.numel() for p in model.parameters()) == total
        assert active_parameters(model.config) == active
        text = report(apply_perft(model, "perft_r"))
    assert f"{total:,}" in text and f"{active:,}" in text


@pytest.mark.parametrize("case", EVERYTHING)
def test_the_table_of_what_trains_has_every_trainable_tensor_once(case):
    """Names with * for the layer, counts, shapes, sizes, against named_parameters; all of it stands
    in the report."""
    model = make_adapted(case)
    rows, text = what_trains(model), report(model)
    seen = {}
    for name, p in trained(model).items():
        parts = ["*" if part.isdigit() else part for part in name.split(".")]
        seen.setdefault(".".join(parts), []).append(p)
    assert [row.module for row in rows] == list(seen)
    for row in rows:
        ps = seen[row.module]
        shape = "x".join(map(str, ps[0].shape))  # the same in all layers here
        assert (row.count, row.shape) == (len(ps), shape)
        assert row.parameters == sum(p.numel() for p in ps)
        line = next(line for line in text.splitlines() if line.split()[0] == row.module)
        assert f"{row.parameters:,}" in line.split() and row.shape in line.split()
    total = sum(p.numel() for p in trained(model).values())
    assert any(f"{total:,}" in line.split() for line in text.splitlines())
    base = make_base()  # its sizes do not grow with what is attached
    assert f"{sum(p.numel() for p in base.parameters()):,} parameters" in text
    assert f"{active_parameters(base.config):,} active" in text


def test_all_that_trains_in_full_fine_tuning_is_the_model_and_its_activated_part():
    """100 % of both: what one token meets of the whole model is active_parameters."""
    model = make_adapted("full")
    rows = what_trains(model)
    assert sum(r.parameters for r in rows) == sum(p.numel() for p in model.parameters())
    assert sum(r.activated for r in rows) == active_parameters(model.config)


def test_a_token_meets_no_more_adapters_than_it_chooses_experts():
    """perft_e with adapters on 6 of 8 experts, 3 chosen a token: at most 3 adapters of each layer
    are activated."""
    model = apply_perft(make_base(), "perft_e", rank=2, experts=[[0, 1, 2, 3, 4, 5]] * 2)
    assert sum(r.activated for r in what_trains(model)) <= 2 * 3 * 2 * SIZES["hidden_size"] * 2


def test_a_report_of_nothing_is_an_error():
    """Attached, listed and inert is the bug that nobody sees."""
    with pytest.raises(ValueError) as error:
        report(make_adapted("S").requires_grad_(False))
    assert "train" in one_line(error)


def test_every_layer_has_adapters_of_its_own():
    """L sets of adapters that share no memory and no values."""
    for case in WITH_LORA:
        variant, options = WITH_LORA[case]
        torch.manual_seed(0)
        model = apply_perft(make_base(num_hidden_layers=3), variant, **options | {"experts": None})
        names = list(trained(model))
        for i in range(3):
            assert {
                n.replace(f"layers.{i}.", "") for n in names if n.startswith(f"layers.{i}.")
            } == {n.replace("layers.0.", "") for n in names if n.startswith("layers.0.")}
        ps = list(trained(model).values())
        assert len({p.data_ptr() for p in ps}) == len(ps) and len(ps) % 3 == 0
        for i, p in enumerate(ps):
            assert all(
                q.shape != p.shape or not torch.equal(p, q) for q in ps[:i] if p.abs().max() > 0
            )


# Training ----------------------------------------------------------------------------------------


def take_steps(model, steps=3, ids=IDS, **options):
    """AdamW over all parameters, the frozen ones too, as a careless loop would do it."""
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-2} | options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def before_and_after(model, **options):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take_steps(model, **options)
    return {name: (before[name], p.detach()) for name, p in model.named_parameters()}


def inert(case, name):
    return "base weights" in case and ".adapters.router." in name


@every_dtype
@both_families
@pytest.mark.parametrize("case", EVERYTHING)
def test_training_moves_every_trained_tensor_and_no_frozen_one(case, family, dtype):
    """Three steps of AdamW with weight decay; frozen tensors stay bit for bit."""
    variant, options = EVERYTHING[case]
    if variant in ("full", "frozen_experts") and dtype == torch.bfloat16:
        pytest.skip("refused on a bfloat16 base")
    torch.manual_seed(0)
    model = apply_perft(make_base(family, dtype), variant, rank=4, dropout=0.0, **options).train()
    names = set(trained(model))
    for name, (old, new) in before_and_after(model, weight_decay=0.5).items():
        assert torch.equal(old, new) == (name not in names or inert(case, name)), name


@both_families
@pytest.mark.parametrize("case", WITH_LORA)
def test_the_first_step_moves_B_and_the_second_everything_else(case, family):
    """With B = 0 the gradient of A and of the adapter router is exactly 0; every adapter was routed
    to. No decay."""
    variant, options = WITH_LORA[case]
    options = options | {"rank": 4, "init": "lora", "dropout": 0.0}
    ids = (
        torch.arange(SIZES["vocab_size"]).repeat(2)[:104].view(4, 26)
    )  # enough tokens for every adapter to be chosen
    for steps in (1, 2):
        torch.manual_seed(0)
        model = apply_perft(make_base(family), variant, **options)
        for a in adapters(model) if variant == "perft_r" else ():
            a.router.weight.data.normal_()
        for routing in model(ids).routings:
            for router in (routing, getattr(routing, "adapter", None)):
                assert (
                    router is None
                    or len(router.selected_experts.unique()) == router.router_logits.shape[1]
                )
        start = {name: p.detach().clone() for name, p in trained(model).items()}
        take_steps(model, steps=steps, ids=ids, weight_decay=0.0)
        for name, p in trained(model).items():
            stacked = ".adapters." in name or ".experts." in name
            one_each = (p - start[name]).abs().flatten(1 if stacked else 0).amax(-1)
            moves = name.endswith(".B") or (steps == 2 and not inert(case, name))
            if (
                name.endswith("adapters.router.weight")
                and options.get("top_k") == 1
                and family == "mixtral"
            ):
                continue  # one renormalised choice: rounding only
            assert (one_each > 0).all() if moves else (one_each == 0).all(), name


@every_dtype
def test_only_experts_stay_when_the_experts_are_frozen_and_only_routers_move_in_router(dtype):
    """The names of what trains, by the baselines' definitions."""
    router = set(trained(apply_perft(make_base(dtype=dtype), "router")))
    assert router == {"layers.0.moe.router.weight", "layers.1.moe.router.weight"}
    everything = {name for name, _ in make_base().named_parameters()}
    assert set(trained(apply_perft(make_base(), "full"))) == everything
    experts = {name for name in everything if name.endswith(("gate_up_proj", "down_proj"))}
    assert len(experts) == 4
    assert set(trained(apply_perft(make_base(), "frozen_experts"))) == everything - experts


@pytest.mark.parametrize("case", [*WITH_LORA, "router", "E and routers"])
def test_what_trains_is_float32_on_a_bfloat16_base_and_the_rest_is_as_it_was(case):
    """Adapters, adapter routers and trained pretrained routers are float32 masters; the output
    stays bfloat16."""
    variant, options = EVERYTHING[case]
    model = apply_perft(make_base(dtype=torch.bfloat16), variant, **options)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model(IDS).logits.dtype == torch.bfloat16


def test_at_the_papers_learning_rate_a_float32_router_moves_and_a_bfloat16_one_hardly():
    """One AdamW step at lr 1e-5 on the same gradient: the step is below half a bfloat16 spacing for
    about 85 %."""
    torch.manual_seed(0)
    model = apply_perft(
        make_base(dtype=torch.bfloat16), "perft_r", num_adapters=32, top_k=4, dropout=0.0
    )
    for a in adapters(model):
        a.B.data.normal_(std=0.3)  # B ~ 1e-6 would hide the router's gradient behind AdamW's eps
    model(IDS, labels=IDS).loss.backward()
    router = adapters(model)[0].router.weight
    copied = nn.Parameter(router.data.bfloat16())
    copied.grad = router.grad.bfloat16()
    moved = {}
    for p in (router, copied):
        old = p.detach().clone()
        torch.optim.AdamW([p], lr=1e-5, weight_decay=0.0).step()
        moved[p.dtype] = (p != old).float().mean().item()
    assert moved[torch.float32] > 0.98
    assert 0.05 < moved[torch.bfloat16] < 0.25


# Initialisation and dropout ----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["S", "D of 3", "R 2 of 4", "E"])
def test_the_papers_initialisation_has_the_papers_spreads(case):
    """A ~ N(0, 2/r) whatever D is, B ~ 1e-6 N(0, 1), router ~ N(0, 0.02^2); within sampling
    error."""
    torch.manual_seed(0)
    for rank in (4, 16):
        variant, options = CASES[case]
        stacks = adapters(apply_perft(make_base(hidden_size=256), variant, rank=rank, **options))
        for stack in stacks:
            expected = [(stack.A, math.sqrt(2 / rank)), (stack.B, 1e-6)]
            if stack.router is not None:
                expected.append((stack.router.weight, 0.02))
            for p, std in expected:
                error = 5 / math.sqrt(2 * p.numel())  # five standard errors of a standard deviation
                assert abs(p.std().item() / std - 1) < error
                assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel())
            assert all(not torch.equal(stack.A[0], other) for other in stack.A[1:]), (
                "adapters that start as copies"
            )


@pytest.mark.parametrize("case", ["S", "D of 3", "R 2 of 4", "E", *LORA])
def test_loras_initialisation_is_uniform_within_one_over_root_D_and_B_is_zero(case):
    """Kaiming-uniform with a = sqrt(5) is U(-1/sqrt(D), 1/sqrt(D)); its std is the bound /
    sqrt(3)."""
    torch.manual_seed(0)
    variant, options = WITH_LORA[case]
    model = apply_perft(make_base(hidden_size=256), variant, rank=8, init="lora", **options)
    for name, p in trained(model).items():
        if name.endswith(".B"):
            assert p.count_nonzero() == 0
        elif name.endswith(".A"):
            bound = 1 / math.sqrt(p.shape[-1])
            assert 0.99 * bound < p.abs().max() <= bound
            assert abs(p.std().item() * math.sqrt(3) / bound - 1) < 0.05
        else:
            assert abs(p.std().item() / 0.02 - 1) < 0.15


def test_alpha_is_twice_the_rank_unless_it_is_given():
    """alpha/r = 2 by default; an alpha of r halves what a LoRA unit adds."""
    one = random_adapters()
    double, y = run_layer("perft_s", "olmoe", "lora", *one)
    assert gap(double - y, 2 * (run_layer("perft_s", "olmoe", "lora", *one, alpha=3)[0] - y)) < 1e-6


@pytest.mark.parametrize("case", WITH_LORA)
@every_kind
def test_dropout_is_off_in_eval_mode_and_on_in_training(case, kind):
    """Two runs are equal bit for bit in eval mode, and equal those without dropout; in training
    they differ."""
    model, without = (make_adapted(case, kind=kind, dropout=p) for p in (0.5, 0.0))
    for name, p in trained(without).items():
        p.data.copy_(trained(model)[name])
    assert torch.equal(model.eval()(IDS).logits, model(IDS).logits)
    assert torch.equal(model(IDS).logits, without.eval()(IDS).logits)
    assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("case", WITH_LORA)
def test_adapters_are_in_the_mode_of_the_model_they_are_attached_to(case):
    """A model in eval mode (from_pretrained leaves it so) stays in eval mode throughout: no dropout
    by surprise."""
    variant, options = WITH_LORA[case]
    for mode in (False, True):
        model = apply_perft(make_base().train(mode), variant, **options)
        assert {m.training for m in model.modules()} == {mode}


def is_one_of(rows, *outcomes):
    """The share of rows that are each outcome (to 1e-5); every row is one of them."""
    matches = torch.stack([(rows - o).abs().amax(-1) < 1e-5 * rows.abs().max() for o in outcomes])
    assert (matches.sum(0) == 1).all()
    return matches.float().mean(1).tolist()


def test_dropout_of_a_lora_unit_is_on_its_input():
    """Tokens with one feature: it is dropped (nothing is added) or doubled; bottlenecks of rank 8
    never drop apart."""
    model = make_adapted("S", rank=8, dropout=0.5).train()
    x = torch.zeros(1, 400, SIZES["hidden_size"])
    x[..., 3] = 1.0
    block, (stack, _) = model.layers[0].moe, adapters(model)
    whole = x[0] @ stack.A[0].T @ stack.B[0].T * 2
    rows = (block(x)[0] - without_adapters(block, x))[0]
    dropped, doubled = is_one_of(rows, torch.zeros_like(whole), 2 * whole)
    assert 0.4 < dropped < 0.6 and 0.4 < doubled < 0.6
    lora = make_adapted("lora_qv", rank=8, dropout=0.5).train().layers[0].self_attn.v_proj
    whole = x[0] @ lora.A.T @ lora.B.T * 2
    rows = (lora(x) - F.linear(x, lora.weight))[0]
    dropped, _ = is_one_of(rows, torch.zeros_like(whole), 2 * whole)
    assert 0.4 < dropped < 0.6


def test_dropout_of_a_parallel_unit_is_between_W1_and_the_activation():
    """Rank 1: the bottleneck h is dropped (silu(0) = 0) or becomes silu(2h): not 2 silu(h), not a
    mixture."""
    model = make_adapted("S", kind="parallel", rank=1, dropout=0.5).train()
    shape, generator = (1, 400, SIZES["hidden_size"]), torch.Generator().manual_seed(3)
    x = 0.1 + 0.1 * torch.rand(shape, generator=generator)
    block, (stack, _) = model.layers[0].moe, adapters(model)
    stack.A.data.abs_()  # h about 1, where silu bends
    doubled = silu(2 * x[0] @ stack.A[0].T) @ stack.B[0].T
    rows = (block(x)[0] - without_adapters(block, x))[0]
    dropped, kept = is_one_of(rows, torch.zeros_like(doubled), doubled)
    assert 0.4 < dropped < 0.6 and 0.4 < kept < 0.6


# Options that cannot be --------------------------------------------------------------------------

IMPOSSIBLE = {
    "K > M": ("perft_r", {"top_k": 5, "num_adapters": 4}, "5.*4"),
    "more base weights than there are": (
        "perft_r",
        {"top_k": 4, "adapter_weights": "base"},
        "3.*4|4.*3",
    ),
    "rank 0": ("perft_s", {"rank": 0}, "rank"),
    "half a rank": ("perft_s", {"rank": 2.5}, "rank.*2.5"),
    "no adapters": ("perft_d", {"num_adapters": 0}, "num_adapters"),
    "K = 0": ("perft_r", {"top_k": 0}, "top_k"),
    "variant": ("perft_x", {}, "perft_x.*perft_r"),
    "kind": ("perft_s", {"kind": "prefix"}, "prefix.*parallel"),
    "init": ("perft_s", {"init": "zero"}, "zero.*paper"),
    "weights": ("perft_r", {"adapter_weights": "mine"}, "mine.*own"),
    "dropout 1": ("perft_s", {"dropout": 1.0}, "dropout.*1"),
    "dropout < 0": ("lora_qv", {"dropout": -0.1}, "dropout.*-0.1"),
    "an expert outside": ("perft_e", {"experts": [[0, 8], [1]]}, "layer 0.*8"),
    "a negative expert": ("perft_e", {"experts": [[0], [-1]]}, "layer 1.*-1"),
    "an expert twice": ("perft_e", {"experts": [[0, 0], [1]]}, "layer 0.*different"),
    "a layer without": ("perft_e", {"experts": [[0], []]}, "layer 1"),
    "layers without": ("perft_e", {"experts": [[0]]}, "each of the model's 2 layers"),
    "no layer": ("perft_e", {"experts": []}, "each of the model's 2 layers"),
    "no list": ("perft_e", {"experts": {"0": [0], "1": [1]}}, "each of the model's 2 layers"),
    "no list of a layer": ("perft_e", {"experts": [[0], 1]}, "layer 1: 1"),
    "no whole expert": ("perft_e", {"experts": [[0], [1.0]]}, "layer 1.*1.0"),
    "experts without E": ("perft_s", {"experts": [[0], [1]]}, "perft_s.*perft_e"),
    "shared halves of what has none": ("perft_e", {"shared_outer": True}, "perft_e.*lora_experts"),
    "routers in a LoRA": ("lora_experts", {"train_router": True}, "train_router is of perft_s"),
    "an expert outside, LoRA": ("lora_experts", {"experts": [[0, 8], [1]]}, "layer 0.*8"),
    "a rank beyond all": ("lora_experts", {"rank": 9 * 10**18}, "rank is 9000000000000000000"),
    "a rank that is true": ("perft_s", {"rank": True}, "rank is True"),
    "no number": ("perft_s", {"alpha": math.nan}, "alpha is nan"),
    "an alpha that overflows float32": ("perft_e", {"alpha": 1e39}, "alpha is 1e.39; .*less than"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_option_that_cannot_be_is_one_line_and_leaves_the_model_alone(name):
    """ValueError with the value and what would do; the model is still plain, and takes adapters
    afterwards."""
    variant, options, said = IMPOSSIBLE[name]
    model = make_base()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=said) as error:
        apply_perft(model, variant, **options)
    one_line(error)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    apply_perft(model, "perft_s")


def test_an_unknown_option_is_a_type_error():
    """A typo is not ignored."""
    with pytest.raises(TypeError, match="num_adaptors"):
        apply_perft(make_base(), "perft_d", num_adaptors=4)


@pytest.mark.parametrize("variant", ["full", "frozen_experts"])
def test_a_bfloat16_base_does_not_train_its_own_weights(variant):
    """At fine-tuning rates most steps would be lost (the dtype trap), so it is refused; float32 is
    the remedy."""
    with pytest.raises(ValueError, match="bfloat16.*float32") as error:
        apply_perft(make_base(dtype=torch.bfloat16), variant)
    one_line(error)


@pytest.mark.parametrize("first", ["perft_s", "lora_qv", "router"])
def test_adapters_are_not_attached_twice(first):
    """Neither the same nor another variant."""
    model = apply_perft(make_base(), first)
    for second in (first, "perft_e"):
        with pytest.raises(ValueError, match="already") as error:
            apply_perft(model, second)
        one_line(error)


# Files -------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("case", EVERYTHING)
@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
def test_the_places_of_a_model_with_adapters_are_those_of_the_plain_model(case, family, fused):
    """Names, order and shapes; what is written at them is what the plain model has there."""

    def parts(place):
        return place.places if isinstance(place, hub.Stack) else [place]

    plain, adapted = make_base(family), make_base(family)
    variant, options = EVERYTHING[case]
    apply_perft(adapted, variant, **options)
    theirs, ours = hub.places(plain, fused), hub.places(adapted, fused)
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].shape == theirs[name].shape, name
        for mine, other in zip(parts(ours[name]), parts(theirs[name]), strict=True):
            assert torch.equal(mine.of(mine.parameter), other.of(other.parameter)), name


def test_adapters_are_attached_on_the_way_in(folders):
    """from_pretrained with edit: the same model as the one that got them after it was loaded."""
    for case in EVERYTHING:
        variant, options = EVERYTHING[case]
        models = []
        for early in (True, False):
            torch.manual_seed(0)
            edit = partial(apply_perft, variant=variant, **options)
            model = MoETransformer.from_pretrained(folders["olmoe"], edit=edit if early else None)
            models.append(model if early else edit(model))
        a, b = models
        assert [n for n, p in a.named_parameters() if p.requires_grad] == list(trained(b))
        for (name, mine), (other, theirs) in zip(a.named_parameters(), b.named_parameters()):
            assert name == other and mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
        assert torch.equal(a(IDS).logits, b(IDS).logits) and not a.training


@every_dtype
@both_families
@pytest.mark.parametrize("case", EVERYTHING)
def test_adapters_survive_saving_and_loading_bit_for_bit(tmp_path, case, family, dtype):
    """Logits and every tensor; the file holds float32 and only what trains, by safetensors' own
    reader."""
    if case in ("full", "frozen_experts") and dtype == torch.bfloat16:
        pytest.skip("refused on a bfloat16 base")
    model = make_adapted(
        case, family, dtype, kind="parallel" if case in ("S", "R 2 of 4") else "lora", alpha=7
    )
    save_adapter(model, tmp_path)
    stored, ours = load_file(tmp_path / "adapter_model.safetensors"), trained(model)
    assert {t.dtype for t in stored.values()} == {torch.float32}
    assert len(stored) == len(ours)
    if EVERYTHING[case][1].keys() & {"shared_outer", "experts"} and "lora" in case:
        ours_in_full = trained(make_adapted("lora_experts", family))  # as PEFT knows it
    else:
        ours_in_full = ours
    sizes = [sum(t.numel() for t in tensors.values()) for tensors in (stored, ours_in_full)]
    assert sizes[0] == sizes[1]
    loaded = load_adapter(make_base(family, dtype), tmp_path)
    assert not any(m.training for m in loaded.modules())
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    assert trained(loaded).keys() == ours.keys()
    assert all(torch.equal(p, ours[name]) for name, p in trained(loaded).items())
    logits = model(IDS).logits
    assert torch.equal(loaded(IDS).logits, logits)
    assert not torch.equal(make_base(family, dtype)(IDS).logits, logits), "nothing was adapted"


@every_dtype
def test_trained_pretrained_routers_are_in_the_file_and_come_back(tmp_path, dtype):
    """train_router=True beside adapters: float32 masters that move, are saved with the adapters,
    and load."""
    model = apply_perft(make_base(dtype=dtype), "perft_r", rank=2, train_router=True, dropout=0.0)
    names = [f"layers.{i}.moe.router.weight" for i in range(2)]
    old = [trained(model)[name].clone() for name in names]
    take_steps(model, lr=1e-5, weight_decay=0.0)
    for name, before in zip(names, old):
        assert trained(model)[name].dtype == torch.float32
        assert (trained(model)[name] != before).float().mean() > 0.9
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.shape == (8, 32) for t in stored.values()) == 2
    assert torch.equal(
        load_adapter(make_base(dtype=dtype), tmp_path)(IDS).logits, model.eval()(IDS).logits
    )


def in_peft(folder, base_folder):
    """(transformers' model, PEFT's of the adapter in `folder` on it)."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(base_folder, dtype=torch.float32), peft.PeftModel.from_pretrained(
        load(base_folder, dtype=torch.float32), folder
    ).eval()


@both_families
@every_lora
def test_a_lora_folder_loads_in_peft_and_comes_back(tmp_path, folders, family, case):
    """Logits of PeftModel on transformers' model of the same base folder, to 1e-5; what PEFT saves
    of it loads here, without a word of ours in its adapter_config.json."""
    model = make_adapted(case, family, alpha=7)
    save_adapter(model, tmp_path / "ours")
    plain, theirs = in_peft(tmp_path / "ours", folders[family])
    logits = theirs(IDS).logits
    assert gap(model(IDS).logits, logits) < 1e-5
    assert gap(plain(IDS).logits, logits) > 0.01
    theirs.save_pretrained(tmp_path / "theirs")
    assert "variant" not in json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    loaded = load_adapter(make_base(family), tmp_path / "theirs")
    assert gap(loaded(IDS).logits, logits) < 1e-5


EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TRAINED_BY_PEFT = {
    "q, v": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    "experts": {"target_modules": [], "target_parameters": EXPERT_PARAMETERS},
    "experts, short names": {
        "target_modules": [],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
    },
    "q, v, rslora": {"target_modules": ["v_proj", "q_proj"], "use_rslora": True},
    "experts, rslora, gaussian": {
        "target_modules": [],
        "target_parameters": EXPERT_PARAMETERS,
        "use_rslora": True,
        "init_lora_weights": "gaussian",
    },
}


@both_families
@pytest.mark.parametrize("name", TRAINED_BY_PEFT)
def test_an_adapter_that_peft_trained_loads_here(tmp_path, folders, family, name):
    """Rank 5, alpha 3, three steps of AdamW in PEFT: logits equal to 1e-5, here and after a merge,
    on every base that it was trained on."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    options = {"task_type": "CAUSAL_LM", "r": 5, "lora_alpha": 3} | TRAINED_BY_PEFT[name]
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    logits = theirs.eval()(IDS).logits
    model = load_adapter(make_base(family), tmp_path)
    assert gap(model(IDS).logits, logits) < 1e-5 < 0.01 < gap(make_base(family)(IDS).logits, logits)
    assert gap(merge(model)(IDS).logits, logits) < 1e-5


PLAIN_PEFT = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 7,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "x",
}
NOT_THE_SAME_LORA = {
    "k too": {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "one stack": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    "both": {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
    "nothing": {"target_modules": None},
    "no names": {"target_modules": [["a"], 5]},
    "a rank of its own": {"rank_pattern": {"q_proj": 4}},
    "an alpha of its own": {"alpha_pattern": {"q_proj": 4}},
    "dora": {"use_dora": True},
    "a bias": {"bias": "all"},
    "a bias in B": {"lora_bias": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "some layers": {"layers_to_transform": [0]},
    "not all": {"exclude_modules": ["layers.0.q_proj"]},
    "transposed": {"fan_in_fan_out": True},
    "a changed base": {"init_lora_weights": "pissa"},
    "tokens": {"trainable_token_indices": [3]},
    "of tomorrow": {"use_hyper_lora": True},
    "no LoRA": {"peft_type": "IA3"},
    "no type": {"peft_type": None},
    "a huge rank": {"r": 9 * 10**18},
    "a text": {"r": "8"},
    "infinite": {"lora_alpha": float("inf")},
    "rank 0": {"r": 0},
    "a negative rank": {"r": -4, "use_rslora": True},
    "another rank than the tensors'": {"r": 4},
}


@pytest.mark.parametrize("name", NOT_THE_SAME_LORA)
def test_what_peft_can_and_this_cannot_is_refused_by_name(tmp_path, name):
    """One line with the file and the key; the same file without that key loads."""
    model = make_adapted("lora_qv")
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(PLAIN_PEFT))
    assert gap(load_adapter(make_base(), tmp_path)(IDS).logits, model(IDS).logits) > 0  # alpha 7
    path.write_text(json.dumps(PLAIN_PEFT | NOT_THE_SAME_LORA[name]))
    plain = make_base()
    with pytest.raises(ValueError) as error:
        load_adapter(plain, tmp_path)
    message, key = one_line(error), list(NOT_THE_SAME_LORA[name])[0]
    if name == "another rank than the tensors'":
        key = "[3, 32]"
    elif key.startswith("target"):
        key = "q_proj" if name != "all-linear" else "target_modules"
    elif key == "r":
        key = "r is" if name == "a text" else "rank is" if "rank" in name else "r is"
    assert (key in message or name == "a huge rank") and str(tmp_path) in message, message
    apply_perft(plain, "perft_s")  # the model is as it was


HOSTILE = {
    "experts": [5, [["a"]], [[0, 8], [1]], {"0": [1]}, [[]], [[True], [0]]],
    "rank": [9 * 10**18, 2**40, -1, 1.5, "3", [3], True],
    "num_adapters": [2**31 - 1, 0, [4]],
    "alpha": [1e39, 1e308, 10**400, "x", [1]],
    "dropout": [5, -1, "x"],
    "variant": ["perft_x", ["perft_s"], 5, {}],
    "train_router": [1, "no", [True]],
    "shared_outer": ["yes", 1],
    "kind": [["lora"], 3],
    "base": [7, [1], "x"],
}


@pytest.mark.parametrize("key", HOSTILE)
@pytest.mark.parametrize("case", ["E", "lora_experts"])
def test_a_hostile_adapter_config_is_one_line_that_names_the_file(tmp_path, case, key):
    """Wrong kinds and absurd sizes, in files of ours: no traceback, no memory taken."""
    save_adapter(make_adapted(case), tmp_path)
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    for value in HOSTILE[key]:
        path.write_text(json.dumps(good | {key: value}))
        plain = make_base()
        with pytest.raises(ValueError) as error:
            load_adapter(plain, tmp_path)
        message = one_line(error)
        assert str(tmp_path) in message and len(message) < 600, message
        apply_perft(plain, "perft_s")


@pytest.mark.parametrize("case", ["S", "lora_qv", "lora_experts"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, case, bad):
    """One number of one tensor: the line names it, and the model is as it was."""
    save_adapter(make_adapted(case), tmp_path)
    names = []

    def spoil(tensors):
        names.append(sorted(tensors)[-1])
        tensors[names[0]].view(-1)[5] = bad

    edit_tensors(tmp_path, spoil)
    plain = make_base()
    with pytest.raises(ValueError) as error:
        load_adapter(plain, tmp_path)
    assert names[0] in one_line(error) and "finite" in str(error.value)
    apply_perft(plain, "perft_s")


@pytest.mark.parametrize("case", [*CASES, *BASELINES])
def test_other_folders_are_refused_by_peft(tmp_path, references, case):
    """Loudly: it must not load them as a LoRA with nothing in it."""
    peft = pytest.importorskip("peft")
    save_adapter(make_adapted(case), tmp_path)
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft.PeftModel.from_pretrained(copy.deepcopy(references["olmoe"]), tmp_path)


def test_a_lora_qv_folder_for_peft_holds_nothing_that_peft_would_drop(tmp_path):
    """lora_qv with trained pretrained routers is refused: a PEFT LoRA has no place for them."""
    with pytest.raises(ValueError, match="train_router is of perft_s"):
        apply_perft(make_base(), "lora_qv", train_router=True)


@both_families
@every_lora
def test_a_merged_lora_is_a_plain_model(tmp_path, family, case):
    """The same logits to 1e-5, the base's parameter names, and a folder that loads without
    adapters."""
    model, plain = make_adapted(case, family), make_base(family)
    logits = model(IDS).logits
    assert merge(model) is model
    assert gap(model(IDS).logits, logits) < 1e-5 < gap(plain(IDS).logits, logits)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    model.save_pretrained(tmp_path)
    assert torch.equal(MoETransformer.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)
    apply_perft(model, "perft_s")  # plain: takes adapters


@pytest.mark.parametrize("case", LORA)
def test_a_merge_into_bfloat16_rounds_once(case):
    """Each changed weight is W + B A alpha/r of double precision, rounded to bfloat16, but for the
    last digit of float32; where an expert has no LoRA, W bit for bit."""
    model = make_adapted(case, dtype=torch.bfloat16)
    attention, experts = model.layers[1].self_attn, model.layers[1].moe.experts
    if case == "lora_qv":
        lora = attention.v_proj
        exact = lora.weight.double() + lora.B.double() @ lora.A.double() * lora.scale
        before = lora.weight.clone()
    else:
        A, B = whole_stacks(experts.down_lora, 8)
        exact = experts.down_proj.double() + B @ A * experts.down_lora.scale
        before = experts.down_proj.clone()
    merge(model)
    block = model.layers[1]
    after = block.self_attn.v_proj.weight if case == "lora_qv" else block.moe.experts.down_proj
    assert after.dtype == torch.bfloat16
    assert (after == exact.to(torch.bfloat16)).float().mean() > 0.999
    assert gap(after.double(), exact) < 2**-8
    if "some" in case:
        same = [torch.equal(a, b) for a, b in zip(after, before)]
        assert same == [e not in SOME_EXPERTS[1] for e in range(8)]


@pytest.mark.parametrize("case", CASES)
def test_what_stands_beside_an_expert_is_not_merged(case):
    """It is no change of weights: the message says so, what the variant is, and what can be."""
    model = make_adapted(case)
    with pytest.raises(
        ValueError, match="cannot be merged.*beside a non-linear.*lora_exp"
    ) as error:
        merge(model)
    assert EVERYTHING[case][0] in one_line(error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", BASELINES)
def test_what_trains_in_its_place_becomes_a_model_folder_too(run_folder, tmp_path, case, dtype):
    """Also a router, which trains in float32 beside a bfloat16 base."""
    if case != "router" and dtype == "bfloat16":
        return  # they want a float32 base
    transformers = pytest.importorskip("transformers")
    folder, model = run_folder(case, dtype=dtype)
    perft.main(["merge", str(folder), str(tmp_path / "new")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert str(theirs.dtype) == f"torch.{dtype}"
    assert gap(theirs(IDS).logits.float(), model(IDS).logits.float()) < (
        1e-5 if dtype == "float32" else 0.1
    )


@pytest.fixture
def run_folder(tmp_path, folders):
    """A folder as train.py leaves it: adapter and config.json, which knows the base."""

    def make(case, family="mixtral", dtype="float32", **options):
        folder = tmp_path / "run"
        model = make_adapted(case, family, getattr(torch, dtype), **options)
        save_adapter(model, folder)
        settings = {"base": str(folders[family]), "dtype": dtype}
        (folder / "config.json").write_text(json.dumps(settings))
        (folders[family] / "tokenizer.json").write_text('{"of": "the base"}')
        return folder, model

    return make


@every_lora
@every_dtype
def test_perft_merge_writes_a_folder_that_transformers_loads(run_folder, tmp_path, case, dtype):
    """python perft.py merge RUN NEW: the logits of the adapted model, in the dtype of the run, with
    the base's tokenizer."""
    transformers = pytest.importorskip("transformers")
    name = str(dtype).removeprefix("torch.")
    folder, model = run_folder(case, dtype=name)
    perft.main(["merge", str(folder), str(tmp_path / "new")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert theirs.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 0.1
    ours = model(IDS).logits.float()
    assert gap(theirs(IDS).logits.float(), ours) < limit
    assert (tmp_path / "new" / "tokenizer.json").read_text() == '{"of": "the base"}'


def test_a_merge_goes_into_a_new_folder_of_a_lora_only(run_folder, tmp_path):
    """What is there stays; a PERFT run, a wrong dtype and a missing run are one line."""
    folder, _ = run_folder("lora_qv")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for taken in ("full", "full/thesis.txt"):
        with pytest.raises(ValueError, match="empty folder") as error:
            perft.main(["merge", str(folder), str(tmp_path / taken)])
        assert taken in one_line(error)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    settings = json.loads((folder / "config.json").read_text())
    for wrong in ({"dtype": "float16"}, {"dtype": 7}, {"base": 5}):
        (folder / "config.json").write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match="config.json") as error:
            perft.main(["merge", str(folder), str(tmp_path / "new")])
        one_line(error)
    with pytest.raises(FileNotFoundError, match="no such file"):
        perft.main(["merge", str(tmp_path / "nowhere"), str(tmp_path / "new")])
    folder, _ = run_folder("R 2 of 4")
    base = tmp_path / "base"  # its weights, which may take minutes to read, are not read for that
    make_base("mixtral").save_pretrained(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="perft_r cannot be merged"):
        perft.main(["merge", str(folder), str(tmp_path / "new"), str(base)])
    assert not (tmp_path / "new").exists()


@every_dtype
def test_an_adapter_of_peft_is_merged_into_a_base_that_is_named(run_folder, tmp_path, dtype):
    """A folder without a config.json of train.py: BASE says where the base is, and its files in
    what dtype the merged model is."""
    folder, model = run_folder("lora_experts", dtype=str(dtype).removeprefix("torch."))
    (folder / "config.json").unlink()
    make_base("mixtral").save_pretrained(tmp_path / "base", dtype)
    perft.main(["merge", str(folder), str(tmp_path / "new"), str(tmp_path / "base")])
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    merged = MoETransformer.from_pretrained(tmp_path / "new", dtype)
    limit = 1e-5 if dtype == torch.float32 else 0.1
    assert gap(merged(IDS).logits, model(IDS).logits) < limit
    with pytest.raises(FileNotFoundError, match="no such folder.+prepare.py no/such"):
        perft.main(["merge", str(folder), str(tmp_path / "other"), "no/such"])


@pytest.mark.parametrize("was_there", [False, True], ids=["a new folder", "an empty folder"])
@pytest.mark.parametrize("fails", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_merge_that_fails_leaves_nothing_and_the_same_command_works(
    run_folder, tmp_path, monkeypatch, fails, was_there
):
    """As on a disk that is full, at each of the files."""
    folder, _ = run_folder("lora_qv")
    argv, new = ["merge", str(folder), str(tmp_path / "new")], tmp_path / "new"
    if was_there:
        new.mkdir()
    fsync = os.fsync

    def full(number):
        if list(new.glob(f"{fails}.*.tmp")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    def half_a_copy(source, target):
        (target / source.name).write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target / source.name))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        if fails == "tokenizer.json":
            patch.setattr(shutil, "copy", half_a_copy)
        with pytest.raises(OSError) as error:
            perft.main(argv)
        assert fails in one_line(error) and "No space left" in str(error.value)
    assert list(new.iterdir()) == [] if was_there else not new.exists()
    perft.main(argv)
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {file.name for file in new.iterdir()} == names


@pytest.mark.parametrize("use", [merge, lambda model: save_adapter(model, "never_written")])
def test_a_model_without_adapters_has_none_to_save_or_to_merge(use):
    """A user's mistake: one line, no AttributeError."""
    with pytest.raises(ValueError) as error:
        use(make_base())
    one_line(error)


@pytest.fixture
def saved(tmp_path):
    save_adapter(make_adapted("R 2 of 4"), tmp_path)
    return tmp_path


OTHER_BASES = {
    "wider": {"hidden_size": 64},
    "deeper": {"num_hidden_layers": 3},
    "more experts": {"num_experts": 16},
    "another top-k": {"num_experts_per_tok": 2},
    "other words": {"vocab_size": 59},
    "the same sizes, other positions": {"rope_theta": 500.0},
    "the same sizes, renormalised": {"norm_topk_prob": True},
}


@pytest.mark.parametrize("other", OTHER_BASES)
def test_an_adapter_is_refused_on_another_base(saved, other):
    """One line that names what differs, on both sides; nothing is attached."""
    model = make_base(**OTHER_BASES[other])
    theirs, here = (
        json.loads((saved / "adapter_config.json").read_text())["base"],
        hub.fingerprint(model.config),
    )
    with pytest.raises(ValueError) as error:
        load_adapter(model, saved)
    message, differing = one_line(error), [key for key in here if here[key] != theirs[key]]
    assert differing and all(key in message for key in differing)
    assert all(json.dumps(side[key]) in message for key in differing for side in (here, theirs))
    apply_perft(model, "perft_s")


def test_an_adapter_is_refused_on_another_family(saved):
    """olmoe and mixtral are both named."""
    with pytest.raises(ValueError, match="olmoe.*mixtral"):
        load_adapter(make_base("mixtral"), saved)


@every_family
def test_a_base_saved_in_the_other_spelling_is_the_same_base(tmp_path, folders, family):
    """transformers 5 writes other config keys (rope_parameters, ...) and may fuse the experts: the
    adapter loads."""
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForCausalLM.from_pretrained(folders[family]).save_pretrained(
        tmp_path / "theirs"
    )
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert raw.keys() != json.loads((folders[family] / "config.json").read_text()).keys()
    model = make_adapted("R 2 of 4", family)
    save_adapter(model, tmp_path / "adapter")
    theirs = load_adapter(MoETransformer.from_pretrained(tmp_path / "theirs"), tmp_path / "adapter")
    assert torch.equal(theirs(IDS).logits, model(IDS).logits)


def test_a_number_written_another_way_is_the_same_base():
    """JSON knows 10000 and 10000.0; both are a rope_theta, and the same one."""
    whole, decimal = (make_base(rope_theta=theta).config for theta in (10000, 10000.0))
    assert hub.fingerprint(whole) == hub.fingerprint(decimal)


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


ROUTER = "layers.1.moe.adapters.router.weight"
FAULTY_TENSORS = {
    "missing": (lambda t: t.pop(ROUTER), [ROUTER, "missing"]),
    "extra": (lambda t: t.update({"layers.7.A": torch.ones(2)}), ["layers.7.A"]),
    "misshaped": (lambda t: t.update({ROUTER: torch.ones(4, 31)}), [ROUTER, "[4, 31]", "[4, 32]"]),
}


@pytest.mark.parametrize("fault", FAULTY_TENSORS)
def test_tensors_that_do_not_fit_are_named(saved, fault):
    """Missing, extra, misshaped: one line with the tensor, and both shapes."""
    change, said = FAULTY_TENSORS[fault]
    edit_tensors(saved, change)
    with pytest.raises(ValueError) as error:
        load_adapter(make_base(), saved)
    message = one_line(error)
    assert all(words in message for words in said)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_folder_names_the_missing_file(saved, name):
    """FileNotFoundError with the path."""
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name) as error:
        load_adapter(make_base(), saved)
    one_line(error)


@pytest.mark.parametrize(
    "content",
    [
        '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], '
        '"base_model_name_or_path": "x"}',
        '{"peft_type": "PERFT", "variant": "perft_s"}',
        '{"variant": "perft_s", "base": null}',
        "[1, 2]",
        "{",
    ],
)
def test_a_foreign_adapter_config_is_refused(saved, content):
    """PEFT's own, a part of ours, JSON that is no object, no JSON: one line with the path."""
    (saved / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match="adapter_config.json") as error:
        load_adapter(make_base(), saved)
    one_line(error)


def test_a_changed_variant_or_rank_in_the_config_does_not_load(saved):
    """The options go through the checks of apply_perft, the tensors through those of the file."""
    path = saved / "adapter_config.json"
    content = json.loads(path.read_text())
    for change in (
        {"variant": "perft_x"},
        {"rank": 0},
        {"rank": 5},
        {"variant": "perft_e"},
        {"num_adapters": 3},
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError) as error:
            load_adapter(make_base(), saved)
        one_line(error)


def test_the_lesson_runs_and_its_counts_are_the_formulas(capsys):
    """python perft.py: every count is what the formula says."""
    perft.main([])
    text = capsys.readouterr().out
    assert "4,325,376" in text and "2,228,224" in text
    lines = [line.split() for line in text.splitlines()]
    for base in (OLMOE_1B_7B, MIXTRAL_8X7B):
        config = hub.make_config(base, Config)
        for variant in (*perft.PERFT, "lora_qv"):
            trained, met = formula(perft.PerftConfig(variant), config)
            said = [line for line in lines if line and line[0] == variant]
            assert any({f"{trained:,}", f"{met:,}"} <= set(line) for line in said), (variant, said)
