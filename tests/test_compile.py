"""torch.compile, one block at a time: every method in one graph, for all lengths, with the numbers
of the plain loop.

Most tests trace the graphs but run them operation by operation ("eager", or "aot_eager", which
makes a graph of the backward pass too): that takes seconds where generating code takes half a
minute. One test, twice, generates code.
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moe
import train
from esft import apply_esft
from model import Config, MoETransformer
from moe import MoE
from perft import PERFT, apply_perft

# 2F is not D, so that a tensor's shape says what it is
CONFIG = Config(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_experts=6,
    num_experts_per_tok=2,
)
METHODS = {
    **{variant: {"rank": 3} for variant in (*PERFT, "lora_qv", "lora_experts")},
    "lora_experts of some, shared": {"rank": 8, "experts": [[3, 0], [1, 4]], "shared_outer": True},
    "perft_e of some experts": {"rank": 4, "experts": [[3, 0], [1, 4]], "kind": "parallel"},
    **{variant: {} for variant in ("router", "frozen_experts", "full")},
    "esft": [[3, 0], [1, 4]],
    "scratch": None,
}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random_weights(module):
    torch.manual_seed(0)
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p, std=0.2) if "norm" not in name else torch.nn.init.ones_(p)
    return module


def make_model(method, dtype):
    """The method attached to random weights; what trains has moved since then, as after some
    steps."""
    model, options = random_weights(MoETransformer(CONFIG)).to(dtype), METHODS[method]
    if method == "esft":
        apply_esft(model, options)
    elif method != "scratch":
        apply_perft(model, method.split()[0], dropout=0.0, **options)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return model


def gap(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def step(model, B, T):
    """One step of plain gradient descent on B rows of T tokens, some padded -> loss and
    gradients."""
    ids = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(T))
    mask = (torch.arange(T) < T - torch.arange(B)[:, None]).long()
    model.zero_grad()
    loss = model(ids, mask, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    return loss.item(), gradients


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_one_graph_for_all_layers_and_lengths(method):
    """Losses and gradients of three steps: those of the loop over experts, not compiled, within
    1e-5 of a tensor's largest entry. Both layers and all shapes share the one graph."""
    plain = make_model(method, torch.float32)
    model = copy.deepcopy(plain)
    for m in (
        plain,
        model,
    ):  # layer 0 as layer 1: its input wants a gradient, whether or not the embeddings train
        m.embed_tokens.register_forward_hook(
            lambda module, args, x: x if x.requires_grad else x.requires_grad_()
        )
    for block in plain.layers:
        for part in block.modules():
            if hasattr(part, "path"):
                part.path = "loop"
    for block in model.layers:
        block.compile(backend="eager", fullgraph=True, dynamic=True)
    for B, T in ((2, 7), (4, 16), (3, 43)):
        exact, exact_gradients = step(plain, B, T)
        with torch._dynamo.config.patch(error_on_recompile=True):
            loss, gradients = step(model, B, T)
        assert loss == pytest.approx(exact, rel=1e-5)
        assert gradients.keys() == exact_gradients.keys()
        far = {name: gap(g, exact_gradients[name]) for name, g in gradients.items()}
        assert max(far.values()) < 1e-5, far


FLAGS = {
    "perft_r": ["--dropout", "0"],
    "perft_e": ["--dropout", "0"],
    "esft_token": ["--score_rows", "8"],
    "esft_token in bfloat16": ["--score_rows", "8", "--dtype", "bfloat16"],
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_compiled_run_has_the_losses_of_the_plain_one(case, tmp_path, monkeypatch):
    """train.py --compile on a tiny base of one layer, with a graph of the backward pass too: three
    steps of unlike lengths, each the outcome of the gradients before it."""
    torch.manual_seed(0)
    config = replace(
        CONFIG,
        num_hidden_layers=1,
        vocab_size=640,
        initializer_range=0.2,
        eos_token_id=0,
        pad_token_id=1,
    )
    MoETransformer(config).save_pretrained(tmp_path / "base")
    tiny = Path(__file__).resolve().parent.parent / "data" / "tiny_olmoe"
    shutil.copy(tiny / "tokenizer.json", tmp_path / "base")
    compile, compiled = torch.compile, []

    def quick(function, **options):
        compiled.append(function)
        return compile(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", quick)
    logged = []
    for flag in ("--no-compile", "--compile"):
        argv = [
            "--variant",
            case.split()[0],
            "--base",
            str(tmp_path / "base"),
            "--out",
            str(tmp_path / flag),
            flag,
        ]
        argv += [
            "--steps",
            "3",
            "--batch_size",
            "4",
            "--train_rows",
            "12",
            "--eval_rows",
            "1",
            "--warmup",
            "1",
        ]
        with torch._dynamo.config.patch(recompile_limit=8):  # which main sets: it is put back
            train.main([*argv, "--lr", "1e-2", "--log_every", "1", "--threads", "1", *FLAGS[case]])
        lines = [
            json.loads(line)
            for line in (tmp_path / flag / "metrics.jsonl").read_text().splitlines()
        ]
        keys = ("cross_entropy", "balance", "adapter_balance")
        logged.append(
            [[line.get(key, 0) for key in keys] for line in lines if line["event"] == "step"]
        )
    plain, ours = logged
    assert len(compiled) == 1 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert len(plain) == 3 and len({tuple(line) for line in plain}) == 3
    limit = 1e-2 if "bfloat16" in case else 1e-4  # in bfloat16 a choice may flip
    for a, b in zip(ours, plain, strict=True):
        assert a == pytest.approx(b, rel=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_keeps_the_rules_of_a_custom_operation(dtype):
    """torch.library.opcheck: the shapes and strides it predicts are those it returns, also for
    symbolic sizes, and no input changes."""
    torch.manual_seed(0)
    a = torch.randn(7, 16, dtype=dtype)
    b = torch.randn(3, 16, 8, dtype=dtype)
    ends = torch.tensor([2, 2, 7]).int()
    none = a[:0]
    for args in (
        (a, b, ends),
        (a, b.mT.contiguous().mT, ends),
        (a.t(), a[:, :8].clone(), ends),
        (none, b, 0 * ends),
        (none.t(), none, 0 * ends),
    ):
        torch.library.opcheck(moe.grouped_mm, args)


def make_block(dtype, trains):
    return random_weights(MoE(CONFIG)).to(dtype).requires_grad_(trains)


def test_compiled_frozen_experts_keep_no_rows():
    """Between forward and backward lie the experts' hidden activations (R, 2F), but no row that
    only the gradient of a weight would need: neither the gathered rows (R, D) nor the input of the
    down projection (R, F)."""
    D, F_, R = CONFIG.hidden_size, CONFIG.intermediate_size, 10 * CONFIG.num_experts_per_tok
    kept = {}
    for trains in (False, True):
        block, saved = make_block(torch.float32, trains), []
        block.compile(backend="aot_eager", fullgraph=True, dynamic=True)
        x = torch.randn(1, 10, D, requires_grad=True)
        block(x)[0].sum().backward()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            block(x)
        kept[trains] = {tuple(t.shape) for t in saved}
    assert (R, 2 * F_) in kept[False] and not {(R, D), (R, F_)} & kept[False]
    assert (R, D) in kept[True]


def test_one_token_and_none_need_a_graph_each_and_have_their_gradients():
    """Sizes 0 and 1 are special to torch.compile; neither breaks the graph."""
    block = make_block(torch.float32, True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (5, 1, 0):
        x = torch.randn(1, T, CONFIG.hidden_size, requires_grad=True)
        results = []
        for run, path in ((compiled, "grouped"), (block, "loop")):
            block.experts.path = path
            y = run(x)[0]
            inputs = [x, block.experts.gate_up_proj, block.experts.down_proj]
            results.append(
                [y, *torch.autograd.grad(y.square().sum(), inputs, materialize_grads=True)]
            )
        block.experts.path = "grouped"
        assert all(a.shape == b.shape for a, b in zip(*results))
        assert all(gap(a, b) < 1e-5 for a, b in zip(*results) if a.numel())


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generated_code_has_the_numbers_of_the_loop_in_double_precision(dtype):
    """The default backend, 7 to 129 tokens, everything trains: output and all gradients, one
    graph."""
    block = make_block(dtype, True)
    exact, tolerance = copy.deepcopy(block).double(), 1e-5 if dtype == torch.float32 else 0.04
    exact.experts.path = "loop"
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for T in (7, 64, 129):
        x = torch.randn(1, T, CONFIG.hidden_size, generator=torch.Generator().manual_seed(T)).to(
            dtype
        )
        x.requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=True):
            y, routing = compiled(x)
            ours = [
                y,
                *torch.autograd.grad(y.float().square().sum(), [x, *block.experts.parameters()]),
            ]
        x64 = x.detach().double().requires_grad_()
        weights = (
            x64.view(T, -1) @ exact.router.weight.t()
        )  # of the experts chosen: rounding moves near ties
        weights = weights.softmax(-1).gather(1, routing.selected_experts)
        theirs = exact.experts(x64.view(T, -1), routing._replace(routing_weights=weights)).view_as(
            x
        )
        direct = torch.autograd.grad(theirs.square().sum(), [x64, *exact.experts.parameters()])
        assert all(gap(a, b) < tolerance for a, b in zip(ours, (theirs, *direct)))
