"""train.py does what its opening page says: the loss, the steps, the files, and one line for every
mistake.

Everything runs on tiny random bases, through train.main as a user would call it, and in a process
of its own where it matters. What a step computes is compared with the same step written out in this
file, row by row, without padding.
"""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import load_base

import eval
import perft
import train
from data import dataset, skills
from data.dataset import encode_rows, pad_batch
from data.hub import Place, SafetensorsFile, write_tensors
from data.tokenizer import load_tokenizer
from esft import apply_esft
from model import Config, MoETransformer
from moe import Routing, load_balancing_loss
from train import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
L, E = 2, 8  # of TINY: layers, experts
FEW = "--steps 4 --batch_size 8 --eval_rows 5 --warmup 2 --log_every 1 --threads 1"
SCRATCH = tuple(FEW.split())  # it takes no --train_rows
SHORT = (*SCRATCH, "--train_rows", "20")


def make_base(folder: Path, **changes) -> Path:
    """A model folder with random weights and the embedded world's tokenizer."""
    torch.manual_seed(0)
    MoETransformer(Config(**TINY | changes)).save_pretrained(folder)
    shutil.copy(ROOT / "data" / "tiny_olmoe" / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These products are too small to share: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base, tmp_path):
    """run(variant, *flags, out=name) trains for a few steps and returns the run folder."""

    def run(variant, *flags, out="run", base=base):
        short = SCRATCH if variant == "scratch" else SHORT
        folder = tmp_path / out
        argv = ["--variant", variant, "--base", base, "--out", folder, *short, *flags]
        train.main([str(word) for word in argv])
        return folder

    return run


def metrics(folder, event=None):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def numbers(folder):
    """What a run logged, without what the clock and the machine decide."""
    free = ("tokens_per_second", "memory", "file", "peak", "seconds")
    return [{k: v for k, v in line.items() if k not in free} for line in metrics(folder)]


def contents(folder) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def saved_tensors(folder):
    file = SafetensorsFile(folder / "adapter_model.safetensors")
    return {name: tensor.clone() for name, tensor in file.items()}


def arguments(base, *flags, variant="perft_s"):
    argv = ["--variant", variant, "--base", base, "--out", "nowhere", *flags]
    return train.parse_args([str(word) for word in argv])


# What a run tells --------------------------------------------------------------------------------


def test_the_screen_tells_the_run_in_order_and_the_files_hold_its_numbers(run, capsys):
    """Configuration, what trains, accuracy before, steps, accuracy after, what was saved."""
    folder = run("perft_r", "--steps", 6, "--log_every", 2)
    screen = capsys.readouterr().out
    headings = [
        "memory in GB a device: ",
        "\nconfiguration: ",
        "\nmodule ",
        "\nall that trains ",
        "\nbase model: ",
        "\naccuracy before: ",
        "\n  step cross-entropy",
        "\naccuracy after: ",
        "\ntook ",
        "\nsaved ",
    ]
    places = [screen.index(heading) for heading in headings]
    assert places == sorted(places)
    assert all(screen.count(heading) == 1 for heading in headings)

    line = r"^ +(\d+)" + 6 * r" +(\S+)" + r" GB +(\S+)   adapters: balance (\S+)(?:   .* left)?$"
    steps = re.findall(line, screen, re.M)
    logged = metrics(folder, "step")
    assert [int(row[0]) for row in steps] == [line["step"] for line in logged] == [2, 4, 6]
    for row, line in zip(steps, logged, strict=True):
        keys = "cross_entropy balance lr grad_norm tokens_per_second memory largest_load"
        keys = [*keys.split(), "adapter_balance"]
        values = [line[key] / (1e9 if key == "memory" else 1) for key in keys]
        shown = [float(text.replace(",", "")) for text in row[1:]]
        assert shown == pytest.approx(values, rel=6e-3, abs=6e-3)

    events = [line["event"] for line in metrics(folder)]
    assert events == ["before", *["step"] * 3, "after", "memory", "saved"]
    for when in ("before", "after"):
        (line,) = metrics(folder, when)
        assert list(line["accuracy"]) == ["kinship_new", *skills.FAMILIES]
        said = re.search(
            rf"accuracy {when}: kinship_new (\S+) %, pre-training families (\S+) % "
            r"\(mean, without kinship\)\n(.*)",
            screen,
        )
        kept = [line["accuracy"][name] for name in skills.FAMILIES if name != "kinship"]
        assert line["kept"] == pytest.approx(sum(kept) / 11)
        assert said[1] == f"{100 * line['accuracy']['kinship_new']:.1f}"
        assert said[2] == f"{100 * line['kept']:.1f}"
        words = [f"{name} {100 * line['accuracy'][name]:.0f}" for name in skills.FAMILIES]
        assert said[3].split() == " ".join(words).split()

    (saved,) = metrics(folder, "saved")
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert saved["bytes"] == size and saved["file"] == str(folder / "adapter_model.safetensors")
    assert f"saved {folder / 'adapter_model.safetensors'} ({size:,} bytes)" in screen
    expected = {"config.json", "metrics.jsonl", "run.svg"}
    expected |= {"adapter_config.json", "adapter_model.safetensors"}
    left = {path.name for path in folder.iterdir()}
    assert left == expected, "no state and no temporary file is left behind"


def test_the_configuration_shows_every_setting_in_force_also_those_that_are_0_or_a_default(
    run, capsys
):
    """Someone who reads the screen, or config.json, can repeat the run: against the values the
    flags and code have."""
    folder = run("perft_r", "--dropout", 0, "--lr", 5e-3)
    shown = dict(re.findall(r"(\w+)=(\S+)", capsys.readouterr().out.split("\nmodule")[0]))
    config = json.loads((folder / "config.json").read_text())
    in_force = {
        "variant": "perft_r",
        "task": "kinship_new",
        "seed": 0,
        "steps": 4,
        "batch_size": 8,
        "lr": 5e-3,
        "weight_decay": 0.0,
        "beta2": 0.999,
        "clip": 1.0,
        "balance": 0.01,
        "adapter_balance": 0.01,
        "rank": 16,
        "alpha": 32.0,
        "num_adapters": 4,
        "top_k": 2,
        "kind": "lora",
        "init": "paper",
        "adapter_weights": "own",
        "dropout": 0.0,
        "dtype": "float32",
    }
    wrong_file = {k: config.get(k) for k, v in in_force.items() if config.get(k) != v}
    wrong_screen = {k: shown.get(k) for k, v in in_force.items() if shown.get(k) != str(v)}
    assert not wrong_screen, "on the screen"
    assert not wrong_file, "in config.json"


CASES = [("perft_r", ["--num_adapters", 3]), ("perft_s", [])]


@pytest.mark.parametrize(("variant", "flags"), CASES)
def test_every_step_logs_both_balance_losses_and_the_load_of_every_layer(run, variant, flags):
    """Loads are shares of the choices, so each layer's sum is 1; only PERFT-R has adapter
    routers."""
    for line in metrics(run(variant, *flags), "step"):
        load = torch.tensor(line["expert_load"])
        assert load.shape == (L, E)
        assert torch.allclose(load.sum(-1), torch.ones(L))
        assert line["largest_load"] == load.max()
        assert 0.9 < line["balance"] <= E / 2
        assert ("adapter_balance" in line) == ("adapter_load" in line) == (variant == "perft_r")
        if variant == "perft_r":
            load = torch.tensor(line["adapter_load"])
            assert load.shape == (L, 3) and torch.allclose(load.sum(-1), torch.ones(L))
            assert 0.9 < line["adapter_balance"] <= 3 / 2


def test_what_was_kept_is_the_mean_over_the_families_that_the_task_does_not_answer_differently():
    """By hand: kinship_new overwrites kinship, which does not count; `add` is itself a family, so
    all twelve count."""
    accuracy = {name: i / 100 for i, name in enumerate(skills.FAMILIES)} | {"kinship_new": 1.0}
    others = [i / 100 for i, name in enumerate(skills.FAMILIES) if name != "kinship"]
    assert eval.kept(accuracy, "kinship_new") == pytest.approx(sum(others) / 11)
    assert eval.kept(accuracy, "add") == pytest.approx(sum(range(12)) / 100 / 12)
    assert eval.kept(accuracy, None) == eval.kept(accuracy, "add")


# The same numbers --------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(run):
    """Bit for bit, in the log and in the saved file, with dropout."""
    flags = ("--dropout", 0.3, "--seed")
    one = run("perft_r", *flags, 3, out="1")
    two = run("perft_r", *flags, 3, out="2")
    other = run("perft_r", *flags, 4, out="3")
    assert numbers(one)[:-1] == numbers(two)[:-1]
    name = "adapter_model.safetensors"
    assert contents(one)[name] == contents(two)[name]
    losses = {line["cross_entropy"] for line in metrics(one, "step")}
    assert not losses & {line["cross_entropy"] for line in metrics(other, "step")}


# an epoch is 3 steps; the stop after 7 steps goes back to the state of step 6
LONG = ("--steps", 9, "--save_every", 3)


def interrupted(monkeypatch, at, stop):
    """Let train.py meet `stop` where step `at` (from 0) asks for its learning rate."""
    real = train.learning_rate

    def learning_rate(step, steps, args):
        if step == at:
            stop()
        return real(step, steps, args)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


def ctrl_c():
    raise KeyboardInterrupt


def outcome(folder):
    """What a finished run leaves behind, without paths, clocks, and how often it was continued."""
    model = [path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))]
    return [line for line in numbers(folder) if line["event"] not in ("saved", "resumed")], model


@pytest.mark.parametrize(
    ("variant", "flags"),
    [
        ("perft_s", ["--dropout", 0.3]),
        ("perft_r", ["--dropout", 0.3, "--train_router"]),
        ("lora_qv", ["--dropout", 0.3, "--dtype", "bfloat16"]),
        ("full", ["--weight_decay", 0.1]),
        ("esft_token", []),
        ("scratch", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(
    run, monkeypatch, capsys, variant, flags
):
    """Ctrl-C in step 8 and --resume from the state of step 6: losses and file bit for bit, each
    step logged once."""
    whole = run(variant, *LONG, *flags, out="whole")
    with monkeypatch.context() as patch:
        interrupted(patch, 7, ctrl_c)
        with pytest.raises(SystemExit) as stopped:
            run(variant, *LONG, *flags, out="stopped")
    assert stopped.value.code == 130 and "--resume" in capsys.readouterr().err
    resumed = run(variant, *LONG, *flags, "--resume", out="stopped")
    assert [line["step"] for line in metrics(resumed, "step")] == list(range(1, 10))
    assert outcome(resumed) == outcome(whole)
    assert not (resumed / "state.safetensors").exists()


def test_a_run_whose_process_was_killed_is_resumed_too(run, base, tmp_path):
    """SIGKILL in a process of its own: nothing gets a chance to tidy up."""
    whole, killed = run("perft_s", *LONG, out="whole"), tmp_path / "killed"
    flags = ["--variant", "perft_s", "--base", base, "--out", killed, *SHORT, *LONG]
    flags = [str(word) for word in flags]
    code = (
        "import os, signal, train\n"
        "real, die = train.learning_rate, lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train.learning_rate = lambda step, *args: die() if step == 7 else real(step, *args)\n"
        f"train.main({flags!r})"
    )
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    train.main([*flags, "--resume"])
    assert outcome(killed) == outcome(whole)


def test_a_log_line_that_was_cut_off_does_not_stand_in_the_way_of_resuming(run, monkeypatch):
    """A power cut, or a full disk, can leave half a line at the end of metrics.jsonl; the state
    before it is good."""
    whole = run("perft_s", *LONG, out="whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, 7, ctrl_c)
        run("perft_s", *LONG, out="stopped")
    with open(whole.parent / "stopped" / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "step": 8, "cross_ent')
    assert outcome(run("perft_s", *LONG, "--resume", out="stopped")) == outcome(whole)


def test_a_run_that_was_stopped_before_its_first_saved_state_is_not_told_to_resume_in_vain(
    run, monkeypatch, capsys
):
    """The remedy on the screen is the one that works: --resume would be refused, --overwrite goes
    through."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, 2, ctrl_c)
        run("perft_s", *LONG)
    screen = capsys.readouterr()
    said = screen.err.splitlines()[-1]
    assert said.startswith("stopped: ") and "--overwrite" in said
    assert "--resume" not in screen.out + screen.err
    run("perft_s", *LONG, "--overwrite")


# The loss and the step, written out --------------------------------------------------------------


def rows_of(batch, prompt_lengths):
    """A padded batch -> [(ids of one row without padding, length of its prompt)]."""
    input_ids, _, mask = batch
    rows = [tuple(ids[real].tolist()) for ids, real in zip(input_ids, mask, strict=True)]
    return [(list(row), prompt_lengths[row]) for row in rows]


def balance_by_hand(layers, top_k):
    """[router logits (N, E) of a layer] -> the mean over layers of E * sum over e of f_e P_e
    (Switch, eq. 4-6)."""
    losses = []
    for logits in layers:
        probs = logits.softmax(-1)
        chosen = F.one_hot(probs.topk(top_k).indices, logits.shape[1]).sum(1).float()  # (N, E)
        losses.append(logits.shape[1] * (chosen.mean(0) / top_k * probs.mean(0)).sum())
    return sum(losses) / len(losses)


def loss_by_hand(model, rows, c_base, c_adapter, on_inputs=False):
    """One row at a time, so there is no padding: cross-entropy of the labels, balance of base and
    adapter routers."""
    terms, router_logits, adapter_logits = [], [[] for _ in range(L)], [[] for _ in range(L)]
    for ids, prompt in rows:
        output = model(torch.tensor([ids]))
        for t in range(1 if on_inputs else prompt, len(ids)):
            logits = output.logits[0, t - 1]
            terms.append(torch.log(torch.exp(logits).sum()) - logits[ids[t]])
        for layer, routing in enumerate(output.routings):
            router_logits[layer].append(routing.router_logits)
            if hasattr(routing, "adapter"):
                adapter_logits[layer].append(routing.adapter.router_logits)
    cross_entropy = sum(terms) / len(terms)
    logits = [torch.cat(layer) for layer in router_logits]
    balance = balance_by_hand(logits, TINY["num_experts_per_tok"])
    loss, adapter_balance = cross_entropy + c_base * balance, None
    if adapter_logits[0]:
        adapter_balance = balance_by_hand([torch.cat(layer) for layer in adapter_logits], 2)
        loss = loss + c_adapter * adapter_balance
    return loss, cross_entropy, balance, adapter_balance


class AdamWByHand:
    """Decoupled weight decay and Adam as in their papers (arXiv 1711.05101, 1412.6980), in
    float64."""

    def __init__(self, parameters, weight_decay, beta2):
        self.parameters, self.weight_decay, self.beta2, self.t = parameters, weight_decay, beta2, 0
        self.m = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        self.v = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]

    @torch.no_grad()
    def step(self, gradients, lr):
        self.t += 1
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(self.beta2 * v + (1 - self.beta2) * g**2)
            new = p.double()
            if p.dim() > 1:  # norms do not decay
                new = new * (1 - lr * self.weight_decay)
            new -= lr * (m / (1 - 0.9**self.t)) / ((v / (1 - self.beta2**self.t)).sqrt() + 1e-8)
            p.copy_(new)


STEPS_BY_HAND = {
    "perft_s, clipped": "perft_s --dropout 0 --clip 0.5 --balance 0.3",
    "perft_r, two balance losses": "perft_r --dropout 0 --balance 0.2 --adapter_balance 0.5",
    "perft_r, coefficients of the base": "perft_r --dropout 0 --train_router --kind parallel",
    "lora_qv, decay": "lora_qv --dropout 0 --weight_decay 3.0 --beta2 0.9 --clip 1000",
    "full, decay on matrices, not on norms": "full --weight_decay 3.0",
    "full, labels on inputs": "full --train_on_inputs --task reverse",
}


@pytest.mark.parametrize("case", STEPS_BY_HAND)
def test_three_steps_equal_three_steps_written_out_by_hand(run, base, case):
    """Loss, gradient norm and trained weights: rows one by one, cross-entropy, balance, clipping
    and AdamW as above."""
    variant, *flags = STEPS_BY_HAND[case].split()
    flags = ["--task", "height", *flags, "--steps", 3, "--warmup", 2, "--lr", 0.01, "--seed", 5]
    folder = run(variant, *flags)

    args = arguments(base, *SHORT, *flags, variant=variant)
    config, tokenizer = eval.load_config(args.base)
    data = dataset.load_data(args, tokenizer, config.max_position_embeddings)
    edit, _, _ = train.edit_for(args, config, tokenizer, data)
    model = train.build(args, config, edit)
    lengths = {}
    for row in skills.sample(args.task, "train", 20, 5):
        prompt, answer = tokenizer.encode(row.prompt), tokenizer.encode(row.answer)
        lengths[(*prompt, *answer, tokenizer.eos_id)] = len(prompt)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adamw = AdamWByHand(list(named.values()), args.weight_decay, args.beta2)
    c_base = 0.01 if args.balance is None else args.balance
    c_adapter = 0.01 if args.adapter_balance is None else args.adapter_balance
    padding, learning_rates = 0, [0.005, 0.01, 0.01]  # the decay begins at the peak
    steps = zip(metrics(folder, "step"), learning_rates, strict=True)
    for (logged, lr), batch in zip(steps, dataset.batches(args, data, tokenizer, 0)):
        rows = rows_of(batch, lengths)
        padding += batch[1].numel() - sum(len(ids) for ids, _ in rows)
        loss, cross_entropy, balance, adapter_balance = loss_by_hand(
            model, rows, c_base, c_adapter, args.train_on_inputs
        )
        gradients = torch.autograd.grad(loss, list(named.values()))
        norm = sum(g.double().square().sum() for g in gradients).sqrt()
        assert logged["cross_entropy"] == pytest.approx(cross_entropy.item(), rel=2e-5)
        assert logged["balance"] == pytest.approx(balance.item(), rel=2e-5)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert logged["lr"] == pytest.approx(lr)
        if adapter_balance is not None:
            assert logged["adapter_balance"] == pytest.approx(adapter_balance.item(), rel=2e-5)
        adamw.step([g * min(1, args.clip / norm.item()) for g in gradients], lr)

    assert padding > 0, "rows of one length would not show that padding changes nothing"

    saved = saved_tensors(folder)
    for (name, p), tensor in zip(named.items(), saved.values(), strict=True):
        error = (p.data - tensor).abs()
        # a gradient of nearly 0 is all rounding, and Adam turns it into a full step: a few entries
        # may differ
        assert (error > 1e-3 * args.lr).float().mean() < 5e-3, (name, error.max())


def test_clipping_is_at_work_in_the_steps_written_out_above(run):
    """Otherwise they would not show it: the logged norm is the one before clipping, and above
    --clip."""
    steps = metrics(run("perft_s", "--lr", 0.01), "step")
    assert all(line["grad_norm"] > 1.0 for line in steps[:2])


def test_the_learning_rate_warms_up_and_decays_linearly_to_zero(run):
    """Against lists made by hand; the rate after the last step would be 0."""

    def rates(steps, warmup):
        args = SimpleNamespace(lr=1.0, warmup=warmup)
        return [train.learning_rate(step, steps, args) for step in range(steps)]

    assert rates(6, 2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(4, 1) == pytest.approx([1.0, 1.0, 2 / 3, 1 / 3])
    assert rates(9, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    logged = metrics(run("perft_s", "--steps", 6, "--warmup", 2, "--lr", 0.002), "step")
    assert [line["lr"] for line in logged] == pytest.approx(
        [1e-3, 2e-3, 2e-3, 1.5e-3, 1e-3, 0.5e-3]
    )


@pytest.mark.parametrize("name", [*skills.FAMILIES, *skills.TARGETS])
def test_labels_are_the_answer_and_the_end_token_and_with_train_on_inputs_the_prompt_too(
    base, name
):
    """Decoded, row by row; padding is no label and no token."""
    tokenizer = load_tokenizer(base)
    rows = skills.sample(name, "train", 6, 1)
    for on_inputs in (False, True):
        examples = encode_rows(rows, tokenizer, on_inputs)
        input_ids, labels, mask = pad_batch(examples, tokenizer.pad_id, "cpu")
        for row, ids, label, real in zip(rows, input_ids, labels, mask, strict=True):
            text = row.prompt + row.answer
            *told, end = label[label != -100].tolist()
            assert tokenizer.decode(told) == (text if on_inputs else row.answer)
            assert end == tokenizer.eos_id
            assert tokenizer.decode(ids[real].tolist()[:-1]) == text
            assert (ids[~real] == tokenizer.pad_id).all() and (label[~real] == -100).all()
            assert (label[label != -100] == ids[label != -100]).all()


# Batches -----------------------------------------------------------------------------------------


def take(args, tokenizer, start, steps):
    """Each batch as the texts of its rows."""
    source = dataset.batches(args, dataset.load_data(args, tokenizer, 64), tokenizer, start)
    texts = []
    for _ in range(steps):
        input_ids, _, mask = next(source)
        rows = [ids[real].tolist()[:-1] for ids, real in zip(input_ids, mask, strict=True)]
        texts.append([tokenizer.decode(row) for row in rows])
    return texts


@pytest.mark.parametrize("batch_size", [1, 7, 8, 20, 50])
def test_an_epoch_is_every_row_exactly_once(base, batch_size):
    """Against the rows themselves, for batch sizes that divide their number and that do not, twice
    around."""
    args = arguments(base, "--train_rows", 40, "--batch_size", batch_size, "--seed", 2)
    tokenizer = load_tokenizer(base)
    rows = sorted(row.prompt + row.answer for row in skills.sample("kinship_new", "train", 40, 2))
    per_epoch = -(-40 // batch_size)
    twice = take(args, tokenizer, 0, 2 * per_epoch)
    first, second = twice[:per_epoch], twice[per_epoch:]
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == rows
    if 1 < batch_size:
        assert first != second, "the next epoch is another permutation"


@pytest.mark.parametrize("variant", ["perft_s", "scratch"])
def test_batches_depend_on_the_seed_and_the_step_and_can_start_anywhere(base, variant):
    """Every start within the first two epochs gives the batches that a run from step 0 sees
    there."""
    rows = [] if variant == "scratch" else ["--train_rows", 50]
    args = arguments(base, *rows, "--batch_size", 4, variant=variant)
    tokenizer = load_tokenizer(base)
    whole = take(args, tokenizer, 0, 40)
    for start in (*range(1, 20), 31, 32, 33):
        assert take(args, tokenizer, start, 3) == whole[start : start + 3]
    other = arguments(base, *rows, "--batch_size", 4, "--seed", 1, variant=variant)
    assert take(other, tokenizer, 0, 1) != whole[:1]


def test_pre_training_sees_new_rows_in_every_epoch(base):
    """Rows are drawn, so chance repeats some (of the smaller families); an epoch that came twice
    would repeat all."""
    args = arguments(base, "--batch_size", 20, variant="scratch")
    tokenizer = load_tokenizer(base)
    epochs = [sum(take(args, tokenizer, 16 * e, 16), []) for e in range(4)]
    for e, epoch in enumerate(epochs):
        before = {text for other in epochs[:e] for text in other}
        assert sum(text in before for text in epoch) < 0.15 * len(epoch)
    prompts = [text.split("->")[0] + "->" for text in sum(epochs, []) if "->" in text]
    assert not any(skills.is_test(prompt) for prompt in prompts)


def test_rows_of_like_length_share_a_batch(base):
    """Which is why there is little padding: less than half of what batches drawn at random would
    hold."""
    args = arguments(base, "--task", "height", "--train_rows", 640, "--batch_size", 32)
    tokenizer = load_tokenizer(base)
    source = dataset.batches(args, dataset.load_data(args, tokenizer, 64), tokenizer, 0)
    masks = [next(source)[2] for _ in range(20)]
    lengths = [n for mask in masks for n in mask.sum(1).tolist()]
    random.Random(0).shuffle(lengths)
    held = sum(32 * max(lengths[i : i + 32]) for i in range(0, 640, 32))
    at_random = held - sum(lengths)
    assert sum((~mask).sum().item() for mask in masks) < at_random / 2


# Every variant -----------------------------------------------------------------------------------

UNITS = [(v, "--kind", k) for v in perft.PERFT for k in ("lora", "parallel")]
RUNS = [
    *UNITS,
    *((*unit, "--dtype", "bfloat16") for unit in UNITS),
    *((v, "--rank", r) for v, r in zip((*perft.PERFT, "lora_qv") * 3, (1, 3, 64) * 5)),
    ("perft_r", "--num_adapters", 3, "--top_k", 3),
    ("perft_r", "--num_adapters", 64, "--top_k", 64, "--rank", 3),
    ("perft_r", "--num_adapters", 64, "--top_k", 1, "--dtype", "bfloat16"),
    ("perft_d", "--num_adapters", 64, "--init", "lora"),
    ("perft_e", "--train_router", "--init", "lora", "--alpha", 4),
    ("lora_qv", "--dtype", "bfloat16", "--rank", 5),
    ("router",),
    ("router", "--dtype", "bfloat16"),
    ("frozen_experts",),
    ("full",),
]


@pytest.mark.parametrize("case", RUNS, ids=lambda case: " ".join(map(str, case)))
def test_every_variant_trains_what_its_table_says_and_nothing_else(
    run, base, monkeypatch, capsys, case
):
    """The saved file against the table; every other tensor against the base, bit for bit; the
    base's files against themselves. All with weight decay on, which moves frozen weights if
    anything does."""
    before, models = contents(base), []
    real = perft.save_adapter

    def save(model, out):
        models.append(model)
        real(model, out)

    monkeypatch.setattr(perft, "save_adapter", save)
    folder = run(*case, "--weight_decay", 0.5, "--steps", 2)
    screen = capsys.readouterr().out
    assert contents(base) == before

    saved = saved_tensors(folder)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in saved.values())
    modules = r"^(?:layers|embed|norm|lm_head)\S+ +(\d+) +(\S+) +([\d,]+) "
    table = re.findall(modules, screen, re.M)
    shapes = sorted("x".join(map(str, tensor.shape)) for tensor in saved.values())
    listed = [[shape] * int(count) for count, shape, _ in table]
    assert sorted(sum(listed, [])) == shapes
    total = sum(tensor.numel() for tensor in saved.values())
    assert sum(int(parameters.replace(",", "")) for *_, parameters in table) == total
    sums = re.search(r"^all that trains +(\d+) +([\d,]+) ", screen, re.M)
    assert sums.groups() == (str(len(saved)), f"{total:,}")

    dtype = case[case.index("--dtype") + 1] if "--dtype" in case else "float32"
    fresh = dict(load_base(str(base), dtype)[0].named_parameters())
    trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
    assert len(trained) == len(saved)
    for name, p in models[0].named_parameters():
        if name not in trained:
            assert p.dtype == fresh[name].dtype and torch.equal(p, fresh[name]), name
        elif name in fresh:
            moved = not torch.equal(p, fresh[name].float())
            assert moved, f"{name} is said to train and has not moved"


def test_scratch_trains_everything_from_random_weights_and_writes_a_model_folder(run, base, capsys):
    """Only the config of --base counts: with other weights beside it the same model comes out, and
    it can be loaded."""
    folder = run("scratch")
    screen = capsys.readouterr().out
    model = MoETransformer.from_pretrained(folder / "model")
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,} " in re.search(r"^all that trains.*$", screen, re.M)[0]
    assert f"saved {folder / 'model' / 'model.safetensors'}" in screen
    other = make_base(folder.parent / "other")
    (other / "model.safetensors").unlink()
    again = run("scratch", base=other, out="again")
    assert contents(again / "model") == contents(folder / "model")
    assert [line["accuracy"].keys() for line in metrics(folder, "after")] == [
        skills.FAMILIES.keys()
    ]


# Inert adapters ----------------------------------------------------------------------------------


def failure(*flags, main=train.main):
    """Exit code and message of a run that fails in one line, as a shell would see them."""
    with pytest.raises(SystemExit) as stopped:
        main([str(flag) for flag in flags])
    code = stopped.value.code
    # a text goes to stderr, with exit code 1
    return (1, code) if isinstance(code, str) else (code, None)


@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize("variant", ["perft_s", "perft_r", "perft_e"])
@pytest.mark.parametrize(
    "breakage",
    ["the first layer is detached", "the second is detached", "every layer is multiplied by 0"],
)
def test_adapters_that_are_attached_but_inert_stop_the_run_at_a_line_of_the_log(
    run, monkeypatch, tmp_path, variant, breakage, log_every
):
    """Real faults, built into the adapter: its output no longer leads back to it. The error names
    the first tensor, at the first line of the log from the second step on."""
    detached = {"the first layer is detached": 0, "the second is detached": 1}.get(breakage)
    name = "beside_experts" if variant == "perft_e" else "forward"
    real, calls = getattr(perft.Adapters, name), []

    def forward(self, *args):
        y = real(self, *args)
        if self not in calls:
            calls.append(self)
        if detached is None:
            return y * 0
        return y.detach() if calls.index(self) == detached else y

    monkeypatch.setattr(perft.Adapters, name, forward)
    flags = ["--log_every", log_every]
    if variant == "perft_r":
        flags += ["--adapter_balance", 0]
    with pytest.raises(SystemExit) as stopped:
        run(variant, *flags)
    message = stopped.value.code
    said = f"error: layers.{detached or 0}.moe.adapters.A trains and never had a gradient"
    assert message.startswith(said)
    assert "inert" in message and message.count("\n") == 0
    folder = tmp_path / "run"
    assert [line["step"] for line in metrics(folder, "step")] == ([1, 2] if log_every == 1 else [3])
    assert not (folder / "adapter_model.safetensors").exists()


def test_nothing_is_inert_where_b_starts_at_zero(run, monkeypatch):
    """With init lora A has no gradient in the first step, by design; a frozen B (learning rate 0)
    is caught."""
    run("perft_s", "--init", "lora")
    monkeypatch.setattr(train, "learning_rate", lambda step, steps, args: 0.0)
    with pytest.raises(SystemExit) as stopped:
        run("perft_s", "--init", "lora", out="zero")
    assert "adapters.A" in stopped.value.code and "adapters.B" not in stopped.value.code


UNTAUGHT = [["--top_k", 1, "--num_adapters", 3], ["--adapter_weights", "base"]]


@pytest.mark.parametrize("flags", UNTAUGHT, ids=["top_k 1", "base weights"])
@pytest.mark.parametrize("adapter_balance", [0.01, 0.0])
def test_a_router_that_cannot_learn_from_the_task_is_warned_about_and_trains_on(
    run, capsys, flags, adapter_balance, tmp_path
):
    """Facts 1 and 2 of perft.py, on a base that renormalises: one warning, no error, and the
    adapter is saved."""
    renormalising = make_base(tmp_path / "renormalising", norm_topk_prob=True)
    flags = (*flags, "--adapter_balance", adapter_balance, "--lr", 0.002)
    folder = run("perft_r", *flags, base=renormalising)
    screen = capsys.readouterr().out
    (warning,) = re.findall(r"^warning: .*$", screen, re.M)
    assert "no gradient from the task" in warning
    places = [screen.index(text) for text in ("configuration:", warning, "accuracy before")]
    assert places == sorted(places)
    assert len(saved_tensors(folder)) == 3 * L


def test_no_warning_where_there_is_nothing_to_warn_of(run, capsys):
    # TINY does not renormalise: the weight is a probability, and learns
    run("perft_r", "--top_k", 1, "--lr", 0.002)
    assert "warning:" not in capsys.readouterr().out


def test_a_rate_found_on_the_embedded_model_is_warned_of_on_another_base(run, capsys):
    """Unless it was asked for, or the recipe brings another."""
    run("perft_s")
    (warning,) = re.findall(r"^warning: .*$", capsys.readouterr().out, re.M)
    assert "--lr 0.001 was found on the embedded model" in warning
    assert "--recipe perft_paper" in warning


# Mistakes ----------------------------------------------------------------------------------------

USAGE = {  # flags -> what the line must say: all of this can be known from the command line alone
    "--variant perft_x": ["perft_x", "perft_s", "scratch"],
    "--rank 4": ["--variant"],
    "--varient perft_s": ["--varient was not understood", "did you mean --variant?"],
    "--varient=perft_s": ["--varient was not understood", "did you mean --variant?"],
    "perft_s": ["perft_s was not understood", "did you mean --variant perft_s?"],
    "--variant perft_s --num_adapters 4": ["--num_adapters", "perft_s", "perft_d, perft_r"],
    "--variant perft_d --top_k 1": ["--top_k", "perft_d", "perft_r"],
    "--variant perft_r --no_such_flag 1": ["--no_such_flag"],
    "--variant perft_r --num_adaptors 4": ["--num_adaptors", "did you mean --num_adapters?"],
    "--variant perft_s --steps -1": ["--steps: -1 is out of range", "at least 1"],
    "--variant perft_s --steps 0": ["--steps: 0 is out of range", "at least 1"],
    "--variant perft_s --batch_size 0": ["--batch_size: 0 is out of range", "at least 1"],
    "--variant perft_s --warmup 0": ["--warmup: 0 is out of range", "at least 1"],
    "--variant perft_s --log_every 0": ["--log_every: 0 is out of range", "at least 1"],
    "--variant perft_s --save_every 0": ["--save_every: 0 is out of range", "at least 1"],
    "--variant perft_s --eval_rows 0": ["--eval_rows: 0 is out of range", "at least 1"],
    "--variant perft_s --train_rows 0": ["--train_rows: 0 is out of range", "at least 1"],
    "--variant perft_s --threads 0": ["--threads: 0 is out of range", "at least 1"],
    "--variant perft_s --threads 100000": ["--threads: 100000 is out of range", "at most 1024"],
    "--variant perft_s --train_rows 99999999999": ["--train_rows", "out of range", "at most"],
    "--variant perft_s --steps many": ["--steps", "many"],
    "--variant perft_s --rank 0": ["rank", "0", "1"],
    "--variant esft_gate --p 5": ["--p: 5 is out of range", "more than 0 and at most 1"],
    "--variant perft_s --dropout 1.5": ["dropout", "1.5", "less than 1"],
    "--variant perft_r --top_k 5": ["top_k is 5", "there are 4 adapters"],
    "--variant perft_s --lr -1": ["lr", "-1"],
    "--variant perft_s --clip -1": ["clip", "-1"],
    "--variant perft_s --task juggle": ["juggle", "kinship_new"],
    "--variant full --dtype bfloat16": ["--dtype bfloat16 does not apply", "full", "perft_s, "],
    "--variant scratch --dtype bfloat16": [
        "--dtype bfloat16 does not apply",
        "scratch",
        "perft_s, ",
    ],
    "--variant perft_s --resume --overwrite": ["--resume", "--overwrite"],
    "--variant perft_s --resume": ["no unfinished run", "--resume"],
    "--variant perft_s --device banana": ["banana", "cpu"],
}


@pytest.mark.parametrize("flags", USAGE)
def test_a_wrong_command_is_told_in_one_line_with_exit_code_2(flags, base, tmp_path, capsys):
    short = SCRATCH if "scratch" in flags else SHORT
    code, _ = failure(*short, *flags.split(), "--base", base, "--out", tmp_path / "run")
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1 and error.endswith("\n") and "error: " in error
    assert not [part for part in USAGE[flags] if part not in error], error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["model.py", "perft.py", "esft.py", "train.py"])
def test_every_command_helps(command):
    """Help, and not what it does without a flag: a process of its own, as a user starts it."""
    if command == "train.py":
        command = "train.py --variant perft_r"
    argv = [sys.executable, *command.split(), "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ") and "--help" in done.stdout
    assert ("--top_k" in done.stdout) == ("perft_r" in command)
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


# Against the README: the flags that a variant takes and others do not, written down a second time.
LORA, UNIT = ["rank", "alpha", "dropout"], ["kind", "init", "train_router"]
ROUTED = ["num_adapters", "top_k", "adapter_weights", "adapter_balance"]
CHOICE = ["experts", "p", "bind_groups", "score_rows"]
TAKES = {
    "perft_s": [*LORA, *UNIT],
    "perft_d": [*LORA, *UNIT, "num_adapters"],
    "perft_r": [*LORA, *UNIT, *ROUTED],
    "perft_e": [*LORA, *UNIT, "experts"],
    "lora_qv": LORA,
    "lora_experts": [*LORA, "experts"],
    "esft_token": [*CHOICE, "train_router"],
    "esft_gate": [*CHOICE, "train_router", "gate_share"],
}
VALUES = {
    "kind": ["lora"],
    "init": ["paper"],
    "adapter_weights": ["own"],
    "train_router": [],
    "gate_share": [],
    "task": ["add"],
    "dropout": ["0.5"],
    "p": ["0.5"],
}  # of a flag; 2 of the others


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_refuses_each_flag_that_does_not_apply_and_takes_the_others(
    variant, base, tmp_path, capsys
):
    takes = list(TAKES.get(variant, []))
    if variant != "scratch":
        takes += ["task", "train_rows"]
    common = ["gate_share", "task", "train_rows"]
    for flag in [*LORA, *UNIT, *ROUTED, *CHOICE, *common]:
        value = VALUES.get(flag, ["2"])
        argv = ["--variant", variant, "--base", str(base), "--out", str(tmp_path / "run")]
        argv += [f"--{flag}", *value]
        if flag in takes:
            train.parse_args(argv)
        else:
            assert failure(*argv)[0] == 2, flag
            said = f"--{flag} does not apply to --variant {variant}; it applies to "
            assert said in capsys.readouterr().err


def break_base(base, folder, what):
    """A copy of `base` with one fault."""
    shutil.copytree(base, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if what == "no folder":
        shutil.rmtree(folder)
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "not safetensors":
        weights.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"x" * 5000)
    elif what == "too few experts":
        config.write_text(config.read_text().replace('"num_experts": 8', '"num_experts": 7'))
    elif what == "another architecture":
        config.write_text(config.read_text().replace('"olmoe"', '"llama"'))
    elif what == "not JSON":
        config.write_text("{")
    return folder


BROKEN = {  # the fault -> what the line must say besides the folder
    "no folder": ["no such folder", "config.json"],
    "no tokenizer": ["tokenizer.json", "no such file"],
    "no weights": ["model.safetensors"],
    "cut off": ["model.safetensors", "cut off"],
    "not safetensors": ["model.safetensors", "not valid JSON", "download it again"],
    "too few experts": ["tensors that the model does not have", "experts.7", "configuration"],
    "another architecture": ["config.json", "llama", "olmoe, mixtral"],
    "not JSON": ["config.json", "not valid JSON"],
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_base_that_cannot_be_used_is_told_in_one_line_with_exit_code_1(base, tmp_path, what):
    """The line names the folder; an earlier run in the output folder is not touched although
    --overwrite is given."""
    broken, out = break_base(base, tmp_path / "broken", what), tmp_path / "run"
    train.main(["--variant", "perft_s", "--base", str(base), "--out", str(out), *SHORT])
    before = contents(out)
    flags = ("--base", broken, "--out", out, *SHORT, "--overwrite")
    code, message = failure("--variant", "perft_s", *flags)
    assert code == 1 and message.startswith(f"error: {broken}") and "\n" not in message
    assert not [part for part in BROKEN[what] if part not in message], message
    assert contents(out) == before


def test_a_tokenizer_that_is_larger_than_the_models_vocabulary_is_refused(tmp_path):
    small = make_base(tmp_path / "small", vocab_size=500)
    vocabulary = load_tokenizer(small).vocab_size
    flags = ("--base", small, "--out", tmp_path / "run", *SHORT)
    code, message = failure("--variant", "perft_s", *flags)
    assert code == 1 and str(small) in message
    assert str(vocabulary) in message and "500" in message
    assert not (tmp_path / "run").exists()


def test_rows_that_are_longer_than_the_model_are_refused(tmp_path):
    short = make_base(tmp_path / "short", max_position_embeddings=16)
    flags = ("--base", short, "--out", tmp_path / "run", *SHORT)
    code, message = failure("--variant", "perft_s", *flags)
    said = r"sequence of \d\d tokens is longer than the model's 16 positions"
    assert code == 1 and re.search(said, message)


def test_more_weights_than_the_base_has_is_refused(base, tmp_path):
    """adapter_weights base lends the base's K = 2 weights; a third adapter would have none."""
    flags = ("--adapter_weights", "base", "--top_k", 3, "--out", tmp_path / "run")
    code, message = failure("--variant", "perft_r", *flags, "--base", base)
    assert code == 1 and "top_k is 3" in message and "2 weights" in message


def test_a_choice_that_cannot_be_is_refused_before_the_base_is_read(
    base, tmp_path, monkeypatch, capsys
):
    """Groups of 3 of 8 experts, and a file that names expert 8 of 0 to 7."""
    monkeypatch.setattr(eval, "load_model", lambda *words: pytest.fail("the base was read"))
    flags = ("--variant", "esft_token", "--base", base, "--out", tmp_path / "run", *SHORT)
    said = "error: bind_groups is 3; it must divide the number of experts, 8"
    assert failure(*flags, "--bind_groups", 3) == (1, said)
    wrong = tmp_path / "experts.json"
    wrong.write_text(json.dumps({"experts": {str(i): [8] for i in range(L)}}))
    code, message = failure(*flags, "--experts", wrong)
    assert code == 1 and message.startswith(f"error: {wrong}")
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_a_run_folder_that_holds_a_run_is_not_touched_unless_told_so(run, base, capsys):
    folder = run("perft_s")
    before = contents(folder)
    capsys.readouterr()
    assert failure("--variant", "perft_s", "--base", base, "--out", folder, *SHORT)[0] == 2
    error = capsys.readouterr().err
    assert str(folder) in error and "--overwrite" in error and "--out" in error
    assert error.count("\n") == 1
    assert (
        failure("--variant", "perft_s", "--base", base, "--out", folder, *SHORT, "--resume")[0] == 2
    )
    error = capsys.readouterr().err
    assert str(folder) in error and "no unfinished run" in error and error.count("\n") == 1
    assert contents(folder) == before
    replaced = run("perft_d", "--overwrite")
    assert json.loads((replaced / "config.json").read_text())["variant"] == "perft_d"
    steps = [line["step"] for line in metrics(replaced, "step")]
    assert steps == [1, 2, 3, 4], "one run's steps, not two"


def test_a_run_is_resumed_with_the_flags_it_was_begun_with(run, monkeypatch):
    """Each change is named with both values; what changes no number may differ."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, 7, ctrl_c)
        run("perft_s", *LONG)
    changes = [
        ("steps", "9", "12"),
        ("rank", "16", "8"),
        ("seed", "0", "1"),
        ("train_rows", "20", "21"),
        ("task", '"kinship_new"', '"add"'),
    ]
    for flag, then, now in changes:
        with pytest.raises(SystemExit) as stopped:
            run("perft_s", *LONG, f"--{flag}", now.strip('"'), "--resume")
        message = stopped.value.code
        assert message.startswith("error: --resume continues ")
        assert " as it was begun; changed: " in message
        assert f"{flag} {then} then, {now} now" in message and "\n" not in message
    with pytest.raises(SystemExit) as stopped:
        run("perft_d", *LONG, "--resume")
    assert "perft_s" in stopped.value.code and "perft_d" in stopped.value.code
    free = ("--log_every", 3, "--save_every", 100, "--threads", 1, "--checkpoint_activations")
    run("perft_s", *LONG, *free, "--resume")


def test_a_run_that_is_resumed_without_a_rate_keeps_its_own(run, monkeypatch):
    """And not the default of its variant, 1e-3."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, 7, ctrl_c)
        run("perft_s", *LONG, "--lr", 5e-3)
    folder = run("perft_s", *LONG, "--resume")
    assert json.loads((folder / "config.json").read_text())["lr"] == 5e-3
    (resumed,) = metrics(folder, "resumed")
    assert resumed["lr"] == 5e-3
    assert metrics(folder, "step")[-1]["lr"] > 5e-4  # of 5e-3, decayed to the last of 9 steps


def test_a_run_that_goes_on_with_another_number_of_processes_says_so(
    run, monkeypatch, tmp_path, capsys
):
    """Each process draws its own dropout, so the steps are not those of the run that was begun."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, 7, ctrl_c)
        run("perft_s", *LONG)
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"world": 2}))
    run("perft_s", *LONG, "--resume")
    said = "dropout differs by the number of processes: world 2 then, 1 now"
    assert f"goes on after step 6, with --lr 0.001; {said}\n" in capsys.readouterr().out


def test_a_damaged_state_is_told_in_one_line(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, 7, ctrl_c)
        run("perft_s", *LONG)
    state = tmp_path / "run" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(SystemExit) as stopped:
        run("perft_s", *LONG, "--resume")
    assert str(state) in stopped.value.code and "cut off" in stopped.value.code


STEPS_OF_NO_RUN = {  # what a state of 6 of 9 steps claims
    "more than the run has": {"done": 9},
    "more than were done": {"step.layers.0.moe.adapters.A": 7},
    "fewer of one tensor": {"step.layers.0.moe.adapters.A": 5},
    "half a step": {"step.layers.0.moe.adapters.A": 5.5, "step.layers.0.moe.adapters.B": 5.5},
    "none": {f"step.layers.{i}.moe.adapters.{half}": 0 for i in range(L) for half in "AB"},
}


def test_a_state_whose_numbers_of_steps_contradict_each_other_is_refused(
    run, monkeypatch, tmp_path
):
    """In one line, that names the file."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, 7, ctrl_c)
        run("perft_s", *LONG)
    state = tmp_path / "run" / "state.safetensors"
    tensors = {name: tensor.clone() for name, tensor in SafetensorsFile(state).items()}
    for claim in STEPS_OF_NO_RUN.values():
        changed = tensors | {name: torch.tensor(float(n)) for name, n in claim.items()}
        write_tensors(state, {name: Place(tensor) for name, tensor in changed.items()})
        with pytest.raises(SystemExit) as stopped:
            run("perft_s", *LONG, "--resume")
        said = f"error: {state}: holds numbers of steps that no run has done; begin again with "
        assert stopped.value.code == f"{said}--overwrite", claim


def test_an_out_that_is_a_file_is_refused_with_cause_and_remedy_and_stays_as_it_is(
    base, tmp_path, capsys
):
    (tmp_path / "notes").write_text("mine")
    flags = ("--base", base, "--out", tmp_path / "notes", *SHORT)
    code, message = failure("--variant", "perft_s", *flags)
    message = message or capsys.readouterr().err
    assert code == 1 and str(tmp_path / "notes") in message
    assert "--out" in message and "not a folder" in message
    assert (tmp_path / "notes").read_text() == "mine"


MINE = ["adapter_model.safetensors", "model/model.safetensors", "eval_generate/results.json"]


@pytest.mark.parametrize("mine", MINE)
def test_a_folder_with_such_files_and_no_run_is_refused_and_stays_as_it_is(
    base, tmp_path, capsys, mine
):
    """Somebody's adapter or model is no run: not even --overwrite may take it."""
    for name in (mine, "model/notes.txt", "eval_mine/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    for more in ([], ["--overwrite"]):
        flags = ("--base", base, "--out", tmp_path, *SHORT, *more)
        code, _ = failure("--variant", "perft_s", *flags)
        message = capsys.readouterr().err
        assert code == 2 and mine in message and "choose another --out" in message
        assert contents(tmp_path) == before


def test_overwrite_removes_what_the_replaced_run_and_its_evaluation_wrote_and_nothing_else(run):
    """An adapter over a scratch run: the old model and the old results go, what the user put there
    stays."""
    folder = run("scratch")
    (folder / "eval_generate").mkdir()
    notes = [folder / name for name in ("notes.txt", "model/notes.txt", "eval_generate/notes.txt")]
    for path in (*notes, folder / "eval_generate/results.json"):
        path.write_text("mine")
    run("perft_s", "--overwrite")
    assert all(path.read_text() == "mine" for path in notes)
    for gone in ("model/model.safetensors", "model/config.json", "eval_generate/results.json"):
        assert not (folder / gone).exists()
    assert (folder / "adapter_model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_no_adapter(run, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run("perft_s", "--lr", 1e30)
    said = r"error: .+ was not finite in step 2, nor was any step since; "
    said += r"lower --lr \(it is 1e\+30\): nothing was saved, begin again with --overwrite"
    assert re.fullmatch(said, stopped.value.code)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    with pytest.raises(SystemExit) as stopped:  # finite in its one step, and no number after it
        run("perft_s", "--lr", 1e38, "--steps", 1, "--warmup", 1, "--init", "lora", out="last")
    said = r"error: .*: not written, layers\.0\.moe\.adapters\.\w is not finite; .+, lower --lr"
    assert re.fullmatch(said, stopped.value.code)
    assert not (tmp_path / "last" / "adapter_model.safetensors").exists()


def test_a_file_may_have_any_name_and_a_given_rate_is_no_bad_rate_of_a_folder(tmp_path):
    """random is a word of --experts alone; and --resume --lr asks for no rate of config.json."""
    args = train.parse_args(["--variant", "perft_s", "--data", "random"])
    assert (args.data, args.task, args.train_rows, args.eval_rows) == ("random", None, None, None)
    (tmp_path / "config.json").write_text('{"lr": -0.5}')
    argv = ["--variant", "perft_s", "--out", str(tmp_path), "--resume"]
    assert train.parse_args([*argv, "--lr", "1e-4"]).lr == 1e-4
    assert failure(*argv)[0] == 2


def test_a_process_that_is_lost_at_the_very_end_is_told_with_what_is_saved(run, monkeypatch):
    """Not even the last meeting of all may end in a traceback."""

    def stop():
        monkeypatch.setattr(train.processes, "WORLD", 2)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr(train.processes, "stop", stop)
    with pytest.raises(SystemExit) as stopped:
        run("perft_s")
    said = r"error: another process is gone: training is done, .+ is saved; accuracies: .+"
    assert re.fullmatch(said, stopped.value.code)


def test_a_mistake_in_a_shell_is_one_line_on_stderr_without_a_traceback(tmp_path):
    """A process of its own, as a user starts it."""
    command = [sys.executable, "train.py", "--variant", "perft_s", "--base", "no/such/folder"]
    command += ["--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: no/such/folder: ")


def test_a_model_folder_is_not_taken_for_a_run(base, tmp_path, capsys):
    """Not even with --overwrite: its config.json would be lost."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags = ("--base", base, "--out", folder, "--overwrite")
    code, _ = failure(*SHORT, "--variant", "perft_s", *flags)
    assert code == 2 and "choose another --out" in capsys.readouterr().err
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_overwrite_keeps_the_old_run_until_the_new_one_can_start(run, base, tmp_path):
    """More test rows than there are: found before anything of the old run is touched."""
    folder = run("perft_s")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags = ("--base", base, "--out", folder, "--overwrite")
    failure("--variant", "perft_s", *flags, "--eval_rows", 10**6)
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_chosen_experts_that_few_tokens_reached_are_not_called_inert(base):
    """A layer is excused exactly while its chosen experts were reached less than MANY times, and
    then the check says that it has not seen all."""
    model = apply_esft(MoETransformer.from_pretrained(base), [[0]] * L)
    optimizer = train.make_optimizer(model, SimpleNamespace(lr=1.0, weight_decay=0.0, beta2=0.9))
    for state in optimizer.state.values():
        state["step"] += 2
    few = torch.full((L, E), train.MANY)
    few[:, 0] -= 1
    assert not train.check_inert(model, optimizer, few)
    for i in range(L):
        enough = few.clone()
        enough[i, 0] += 1
        with pytest.raises(ValueError, match=rf"^layers\.{i}\..* attached but inert"):
            train.check_inert(model, optimizer, enough)
    for state in optimizer.state.values():
        state["exp_avg"] += 1
    assert train.check_inert(model, optimizer, few + 1) and not train.check_inert(
        model, optimizer, few
    )


def test_experts_that_no_label_depends_on_yet_do_not_stop_a_run(run, tmp_path):
    """Few rows a step and a look at each: of the last layer's tokens only those before a label have
    a gradient, and these need not meet the expert that trains."""
    hot = tmp_path / "hot.json"
    hot.write_text(json.dumps({"experts": {str(i): [2] for i in range(L)}}))
    flags = ("--experts", hot, "--batch_size", 1, "--log_every", 1, "--steps", 8)
    for variant in ("perft_e", "lora_experts", "esft_token"):
        folder = run(variant, *flags, out=variant)
        assert len(metrics(folder, "step")) == 8


# The papers' recipe ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_the_recipes_balance_is_what_the_papers_code_adds_to_the_loss_of_one_layer(
    family, tmp_path
):
    """Their code adds c times transformers' number: load_balancing_loss_func, here asked itself,
    for the base's routers (top 2 or 3 of 8) and for the adapters' (top 2 of 4)."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers.models, family)
    theirs = getattr(theirs, f"modeling_{family}").load_balancing_loss_func
    K, c = (3, 0.01) if family == "olmoe" else (2, 0.02)
    sizes = {"num_experts_per_tok": K, "model_type": family, "norm_topk_prob": family == "mixtral"}
    folder = make_base(tmp_path / family, **sizes)
    flags = ("--data", "rows.json", "--recipe", "perft_paper", "--top_k", 2)
    args = arguments(folder, *flags, variant="perft_r")
    settings = vars(
        train.settings_of(args, Config.from_folder(folder), dataset.Data(None, steps=1))
    )
    assert settings["balance"] == pytest.approx(c * K)
    assert settings["adapter_balance"] == pytest.approx(c * 2)

    for experts, top_k, ours in ((E, K, "balance"), (4, 2, "adapter_balance")):
        logits = torch.randn(50, experts, generator=torch.Generator().manual_seed(experts))
        weights, chosen = logits.softmax(-1).topk(top_k)
        loss = settings[ours] * load_balancing_loss(Routing(logits, weights, chosen))
        assert loss.item() == pytest.approx(c * theirs((logits,), experts, top_k).item(), rel=1e-6)


def test_the_recipes_balance_of_olmoe_itself_is_8_hundredths(tmp_path):
    """Of 8 experts a token: 0.01 * 8, and of the adapters' 2 of 4: 0.01 * 2."""
    folder = make_base(tmp_path / "base", num_experts=16, num_experts_per_tok=8)
    args = arguments(folder, "--data", "rows.json", "--recipe", "perft_paper", variant="perft_r")
    settings = vars(
        train.settings_of(args, Config.from_folder(folder), dataset.Data(None, steps=1))
    )
    assert settings["balance"] == pytest.approx(0.08)
    assert settings["adapter_balance"] == pytest.approx(0.02)


# Rows of a file ----------------------------------------------------------------------------------


def test_epochs_are_measured_where_rows_are_held_out_and_steps_replace_them(run, tmp_path, capsys):
    """Two epochs of 8 rows in batches of 4, or 3 steps: what the configuration and the log say."""
    rows = [{"instruction": f"say {n}", "output": "a b" if n % 2 else "c"} for n in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--variant", "perft_s", "--data", tmp_path / "rows.json", "--batch_size", 4]
    flags += ["--warmup", 1, "--threads", 1]
    cases = [
        (["--held_out", 2, "--epochs", 2], [2], 2, 4),
        (["--held_out", 0, "--epochs", 2], [], 2, 6),
        (["--held_out", 2, "--steps", 3], [], None, 3),
    ]
    for i, (more, epochs, epochs_said, steps) in enumerate(cases):
        folder = tmp_path / str(i)
        argv = [*flags, *more, "--out", folder]
        train.main([str(word) for word in argv])
        assert [line["step"] for line in metrics(folder, "epoch")] == epochs
        settings = json.loads((folder / "config.json").read_text())
        assert (settings["epochs"], settings["steps"]) == (epochs_said, steps)
        screen = capsys.readouterr().out
        assert ("epochs=" in screen) == (epochs_said is not None) and f"steps={steps}" in screen
        assert screen.count("after epoch") == len(epochs)
