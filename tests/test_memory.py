"""What a step keeps in memory: no logits, on demand no activations; and the estimate that is printed before a run."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data.report import kept_by, kept_compiled, memory_estimate
from esft import apply_esft
from model import Config, CrossEntropy, MoETransformer
from moe import load_balancing_loss
from perft import MIXTRAL_8X7B, OLMOE_1B_7B, apply_perft
from train import make_optimizer, parse_args, state_tensors

TINY = Config(
    vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
    num_experts=8, num_experts_per_tok=2,
)  # fmt: skip


def make_model(seed=0, config=TINY, dtype=torch.float32):
    torch.manual_seed(seed)
    model = MoETransformer(config)
    for name, p in model.named_parameters():
        p.data.normal_(1, 0.3) if "norm" in name else p.data.normal_(0, p.shape[-1] ** -0.5)
    return model.to(dtype)


def saved_bytes(run):
    """The bytes that autograd keeps between `run` and its backward pass, parameters aside, each storage once."""
    kept = {}

    def pack(t):
        if not isinstance(t, torch.nn.Parameter) and not (t._base is not None and t.is_leaf):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return sum(kept.values()), result


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_is_the_cross_entropy_of_torch(chunk, dtype, monkeypatch):
    """Loss and both gradients, for a chunk that does not divide the rows and for one that holds them all. In bfloat16
    they are as near to float64 as torch's own, which rounds in other places; a label that is nearly certain included:
    there the gradient is a small difference of numbers near 1."""
    monkeypatch.setattr(CrossEntropy, "CHUNK", chunk)
    torch.manual_seed(0)
    x, weight, labels = torch.randn(50, 32), torch.randn(97, 32) / 4, torch.randint(0, 97, (50,))
    x[0] = 6 * weight[labels[0]]

    def run(function, dtype):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        loss = function(*inputs)
        (loss * 0.37).backward()
        return loss.detach().double(), *(t.grad.double() for t in inputs)

    def plain(x, weight):
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), labels, reduction="sum")

    exact = run(plain, torch.float64)
    theirs, ours = run(plain, dtype), run(lambda x, weight: CrossEntropy.apply(x, weight, labels), dtype)
    for e, t, o in zip(exact, theirs, ours):
        ours_off, theirs_off = (((v - e).norm() / e.norm()).item() for v in (o, t))
        assert ours_off <= max({torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 0), 1.3 * theirs_off)


@pytest.mark.parametrize("trains", ["x", "weight", "neither"])
def test_only_the_gradients_that_are_wanted_are_made(trains):
    x, weight, labels = torch.randn(5, 8), torch.randn(11, 8), torch.randint(0, 11, (5,))
    {"x": x, "weight": weight, "neither": x.clone()}[trains].requires_grad_()
    kept, loss = saved_bytes(lambda: CrossEntropy.apply(x, weight, labels))
    assert kept == {"x": x, "weight": weight, "neither": x[:0]}[trains].nbytes
    assert loss.requires_grad == (trains != "neither")


def test_no_logits_are_kept():
    """As many labels as tokens: the loss keeps less than the hidden states' size twice, however large V is."""
    x, weight, labels = torch.randn(300, 8, requires_grad=True), torch.randn(5000, 8), torch.randint(0, 5000, (300,))
    assert saved_bytes(lambda: CrossEntropy.apply(x, weight, labels))[0] == x.nbytes


def test_the_losses_of_parts_add_up_to_the_loss_of_the_whole():
    """Three micro-batches, of which one has few labels and one none at all: divided by the labels of all, their losses
    and gradients sum to those of one batch. Their own means would not."""
    whole, parts = make_model(), make_model()
    ids = torch.randint(0, 97, (5, 12))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100)
    labels[1, 2:] = labels[4] = -100
    loss = whole(ids, labels=labels).loss
    loss.backward()
    total = (labels[:, 1:] != -100).sum()
    losses = []
    for part in (slice(0, 1), slice(1, 4), slice(4, 5)):
        losses.append(parts(ids[part], labels=labels[part], loss_divisor=total).loss)
        losses[-1].backward()
    assert sum(losses).item() == pytest.approx(loss.item(), rel=1e-6) and losses[-1].item() == 0
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_loss_without_gradients_makes_none(monkeypatch):
    """Where every weight trains and the loss is only looked at, the product for the head's gradient is not made."""
    model, seen = make_model(), []
    ids = torch.randint(0, 97, (2, 12))
    forward = CrossEntropy.forward

    def look(ctx, *args):
        seen.append(ctx.needs_input_grad)
        return forward(ctx, *args)

    monkeypatch.setattr(CrossEntropy, "forward", staticmethod(look))
    with torch.no_grad():
        quiet = model(ids, labels=ids).loss
    assert model(ids, labels=ids).loss == quiet and seen == [(False, False, False), (True, True, False)]


# Activation checkpointing -------------------------------------------------------------------------------------------


def step(model, ids, checkpointed, seed=3):
    """Loss with the balance losses of both routers -> (kept bytes, loss, gradients by name)."""
    model.checkpoint_activations = checkpointed
    model.zero_grad()
    torch.manual_seed(seed)  # of dropout

    def forward():
        out = model(ids, labels=ids)
        adapters = [r.adapter for r in out.routings if r.adapter is not None]
        return out.loss + 0.1 * sum(load_balancing_loss(r) for r in [*out.routings, *adapters])

    kept, loss = saved_bytes(forward)
    loss.backward()
    return kept, loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", ["perft_s", "perft_r", "perft_e", "lora_qv", "router", "full"])
def test_checkpointing_changes_no_bit_and_keeps_less(variant):
    """Loss and every gradient, the balance losses' through the routers and the dropout of the adapters included."""
    model = apply_perft(make_model(), variant, dropout=0.3).train()
    ids = torch.randint(0, 97, (4, 24))
    kept, loss, grads = step(model, ids, False)
    less, same, again = step(model, ids, True)
    assert torch.equal(loss, same) and grads.keys() == again.keys()
    assert all(torch.equal(grads[name], again[name]) for name in grads)
    assert less < kept / 3, f"{less} of {kept} bytes"


def test_checkpointing_keeps_the_inputs_of_the_blocks():
    """An input of a block is (N, D); beyond these the last norm's and small tensors (rotary positions) are kept."""
    model = apply_perft(make_model(), "perft_s", dropout=0.0).train()
    ids = torch.randint(0, 97, (4, 24))
    kept, _, _ = step(model, ids, True)
    inputs = ids.numel() * TINY.hidden_size * 4 * (TINY.num_hidden_layers + 4)  # 4: the last norm and the head
    assert kept < 1.5 * inputs


def test_checkpointing_does_nothing_where_no_gradient_is_asked_for():
    model = make_model()
    ids = torch.randint(0, 97, (2, 12))
    with torch.no_grad():
        plain = model(ids).logits
        model.checkpoint_activations = True
        assert torch.equal(model(ids).logits, plain)
        assert model.generate([[5, 6, 7]], 5)


def test_compiled_blocks_can_be_checkpointed():
    """Compiled as far as the graph (no code is generated here): the same loss and gradients, within rounding."""
    torch._dynamo.reset()
    one_layer = replace(TINY, num_hidden_layers=1)
    model = apply_perft(make_model(config=one_layer, dtype=torch.bfloat16), "perft_s", dropout=0.0).train()
    ids = torch.randint(0, 97, (2, 12))
    _, loss, grads = step(model, ids, False)
    for block in model.layers:
        block.compile(backend="aot_eager", dynamic=True)
    _, same, again = step(model, ids, True)
    torch.testing.assert_close(loss, same, rtol=1e-3, atol=0)
    for name, grad in grads.items():
        assert (again[name] - grad).norm() < 0.01 * grad.norm(), name


# What is said before a run --------------------------------------------------------------------------------------------


def attach(model, variant):
    if variant == "esft":
        return apply_esft(model, [[1, 5]] * model.config.num_hidden_layers)
    return apply_perft(model, variant)


CASES = [(v, d) for v in ("perft_s", "perft_e", "lora_qv", "router", "full", "esft")
         for d in (torch.float32, torch.bfloat16) if (v, d) != ("full", torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize(("variant", "dtype"), CASES)
@pytest.mark.parametrize("width", [32, 512])
def test_the_estimate_of_a_layer_is_what_a_step_keeps(variant, dtype, width):
    """The model with one layer more keeps as much more as the estimate says, within a fifth, at a quarter of OLMoE's
    widths also; the estimate is made from shapes alone."""
    config = replace(TINY, hidden_size=width, intermediate_size=width // 2, num_hidden_layers=1)
    with torch.device("meta"):
        abstract = attach(MoETransformer(config).to(dtype), variant)
    estimate, ids, kept = kept_by(abstract.layers[0], abstract), torch.randint(0, 97, (2, 150)), []
    for layers in (1, 2):
        model = attach(make_model(config=replace(config, num_hidden_layers=layers), dtype=dtype), variant).train()
        kept.append(saved_bytes(lambda: model(ids, labels=ids).loss)[0])  # noqa: B023
    assert estimate * ids.numel() == pytest.approx(kept[1] - kept[0], rel=0.2)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("variant", ["perft_s", "full", "esft"])
def test_the_estimate_of_a_step_counts_what_there_is(variant, checkpointed):
    """Weights, gradients and AdamW's state to the byte; activations: what is kept, and at most two layers on top."""
    config = replace(TINY, num_hidden_layers=8)
    with torch.device("meta"):
        abstract = attach(MoETransformer(config), variant)
    model, ids = attach(make_model(config=config), variant).train(), torch.randint(0, 97, (4, 50))
    abstract.checkpoint_activations = model.checkpoint_activations = checkpointed
    memory = memory_estimate(abstract, 4, 50)
    kept, loss = saved_bytes(lambda: model(ids, labels=ids).loss)
    loss.backward()
    optimizer = make_optimizer(model, parse_args(["--variant", "router", "--out", "no_such_folder"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = sum(t.nbytes for name, t in state_tensors(model, optimizer).items() if name.startswith("exp_avg"))
    assert memory.weights + memory.trained == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in trained) and memory.optimizer == moments
    layer, logits = kept_by(abstract.layers[0], abstract) * ids.numel(), ids.numel() * 97 * 8
    assert kept <= memory.activations - logits <= 1.2 * kept + 2 * layer


def test_the_published_models_take_what_was_measured():
    """On a GPU a frozen OLMoE in bfloat16 keeps 67 KiB a token and layer compiled and at most 124 eager; weights by
    the size of the files. Eight devices hold an eighth each; what they gather is two layers and the root."""
    with torch.device("meta"):
        model = apply_perft(MoETransformer(OLMOE_1B_7B).bfloat16(), "perft_s")
        large = MoETransformer(MIXTRAL_8X7B).bfloat16().requires_grad_(False)
    compiled, eager = kept_compiled(model) / 1024, kept_by(model.layers[0], model) / 1024
    assert compiled == pytest.approx(67, rel=0.1) and compiled < eager < 130
    memory = memory_estimate(model, 32, 1024, compiled=True)
    assert memory.weights == 13_838_323_712 and memory.activations == pytest.approx(33 * 2**30, rel=0.15)
    assert str(memory).startswith("memory in GB a device: weights 13.84, trains 0.00, gradients + AdamW 0.01, activ")
    many = memory_estimate(large, 1, 1024, compiled=True, devices=8)
    assert many.weights == 93_405_585_408 // 8 and 2 * 2.9e9 < many.gathered < 2 * 2.9e9 + 0.6e9
