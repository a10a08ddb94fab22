"""--micro_batch and --checkpoint_activations change how much memory a step takes, not what it computes, and the line
about memory says how much: before anything is loaded, and after the run.

A step's gradients are read where train.py hands them to torch's clipping.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from data.report import Memory
from model import Config, MoETransformer
from moe import Routing, expert_counts, expert_load, load_balancing_loss

ROOT = Path(__file__).resolve().parent.parent
TINY = Config(
    vocab_size=640, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=8,
    num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.2, eos_token_id=0, pad_token_id=1,
)  # fmt: skip
SHORT = ("--steps", 3, "--batch_size", 8, "--train_rows", 20, "--eval_rows", 1, "--warmup", 2, "--log_every", 1,
         "--threads", 1)  # fmt: skip
WITHOUT = {"perft_s": ("--dropout", 0), "perft_r": ("--dropout", 0, "--adapter_balance", 0), "full": (),
           "esft_token": ("--score_rows", 8)}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    MoETransformer(TINY).save_pretrained(folder)
    shutil.copy(ROOT / "data" / "tiny_olmoe" / "tokenizer.json", folder)
    return folder


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """run(variant, *flags, out=name) -> the lines of metrics.jsonl, and the gradients of the first step."""
    clip = torch.nn.utils.clip_grad_norm_

    def run(variant, *flags, out):
        grads = []

        def look(parameters, limit):
            grads.append([p.grad.clone() for p in parameters])
            return clip(parameters, limit)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
        argv = ["--variant", variant, "--base", base, "--out", tmp_path / out, *SHORT, *flags]
        train.main([str(flag) for flag in argv])
        return [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()], grads[0]

    return run


def steps(lines, *without):
    free = ("tokens_per_second", "memory", *without)
    return [{k: v for k, v in line.items() if k not in free} for line in lines if line["event"] == "step"]


# Micro-batches ------------------------------------------------------------------------------------------------------


def labels_of_parts(argv, rows):
    """How many labels the micro-batches of the first step have."""
    args = train.parse_args([str(flag) for flag in argv])
    _, tokenizer = train.load_config(args.base)
    _, labels, _ = next(train.batches(args, train.load_data(args, tokenizer, 64), tokenizer, 0))
    return [(part[:, 1:] != -100).sum().item() for part in labels.split(rows)]


@pytest.mark.parametrize("variant", WITHOUT)
def test_micro_batches_have_the_gradients_of_the_batch(run, base, variant):
    """Without balance losses: three steps in parts of 3, 3 and 2 rows, with unlike numbers of labels, are those of 8
    rows at once. Were each part divided by its own labels, they would not be."""
    flags = (*WITHOUT[variant], "--balance", 0)
    rows = labels_of_parts(["--variant", variant, "--base", base, "--out", "none", *SHORT, *flags], 3)
    assert len(rows) == 3 and len(set(rows)) > 1
    whole, exact = run(variant, *flags, out="whole")
    parts, grads = run(variant, *flags, "--micro_batch", 3, out="parts")
    for a, b in zip(grads, exact, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    for a, b in zip(steps(parts), steps(whole), strict=True):
        assert a["cross_entropy"] == pytest.approx(b["cross_entropy"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["expert_load"] == b["expert_load"]


def test_the_balance_loss_of_a_step_is_the_mean_of_its_parts_by_tokens(run, base, monkeypatch):
    """Computed here from the model's own routings, part by part, padding aside; not the loss of the batch."""
    seen, forward = [], MoETransformer.forward

    def look(self, input_ids, *args, **kwargs):
        output = forward(self, input_ids, *args, **kwargs)
        if kwargs.get("loss_divisor"):
            seen.append((input_ids != TINY.pad_token_id, output.routings))
        return output

    monkeypatch.setattr(MoETransformer, "forward", look)
    lines, _ = run("perft_r", "--micro_batch", 3, "--dropout", 0, out="run")
    parts = seen[:3]  # of the first step
    assert [len(real) for real, _ in parts] == [3, 3, 2]

    def by_tokens(pick):
        losses = [sum(load_balancing_loss(pick(r), real) for r in layers).item() / 2 for real, layers in parts]
        tokens = [real.sum().item() for real, _ in parts]
        return sum(loss * n for loss, n in zip(losses, tokens)) / sum(tokens)

    first = steps(lines)[0]
    assert first["balance"] == pytest.approx(by_tokens(lambda r: r), rel=1e-5)
    assert first["adapter_balance"] == pytest.approx(by_tokens(lambda r: r.adapter), rel=1e-5)
    batch = steps(run("perft_r", "--dropout", 0, out="whole")[0])[0]
    assert first["balance"] != pytest.approx(batch["balance"], rel=1e-3)
    assert first["balance"] == pytest.approx(batch["balance"], rel=0.5), "but near it"


def test_a_micro_batch_that_is_larger_than_the_batch_is_the_batch(run):
    assert steps(run("perft_s", out="whole")[0]) == steps(run("perft_s", "--micro_batch", 99, out="large")[0])


@pytest.mark.parametrize("variant", ["perft_r", "perft_e", "lora_qv", "full", "esft_token"])
def test_checkpointed_activations_change_no_bit(run, variant):
    """Every number of every step, and the gradients, in micro-batches too; dropout draws the same twice."""
    flags = ("--micro_batch", 3, *(("--dropout", 0.3) if variant in ("perft_r", "perft_e", "lora_qv") else ()))
    plain, exact = run(variant, *flags, out="plain")
    lines, grads = run(variant, *flags, "--checkpoint_activations", out="checkpointed")
    assert steps(lines) == steps(plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, exact, strict=True))


# Memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["perft_s", "perft_r", "lora_qv", "full", "esft_token"])
def test_the_estimate_is_on_the_screen_before_anything_is_loaded(run, monkeypatch, capsys, variant):
    """Who runs out of memory while loading has read why. ESFT, which loads the base to choose, says what it assumes."""

    def stop(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(MoETransformer, "from_pretrained", stop)
    with pytest.raises(MemoryError):
        run(variant, out="run")
    screen = capsys.readouterr().out
    line, *more = screen.splitlines()
    assert line.startswith("memory in GB a device: ") and ", total " in line
    assumed = ["    with 2 of 8 experts chosen; a sample is read now, to choose"]  # p is 0.2
    assert more == (assumed if variant == "esft_token" else [])


@pytest.mark.parametrize("variant", ["perft_s", "full", "esft_token"])
def test_the_run_ends_with_its_peak_beside_the_estimate(run, capsys, variant):
    """The parts sum to the estimate, the weights are those of the model, and the peak of a process is more than that
    (torch alone takes some hundred MB)."""
    lines, _ = run(variant, out="run")
    (memory,) = (line for line in lines if line["event"] == "memory")
    assert memory.keys() == {"event", "peak", "estimate", *Memory._fields}
    parts = [memory[name] for name in Memory._fields if name != "tokens"]
    assert memory["estimate"] == sum(parts) and all(n >= 0 for n in parts)
    with torch.device("meta"):
        base = sum(p.nbytes for p in MoETransformer(TINY).parameters())
    assert memory["weights"] + memory["trained"] >= base and memory["gradients"] == memory["trained"] > 0
    assert memory["optimizer"] == 2 * memory["trained"] and memory["gathered"] == 0
    assert memory["peak"] > memory["weights"] + memory["trained"]
    said = f"memory: at most {memory['peak'] / 1e9:.2f} GB, {memory['estimate'] / 1e9:.2f} were estimated"
    assert said in capsys.readouterr().out


def test_both_flags_lower_the_estimate(run):
    """Of the activations alone; a third of the rows takes about a third of what grows with the rows."""
    flags = ((), ("--micro_batch", 2), ("--micro_batch", 2, "--checkpoint_activations"))
    lines = [run("perft_s", *some, out=f"run {i}")[0] for i, some in enumerate(flags)]
    a, b, c = (next(line for line in some if line["event"] == "memory") for some in lines)
    assert a["tokens"] == 4 * b["tokens"] == 4 * c["tokens"]
    assert a["activations"] == pytest.approx(4 * b["activations"], rel=1e-6) and c["activations"] < b["activations"]
    assert a["weights"] == b["weights"] == c["weights"] and a["optimizer"] == c["optimizer"]


# Mistakes -----------------------------------------------------------------------------------------------------------

USAGE = {
    ("--micro_batch", "0"): ["--micro_batch", "0 is out of range", "at least 1"],
    ("--micro_batch", "-4"): ["--micro_batch", "-4 is out of range"],
    ("--micro_batch", "1.5"): ["--micro_batch", "invalid whole number value: '1.5'"],
    ("--micro_batch",): ["--micro_batch", "expected one argument"],
    ("--checkpoint_activations", "yes"): ["unrecognized arguments: yes"],
    ("--checkpoint_activations=yes",): ["--checkpoint_activations", "yes"],
    ("--compile=yes",): ["--compile", "yes"],
    ("--no-compile", "1"): ["unrecognized arguments: 1"],
}


@pytest.mark.parametrize("flags", USAGE, ids=" ".join)
def test_a_wrong_flag_is_told_in_one_line_with_exit_code_2(flags, base, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--variant", "perft_s", "--base", str(base), "--out", str(tmp_path / "run"), *flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "error: " in error
    assert not [part for part in USAGE[flags] if part not in error], error


# The balance loss of a part -----------------------------------------------------------------------------------------


def make_routing(N, E=6, K=2):
    logits = torch.randn(N, E, generator=torch.Generator().manual_seed(N), dtype=torch.float32).requires_grad_()
    weights, chosen = logits.softmax(-1).topk(K)
    return Routing(logits, weights, chosen)


def test_the_choices_counted_are_those_that_count():
    """Three tokens by hand; the second is padding. Masks may be (N,) or (B, T), of any dtype."""
    routing = Routing(torch.zeros(3, 4), torch.ones(3, 2), torch.tensor([[0, 2], [1, 3], [2, 1]]))
    assert expert_counts(routing).tolist() == [1, 2, 2, 1] and expert_counts(routing).dtype == torch.int64
    for mask in (torch.tensor([1, 0, 1]), torch.tensor([[True, False, True]]), torch.tensor([[1.0], [0.0], [1.0]])):
        assert expert_counts(routing, mask).tolist() == [1, 1, 2, 0]
        assert expert_load(routing, mask).tolist() == [0.25, 0.25, 0.5, 0]
    assert expert_counts(routing, torch.zeros(3)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_losses_of_parts_add_up_in_value_and_gradient(masked):
    """Parts of 20 tokens: 7, 1 and 12, of which the middle one is padding throughout where there is a mask. With the
    load and the number of tokens of all, losses and gradients are those of the whole; by themselves they are not."""
    whole = make_routing(20)
    mask = torch.ones(20)
    if masked:
        mask[[2, 3, 7, 19]] = 0
    loss = load_balancing_loss(whole, mask if masked else None)
    (exact,) = torch.autograd.grad(loss, whole.router_logits)
    counted, probs = mask.bool(), whole.router_logits.softmax(-1)
    chosen = F.one_hot(whole.selected_experts[counted], 6).sum((0, 1)) / (2 * counted.sum())
    assert loss.item() == pytest.approx(6 * (chosen * probs[counted].mean(0)).sum().item(), rel=1e-6)  # as defined

    load, tokens, parts, alone = expert_load(whole, mask), int(mask.sum()), [], []
    for rows in (slice(0, 7), slice(7, 8), slice(8, 20)):
        part = Routing(*(t[rows] for t in whole[:3]))
        parts.append(load_balancing_loss(part, mask[rows], load, tokens))
        alone.append(load_balancing_loss(part, mask[rows]).item() * mask[rows].sum().item() / tokens)
    assert sum(parts).item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), whole.router_logits)[0], exact, rtol=1e-5, atol=1e-8)
    assert parts[1].item() == 0 or not masked
    assert sum(n for n in alone if n == n) != pytest.approx(loss.item(), rel=1e-3)
