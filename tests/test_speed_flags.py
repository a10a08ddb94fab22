"""--micro_batch and --checkpoint_activations change how much memory a step takes, not what it
computes; and what is certain of a step's memory is said, and compared with what is free, before
anything is loaded.

A step's gradients are read where train.py hands them to torch's clipping.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import eval
import train
from data import dataset, run
from data import shard as processes
from model import Config, MoETransformer
from moe import Routing, expert_counts, expert_load, load_balancing_loss

ROOT = Path(__file__).resolve().parent.parent
TINY = Config(
    vocab_size=640,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    eos_token_id=0,
    pad_token_id=1,
)
SCRATCH = "--steps 3 --batch_size 8 --eval_rows 1 --warmup 2 --log_every 1 --threads 1".split()
SHORT = [*SCRATCH, "--train_rows", 20]
WITHOUT = {
    "perft_s": ("--dropout", 0),
    "perft_r": ("--dropout", 0, "--adapter_balance", 0),
    "full": (),
    "esft_token": ("--score_rows", 8),
}  # what a variant draws, or adds to the loss, for the whole batch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    MoETransformer(TINY).save_pretrained(folder)
    shutil.copy(ROOT / "data" / "tiny_olmoe" / "tokenizer.json", folder)
    return folder


@pytest.fixture
def go(base, tmp_path, monkeypatch):
    """go(variant, *flags, out=name) -> the lines of metrics.jsonl, and the gradients of the first
    step."""
    clip = torch.nn.utils.clip_grad_norm_

    def go(variant, *flags, out):
        grads = []

        def look(parameters, limit):
            parameters = list(parameters)
            grads.append([p.grad.clone() for p in parameters if p.grad is not None])
            return clip(parameters, limit)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
        short = SCRATCH if variant == "scratch" else SHORT
        argv = ["--variant", variant, "--base", base, "--out", tmp_path / out, *short, *flags]
        train.main([str(flag) for flag in argv])
        log = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in log], grads[0]

    return go


def steps(lines, *without):
    free = ("tokens_per_second", "memory", *without)
    lines = [line for line in lines if line["event"] == "step"]
    return [{k: v for k, v in line.items() if k not in free} for line in lines]


# Micro-batches -----------------------------------------------------------------------------------


def labels_of_parts(argv, rows):
    """How many labels the micro-batches of the first step have."""
    args = train.parse_args([str(flag) for flag in argv])
    _, tokenizer = eval.load_config(args.base)
    data = dataset.load_data(args, tokenizer, 64)
    _, labels, _ = next(dataset.batches(args, data, tokenizer, 0))
    return [(part[:, 1:] != -100).sum().item() for part in labels.split(rows)]


@pytest.mark.parametrize("variant", WITHOUT)
def test_micro_batches_have_the_gradients_of_the_batch(go, base, variant):
    """Without balance losses: three steps in parts of 3, 3 and 2 rows, with unlike numbers of
    labels, are those of 8 rows at once. Were each part divided by its own labels, they would not
    be."""
    flags = (*WITHOUT[variant], "--balance", 0)
    argv = ["--variant", variant, "--base", base, "--out", "none", *SHORT, *flags]
    rows = labels_of_parts(argv, 3)
    assert len(rows) == 3 and len(set(rows)) > 1
    whole, exact = go(variant, *flags, out="whole")
    parts, grads = go(variant, *flags, "--micro_batch", 3, out="parts")
    for a, b in zip(grads, exact, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    for a, b in zip(steps(parts), steps(whole), strict=True):
        assert a["cross_entropy"] == pytest.approx(b["cross_entropy"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["expert_load"] == b["expert_load"]


def test_the_balance_loss_of_a_step_is_the_mean_of_its_parts_by_tokens(go, base, monkeypatch):
    """Computed here from the model's own routings, part by part, padding aside; not the loss of the
    batch."""
    seen, forward = [], MoETransformer.forward

    def look(self, input_ids, *args, **kwargs):
        output = forward(self, input_ids, *args, **kwargs)
        if kwargs.get("loss_divisor"):
            seen.append((input_ids != TINY.pad_token_id, output.routings))
        return output

    monkeypatch.setattr(MoETransformer, "forward", look)
    lines, _ = go("perft_r", "--micro_batch", 3, "--dropout", 0, out="run")
    parts = seen[:3]  # of the first step
    assert [len(real) for real, _ in parts] == [3, 3, 2]

    def by_tokens(pick):
        total = tokens = 0
        for real, layers in parts:
            losses = [load_balancing_loss(pick(r), real).item() for r in layers]
            total += sum(losses) / len(losses) * real.sum().item()
            tokens += real.sum().item()
        return total / tokens

    first = steps(lines)[0]
    assert first["balance"] == pytest.approx(by_tokens(lambda r: r), rel=1e-5)
    assert first["adapter_balance"] == pytest.approx(by_tokens(lambda r: r.adapter), rel=1e-5)
    batch = steps(go("perft_r", "--dropout", 0, out="whole")[0])[0]
    assert first["balance"] != pytest.approx(batch["balance"], rel=1e-3)
    assert first["balance"] == pytest.approx(batch["balance"], rel=0.5), "but near it"


def test_a_micro_batch_that_is_larger_than_the_batch_is_the_batch(go):
    whole, _ = go("perft_s", out="whole")
    large, _ = go("perft_s", "--micro_batch", 99, out="large")
    assert steps(whole) == steps(large)


@pytest.mark.parametrize("variant", ["perft_r", "perft_e", "lora_qv", "full", "esft_token"])
def test_checkpointed_activations_change_no_bit(go, variant):
    """Every number of every step, and the gradients, in micro-batches too; dropout draws the same
    twice."""
    flags = ["--micro_batch", 3]
    if variant in ("perft_r", "perft_e", "lora_qv"):
        flags += ["--dropout", 0.3]
    plain, exact = go(variant, *flags, out="plain")
    lines, grads = go(variant, *flags, "--checkpoint_activations", out="checkpointed")
    assert steps(lines) == steps(plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, exact, strict=True))


# Memory ------------------------------------------------------------------------------------------

SAID = (
    r"memory in GB a device: weights (\S+), trains (\S+), gradients (\S+), AdamW (\S+); "
    r"activations come on top"
)


@pytest.mark.parametrize("variant", ["perft_s", "perft_r", "lora_qv", "full", "esft_token"])
def test_what_is_certain_is_on_the_screen_before_anything_is_loaded(
    go, monkeypatch, capsys, variant
):
    """Who runs out of memory while loading has read why. ESFT, which loads the base to choose, says
    so."""

    def stop(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(MoETransformer, "from_pretrained", stop)
    with pytest.raises(SystemExit, match="out of memory.*: nothing was written"):
        go(variant, out="run")
    line, *more = capsys.readouterr().out.splitlines()
    assert re.fullmatch(SAID, line)
    read = ["    a sample is read now, to score the experts, of which some then train"]
    assert more == (read if variant == "esft_token" else [])


@pytest.mark.parametrize("variant", ["perft_s", "perft_e", "full", "esft_token", "scratch"])
def test_a_run_that_needs_more_than_is_free_is_refused_in_one_line_before_it_takes_memory(
    go, monkeypatch, tmp_path, capsys, variant
):
    """Of a machine with 100 kB: the weights alone take 298 kB."""

    monkeypatch.setattr(run, "free_memory", lambda: 100_000)
    monkeypatch.setattr(MoETransformer, "init_weights", keep_meta(MoETransformer.init_weights))
    with pytest.raises(SystemExit) as stopped:
        go(variant, out="run")
    said = r"error: at least 0\.0 GB are needed, 0\.0 GB are free; try .*"
    assert re.fullmatch(said, stopped.value.code)
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def keep_meta(real):
    """A model's init_weights, which refuses to fill memory."""

    def init_weights(self):
        assert all(p.is_meta for p in self.parameters()), "memory was taken"
        real(self)

    return init_weights


def test_adapters_that_would_not_fit_are_refused_before_they_are_drawn(go, tmp_path, monkeypatch):
    """The largest rank that there is beside every expert, where 2 MB are free."""
    monkeypatch.setattr(train.run, "free_memory", lambda: 2e6)
    with pytest.raises(SystemExit) as stopped:
        go("perft_e", "--rank", 65_536, out="run")
    assert re.fullmatch(r"error: at least [\d,.]+ GB are needed, .*", stopped.value.code)
    assert "--rank" in stopped.value.code and not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", ["perft_s", "full", "esft_token"])
def test_the_run_ends_with_its_peak(go, capsys, variant):
    """The peak of a process is more than the weights (torch alone takes some hundred MB)."""
    lines, _ = go(variant, out="run")
    (memory,) = (line for line in lines if line["event"] == "memory")
    assert memory.keys() == {"event", "seconds", "peak"} and memory["seconds"] > 0
    with torch.device("meta"):
        base = sum(p.nbytes for p in MoETransformer(TINY).parameters())
    assert memory["peak"] > base
    said = f"took {memory['seconds']:,.0f} s and at most {memory['peak'] / 1e9:.2f} GB of memory"
    assert said in capsys.readouterr().out.splitlines()


# Mistakes ----------------------------------------------------------------------------------------

USAGE = {
    "--micro_batch 0": ["--micro_batch", "0 is out of range", "at least 1"],
    "--micro_batch -4": ["--micro_batch", "-4 is out of range"],
    "--micro_batch 1.5": ["--micro_batch", "invalid whole number value: '1.5'"],
    "--micro_batch": ["--micro_batch", "expected one argument"],
    "--checkpoint_activations yes": ["yes was not understood"],
    "--checkpoint_activations=yes": ["--checkpoint_activations", "yes"],
    "--compile=yes": ["--compile", "yes"],
    "--no-compile 1": ["1 was not understood"],
}


@pytest.mark.parametrize("flags", USAGE)
def test_a_wrong_flag_is_told_in_one_line_with_exit_code_2(flags, base, tmp_path, capsys):
    argv = ["--variant", "perft_s", "--base", str(base), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        train.main([*argv, *flags.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "error: " in error
    assert not [part for part in USAGE[flags] if part not in error], error


# The balance loss of a part ----------------------------------------------------------------------


def make_routing(N, E=6, K=2):
    logits = torch.randn(N, E, generator=torch.Generator().manual_seed(N)).requires_grad_()
    weights, chosen = logits.softmax(-1).topk(K)
    return Routing(logits, weights, chosen)


def test_the_choices_counted_are_those_that_count():
    """Three tokens by hand; the second is padding. Masks may be (N,) or (B, T), of any dtype."""
    chosen = torch.tensor([[0, 2], [1, 3], [2, 1]])
    routing = Routing(torch.zeros(3, 4), torch.ones(3, 2), chosen)
    assert expert_counts(routing).tolist() == [1, 2, 2, 1]
    assert expert_counts(routing).dtype == torch.int64
    masks = [[1, 0, 1], [[True, False, True]], [[1.0], [0.0], [1.0]]]
    for mask in map(torch.tensor, masks):
        assert expert_counts(routing, mask).tolist() == [1, 1, 2, 0]
        assert expert_load(routing, mask).tolist() == [0.25, 0.25, 0.5, 0]
    assert expert_counts(routing, torch.zeros(3)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_losses_of_parts_add_up_in_value_and_gradient(masked, monkeypatch):
    """Parts of 20 tokens, as of three processes: 7, 1 and 12, of which the middle one is padding
    throughout where there is a mask. With the choices and the number of tokens of all, losses and
    gradients are those of the whole; by themselves they are not."""
    whole = make_routing(20)
    mask = torch.ones(20)
    if masked:
        mask[[2, 3, 7, 19]] = 0
    loss = load_balancing_loss(whole, mask if masked else None)
    (exact,) = torch.autograd.grad(loss, whole.router_logits)
    counted, probs = mask.bool(), whole.router_logits.softmax(-1)
    chosen = F.one_hot(whole.selected_experts[counted], 6).sum((0, 1)) / (2 * counted.sum())
    by_hand = 6 * (chosen * probs[counted].mean(0)).sum().item()  # as defined
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)

    monkeypatch.setattr(processes, "total", lambda counts: expert_counts(whole, mask)[None])
    tokens, parts, alone = int(mask.sum()), [], []
    for rows in (slice(0, 7), slice(7, 8), slice(8, 20)):
        part = Routing(*(t[rows] for t in whole))
        losses, _ = train.balance_losses([part], mask[rows], tokens)
        parts.append(losses.mean())
        share = mask[rows].sum().item() / tokens
        alone.append(load_balancing_loss(part, mask[rows]).item() * share)
    assert sum(parts).item() == pytest.approx(loss.item(), rel=1e-6)
    (together,) = torch.autograd.grad(sum(parts), whole.router_logits)
    torch.testing.assert_close(together, exact, rtol=1e-5, atol=1e-8)
    assert parts[1].item() == 0 or not masked
    assert sum(n for n in alone if n == n) != pytest.approx(loss.item(), rel=1e-3)
