"""What a step keeps in memory: no more than a chunk's logits, on demand no activations; and what is
certain, which is printed before a run."""

import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as network
from data import run
from data import shard as processes
from data.hub import make_config
from esft import apply_esft
from model import Config, MoETransformer, summed_cross_entropy
from moe import load_balancing_loss
from perft import MIXTRAL_8X7B, OLMOE_1B_7B, apply_perft
from train import check_memory, make_optimizer, parse_args, state_places

TINY = Config(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
)


def make_model(seed=0, config=TINY, dtype=torch.float32):
    torch.manual_seed(seed)
    model = MoETransformer(config)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.normal_(1, 0.3)
        else:
            p.data.normal_(0, p.shape[-1] ** -0.5)
    return model.to(dtype)


def saved_bytes(run):
    """The bytes that autograd keeps between `run` and its backward pass, parameters aside, each
    storage once -> (bytes, what `run` returns)."""
    kept = {}

    def pack(t):
        if not isinstance(t, torch.nn.Parameter) and not (t._base is not None and t.is_leaf):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return sum(kept.values()), result


# The loss ----------------------------------------------------------------------------------------


def plain_cross_entropy(x, weight, labels):
    logits = F.linear(x, weight)
    precise = torch.promote_types(x.dtype, torch.float32)
    return F.cross_entropy(logits.to(precise), labels, reduction="sum")


@pytest.mark.parametrize("chunk", [7, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_is_the_cross_entropy_of_torch(chunk, dtype, monkeypatch):
    """Loss and both gradients, for a chunk that does not divide the rows and for one that holds
    them all. In bfloat16 they are as near to float64 as torch's own, which rounds in other places;
    a label that is nearly certain included: there the gradient is a small difference of numbers
    near 1."""
    monkeypatch.setattr(network, "CHUNK", chunk)
    torch.manual_seed(0)
    x, weight, labels = torch.randn(50, 32), torch.randn(97, 32) / 4, torch.randint(0, 97, (50,))
    x[0] = 6 * weight[labels[0]]

    def run(function, dtype):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        loss = function(*inputs, labels)
        (loss * 0.37).backward()
        return loss.detach().double(), *(t.grad.double() for t in inputs)

    exact = run(plain_cross_entropy, torch.float64)
    theirs, ours = run(plain_cross_entropy, dtype), run(summed_cross_entropy, dtype)
    bound = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 0)
    for name, e, t, o in zip(("loss", "x", "weight"), exact, theirs, ours):
        ours_off, theirs_off = (((v - e).norm() / e.norm()).item() for v in (o, t))
        assert ours_off <= max(bound, 1.3 * theirs_off), name


class Watch(TorchDispatchMode):
    """Notes the shape of each matrix product's result, and the most bytes that the results of all
    operations hold at a time, the storages of `inputs` aside."""

    def __init__(self, *inputs):
        super().__init__()
        self.own = {t.untyped_storage().data_ptr() for t in inputs}
        self.live, self.peak, self.products = {}, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.products.append(tuple(result.shape))
        for t in tree_leaves(result):
            if torch.is_tensor(t):
                self.note(t.untyped_storage())
        self.peak = max(self.peak, self.held())
        return result

    def note(self, storage):
        address = storage.data_ptr()
        if storage.nbytes() and address not in self.own and address not in self.live:
            self.live[address] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, address, None)

    def held(self) -> int:
        return sum(self.live.values())


@pytest.mark.parametrize("trains", ["x", "weight", "neither"])
def test_only_the_gradients_that_are_wanted_are_made(trains, monkeypatch):
    """By the products: (n, 11) logits of chunks of 3 and 2 rows; where something trains they are
    made once more in the backward pass, and then one product a chunk for each wanted gradient."""
    monkeypatch.setattr(network, "CHUNK", 3)
    x, weight, labels = torch.randn(5, 8), torch.randn(11, 8), torch.randint(0, 11, (5,))
    {"x": x, "weight": weight, "neither": x.clone()}[trains].requires_grad_()
    logits = [(2, 11), (3, 11)]
    with Watch() as watch:
        loss = summed_cross_entropy(x, weight, labels)
        assert sorted(watch.products) == logits
        assert loss.requires_grad == (trains != "neither")
        if loss.requires_grad:
            loss.backward()
    wanted = {
        "x": [(2, 8), (2, 11), (3, 8), (3, 11)],
        "weight": [(2, 11), (3, 11), (11, 8), (11, 8)],
        "neither": [],
    }
    assert sorted(watch.products[2:]) == wanted[trains]


def test_no_more_than_a_chunk_of_logits_is_there_at_a_time(monkeypatch):
    """As many labels as tokens: between forward and backward pass the loss keeps less than the
    hidden states' size, however large V is; in them at most 4 chunks' logits are alive, of 6 (the
    logits, their softmax and gradients). All at once they would be 18."""
    monkeypatch.setattr(network, "CHUNK", 50)
    x, weight = torch.randn(300, 8, requires_grad=True), torch.randn(5000, 8)
    labels = torch.randint(0, 5000, (300,))
    chunk = 50 * 5000 * 4

    def watch(function):
        with Watch(x, weight, labels) as watch:
            loss = function(x, weight, labels)
            kept = watch.held()
            loss.backward()
        return kept, watch.peak

    kept, peak = watch(summed_cross_entropy)
    assert kept < x.nbytes and peak < 4 * chunk
    kept, peak = watch(plain_cross_entropy)
    assert kept > 5 * chunk and peak > 17 * chunk


def test_the_losses_of_parts_add_up_to_the_loss_of_the_whole():
    """Three micro-batches, of which one has few labels and one none at all: divided by the labels
    of all, their losses and gradients sum to those of one batch. Their own means would not."""
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


@pytest.mark.parametrize("chunk", [5, 1024])
def test_a_loss_without_gradients_makes_none(chunk, monkeypatch):
    """Where every weight trains and the loss is only looked at, the same number comes out, and the
    head makes nothing but logits: of 22 rows, or of 5 at a time."""
    monkeypatch.setattr(network, "CHUNK", chunk)
    model = make_model()
    ids = torch.randint(0, 97, (2, 12))
    with torch.no_grad(), Watch() as watch:
        quiet = model(ids, labels=ids).loss
    assert not quiet.requires_grad
    logits = [(5, 97)] * 4 + [(2, 97)] if chunk == 5 else [(22, 97)]
    assert [shape for shape in watch.products if 97 in shape] == logits
    loss = model(ids, labels=ids).loss
    assert loss == quiet and loss.requires_grad


# Activation checkpointing ------------------------------------------------------------------------


def step(model, ids, checkpointed, seed=3):
    """Loss with the balance losses of both routers -> (kept bytes, loss, gradients by name)."""
    model.checkpoint_activations = checkpointed
    model.zero_grad()
    torch.manual_seed(seed)  # of dropout

    def forward():
        out = model(ids, labels=ids)
        adapters = [r.adapter for r in out.routings if hasattr(r, "adapter")]
        return out.loss + 0.1 * sum(load_balancing_loss(r) for r in [*out.routings, *adapters])

    kept, loss = saved_bytes(forward)
    loss.backward()
    named = dict(model.named_parameters())
    grads = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    return kept, loss, grads


@pytest.mark.parametrize("variant", ["perft_s", "perft_r", "perft_e", "lora_qv", "router", "full"])
def test_checkpointing_changes_no_bit_and_keeps_less(variant):
    """Loss and every gradient, the balance losses' through the routers and the dropout of the
    adapters included."""
    model = apply_perft(make_model(), variant, dropout=0.3).train()
    ids = torch.randint(0, 97, (4, 24))
    kept, loss, grads = step(model, ids, False)
    less, same, again = step(model, ids, True)
    assert torch.equal(loss, same) and grads.keys() == again.keys()
    assert all(torch.equal(grads[name], again[name]) for name in grads)
    assert less < kept / 3, f"{less} of {kept} bytes"


def test_checkpointing_keeps_the_inputs_of_the_blocks():
    """An input of a block is (N, D); beyond these the last norm's and small tensors (rotary
    positions) are kept."""
    model = apply_perft(make_model(), "perft_s", dropout=0.0).train()
    ids = torch.randint(0, 97, (4, 24))
    kept, _, _ = step(model, ids, True)
    inputs = (
        ids.numel() * TINY.hidden_size * 4 * (TINY.num_hidden_layers + 4)
    )  # 4: the last norm and the head
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
    """Compiled as far as the graph (no code is generated here): the same loss and gradients, within
    rounding."""
    torch._dynamo.reset()
    one_layer = replace(TINY, num_hidden_layers=1)
    model = make_model(config=one_layer, dtype=torch.bfloat16)
    model = apply_perft(model, "perft_s", dropout=0.0).train()
    ids = torch.randint(0, 97, (2, 12))
    _, loss, grads = step(model, ids, False)
    for block in model.layers:
        block.compile(backend="aot_eager", dynamic=True)
    _, same, again = step(model, ids, True)
    torch.testing.assert_close(loss, same, rtol=1e-3, atol=0)
    for name, grad in grads.items():
        assert (again[name] - grad).norm() < 0.01 * grad.norm(), name


# What is said before a run -----------------------------------------------------------------------


def attach(model, variant):
    if variant == "esft":
        return apply_esft(model, [[1, 5]] * model.config.num_hidden_layers)
    return apply_perft(model, variant)


CASES = [(v, torch.float32) for v in ("perft_s", "perft_e", "lora_qv", "router", "full", "esft")]
CASES += [(v, torch.bfloat16) for v, _ in CASES if v != "full"]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_what_is_certain_is_what_there_is_after_a_step(variant, dtype, checkpointed, monkeypatch):
    """Weights, gradients and AdamW's moments to the byte, said from shapes alone: with as many
    bytes free the run may start, with one less it is refused."""
    model = attach(make_model(dtype=dtype), variant).train()
    model.checkpoint_activations = checkpointed
    ids = torch.randint(0, 97, (4, 50))
    optimizer = make_optimizer(
        model, parse_args(["--variant", "router", "--out", "no_such_folder"])
    )
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    places = state_places(model, optimizer).items()
    moments = [place.parameter for name, place in places if name.startswith("exp_avg")]
    there = sum(p.nbytes for p in model.parameters())
    there += sum(p.grad.nbytes for p in trained) + sum(t.nbytes for t in moments)
    assert len(moments) == 2 * len(trained)

    args = SimpleNamespace(dtype=str(dtype).removeprefix("torch."), device="cpu")
    edit = partial(attach, variant=variant)
    monkeypatch.setattr(run, "free_memory", lambda: there)
    check_memory(args, TINY, edit)
    monkeypatch.setattr(run, "free_memory", lambda: there - 1)
    with pytest.raises(ValueError, match="at least 0.0 GB are needed, 0.0 GB are free; try"):
        check_memory(args, TINY, edit)


def test_the_published_models_take_the_size_of_their_files_and_what_trains(monkeypatch, capsys):
    """OLMoE with PERFT-S, all of OLMoE, and Mixtral, of which eight devices hold an eighth each;
    the numbers by hand: 13.84 and 93.41 GB of bfloat16 weights, 4 bytes a float32 one."""
    monkeypatch.setattr(run, "free_memory", lambda: float("inf"))
    olmoe, mixtral = make_config(OLMOE_1B_7B, Config), make_config(MIXTRAL_8X7B, Config)
    half, full = (SimpleNamespace(dtype=name, device="cpu") for name in ("bfloat16", "float32"))
    check_memory(half, olmoe, partial(apply_perft, variant="perft_s"))
    check_memory(full, olmoe, partial(apply_perft, variant="full"))
    monkeypatch.setattr(processes, "WORLD", 8)
    check_memory(half, mixtral, lambda model: model.requires_grad_(False))
    line = "memory in GB a device: weights {}, trains {}, gradients {}, AdamW {}; activations come "
    line += "on top"
    assert capsys.readouterr().out.splitlines() == [
        line.format("13.84", "0.00", "0.00", "0.01"),
        line.format("0.00", "27.68", "27.68", "55.35"),
        line.format("11.68", "0.00", "0.00", "0.00"),
    ]
