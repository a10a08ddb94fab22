"""Fine-tune a Mixture-of-Experts model: one visible loop for every method.

    python train.py --variant perft_s                      the embedded base learns 16 new words
    python train.py --variant perft_r --num_adapters 8     adapters with a router of their own
    python train.py --variant perft_s --data rows.json     a file of alpaca or messages records
    python train.py --variant perft_r --base data/downloads/OLMoE-1B-7B-0924 --data commonsense \\
                    --recipe perft_paper                   the papers' experiment
    python train.py --variant esft_gate --base path/to/Qwen3-30B-A3B --dtype bfloat16 \\
                    --data chats.jsonl --recipe esft_paper  ESFT's, on chats of your own
    python train.py --variant scratch                      re-make the base: about an hour
    python train.py --variant perft_r --help               the flags of a variant

What happens, in this order, on the screen and in the run folder (config.json, metrics.jsonl, and
run.svg at the end):

    memory that is certain -> configuration -> table of what trains -> accuracy before -> steps ->
    accuracy after -> what was saved, and where

What is measured before and after: exact-match accuracy for --task, cross-entropy of held-out rows
for --data.

The loss of a step:

    cross-entropy over the labels
        + c_base * balance(base routers) + c_adapter * balance(adapter routers, PERFT-R only)

balance is moe.load_balancing_loss, averaged over the layers: 1 is even. The labels are the answer
and the end token; --train_on_inputs adds the prompt, as the papers do. The base routers are frozen
in most variants, yet c_base still moves adapters: those of earlier layers change what later routers
see.

On several GPUs the same command stands behind torchrun, and gives the same losses, if --dropout is
0 (processes draw for themselves) and --micro_batch is not used (data/shard.py):

    torchrun --nproc_per_node=2 train.py --variant perft_s --base path/to/Mixtral-8x7B-v0.1 ...

A step depends on the seed, its own number and the number of processes only (data order, dropout),
so a run that was stopped and continued with --resume gives the numbers of one that was not. Ctrl-C
finishes the step and saves it; a second one stops at once. A step with a number that is not finite
changes nothing.
--micro_batch runs a step's rows in parts, for less memory; the parts' cross-entropies are divided
by the labels of the whole step and add up. The balance loss of a step is then the mean of its
parts', which is not quite the balance loss of the whole.

This file tells the run first, then the loop, what a variant does to the base, what is measured, the
log, what could go wrong, how a run goes on; the flags of all variants come last.
"""

from data import run  # first: from here on Ctrl-C is one line

# isort: split
import os
import shutil
import signal
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import esft
import eval
import perft
from data import dataset, hub, pictures, skills, tasks
from data import shard as processes
from data.run import ON, ON_OFF, Flag, count, fraction, from_zero, group, natural, number, positive
from model import EMBEDDED, Config, MoETransformer
from moe import expert_counts, load_balancing_loss, shares
from perft import BASELINES, CHOICES, LORA, PERFT, PerftConfig

# The run -----------------------------------------------------------------------------------------


def train(args):
    begun = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    config, tokenizer = eval.load_config(args.base)
    data = dataset.load_data(args, tokenizer, config.max_position_embeddings)

    # what trains
    edit, notes, esft_scores = edit_for(args, config, tokenizer, data)
    check_memory(args, config, edit)
    model = build(args, config, edit)
    optimizer = make_optimizer(model, args)

    # what will be done
    settings = settings_of(args, config, data)  # the flags, and none left open
    content = vars(settings) | facts_of(model, data)
    warnings = [f"warning: {note}" for note in [*notes, *advice(settings)]]
    print(configuration_text(settings), *data.notes, *warnings, perft.report(model), sep="\n")

    # begin, or go on
    measure_when = partial(measure, settings, model, tokenizer, data)
    if args.resume:
        event, record = "resumed", restore(content, model, optimizer)
    else:
        event, record = "before", measure_when("before")
    first = int(optimizer.done)
    log = open_folder(content, first)

    # train, save, measure again
    with explaining_end(lambda: what_is_where(settings)):
        log.write(event=event, **record)
        if esft_scores and processes.RANK == 0:
            esft.save_scores(model, Path(args.out), *esft_scores)
        batches = dataset.batches(settings, data, tokenizer, first)
        after_step = partial(measure_after, settings, data, measure_when, log)
        with run.noting() as noted:
            run_steps(settings, model, optimizer, batches, log, noted, after_step)
            save(settings, model)
        if noted:
            raise run.Stopped("", 128 + noted[0])  # explaining_end has the words
        processes.meet()  # the first process has written it
        log.write(event="after", **measure_when("after"))
        close_run(settings, log, begun)


# The loop ----------------------------------------------------------------------------------------


def run_steps(settings, model, optimizer, batches, log, noted, after_step):
    """The training loop, from the steps that are done on.

    noted: signals that ask it to stop. after_step(done): measures, after some of the steps.
    """
    first, steps = int(optimizer.done), settings.steps
    model.checkpoint_activations = settings.checkpoint_activations
    if settings.compile:
        compile_blocks(model)
    model.train()
    guard, clock = Guard(model), Clock(first)
    counts = 0  # (L, E): choices of each expert, since `first`
    all_learn = False
    print("  step cross-entropy  balance        lr grad norm  tokens/s    memory   load")
    off = processes.RANK > 0 or None  # None: shown on a terminal
    for step in tqdm(range(first, steps), initial=first, total=steps, disable=off, leave=False):
        batch = next(batches)
        losses, grad_norm = take_step(settings, model, optimizer, guard, batch, step)
        done = step + 1
        optimizer.done.fill_(done)
        counts += losses.counts
        clock.tokens += int(batch.mask.sum())

        is_last = done == steps
        stopping = processes.total(torch.tensor(len(noted))) > 0 and not is_last
        saving = (stopping or done % settings.save_every == 0) and not is_last
        logging = done % settings.log_every == 0 or is_last
        finite = True
        if logging or saving:  # the device is asked now, and in no step between
            finite = guard.read(settings, log, is_last)
        if logging and finite:
            log_step(settings, log, model, batch, step, losses, grad_norm, clock)
            all_learn = all_learn or check_inert(model, optimizer, counts)
        with clock.paused():
            after_step(done)
        if saving and finite:
            save_state(settings, model, optimizer, log)
        if stopping:
            saved = f"step {done} of {steps} is saved in {settings.out}, go on with --resume"
            number = noted[0] if noted else signal.SIGTERM  # another process's
            raise run.Stopped(saved if finite else "", 128 + number)
    model.eval()


def take_step(settings, model, optimizer, guard, batch, step):
    """-> its losses, and the norm of its gradients."""
    # dropout: the step's own
    torch.manual_seed((settings.seed * 1_000_003 + step + processes.RANK * 7_919) % 2**63)
    rate = learning_rate(step, settings.steps, settings)
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    losses = forward_backward(model, batch, settings)
    # where this is 1, AdamW changes nothing: torch's own way, which its GradScaler takes too
    optimizer.found_inf = guard.look(losses, step + 1)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()
    optimizer.zero_grad()
    return losses, processes.whole(grad_norm)


class StepLosses(NamedTuple):
    """Of a whole step and all processes; no gradients. Without adapters that are chosen: 0."""

    cross_entropy: torch.Tensor
    balance: torch.Tensor  # (L,)
    counts: torch.Tensor  # (L, E)
    adapter_balance: torch.Tensor | int = 0  # (L,)
    adapter_counts: torch.Tensor | int = 0  # (L, M)


def forward_backward(model, batch, settings):
    """One step's gradients. Its rows come at once; or in parts, of --micro_batch rows and of each
    process, whose losses add up."""
    n_labels, n_tokens = count_labels(batch.labels), int(batch.mask.sum())
    parts = []
    for rows in processes.micro_batches(batch, settings.micro_batch or settings.batch_size):
        loss, losses = loss_of(model, rows, settings, n_labels, n_tokens)
        # sharded gradients are averaged over the processes, and should be summed
        (loss * processes.WORLD).backward()
        parts.append(losses)
    return StepLosses(*map(sum, zip(*parts)))


def loss_of(model, rows, settings, n_labels, n_tokens):
    """The loss of a step with so many labels and tokens, or of a part of its rows -> loss, with its
    graph; StepLosses."""
    input_ids, labels, mask = rows
    input_ids, mask = input_ids.to(settings.device), mask.to(settings.device)
    # labels stay on the CPU, where those that count are found without waiting for the GPU;
    # no attention mask: padding is on the right, where no token sees it
    output = model(input_ids, labels=labels, loss_divisor=n_labels)
    balance, counts = balance_losses(output.routings, mask, n_tokens)
    loss = output.loss + settings.balance * balance.mean()
    losses = StepLosses(processes.total(output.loss), processes.total(balance), counts)
    if settings.variant == "perft_r":
        adapters = [routing.adapter for routing in output.routings]
        balance, counts = balance_losses(adapters, mask, n_tokens)
        loss = loss + settings.adapter_balance * balance.mean()
        balance = processes.total(balance)
        losses = losses._replace(adapter_balance=balance, adapter_counts=counts)
    return loss, losses


def balance_losses(routings, mask, tokens):
    """moe.load_balancing_loss of each layer, of a part of a step's `tokens` -> losses (L,), which
    add up over the parts, and the choices of all processes (L, E).

    The shares f are those of all processes, and the loss is linear in P: the processes' terms sum
    exactly. (Micro-batches each have their own f.)
    """
    counts = torch.stack([expert_counts(routing, mask) for routing in routings])
    counts = processes.total(counts)  # (L, E)
    losses = []
    for routing, load in zip(routings, shares(counts)):
        losses.append(load_balancing_loss(routing, mask, load, tokens))
    return torch.stack(losses), counts


def count_labels(labels):
    """Of rows (B, T): the first token is never predicted."""
    return int((labels[:, 1:] != -100).sum())


def learning_rate(step, steps, settings):
    """Linear warm-up to settings.lr, linear decay to 0 after the last step."""
    warm = (step + 1) / settings.warmup
    decayed = (steps - step) / max(steps - settings.warmup, 1)
    return settings.lr * min(warm, decayed, 1.0)


def compile_blocks(model):
    """Each block by itself: equal blocks share their graphs."""
    torch._dynamo.config.recompile_limit = 64  # ESFT: a graph for each number of experts
    for block in model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)


# What a variant does to the base -----------------------------------------------------------------


def edit_for(args, config, tokenizer, data):
    """-> edit(model), which attaches what trains, before the model has memory, and returns it;
    notes to print; and of ESFT what esft.save_scores saves."""
    if args.variant == "scratch":
        return lambda model: model.requires_grad_(True), [], None
    hub.Tensors(args.base or EMBEDDED).check_sizes(config)
    if args.variant in ESFT:
        return edit_for_esft(args, config, tokenizer, data)
    options = adapter_options(args)
    if args.experts:
        options["experts"] = esft.read_config(args.experts, config).experts

    def edit(model):
        torch.manual_seed(args.seed)  # adapters start alike on every device
        return perft.apply_perft(model, **options)

    return edit, perft.warnings_for(PerftConfig(**options), config), None


def edit_for_esft(args, config, tokenizer, data):
    """Score the experts, and choose unless a file says which."""
    esft_config = None
    if args.experts not in (None, "random"):
        esft_config = esft.read_config(args.experts, config)
    else:  # found out now, and not after all is scored
        esft.bind_groups(torch.zeros(1, config.num_experts), args.bind_groups)
    check_memory(args, config, lambda model: model.requires_grad_(False))
    print("    a sample is read now, to score the experts, of which some then train")
    usage = read_sample(args, config, tokenizer, data)
    kind = "gate_share" if args.gate_share else args.variant.removeprefix("esft_")
    scores = esft.expert_scores(*usage, config.num_experts_per_tok, kind)
    notes = []
    if esft_config is None:
        chosen = esft.select_groups(scores, args.p, args.bind_groups)
        notes = esft.warnings_for(esft.bind_groups(scores, args.bind_groups), args.p)
        if args.experts == "random":
            chosen = esft.random_experts(chosen, config.num_experts, args.seed)
        esft_config = esft.EsftConfig(chosen)
    if args.train_router:
        esft_config = esft_config._replace(train_router=True)
    print(esft.describe_choice(esft_config.experts, usage))
    how = {
        "task": args.task or args.data,
        "kind": kind,
        "p": args.p,
        "experts": args.experts or "by score",
    }
    return lambda model: esft.apply_esft(model, *esft_config), notes, (usage, scores, how)


def read_sample(args, config, tokenizer, data):
    """How rows of the task use the experts of the base, which is gone afterwards."""
    examples = data.train[: args.score_rows]
    size = args.micro_batch or args.batch_size
    batches = (
        dataset.pad_batch(examples[i : i + size], tokenizer.pad_id, args.device)
        for i in range(0, len(examples), size)
    )
    model = eval.load_model(args.base, config, args.dtype, args.device)
    return esft.collect(model, batches)


def build(args, config, edit):
    """The model with all that trains. Of several processes none ever holds the whole of a base."""
    if args.variant != "scratch":
        return eval.load_model(args.base, config, args.dtype, args.device, edit)
    torch.manual_seed(args.seed)
    model = edit(MoETransformer(config))  # every process draws it all, and keeps its share
    processes.cut(model, args.device)
    return model.to(args.device)


def make_optimizer(model, args) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    norms = [p for p in trained if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": norms, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, args.beta2),
        eps=1e-8,
        weight_decay=args.weight_decay,
        fused=True,
    )
    for p in trained:  # made here, not at the first step, so that a saved state has a place to go
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    # ours, beside AdamW's: the steps of the run, of which "step" counts those that changed it
    optimizer.done = torch.zeros(())
    return optimizer


# What is measured --------------------------------------------------------------------------------


VALIDATION_ROWS = 90  # of each skill; the smallest, lexicon_new, has 94


@torch.compiler.set_stance("force_eager")  # a few batches, of other lengths: not worth a graph
def measure(settings, model, tokenizer, data, when, split="test"):
    """-> a record for metrics.jsonl, with its text for the screen.

    --task: accuracy on it, and how much of the pre-training families is still there.
    --data: loss of the held-out rows, whatever the split.
    """
    if settings.data and data.held_out is None:
        return {"text": f"no rows are held out to measure {when} training"}
    if settings.data:
        loss = held_out_loss(settings, model, data.held_out, tokenizer.pad_id)
        text = f"cross-entropy of {len(data.held_out)} held-out rows {when}: {loss:.4f}"
        return {"text": text, "held_out": loss}
    names = list(skills.FAMILIES)
    if settings.task:
        names.insert(0, settings.task)
    if split == "test":
        rows, task = settings.eval_rows, settings.task
    else:
        rows, task = VALIDATION_ROWS, None  # as many of each skill
    accuracy = eval.accuracies(model, tokenizer, names, rows, task, split)
    text = f"accuracy {when}: "
    if settings.task:
        text += f"{settings.task} {100 * accuracy[settings.task]:.1f} %, "
    text += eval.kept_text(accuracy, settings.task)
    if split == "test":
        others = [
            f"{name} {100 * accuracy[name]:.0f}" for name in accuracy if name != settings.task
        ]
        text += f"\n    {' '.join(others)}"
    return {"text": text, "accuracy": accuracy, "kept": eval.kept(accuracy, settings.task)}


@torch.no_grad()
def held_out_loss(settings, model, held_out, pad_id):
    """Mean cross-entropy over the labels of the held-out rows."""
    was_training = model.training
    model.eval()
    total = n_labels = 0
    size = settings.micro_batch or settings.batch_size
    for cut in dataset.epoch_batches(held_out.lengths(), size, "held out"):
        rows = [held_out[i] for i in cut]
        input_ids, labels, _ = dataset.pad_batch(rows, pad_id, settings.device)
        n = count_labels(labels)
        total += n * model(input_ids, labels=labels).loss.item()
        n_labels += n
    model.train(was_training)
    return total / n_labels


def measure_after(settings, data, measure_when, log, done):
    """What is measured after a step, if anything: where an epoch ends, and every --eval_every."""
    by_epochs = settings.epochs and data.held_out and done < settings.steps
    if by_epochs and done % data.steps_per_epoch == 0:
        record = measure_when(f"after epoch {done // data.steps_per_epoch}")
        log.write(event="epoch", step=done, **record)
    if settings.eval_every and done % settings.eval_every == 0:
        record = measure_when(f"at step {done}, validation rows", "validation")
        log.write(event="eval", step=done, **record)


# The log -----------------------------------------------------------------------------------------


class Clock:
    """How fast the steps are, without what is measured between them."""

    def __init__(self, first):
        self.first = first  # step
        self.begun = self.since = time.perf_counter()
        self.tokens = 0  # since then

    @contextmanager
    def paused(self):
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin

    def speed(self):
        """Tokens a second, since it was asked last."""
        now = time.perf_counter()
        speed = self.tokens / (now - self.since)
        self.tokens, self.since = 0, now
        return speed

    def left(self, done, steps):
        """Seconds to the last step, measuring included."""
        seconds = time.perf_counter() - self.begun
        return seconds / (done - self.first) * (steps - done)


def log_step(settings, log, model, batch, step, losses, grad_norm, clock):
    """A line of the screen and of metrics.jsonl."""
    speed, seconds_left = clock.speed(), clock.left(step + 1, settings.steps)
    seconds = int(batch.mask.sum()) / speed
    peak_share = share_of_peak(model, batch, losses.counts, settings.device, seconds)
    load = shares(losses.counts)
    record = {
        "step": step + 1,
        "cross_entropy": losses.cross_entropy.item(),
        "balance": losses.balance.mean().item(),
        "lr": learning_rate(step, settings.steps, settings),
        "grad_norm": grad_norm.item(),
        "tokens_per_second": speed,
        "peak_share": peak_share,
        "memory": peak_memory(settings.device),
        "largest_load": load.max().item(),
    }
    line = (
        "{step:6} {cross_entropy:13.4f} {balance:8.3f} {lr:9.2e} {grad_norm:9.3f} "
        "{tokens_per_second:9,.0f} {gb:6.2f} GB {largest_load:6.3f}"
    )
    text = line.format(**record, gb=record["memory"] / 1e9)
    if peak_share is not None:
        text += f"   {100 * peak_share:.1f} % of the peak"
    if settings.variant == "perft_r":
        record["adapter_balance"] = losses.adapter_balance.mean().item()
        record["adapter_load"] = shares(losses.adapter_counts).tolist()
        text += f"   adapters: balance {record['adapter_balance']:.3f}"
    if seconds_left and not sys.stderr.isatty():  # where there is no bar that says it
        text += f"   {tqdm.format_interval(seconds_left)} left"
    log.write(text, event="step", **record, expert_load=load.tolist())


def peak_memory(device):
    """Bytes: of the GPU's allocator, or of this process."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else run.peak_memory()


# bf16 products without sparsity, operations a second, by the makers' data sheets. Of two names that
# fit a device the first counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def share_of_peak(model, batch, counts, device, seconds):
    """The part of all devices' peak (MFU) that a step takes; None if that is unknown."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    for part, peak in PEAKS.items():
        if part in name:
            return flops_of_step(model, batch, counts) / (seconds * peak * processes.WORLD)
    return None


def flops_of_step(model, batch, counts):
    """Operations of a step's matrix products: for each weight and each token that meets it 2
    forward, 2 for the gradient of what is multiplied, 2 for the weight's own where it trains.

    counts (L, E): the choices, of which ESFT's experts have some.
    Too much, by the gradients that the lowest layer does not need above frozen embeddings; nothing
    that is computed twice counts twice.
    """
    c, adapted = model.config, getattr(model, "adapter_config", None)
    lengths = batch.mask.sum(1)
    keys = (lengths * (lengths + 1)).sum().item() / 2  # to which tokens attend
    # two products forward, four for their gradients
    flops = 12 * keys * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    for name, p in model.named_parameters():
        tokens = lengths.sum().item() * perft.share_met(model, name, p)
        products = 2 + p.requires_grad
        if p is model.lm_head.weight:
            tokens = count_labels(batch.labels)
        elif p.dim() == 1 or p is model.embed_tokens.weight:
            products = 0
        elif products == 3 and ".experts." in name and isinstance(adapted, esft.EsftConfig):
            # its own gradient alone: all else is of the bank, which is a parameter too
            layer = int(name.split(".")[1])
            tokens = counts[layer][adapted.experts[layer]].sum().item() / len(p)
            products = 1
        flops += 2 * products * p.numel() * tokens
    return flops


# What could go wrong -----------------------------------------------------------------------------


def check_memory(args, config, edit):
    """Print the memory that a step takes for sure, by a model that takes none itself. ValueError if
    the device has not as much."""
    with torch.device("meta"):
        model = edit(MoETransformer(config).to(hub.DTYPES[args.dtype]))
    parameters = list(model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad) // processes.WORLD
    frozen = sum(p.nbytes for p in parameters) // processes.WORLD - trained
    total = frozen + 4 * trained  # gradients, and AdamW's two moments
    on_gpu = args.device.startswith("cuda")
    free = torch.cuda.mem_get_info(args.device)[0] if on_gpu else run.free_memory()
    if total > free:
        raise ValueError(
            f"at least {total / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free; try "
            "a lower --rank, --dtype bfloat16, or several GPUs (torchrun)"
        )
    line = (
        "memory in GB a device: weights {:,.2f}, trains {:,.2f}, gradients {:,.2f}, "
        "AdamW {:,.2f}; activations come on top"
    )
    print(line.format(*(n / 1e9 for n in (frozen, trained, trained, 2 * trained))))


IN_A_ROW = 10  # steps that are not finite: one may be chance, so many are not


class Guard:
    """Finds numbers that are not finite in their step, without waiting for the device: such a step
    changes neither weights nor moments, and is told of when the device is asked anyway, at the next
    line of the log, or save.
    """

    def __init__(self, model):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.trained = trained[::-1]
        # in the order in which a step computes: the first that is not finite is nearest the cause
        self.places = [f"the router of layers.{i}" for i in range(len(model.layers))]
        self.places += ["the loss", *(f"the gradient of {name}" for name, _ in self.trained)]
        self.looks = []  # (step, a number for each place), since the device was asked
        self.bad_in_a_row = 0  # steps
        self.first_bad = ""

    def look(self, losses, step):
        """-> 1 if this step is to change nothing, else 0."""
        norms = []
        for _, p in self.trained:
            grad = losses.balance.new_zeros(()) if p.grad is None else processes.held(p.grad)[0]
            norms.append(grad.norm())
        norms = processes.total(torch.stack(norms))
        values = torch.cat((losses.balance, losses.cross_entropy[None], norms))
        self.looks.append((step, values))
        return (~values.isfinite().all()).float()

    def read(self, settings, log, is_last):
        """Ask the device; tell the log where bad steps began. Is the latest one good? ValueError if
        it is the last of many that are not, or of the run."""
        for step, values in self.looks:
            finite = values.isfinite().tolist()
            if all(finite):
                self.bad_in_a_row = 0
                continue
            if self.bad_in_a_row == 0:
                place = self.places[finite.index(False)]
                self.first_bad = f"{place} was not finite in step {step}"
                text = f"warning: {self.first_bad}, which changed nothing"
                log.write(text, event="not_finite", step=step, what=self.first_bad)
            self.bad_in_a_row += 1
        self.looks.clear()
        if self.bad_in_a_row >= IN_A_ROW or (self.bad_in_a_row and is_last):
            raise ValueError(
                f"{self.first_bad}, nor was any step since; lower --lr (it is {settings.lr}): "
                f"{what_is_where(settings)}"
            )
        return self.bad_in_a_row == 0


MANY = 1000  # choices, among which are some that a label depends on


def check_inert(model, optimizer, counts):
    """ValueError if a tensor that trains never had a gradient, of which AdamW's first moment would
    know: attached, listed, stepped, and inert is the commonest silent failure. -> was every layer
    looked at?

    Looked at from the second step on: where B starts at 0, A has no gradient in the first. A layer
    is left for later while its chosen experts have counts (L, E) below MANY: not every token has a
    label that depends on it. An adapter router that was warned about is never looked at.
    """
    if max(state["step"].item() for state in optimizer.state.values()) < 2:
        return False
    config = getattr(model, "adapter_config", None)
    chosen = getattr(config, "experts", None) or []
    too_early = [f"layers.{i}." for i, ids in enumerate(chosen) if counts[i][ids].sum() < MANY]
    untaught = []
    if isinstance(config, PerftConfig) and perft.warnings_for(config, model.config):
        untaught = ["adapters.router"]
    for name, p in model.named_parameters():
        if not p.requires_grad or any(part in name for part in [*too_early, *untaught]):
            continue
        if not processes.whole(optimizer.state[p]["exp_avg"]).any():
            raise ValueError(
                f"{name} trains and never had a gradient: attached but inert; is its output "
                "detached, or does no token reach it?"
            )
    return not too_early


@contextmanager
def explaining_end(text):
    """What text() says, where things are and how to go on, is told to who stops the work inside, or
    has too little memory for it, or lost another process."""
    try:
        with run.last_words(text):
            yield
    except (RuntimeError, MemoryError) as error:
        if processes.is_alone(error):
            cause = "another process is gone"
        elif isinstance(error, MemoryError) or "memory" in str(error):
            cause = "out of memory; lower --micro_batch or --batch_size"
        else:
            raise
        raise ValueError(f"{cause}: {text()}") from None


def what_is_where(args):
    """Of a run that ends before its time, once it has its folder."""
    weights = weights_file(args)
    if weights.exists():
        flag = f"--base {weights.parent}" if args.variant == "scratch" else f"--adapter {args.out}"
        return f"training is done, {weights} is saved; accuracies: eval.py {flag}"
    if (Path(args.out) / STATE).exists():
        return f"an earlier step is saved in {args.out}, go on with --resume"
    return "nothing was saved, begin again with --overwrite"


# Going on ----------------------------------------------------------------------------------------

STATE = "state.safetensors"  # of an unfinished run: what a step changes
# What may differ in a run that goes on: its rate; what changes no number of a step; the machine.
MAY_DIFFER = """lr
    resume overwrite out log_every save_every checkpoint_activations
    threads torch world device""".split()
# What a run folder may hold beside config.json and metrics.jsonl: what --overwrite removes.
RUN_FILES = (
    STATE,
    "run.svg",
    perft.CONFIG,
    perft.WEIGHTS,
    esft.CONFIG,
    esft.WEIGHTS,
    esft.SCORES,
    esft.PICTURE,
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    *(f"eval_generate/{name}" for name in eval.EVAL_FILES),
    *(f"eval_likelihood/{name}" for name in eval.EVAL_FILES),
)


def settings_of(args, config, data):
    """Every value in force: the flags, and what follows from the base and the rows."""
    settings = Namespace(**vars(args))
    settings.steps = data.steps
    settings.max_length = data.max_length
    settings.template = data.template
    if args.balance is None:
        settings.balance = config.router_aux_loss_coef
    if args.variant == "perft_r" and args.adapter_balance is None:
        settings.adapter_balance = config.router_aux_loss_coef
    if args.compile is None:
        settings.compile = args.device.startswith("cuda")
    # paths that hold from everywhere
    if args.base:
        settings.base = os.path.abspath(args.base)
    if args.data and args.data not in dataset.NAMED:
        settings.data = os.path.abspath(args.data)
    return settings


def facts_of(model, data):
    """What else config.json says of a run."""
    whole = perft.summed("all", perft.what_trains(model))
    return {
        "data_sha256": data.sha256,
        "world": processes.WORLD,
        "torch": torch.__version__,
        "base_config": model.config.to_dict(),
        "chosen": getattr(getattr(model, "adapter_config", None), "experts", None),
        "trains": whole.parameters,
        "activated": whole.activated,  # of those, by one token
    }


def configuration_text(settings):
    words = ["configuration:"]
    for name, value in vars(settings).items():
        if value is not None and value is not False:
            words.append(f"{name}={value}")
    return textwrap.fill(" ".join(words), 100, subsequent_indent="    ", break_on_hyphens=False)


def advice(settings):
    """What a user should know of settings that are likely not meant."""
    found = BY_VARIANT[settings.variant]["lr"]
    notes = []
    if settings.warmup >= settings.steps:
        notes.append("--warmup is not shorter than the run, whose rate never comes down")
    if settings.lr > 100 * found:
        notes.append(
            f"--lr {settings.lr} is far above what {settings.variant} was found to bear, {found}: "
            "training will likely diverge"
        )
    recipes = [name for name, recipe in RECIPES.items() if settings.variant in recipe.variants]
    if settings.base and not settings.recipe and settings.lr == found and recipes:
        notes.append(
            f"--lr {settings.lr} was found on the embedded model; a real base wants less; --data "
            f"with --recipe {' or '.join(recipes)} has the papers' settings"
        )
    if settings.base and not settings.data and not eval.is_embedded(settings.base):
        notes.append("--task is of the embedded world, which this base does not know; give --data")
    return notes


def open_folder(content, done):
    """From here on a run that is replaced is lost. metrics.jsonl comes first: it makes a folder a
    run's, whatever happens next. content: of config.json. done: the steps of a run that goes
    on."""
    if processes.RANK > 0:
        return run.Log(None, None)
    out = Path(content["out"])
    # once more: somebody may have put a run there meanwhile
    run.check_run_folder(out, done, content["overwrite"], RUN_FILES)
    if not done:
        for name in RUN_FILES:
            (out / name).unlink(missing_ok=True)
    log = run.Log(out / "metrics.jsonl", done or None)
    run.write_json(out / "config.json", content, indent=2)
    return log


def state_places(model, optimizer):
    """Everything that a step changes: the trained parameters, AdamW's moments and step counts."""
    table = {"done": hub.Place(optimizer.done)}
    for name, p in model.named_parameters():
        if p.requires_grad:
            table[f"param.{name}"] = hub.Place(p)
            for key, value in optimizer.state[p].items():
                table[f"{key}.{name}"] = hub.Place(value)
    return table


def save_state(settings, model, optimizer, log):
    log.sync()  # what belongs to the state is there before it
    hub.write_tensors(Path(settings.out) / STATE, state_places(model, optimizer))


def restore(content, model, optimizer):
    """Go on from the saved state of a run -> a record of that."""
    out = Path(content["out"])
    fixed = {name: value for name, value in content.items() if name not in MAY_DIFFER}
    then = run.read_json(out / "config.json")
    changed = run.changes(then, fixed)
    if changed:
        raise ValueError(f"--resume continues {out} as it was begun; changed: {changed}")
    hub.Tensors(out / STATE).fill(state_places(model, optimizer))
    done = optimizer.done.item()
    # of a tensor that never had a gradient 0; of all others the steps that changed something
    counts = {moments["step"].item() for moments in optimizer.state.values()} - {0}
    possible = done in range(1, content["steps"]) and len(counts) == 1
    if not possible or counts.pop() not in range(1, int(done) + 1):
        raise ValueError(
            f"{out / STATE}: holds numbers of steps that no run has done; begin again with "
            "--overwrite"
        )
    text = f"goes on after step {done:.0f}, with --lr {content['lr']}"
    number = run.changes(then, {"world": content["world"]})
    if number and content["dropout"]:
        text += f"; dropout differs by the number of processes: {number}"
    return {"text": text, "step": int(done), "lr": content["lr"]}


def weights_file(args):
    """What a run is for."""
    name = esft.WEIGHTS if args.variant in ESFT else perft.WEIGHTS
    if args.variant == "scratch":
        name = "model/model.safetensors"
    return Path(args.out) / name


def save(settings, model):
    """Write what was trained."""
    out = Path(settings.out)
    if settings.variant in ESFT:
        return esft.save(model, out)
    if settings.variant != "scratch":
        return perft.save_adapter(model, out)
    model.save_pretrained(out / "model", torch.bfloat16)
    for p in model.parameters():
        p.data.copy_(p.data.bfloat16())  # what is reported is what is in the file
    if processes.RANK == 0:
        for file in Path(settings.base or EMBEDDED).glob("tokenizer*.json"):
            shutil.copy(file, out / "model")


def close_run(settings, log, begun):
    """The state goes last: a run that is cut off before goes on from it and comes here again."""
    peak, seconds = peak_memory(settings.device), time.perf_counter() - begun
    text = f"took {seconds:,.0f} s and at most {peak / 1e9:.2f} GB of memory"
    log.write(text, event="memory", seconds=seconds, peak=peak)
    saved = weights_file(settings)
    size = saved.stat().st_size
    log.write(f"saved {saved} ({size:,} bytes)", event="saved", file=str(saved), bytes=size)
    log.sync()
    if processes.RANK == 0:
        out = Path(settings.out)
        pictures.draw(out)
        (out / STATE).unlink(missing_ok=True)


# Flags -------------------------------------------------------------------------------------------

ESFT = ("esft_token", "esft_gate")
VARIANTS = (*PERFT, *ESFT, *BASELINES, "scratch")
WITH_ROWS = VARIANTS[:-1]  # scratch draws rows without end
ADAPTERS = (*PERFT, *LORA)
KEEP_THE_BASE = (*PERFT, *ESFT, *LORA, "router")  # all of it, or float32 masters of what trains
TASKS = (*skills.TARGETS, *skills.FAMILIES)
# choices that are not every variant's
DTYPES_OF = {"float32": VARIANTS, "bfloat16": KEEP_THE_BASE}
ROWS_DRAWN = number(int, 1, most=eval.MOST_ROWS)  # they are all held in memory
BETA = number(float, 0, most=0.999999)


def perft_paper(variant, given):
    """The settings of the papers and of the authors' code (2411.08212), beside what is the default
    anyway: alpha 2r, --kind lora, --init paper, --dropout 0.05, --held_out 120, AdamW (0.9, 0.999)
    with eps 1e-8 and no weight decay, --clip 1, linear decay.

    Their balance loss is transformers', which is K times ours on one layer, hence c * K. (It also
    pools all layers, which ours does not: moe.load_balancing_loss.)
    """
    config = Config.from_folder(given.get("base", EMBEDDED))
    mixtral = config.model_type == "mixtral"
    lora_on_commonsense = variant == "lora_qv" and given.get("data") == "commonsense"
    c = 0.02 if mixtral else 0.01
    return {
        "lr": 2e-5 if mixtral or lora_on_commonsense else 1e-5,
        "balance": c * config.num_experts_per_tok,
        "adapter_balance": c * given.get("top_k", PerftConfig.top_k),
        "batch_size": 16,
        "epochs": 3,
        "max_length": 256,
        "warmup": 100,
        "train_on_inputs": True,
    }


def esft_paper(variant, given):
    """The settings of the ESFT paper (2407.01906, section 4.3), and of its authors' code where the
    paper is silent (decay, beta2), beside what is the default anyway: p 0.2 for token and 0.1 for
    gate, labels on the answers, --clip 1, alpha 2r. What is theirs and not here: a constant rate,
    several samples in one row, half of the rows from an alignment set (for full and LoRA), and LoRA
    on every matrix of the model.
    """
    rates = {"full": 3e-5, "lora_qv": 1e-4, "lora_experts": 1e-4}
    return {
        "lr": rates.get(variant, 1e-5),
        "rank": 8,
        "batch_size": 32,
        "steps": None if "epochs" in given else 500,
        "epochs": None,
        "max_length": 4096,
        "warmup": 1,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "eval_every": 100,
    }


class Recipe(NamedTuple):
    settings: Callable  # (variant, what is given) -> values of flags
    variants: tuple[str, ...]


RECIPES = {
    "perft_paper": Recipe(perft_paper, (*PERFT, *BASELINES)),
    "esft_paper": Recipe(esft_paper, (*ESFT, *LORA, "full")),
}

FLAGS = [
    group(
        "model and rows",
        variant=Flag(VARIANTS, None, "what trains"),
        base=Flag("DIR", None, "model folder (the embedded data/tiny_olmoe)"),
        device=Flag("NAME", eval.DEVICE, "where"),
        threads=Flag(run.threads, 1, "of the CPU"),
        dtype=Flag(DTYPES_OF, "float32", "of the base"),
        data=Flag("FILE", None, "rows of a file, no task; with --help: their flags", WITH_ROWS),
    ),
    group(
        "task of the embedded world",
        task=Flag(TASKS, skills.DEFAULT_TARGET, "what to learn", WITH_ROWS, not_with="data"),
        train_rows=Flag(ROWS_DRAWN, 4000, "to draw", WITH_ROWS, not_with="data"),
        eval_rows=Flag(
            ROWS_DRAWN, 500, "test rows of the task, a fifth of it for each family", not_with="data"
        ),
    ),
    group(
        "rows of a file",
        recipe=Flag(RECIPES, None, "a paper's settings", only_with="data"),
        max_length=Flag(count, 1024, "tokens of a row, at most", only_with="data"),
        template=Flag(
            tasks.TEMPLATES, None, "of alpaca records' prompts (papers)", only_with="data"
        ),
        held_out=Flag(
            natural, 120, "rows kept out to measure on, as many as in the papers", only_with="data"
        ),
        epochs=Flag(
            count,
            1,
            "times through the rows, if --steps is not given",
            only_with="data",
            not_with="steps",
        ),
    ),
    group(
        "adapters",
        rank=Flag(count, PerftConfig.rank, "r", ADAPTERS),
        alpha=Flag(positive, None, "scale is alpha/r (2r)", ADAPTERS),
        dropout=Flag(from_zero, PerftConfig.dropout, "of the unit's input", ADAPTERS),
        shared_outer=Flag(ON, False, "one outer half for all experts", ("lora_experts",)),
        kind=Flag(CHOICES["kind"], PerftConfig.kind, "of the unit", PERFT),
        init=Flag(CHOICES["init"], PerftConfig.init, "weights at the start", PERFT),
        num_adapters=Flag(count, PerftConfig.num_adapters, "M", ("perft_d", "perft_r")),
        top_k=Flag(count, PerftConfig.top_k, "adapters of a token", ("perft_r",)),
        adapter_weights=Flag(
            CHOICES["adapter_weights"],
            PerftConfig.adapter_weights,
            "which router weighs, base as in the released OLMoE code",
            ("perft_r",),
        ),
        adapter_balance=Flag(
            from_zero, None, "c_adapter (router_aux_loss_coef of the base's config)", ("perft_r",)
        ),
    ),
    group(
        "experts and routers",
        experts=Flag(
            "FILE",
            None,
            "those of an expert_cfg.json only; ESFT: or 'random', as many, drawn by --seed",
            ("perft_e", "lora_experts", *ESFT),
        ),
        score_rows=Flag(count, 500, "rows that are read for the scores", ESFT),
        train_router=Flag(ON, False, "the pretrained routers too", (*PERFT, *ESFT)),
    ),
    group(
        "choice of the experts",
        gate_share=Flag(
            ON, False, "scores as shares of their layer's sum", ("esft_gate",), not_with="experts"
        ),
        p=Flag(fraction, 0.2, "score that a layer's choice reaches", ESFT, not_with="experts"),
        bind_groups=Flag(
            count, 1, "choose whole groups of so many, as a control", ESFT, not_with="experts"
        ),
    ),
    group(
        "optimisation (AdamW, warm-up, then linear decay to 0)",
        lr=Flag(positive, None, "peak rate"),
        steps=Flag(count, 200, "how many"),
        batch_size=Flag(count, 64, "rows a step"),
        warmup=Flag(count, 20, "steps"),
        weight_decay=Flag(from_zero, 0.0, "on matrices that train"),
        beta2=Flag(BETA, 0.999, "AdamW's memory of squared gradients"),
        clip=Flag(positive, 1.0, "gradient norm"),
        balance=Flag(from_zero, None, "c_base (router_aux_loss_coef of the base's config)"),
        train_on_inputs=Flag(ON_OFF, False, "labels on the prompt too, not only on the answer"),
        seed=Flag(natural, 0, "of weights, row order, dropout"),
    ),
    group(
        "run",
        out=Flag("DIR", None, "run folder"),
        overwrite=Flag(ON, False, "replace the run that the folder holds"),
        resume=Flag(ON, False, "continue the run that the folder holds"),
        log_every=Flag(count, 20, "steps a line"),
        eval_every=Flag(count, None, "steps between accuracies on validation rows, if any"),
        save_every=Flag(count, 50, "steps between states to resume from"),
        micro_batch=Flag(count, None, "rows at a time on a device (all of the batch)"),
        checkpoint_activations=Flag(ON, False, "compute blocks twice, keep only their inputs"),
        compile=Flag(ON_OFF, None, "compile the blocks (a minute at the start; on for cuda)"),
    ),
]

# Defaults that differ. The rates: with which the embedded model learns 99 % of kinship_new or more
# (assets/results.csv; router, which learns next to nothing, and scratch: one try each).
BY_VARIANT = {
    "perft_s": {"lr": 1e-3},
    "perft_d": {"lr": 3e-4},
    "perft_r": {"lr": 1e-3},
    "perft_e": {"lr": 1e-3},
    "esft_token": {"lr": 3e-3},
    "esft_gate": {"lr": 3e-3, "p": 0.1},  # the paper's p, as 0.2 for token
    "lora_qv": {"lr": 2e-3},
    "lora_experts": {"lr": 3e-3},
    "router": {"lr": 5e-3},
    "frozen_experts": {"lr": 3e-4},
    "full": {"lr": 1e-4},
    "scratch": {
        "lr": 3e-3,
        "steps": 8000,
        "batch_size": 96,
        "warmup": 200,
        "weight_decay": 0.1,
        "beta2": 0.98,
    },
}


def not_for(variant, others):
    return f"does not apply to --variant {variant}; it applies to {', '.join(others)}"


RANDOM_EXPERTS = ("experts", "random")  # as many as a choice would be: it has a p, too


def absent(variant, given):
    """The flags that a command does not have, and why."""
    why = {}
    for name, flag in [item for _, flags in FLAGS for item in flags.items()]:
        if flag.of and variant not in flag.of:
            why[name] = not_for(variant, flag.of)
        elif flag.only_with and flag.only_with not in given:
            why[name] = f"applies to --{flag.only_with} only"
        elif flag.not_with in given and (flag.not_with, given[flag.not_with]) != RANDOM_EXPERTS:
            why[name] = f"does not apply to --{flag.not_with}, which brings its own"
    return why


def defaults_of(variant, given):
    """Defaults other than those of the table."""
    out = f"out/{variant}"
    values = BY_VARIANT[variant] | {"out": out}
    if "base" in given:
        values["threads"] = None  # as torch likes; a small model is faster with one
    if "gate_share" in given:
        values["p"] = 0.25
    if "data" in given:
        values["steps"] = None
    if "recipe" in given:
        values |= RECIPES[given["recipe"]].settings(variant, given)
    begun = Path(given.get("out", out)) / "config.json"
    # at the rate of the run that is continued
    if "resume" in given and "lr" not in given and begun.is_file():
        rate = run.read_json(begun, lr=float).get("lr") or values["lr"]
        if rate < 0:
            raise ValueError(f"{begun}: lr is {rate}, which no run had; give --lr")
        values["lr"] = rate
    return values


def decide(given):
    """Of run.read_flags: this command's defaults, and which flags it lacks, and why."""
    variant = given.get("variant", "perft_s")  # whose page --help shows
    return defaults_of(variant, given), absent(variant, given)


def parse_args(argv=None) -> Namespace:
    try:
        args = run.read_flags(
            FLAGS,
            argv,
            decide,
            usage="python train.py --variant NAME [options]",
            description="Fine-tune a Mixture-of-Experts model; train.py's first page says how.",
        )
        check_args(args)
    except (ValueError, OSError) as error:
        run.refuse(str(error))
    return args


def check_args(args):
    """ValueError for values that cannot go together."""
    if args.variant is None:
        raise ValueError("--variant is required, it says what trains")
    eval.check_device(args.device)
    only = {"dtype": DTYPES_OF[args.dtype]}
    if args.recipe:
        only["recipe"] = RECIPES[args.recipe].variants
    for name, others in only.items():
        if args.variant not in others:
            raise ValueError(f"--{name} {vars(args)[name]} {not_for(args.variant, others)}")
    if args.kind == "parallel" and args.alpha is not None:
        raise ValueError("--alpha does not apply to --kind parallel, which has no scale")
    if args.variant in ADAPTERS:
        args.alpha = PerftConfig(**adapter_options(args)).alpha
        if args.experts == "random":
            raise ValueError("--experts random is a control for ESFT; adapters take a file")


def adapter_options(args):
    """The flags that are fields of PerftConfig; --experts is a file, which is not read yet."""
    names = PerftConfig.__dataclass_fields__.keys() - {"experts"}
    return {name: vars(args)[name] for name in names if vars(args)[name] is not None}


# The command -------------------------------------------------------------------------------------


@run.command
def main(argv=None):
    args = parse_args(argv)
    if processes.RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one process speaks for all)
    out = Path(args.out)
    does = "goes on" if args.resume else "begins again"
    nothing = f"nothing was written, the same command {does}"
    with run.locked(out), explaining_end(lambda: nothing):
        run.check_run_folder(out, args.resume, args.overwrite, RUN_FILES)
        args.device = processes.start(args.device)
        train(args)
    with explaining_end(lambda: what_is_where(args)):
        processes.stop()


if __name__ == "__main__":
    main()
