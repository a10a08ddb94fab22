"""ESFT: the scores and choices are the released ones; the chosen experts train, and nothing else
moves by a bit."""

import copy
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import pytest
import torch
from test_hub import TINY

import esft
import perft
from data import hub, run, skills
from data.hub import Place, SafetensorsFile
from data.run import read_json
from esft import apply_esft, collect, expert_scores, export, load, save, select_experts
from model import EMBEDDED, Config, MoETransformer
from moe import Routing
from perft import report

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
RELEASED = Path(__file__).parents[2] / "shared" / "esft"
OLMOE = TINY | {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 2}
BASES = {
    "olmoe": OLMOE,
    "olmoe_tied": OLMOE | {"tie_word_embeddings": True},
    "mixtral": TINY
    | {
        "model_type": "mixtral",
        "num_key_value_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    # rows of 28 or 14 bytes, which F.grouped_mm does not take
    "no_grouped_mm": OLMOE | {"intermediate_size": 7},
}
every_base = pytest.mark.parametrize("base", BASES)
every_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16")
)
CHOSEN = [[3, 0], [2, 1, 3]]  # not sorted, and not as many in each layer
IDS = torch.tensor([[5, 9, 2, 60, 33, 7, 7, 1], [4, 4, 8, 15, 16, 23, 42, 0]])


def make_model(base="olmoe", seed=0, dtype=torch.float32):
    """A tiny model with random weights, norms included."""
    torch.manual_seed(seed)
    model = MoETransformer(hub.make_config(BASES[base], Config))
    for name, p in model.named_parameters():
        p.data.normal_(1 if "norm" in name else 0, 0.3)
    return model.to(dtype).eval()


def tensors_of(model):
    """Name in a Hugging Face folder -> the tensor, taken from its place."""
    table = hub.places(model)
    return {name: place.of(place.parameter.detach()) for name, place in table.items()}


def esft_command(argv):
    """As `python esft.py ...` does it."""
    return run.command(esft.main)(argv)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def train(model, steps, lr=1e-2, weight_decay=0.1):
    """AdamW on the next token of IDS -> the model; only what has a gradient can step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


def gap(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


# Scores and selection ----------------------------------------------------------------------------


def released(task):
    path = RELEASED / f"{task}.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent: the authors' counts and lists are not part of this project")
    log = read_json(path)
    lists = [log["released_token_p020"][str(i)] for i in range(1, 27)]  # decoder layer 0 is dense
    gates = torch.tensor(log["gate_sums_times_1e4"], dtype=torch.float64) / 1e4
    return log, gates, lists


@pytest.mark.parametrize(("task", "total"), [("intent", 124), ("law", 153)])
def test_the_released_lists_come_out_exactly(task, total):
    """All 26 layers, ids and their order, from the released counts; the paper's p 0.2."""
    log, gates, lists = released(task)
    chosen = select_experts(
        expert_scores(log["counts"], gates, log["n_tokens"], log["top_k"], "token"), 0.2
    )
    assert chosen == lists and sum(map(len, chosen)) == total


def test_rounding_decides_layer_17_of_the_intent_task():
    """Experts 2 and 45 have 1522 and 1526 choices, both 0.0309: the released list takes 2, the
    lower id."""
    log, gates, lists = released("intent")
    counts = log["counts"][16]
    assert (counts[2], counts[45]) == (1522, 1526)
    assert 2 in lists[16] and 45 not in lists[16]
    assert (
        select_experts(expert_scores(log["counts"], gates, log["n_tokens"], log["top_k"]), 0.2)[16]
        == lists[16]
    )


@pytest.mark.parametrize("task", ["intent", "law"])
def test_neither_unrounded_scores_nor_the_wrong_axis_give_the_released_lists(task):
    """Unrounded, one layer of each task comes out otherwise; normalised over layers, as a script
    once did, all do."""
    log, gates, lists = released(task)
    scores = expert_scores(log["counts"], gates, log["n_tokens"], log["top_k"])
    unrounded = [esft.smallest_prefix(layer, 0.2) for layer in scores.tolist()]
    assert sum(a != b for a, b in zip(unrounded, lists)) == 1
    counts = torch.tensor(log["counts"], dtype=torch.float64)
    wrong_axis = select_experts(counts / counts.sum(0, keepdim=True), 0.2)
    assert not any(a == b for a, b in zip(wrong_axis, lists))


def test_the_scores_of_the_released_logs_have_the_scales_they_should():
    """token and gate_share sum to 1 over a layer; gate to the mean mass of a top 6, 0.26 to 0.53 on
    that model."""
    log, gates, _ = released("intent")
    score = {
        k: expert_scores(log["counts"], gates, log["n_tokens"], 6, k)
        for k in ("token", "gate", "gate_share")
    }
    assert torch.allclose(score["token"].sum(-1), torch.ones(26, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(
        score["gate_share"].sum(-1), torch.ones(26, dtype=torch.float64), atol=1e-12
    )
    assert 0.2 < score["gate"].sum(-1).min() and score["gate"].sum(-1).max() < 0.6


def test_scores_and_choice_of_an_example_made_by_hand():
    """One layer, 10 tokens, K = 2, 20 choices: scores 0.1 0.3 0.3 0.25 0.05."""
    counts, gates = (
        torch.tensor([[2, 6, 6, 5, 1]]),
        torch.tensor([[0.5, 1.0, 1.5, 1.5, 0.5]], dtype=torch.float64),
    )
    token = expert_scores(counts, gates, 10, 2, "token")
    assert token.tolist() == [[0.1, 0.3, 0.3, 0.25, 0.05]] and token.dtype == torch.float64
    assert expert_scores(counts, gates, 10, 2, "gate").tolist() == [[0.05, 0.1, 0.15, 0.15, 0.05]]
    assert expert_scores(counts, gates, 10, 2, "gate_share").tolist() == [[0.1, 0.2, 0.3, 0.3, 0.1]]
    expected = {
        0.01: [1],
        0.3: [1],
        0.31: [1, 2],
        0.6: [1, 2],
        0.61: [1, 2, 3],
        0.95: [1, 2, 3, 0],
        1: [1, 2, 3, 0, 4],
    }
    for p, ids in expected.items():
        assert select_experts(token, p) == [ids], p


def test_the_prefix_is_the_smallest_one_that_reaches_p_in_exact_decimals():
    """Against exact fractions, for layers of many shapes; eight times 0.1 is 0.8 although floats
    sum to less."""
    from fractions import Fraction

    assert len(select_experts(torch.full((1, 10), 0.1), 0.8)[0]) == 8
    assert select_experts(torch.tensor([[0.30004, 0.30001, 0.4]]), 0.6) == [
        [2, 0]
    ]  # both 0.3: the lower id
    torch.manual_seed(0)
    for p in (0.07, 0.1, 0.2, 0.25, 0.5, 0.57, 0.9):
        scores = (torch.rand(30, 16, dtype=torch.float64) ** 3).softmax(-1)
        for layer, ids in zip(scores.tolist(), select_experts(scores, p)):
            exact = [Fraction(str(round(score, 4))) for score in layer]
            assert ids == sorted(range(16), key=lambda e: (-exact[e], e))[: len(ids)]
            assert sum(exact[e] for e in ids) >= Fraction(str(p)) > sum(exact[e] for e in ids[:-1])


def test_where_p_exceeds_a_layers_mass_all_experts_are_chosen_and_a_warning_says_so():
    scores = torch.tensor([[0.05, 0.02, 0.01], [0.3, 0.2, 0.1]])
    assert select_experts(scores, 0.1) == [[0, 1, 2], [0]]
    (warning,) = esft.warnings_for(scores, 0.1)
    assert "layers [0] sum to less than p 0.1" in warning
    assert esft.warnings_for(scores, 0.08) == []


@pytest.mark.parametrize("p", [0, -0.1, 1.01, math.nan])
def test_a_p_that_is_no_share_is_an_error(p):
    with pytest.raises(ValueError, match=r"p is .*; it must be more than 0 and at most 1"):
        select_experts(torch.full((2, 4), 0.25), p)


def test_a_kind_that_does_not_exist_and_an_empty_sample_are_errors():
    with pytest.raises(ValueError, match="kind is 'tokens'; choose from token, gate, gate_share"):
        expert_scores([[1]], [[1.0]], 1, 1, "tokens")
    with pytest.raises(ValueError, match="no token was counted"):
        expert_scores([[0]], [[0.0]], 0, 1)


def test_bound_groups_compete_by_their_sums_and_are_chosen_whole():
    """Groups of 2 with sums 0.3, 0.5, 0.2: expert 0 is the best alone, but its group is not."""
    scores = torch.tensor([[0.29, 0.01, 0.25, 0.25, 0.0, 0.2]])
    assert torch.allclose(
        esft.bind_groups(scores, 2), torch.tensor([[0.3, 0.5, 0.2]], dtype=torch.float64)
    )
    assert esft.select_groups(scores, 0.2, 2) == [[2, 3]]
    assert esft.select_groups(scores, 0.6, 2) == [[2, 3, 0, 1]]
    assert esft.select_groups(scores, 0.6, 1) == select_experts(scores, 0.6) == [[0, 2, 3]]
    with pytest.raises(
        ValueError, match="bind_groups is 4; it must divide the number of experts, 6"
    ):
        esft.select_groups(scores, 0.2, 4)


def test_the_random_control_takes_as_many_experts_and_the_same_ones_for_a_seed():
    drawn = [esft.random_experts(CHOSEN, 64, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for layers in drawn:
        assert [len(set(ids)) for ids in layers] == [2, 3] and all(
            0 <= e < 64 for ids in layers for e in ids
        )


# Collecting --------------------------------------------------------------------------------------

ROWS = [list(range(5, 5 + n)) for n in (9, 4, 12, 1, 7)]


def padded(rows, side="right", pad=0):
    """(input_ids, labels, mask) of the rows in one batch; the last two tokens of a row are its
    answer."""
    T = max(map(len, rows)) + 2
    ids, labels, mask = (
        torch.full((len(rows), T), pad),
        torch.full((len(rows), T), -100),
        torch.zeros(len(rows), T),
    )
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(T - len(row), T)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
        labels[i, place] = torch.tensor([-100] * (len(row) - 2) + row[-2:])[-len(row) :]
    return ids, labels, mask.bool()


@torch.no_grad()
def plain_count(model, rows):
    """Token by token, row by row, from the definition: no batch, no padding."""
    L, E = model.config.num_hidden_layers, model.config.num_experts
    counts = torch.zeros(L, E, dtype=torch.int64)
    gates = torch.zeros(L, E, dtype=torch.float64)
    for row in rows:
        for i, routing in enumerate(model(torch.tensor([row])).routings):
            for t in range(len(row)):
                s = routing.router_logits[t].double().softmax(-1)
                for e in s.topk(model.config.num_experts_per_tok).indices.tolist():
                    counts[i, e] += 1
                    gates[i, e] += s[e]
    return counts, gates, sum(map(len, rows))


def assert_same_usage(a, b):
    assert torch.equal(a[0], b[0]) and a[2] == b[2]
    assert a[0].dtype == torch.int64 and a[1].dtype == torch.float64
    assert torch.allclose(a[1], b[1], rtol=1e-5)


@pytest.mark.parametrize("base", ["olmoe", "mixtral"])
def test_collect_equals_a_count_token_by_token(base):
    """Gate sums are of the raw softmax, also in Mixtral, which renormalises; padding on either side
    counts nothing."""
    model = make_model(base)
    plain = plain_count(model, ROWS)
    assert plain[2] == 33 and int(plain[0].sum()) == 33 * 2 * 2
    for side in ("right", "left"):
        for pad in (0, 60):
            assert_same_usage(collect(model, [padded(ROWS, side, pad)]), plain)


def test_batches_and_shards_do_not_change_what_is_collected():
    model = make_model()
    together = collect(model, [padded(ROWS)])
    assert_same_usage(collect(model, [padded([row]) for row in ROWS]), together)
    assert_same_usage(
        collect(model, [(ids, mask) for ids, _, mask in (padded(ROWS[:2]), padded(ROWS[2:]))]),
        together,
    )
    shards = [collect(model, [padded(ROWS[i::2])]) for i in range(2)]
    added = esft.Usage(*(a + b for a, b in zip(*shards)))
    assert_same_usage(added, together)
    chosen = [select_experts(expert_scores(*usage, 2, "gate"), 0.1) for usage in (added, together)]
    assert chosen[0] == chosen[1]


def test_collect_leaves_the_model_and_the_mask_as_they_were():
    model, (ids, labels, mask) = make_model().train(), padded(ROWS)
    before, seen = mask.clone(), []
    model.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    collect(model, [(ids, labels, mask)])
    assert seen == [(False, False)] and model.training and torch.equal(mask, before)
    collect(model.eval(), [(ids, labels, mask)])
    assert not model.training


# Training ----------------------------------------------------------------------------------------


@every_base
@every_dtype
def test_before_training_the_model_is_the_base_bit_for_bit(base, dtype):
    """Forward over a batch, and the greedy continuation with its cache; also after deepcopy."""
    model = make_model(base, dtype=dtype)
    before, said = logits(model), model.generate(IDS, 6)
    apply_esft(model, CHOSEN)
    assert torch.equal(logits(model), before) and model.generate(IDS, 6) == said
    assert torch.equal(logits(copy.deepcopy(model)), before)


@every_base
def test_gradients_of_the_chosen_are_those_of_full_fine_tuning(base):
    """The same loss on the plain model with everything trainable; the input's gradient shows in the
    embeddings."""
    full, model = make_model(base).requires_grad_(True), apply_esft(make_model(base), CHOSEN)
    model.embed_tokens.weight.requires_grad_(True)
    for m in (full, model):
        m(IDS, labels=IDS).loss.backward()
    for ours, theirs, ids in zip(model.layers, full.layers, CHOSEN):
        for name in ("gate_up_proj", "down_proj"):
            mine, whole = getattr(ours.moe.experts, name), getattr(theirs.moe.experts, name)
            assert mine.dtype == mine.grad.dtype == torch.float32 and len(mine) == len(ids)
            assert gap(mine.grad, whole.grad[ids]) < 1e-5
    assert gap(model.embed_tokens.weight.grad, full.embed_tokens.weight.grad) < 1e-5


def test_the_gradient_of_the_input_passes_through_frozen_experts():
    """Tokens that chose frozen experts only: x and the routing weights have the gradients of the
    plain layer."""
    plain = make_model().layers[0].moe.experts
    ours = esft.ChosenExperts(plain, [3, 0])
    torch.manual_seed(1)
    x, weights = torch.randn(5, 16, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    routing = Routing(None, weights, torch.tensor([[1, 2], [4, 5], [2, 1], [5, 2], [1, 4]]))
    grads = [
        torch.autograd.grad(run(x, routing).square().sum(), (x, weights)) for run in (plain, ours)
    ]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads))


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    """Not None and not NaN: expert 3 is never asked, expert 0 is; and so with no tokens at all."""
    layer = esft.ChosenExperts(make_model().layers[0].moe.experts, [3, 0])
    routing = Routing(None, torch.ones(4, 2), torch.tensor([[0, 1], [2, 0], [0, 5], [4, 1]]))
    layer(torch.randn(4, 16), routing).sum().backward()
    for p in (layer.gate_up_proj, layer.down_proj):
        assert not p.grad[0].any() and p.grad[1].any() and p.grad.isfinite().all()
    layer.zero_grad()
    layer(
        torch.zeros(0, 16),
        routing._replace(
            routing_weights=torch.ones(0, 2), selected_experts=torch.zeros(0, 2, dtype=torch.int64)
        ),
    ).sum().backward()
    assert not layer.down_proj.grad.any()


@every_base
@every_dtype
def test_after_50_steps_with_weight_decay_all_that_is_frozen_is_bit_identical(base, dtype):
    """Tensor by tensor under the checkpoint's names. Every tensor of a chosen expert moved."""
    model = make_model(base, dtype=dtype)
    before = {name: t.clone() for name, t in tensors_of(model).items()}
    train(apply_esft(model, CHOSEN), 50)
    after = tensors_of(model)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    kind = "block_sparse_moe" if base == "mixtral" else "mlp"
    may_move = tuple(
        f"model.layers.{i}.{kind}.experts.{e}." for i, ids in enumerate(CHOSEN) for e in ids
    )
    moved = {name for name in before if not torch.equal(after[name].to(dtype), before[name])}
    assert moved == {name for name in before if name.startswith(may_move)} and len(moved) == 5 * 3
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(
        f"layers.{i}.moe.experts.{w}_proj" for i in (0, 1) for w in ("gate_up", "down")
    )
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_one_step_equals_full_fine_tunings_step_on_the_chosen_rows():
    """AdamW works element by element: its step on the masters is its step on the same rows of the
    whole stack."""
    full, model = make_model().requires_grad_(True), apply_esft(make_model(), CHOSEN)
    train(full, 1)
    train(model, 1)
    for ours, theirs, ids in zip(model.layers, full.layers, CHOSEN):
        gap_of_step = ours.moe.experts.down_proj - theirs.moe.experts.down_proj[ids]
        assert gap_of_step.abs().max() < 1e-5  # of a step of 1e-2


def test_in_a_bfloat16_base_float32_masters_move_where_bfloat16_weights_would_not():
    """The paper's learning rate of 1e-5: in place nine of ten bfloat16 weights never move, the
    masters all do."""
    naive = make_model(dtype=torch.bfloat16).requires_grad_(True)
    before, start = naive.layers[0].moe.experts.down_proj.detach()[[3, 0]].clone(), logits(naive)
    model = apply_esft(make_model(dtype=torch.bfloat16), CHOSEN)
    for m in (naive, model):
        train(m, 20, lr=1e-5, weight_decay=0.0)
    masters = model.layers[0].moe.experts.down_proj
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert (masters != before.float()).float().mean() > 0.99
    assert (naive.layers[0].moe.experts.down_proj[[3, 0]] != before).float().mean() < 0.1
    train(model, 150, lr=1e-5, weight_decay=0.0)
    assert (
        masters.bfloat16() != before
    ).float().mean() > 0.5  # enough small steps become a large one
    assert not torch.equal(logits(model), start)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_the_forward_pass_uses_the_weights_of_the_last_step(options):
    """However they were written: by any AdamW, by hand through .data, or by load_state_dict."""
    model = apply_esft(make_model(), CHOSEN)
    seen = [logits(model)]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, **options
    )
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    seen.append(logits(model))
    model.layers[0].moe.experts.down_proj.data.mul_(2)
    seen.append(logits(model))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    other = apply_esft(make_model(), CHOSEN)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), seen[2])


def test_two_forward_passes_before_one_backward_and_checkpointing_give_the_same_gradients():
    """The bank is written in every forward; what an earlier pass saved must not suffer."""
    from torch.utils.checkpoint import checkpoint

    grads = []
    for way in ("one by one", "together", "checkpointed"):
        model = apply_esft(make_model(), CHOSEN)
        if way == "checkpointed":
            for block in model.layers:
                run = block.moe.forward
                block.moe.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=False)
        if way == "one by one":
            for ids in (IDS[:1], IDS[1:]):
                model(ids, labels=ids).loss.backward()
        else:
            losses = [model(ids, labels=ids).loss for ids in (IDS[:1], IDS[1:])]
            sum(losses).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in grads[1:]:
        assert all(gap(a, b) < 1e-5 for a, b in zip(grads[0], other))


@every_dtype
def test_fill_bank_takes_the_masters_values_whatever_lies_in_their_room(dtype):
    """The bank's leading matrices become the masters', rounded to its dtype; those behind stay as
    they are. Autograd is not told: a pass that waits for its backward would object."""
    layer = esft.ChosenExperts(make_model(dtype=dtype).layers[0].moe.experts, [3, 0])
    for bank, masters in layer.stacks():
        behind, seen = bank[2:].clone(), bank._version
        masters.data.normal_()
        bank.data[:2].fill_(7)
        layer.fill_bank()
        assert torch.equal(bank[:2], masters.to(dtype)) and torch.equal(bank[2:], behind)
        assert bank._version == seen and bank.grad_fn is None and not bank.requires_grad


def test_the_grouped_product_of_chosen_experts_is_one_product_a_group():
    """Value, the gradient of the rows, and the masters' gradient, which stops after the chosen; in
    double precision by hand. Gradients of a sum have stride 0."""
    torch.manual_seed(0)
    rows, bank = torch.randn(9, 16).requires_grad_(), torch.randn(3, 8, 16)
    masters = bank[:2].clone().requires_grad_()
    ends = torch.tensor([4, 6, 9], dtype=torch.int32)
    y = esft.ChosenProduct.apply(rows, bank, masters, ends)
    x, w = rows.detach().double().requires_grad_(), bank.double().requires_grad_()
    exact = torch.cat((x[:4] @ w[0].T, x[4:6] @ w[1].T, x[6:] @ w[2].T))
    assert gap(y, exact) < 1e-6
    for reduce in (torch.sum, lambda y: y.square().sum()):
        ours = torch.autograd.grad(reduce(y), (rows, masters), retain_graph=True)
        theirs = torch.autograd.grad(reduce(exact), (x, w), retain_graph=True)
        assert gap(ours[0], theirs[0]) < 1e-6 and gap(ours[1], theirs[1][:2]) < 1e-6


def test_a_pass_that_waits_for_its_backward_is_not_disturbed_by_other_passes():
    """Evaluation, and a look at the weights through fill_banks, between forward and backward: the
    same gradients bit for bit."""
    grads = []
    for disturb in (False, True):
        model = apply_esft(make_model(), CHOSEN)
        loss = model(IDS, labels=IDS).loss
        if disturb:
            logits(model)
            esft.fill_banks(model)
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_step_before_the_backward_pass_is_an_error_as_with_any_weight():
    """The bank takes the new values without telling autograd; the masters tell it."""
    for chosen in (False, True):
        model = make_model().requires_grad_(True)
        if chosen:
            apply_esft(model, CHOSEN)
        loss = model(IDS, labels=IDS).loss
        with torch.no_grad():
            model.layers[0].moe.experts.down_proj.add_(1.0)
        logits(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_deepcopy_trains_on():
    """It trains masters of its own; the original stays as it was."""
    model = train(apply_esft(make_model(), CHOSEN), 3)
    twin, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), before)
    assert torch.equal(logits(train(twin, 1)), logits(train(copy.deepcopy(model), 1)))
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)


def test_the_options_train_the_router_or_all_that_is_no_expert():
    """train_router: masters in float32 also for a bfloat16 base. train_non_experts needs a float32
    base."""
    for dtype in (torch.float32, torch.bfloat16):
        model = apply_esft(make_model(dtype=dtype), CHOSEN, train_router=True)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, 2)
        moved = {
            n
            for n, p in model.named_parameters()
            if not torch.equal(p, before[n]) and "bank" not in n
        }
        assert moved == {
            name for name in before if ".router." in name or name.endswith(("up_proj", "down_proj"))
        }
        assert model.layers[0].moe.router.weight.dtype == torch.float32
    model = apply_esft(make_model(), CHOSEN, train_non_experts=True)
    assert all(p.requires_grad != ("_bank" in name) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="torch.bfloat16 would lose small steps; .* in float32"):
        apply_esft(make_model(dtype=torch.bfloat16), CHOSEN, train_non_experts=True)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([[0, 1]], "not given for each of the model's 2 layers"),
        ([[0, 6], [1]], r"layer 0: \[0, 6\] is no list of different experts from 0..5"),
        ([[0], [-1]], r"layer 1: \[-1\]"),
        ([[0], [1.0]], r"layer 1: \[1.0\]"),
        ([[0], []], r"layer 1: \[\]"),
        ([[0], [2, 4, 2]], r"layer 1: \[2, 4, 2\] is no list of different experts"),
    ],
)
def test_a_choice_that_the_model_does_not_have_is_an_error_and_leaves_it_alone(
    chosen, message, tmp_path
):
    """From the caller and from a file alike: one line."""
    model = make_model()
    before = logits(model)
    with pytest.raises(ValueError, match=message) as error:
        apply_esft(model, chosen)
    assert "\n" not in str(error.value) and torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters()) and apply_esft(model, CHOSEN)
    content = {"experts": {str(i): ids for i, ids in enumerate(chosen)}, "shared_experts": False}
    (tmp_path / "expert_cfg.json").write_text(json.dumps(content | {"non_expert_modules": False}))
    with pytest.raises(ValueError) as error:
        esft.read_config(tmp_path / "expert_cfg.json", model.config)
    assert "\n" not in str(error.value) and "expert_cfg.json" in str(error.value)


def test_a_model_that_carries_something_already_is_refused(tmp_path):
    model = apply_esft(make_model(), CHOSEN)
    save(model, tmp_path)
    for again in (lambda: apply_esft(model, CHOSEN), lambda: load(model, tmp_path)):
        with pytest.raises(ValueError, match="already carries adapters; load the base again"):
            again()
    adapted = perft.apply_perft(make_model(), "perft_s")
    for early in (lambda m: save(m, "."), lambda m: export(m, ".")):
        for other in (make_model(), adapted):
            with pytest.raises(ValueError, match="apply_esft or load first"):
                early(other)
    with pytest.raises(ValueError, match="carries no adapters"):
        perft.save_adapter(model, ".")


def test_the_reports_count_experts_and_parameters():
    """5 experts of 3 * 16 * 8 numbers; shares and gate mass from the usage; masters do not count as
    base parameters."""
    model = make_model()
    usage, total = collect(model, [padded(ROWS)]), sum(p.numel() for p in model.parameters())
    lines = report(apply_esft(model, CHOSEN)).splitlines()
    trained = next(line for line in lines if line.startswith("all that trains"))
    assert {"1,920", f"{100 * 1920 / total:.3f}"} <= set(trained.split())
    assert lines[-1].startswith(f"base model: {total:,} parameters")
    text = esft.describe_choice(CHOSEN, usage)
    assert "[3, 0]" in text and "[2, 1, 3]" in text and text.endswith("trains 5 of 12 experts")
    share = usage.counts[0, [3, 0]].sum() / usage.counts[0].sum()
    mass = usage.gate_sums[0] / 33
    assert f"{100 * share:.1f} %" in text and f"{mass[[3, 0]].sum():.4f} ({mass.sum():.4f})" in text


# Files -------------------------------------------------------------------------------------------


@every_base
@every_dtype
@pytest.mark.parametrize("options", [{}, {"train_router": True}], ids=["experts", "router_too"])
def test_saved_and_loaded_again_the_logits_are_bit_identical(base, dtype, options, tmp_path):
    model = train(apply_esft(make_model(base, dtype=dtype), CHOSEN, **options), 5)
    save(model, tmp_path)
    again = load(make_model(base, dtype=dtype), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(make_model(base, dtype=dtype)))
    assert again.adapter_config == model.adapter_config and not again.training
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


@pytest.mark.parametrize("base", ["olmoe", "olmoe_tied", "mixtral"])
@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
def test_experts_are_chosen_on_the_way_in(base, fused, tmp_path):
    """apply_esft as edit= of from_pretrained, on a folder of transformers that holds a tensor for
    each matrix, or the experts of a layer in one: the plain model's logits, the masters the file's
    values, and the same step."""
    transformers = pytest.importorskip("transformers")
    make_model(base).save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=not fused)
    names = hub.Tensors(tmp_path / "theirs").tensors
    assert any(name.endswith(".experts.gate_up_proj") for name in names) == fused
    edit = partial(apply_esft, chosen=CHOSEN)
    model = MoETransformer.from_pretrained(tmp_path / "theirs", edit=edit)
    assert torch.equal(logits(model), logits(make_model(base)))
    assert gap(logits(model), theirs.eval()(IDS).logits.detach()) < 1e-5
    later = apply_esft(make_model(base), CHOSEN)
    for ours, other in zip(model.parameters(), later.parameters()):
        assert ours.requires_grad == other.requires_grad and ours.dtype == other.dtype
        assert not ours.requires_grad or torch.equal(ours, other)
    assert torch.equal(logits(train(model, 1)), logits(train(later, 1)))


@every_base
def test_a_bfloat16_base_with_chosen_experts_has_float32_masters_of_the_files_values(
    base, tmp_path
):
    """Built without memory, converted, edited, filled: masters keep what bfloat16 would round."""
    plain = make_model(base)
    plain.save_pretrained(tmp_path)
    edit = partial(apply_esft, chosen=CHOSEN)
    model = MoETransformer.from_pretrained(tmp_path, torch.bfloat16, edit=edit)
    for ours, whole, ids in zip(model.layers, plain.layers, CHOSEN):
        for name in ("gate_up_proj", "down_proj"):
            masters = getattr(ours.moe.experts, name)
            assert masters.dtype == torch.float32
            assert torch.equal(masters, getattr(whole.moe.experts, name)[ids])
    assert torch.equal(logits(model), logits(plain.bfloat16()))


@every_base
@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
def test_the_places_of_a_model_with_chosen_experts_are_those_of_the_plain_model(base, fused):
    """Names, order and shapes; what is written at them is what the plain model has there."""

    def parts(place):
        return place.places if isinstance(place, hub.Stack) else [place]

    plain, chosen = make_model(base), apply_esft(make_model(base), CHOSEN)
    theirs, ours = hub.places(plain, fused), hub.places(chosen, fused)
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].shape == theirs[name].shape, name
        for mine, other in zip(parts(ours[name]), parts(theirs[name]), strict=True):
            assert torch.equal(mine.of(mine.parameter), other.of(other.parameter)), name


def test_everything_that_is_no_expert_is_saved_too_when_it_trains(tmp_path):
    model = train(apply_esft(make_model("olmoe_tied"), CHOSEN, train_non_experts=True), 3)
    save(model, tmp_path)
    assert read_json(tmp_path / "expert_cfg.json")["non_expert_modules"] is True
    assert torch.equal(logits(load(make_model("olmoe_tied"), tmp_path)), logits(model))


def test_the_configuration_has_the_released_layout(tmp_path):
    """And a file of that layout without our own keys is a choice that can be read, but not
    loaded."""
    save(apply_esft(make_model(), CHOSEN), tmp_path)
    content = read_json(tmp_path / "expert_cfg.json")
    own = {name: content.pop(name) for name in ("router", "base")}
    assert content == {
        "experts": {"0": [3, 0], "1": [2, 1, 3]},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    assert own["router"] is False and own["base"]["num_experts"] == 6
    (tmp_path / "expert_cfg.json").write_text(json.dumps(content))
    assert esft.read_config(tmp_path / "expert_cfg.json", make_model().config).experts == CHOSEN
    with pytest.raises(ValueError, match="does not say for which base"):
        load(make_model(), tmp_path)


@every_base
@every_dtype
def test_the_delta_lies_over_the_bases_tensors_and_makes_the_exported_checkpoint(
    base, dtype, tmp_path
):
    """Read by the safetensors library: base tensors | delta tensors == exported tensors, in the
    base's dtype, named as the hub names experts."""
    safetensors = pytest.importorskip("safetensors.torch")
    make_model(base).save_pretrained(tmp_path / "base", dtype)
    model = train(apply_esft(MoETransformer.from_pretrained(tmp_path / "base", dtype), CHOSEN), 5)
    save(model, tmp_path / "delta")
    export(model, tmp_path / "whole")
    delta = safetensors.load_file(tmp_path / "delta" / "expert_weights.safetensors")
    moe, gate = ("block_sparse_moe", "w1") if base == "mixtral" else ("mlp", "gate_proj")
    assert len(delta) == 5 * 3 and f"model.layers.1.{moe}.experts.2.{gate}.weight" in delta
    merged = safetensors.load_file(tmp_path / "base" / "model.safetensors") | delta
    whole = safetensors.load_file(tmp_path / "whole" / "model.safetensors")
    assert merged.keys() == whole.keys()
    assert all(merged[name].dtype == whole[name].dtype == dtype for name in whole)
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    plain = MoETransformer.from_pretrained(tmp_path / "whole", dtype)
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("base", ["olmoe", "olmoe_tied", "mixtral"])
@every_dtype
def test_an_exported_folder_is_the_same_model_in_transformers(base, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = train(apply_esft(make_model(base, dtype=dtype), CHOSEN), 5)
    (tmp_path / "base").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "README.md"):
        (tmp_path / "base" / name).write_text("{}")
    export(model, tmp_path / "whole", tmp_path / "base")
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "whole").iterdir()} == files
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == dtype
    plain = MoETransformer.from_pretrained(tmp_path / "whole")
    assert gap(logits(plain), theirs.eval().float()(IDS).logits.detach()) < 1e-5
    assert torch.equal(logits(plain.to(dtype)), logits(model))


def test_export_writes_into_a_new_or_empty_folder_only(tmp_path):
    model = apply_esft(make_model(), CHOSEN)
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty")
    with pytest.raises(ValueError, match="already exists and is not an empty folder"):
        export(model, tmp_path / "empty")
    with pytest.raises(OSError, match="nowhere"):
        export(model, tmp_path / "other", tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="model.norm.weight is not finite"):
        export(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("named", [False, True], ids=["base_of_the_run", "base_named"])
def test_the_export_command_writes_a_folder_that_transformers_loads_with_the_same_logits(
    named, tmp_path, capsys
):
    """The base is the run's own unless one is named. Next to the model lie the base's tokenizer
    files."""
    transformers = pytest.importorskip("transformers")
    make_model().save_pretrained(tmp_path / "base", torch.float32)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    model = train(apply_esft(make_model(), CHOSEN), 5)
    save(model, tmp_path / "run")
    base = tmp_path / "base"
    settings = {"base": str(tmp_path / "nowhere" if named else base), "dtype": "float32"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    folders = [tmp_path / "run", tmp_path / "new"]
    if named:
        folders.append(base)
    esft_command(["export", *map(str, folders)])
    where = f"{base} with what {tmp_path / 'run'} trained, in float32"
    assert capsys.readouterr().out == f"wrote {tmp_path / 'new'}: {where}\n"
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert gap(logits(model), theirs(IDS).logits.detach()) < 1e-5
    assert torch.equal(logits(MoETransformer.from_pretrained(tmp_path / "new")), logits(model))


@pytest.mark.parametrize("config", [None, {}, {"base": None}], ids=["no_config", "no_base", "null"])
def test_the_export_command_takes_the_embedded_base_where_the_run_names_none(
    config, tmp_path, capsys
):
    if not Path(EMBEDDED, "model.safetensors").is_file():
        pytest.skip(f"{EMBEDDED}/model.safetensors is absent")
    model = apply_esft(MoETransformer.from_pretrained(EMBEDDED), [[7], [0], [31], [2]])
    save(model, tmp_path / "run")
    if config is not None:
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    esft_command(["export", str(tmp_path / "run"), str(tmp_path / "new")])
    assert f"{EMBEDDED} with what {tmp_path / 'run'} trained" in capsys.readouterr().out
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "new").iterdir()} == files


@pytest.mark.parametrize(
    "argv",
    [["train"], ["export"], ["export", "run"], ["export", "a", "b", "c", "d"], ["--hlep"]],
    ids=" ".join,
)
def test_wrong_usage_of_the_command_is_told_in_one_line_and_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        esft_command(argv)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("; see --help\n")


@pytest.mark.parametrize("argv", [["--help"], ["export", "--help"]], ids=" ".join)
def test_help_is_a_page_that_names_the_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        esft_command(argv)
    printed = capsys.readouterr()
    words = ["export"] if len(argv) == 1 else ["RUN_FOLDER", "NEW_FOLDER", "BASE"]
    assert stop.value.code == 0 and printed.err == ""
    assert all(word in printed.out for word in words)


def test_what_cannot_be_exported_is_an_error_in_one_line_and_exits_with_1(tmp_path):
    """No run, no base, a folder that is in use, no such dtype; and the exit code of a process."""
    make_model().save_pretrained(tmp_path / "base", torch.float32)
    save(apply_esft(make_model(), CHOSEN), tmp_path / "run")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"dtype": "float8"}')
    for folders, message in [
        (("nothing", "new", "base"), "no such file"),
        (("run", "new", "nowhere"), "nowhere"),
        (("run", "base", "base"), "already exists and is not an empty folder"),
        (("odd", "new", "base"), "float8"),
    ]:
        with pytest.raises(SystemExit, match=rf"^error: .*{message}") as stop:
            esft_command(["export", *(str(tmp_path / folder) for folder in folders)])
        assert "\n" not in stop.value.code and not (tmp_path / "new").exists()
    argv = [sys.executable, "esft.py", "export", "a", "b"]
    out = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr.startswith("error: ") and out.stderr.count("\n") == 1


def edited(tmp_path, change):
    """A saved folder whose expert_cfg.json was changed by hand."""
    save(apply_esft(make_model(), CHOSEN), tmp_path)
    content = read_json(tmp_path / "expert_cfg.json")
    change(content)
    (tmp_path / "expert_cfg.json").write_text(json.dumps(content))


WEIGHTS = "expert_weights.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["experts"].update({"0": [3, 9]}),
            r"expert_cfg.json: layer 0: \[3, 9\].* 0..5",
        ),
        (
            lambda c: c["experts"].update({"2": [1]}),
            "expert_cfg.json: not given for each of the model's 2 layers",
        ),
        (lambda c: c["experts"].pop("1"), "expert_cfg.json: .* 2 layers"),
        (lambda c: c["experts"].update({"1": None}), "expert_cfg.json: layer 1: None is no list"),
        (
            lambda c: c.update(experts=[[1], [2]]),
            r"expert_cfg.json: experts is \[\[1\], \[2\]\], expected an object",
        ),
        (lambda c: c.update(router="yes"), "expert_cfg.json: router is .*, expected true or false"),
        (
            lambda c: c.update(shared_experts=True),
            "expert_cfg.json: shared_experts is true, olmoe models have none",
        ),
        (
            lambda c: c["experts"].update({"0": [3]}),
            r"3 tensors that the model does not have: .*experts.0.down_proj.weight",
        ),
        (
            lambda c: c["experts"].update({"0": [3, 0, 5]}),
            rf"{WEIGHTS}: 3 tensors are missing: .*experts.5.down_proj.weight",
        ),
        (
            lambda c: c.update(router=True),
            rf"{WEIGHTS}: 2 tensors are missing: .*mlp.gate.weight",
        ),
        (
            lambda c: c["base"].update(num_experts=64),
            "expert_cfg.json: was made for another base: num_experts 64 then, 6 now",
        ),
        (lambda c: c.pop("base"), "expert_cfg.json: does not say for which base"),
    ],
)
def test_a_folder_that_contradicts_itself_or_the_model_is_refused_with_both_sides_named(
    change, message, tmp_path
):
    edited(tmp_path, change)
    model = make_model()
    with pytest.raises(ValueError, match=message) as error:
        load(model, tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    apply_esft(model, CHOSEN)  # nothing had been attached


def test_weights_of_another_shape_or_another_base_are_refused(tmp_path):
    save(apply_esft(make_model(), CHOSEN), tmp_path)
    with pytest.raises(ValueError, match='model_type "olmoe" then, "mixtral" now'):
        load(make_model("mixtral"), tmp_path)
    tensors = {
        name: t.clone()
        for name, t in SafetensorsFile(tmp_path / "expert_weights.safetensors").items()
    }
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name][:, :4]
    places = {name: Place(t) for name, t in tensors.items()}
    hub.write_tensors(tmp_path / "expert_weights.safetensors", places)
    with pytest.raises(ValueError, match=rf"{name}. has shape \[8, 4\], the model has \[8, 16\]"):
        load(make_model(), tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_trained_weight_that_is_no_finite_number_is_refused_by_name(value, tmp_path):
    """NaN and infinities; the model stays as it was."""
    safetensors = pytest.importorskip("safetensors.torch")
    save(apply_esft(make_model(), CHOSEN), tmp_path)
    file = tmp_path / "expert_weights.safetensors"
    tensors = {name: t.double() for name, t in SafetensorsFile(file).items()}
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[name][3, 4] = value
    safetensors.save_file(tensors, file)
    model = make_model()
    with pytest.raises(ValueError, match=rf"{file}: tensor .{name}. holds numbers that are not"):
        load(model, tmp_path)
    assert torch.equal(logits(model), logits(make_model())) and apply_esft(model, CHOSEN)


# The picture and the lesson ----------------------------------------------------------------------


def test_a_run_folder_gets_the_scores_the_usage_and_a_picture_of_the_choice(tmp_path):
    model = make_model()
    usage = collect(model, [padded(ROWS)])
    scores = expert_scores(*usage, 2)
    how = {"kind": "token", "task": "<a & b>", "p": 0.2}
    esft.save_scores(apply_esft(model, CHOSEN), tmp_path, usage, scores, how)
    content = read_json(tmp_path / "scores.json")
    assert content["chosen"] == CHOSEN and content["n_tokens"] == 33 and content["kind"] == "token"
    assert content["scores"] == scores.tolist() and content["counts"] == usage.counts.tolist()
    assert content["gate_sums"] == usage.gate_sums.tolist()
    rects = list(ElementTree.parse(tmp_path / "scores.svg").iter(f"{SVG}rect"))
    told = [rect[0].text for rect in rects]
    assert told == [f"layer {i}, column {e}: {scores[i, e]:.4g}" for i in (0, 1) for e in range(6)]
    outlined = {divmod(i, 6) for i, rect in enumerate(rects) if rect.get("class") == "chosen"}
    assert outlined == {(0, 3), (0, 0), (1, 2), (1, 1), (1, 3)}
    words = [text.text for text in ElementTree.parse(tmp_path / "scores.svg").iter(f"{SVG}text")]
    assert any(text.startswith("kind token, task <a & b>, p 0.2") for text in words if text)


def test_the_lesson_prints_or_says_in_one_line_what_is_missing(capsys):
    if (ROOT / "data" / "tiny_olmoe" / "model.safetensors").is_file():
        esft_command([])
        printed = capsys.readouterr().out
        assert "Overlap: experts chosen for both" in printed
    else:
        with pytest.raises(SystemExit, match=r"^error: .*tiny_olmoe.*") as stop:
            esft_command([])
        assert "\n" not in str(stop.value)


def test_the_lesson_runs_on_random_weights_of_the_embedded_model(monkeypatch, capsys):
    """Nothing to learn from, but every family has its line, and an overlap of 100 with itself."""
    model = MoETransformer(Config.from_folder(EMBEDDED)).eval()
    monkeypatch.setattr(MoETransformer, "from_pretrained", lambda folder: model)
    two = {name: skills.FAMILIES[name] for name in ("sort", "kinship")}
    monkeypatch.setattr(skills, "FAMILIES", two)
    esft.lesson()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("  sort", "  kinship"))]
    assert [row[0] for row in rows] == ["sort", "kinship"] * 2
    overlaps = [row[1:] for row in rows[2:]]
    assert overlaps[0][0] == overlaps[1][1] == "100%" and overlaps[0][1] == overlaps[1][0]
