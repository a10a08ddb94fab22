"""Fine-tune a Mixture-of-Experts model: one visible loop for every method, and for training the embedded base itself.

    python train.py --variant perft_s                      the embedded base learns sixteen new words: a minute on a CPU
    python train.py --variant perft_r --num_adapters 8     eight adapters with a router of their own
    python train.py --variant perft_s --data rows.json     a file of alpaca or messages records (data/dataset.py)
    python train.py --variant perft_r --base data/downloads/OLMoE-1B-7B-0924 --data commonsense --recipe perft_paper
    python train.py --variant scratch                      re-make its weights (into out/scratch): about an hour

What happens, in this order, on the screen and in the run folder (--out; config.json and metrics.jsonl):

    configuration -> table of what trains -> accuracy before -> steps -> accuracy after -> what was saved, and where

What is measured before and after: exact-match accuracy for --task, cross-entropy of held-out rows for --data.

The loss of a step:

    cross-entropy over the labels + c_base * balance(base routers) + c_adapter * balance(adapter routers, PERFT-R only)

On several GPUs the same command stands behind torchrun, and gives the same losses (with --dropout 0, which processes
draw differently, and a step in one part; data/shard.py):

    torchrun --nproc_per_node=2 train.py --variant perft_s --base path/to/Mixtral-8x7B-v0.1 --dtype bfloat16 --data ...

balance is moe.load_balancing_loss, averaged over the layers: 1 is even. The labels are the answer and the end token;
--train_on_inputs adds the prompt, as the papers do. The base routers are frozen in most variants, yet c_base still
moves adapters: those of earlier layers change what later routers see.

A step depends on the seed, its own number and the number of processes only (data order, dropout), so a run that was
stopped and continued with --resume gives the numbers of one that was not. --micro_batch runs a step's rows in parts,
for less memory; the parts' cross-entropies are divided by the labels of the whole step and add up. The balance loss of
a step is then the mean of its parts', which is not quite the balance loss of the whole.
"""

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import esft
from data import skills
from data.checkpoint import read_json, read_safetensors, write_safetensors, write_text
from data.dataset import NAMED, Data, Dataset, batches, encode_rows, epoch_batches, load_data, pad_batch
from data.flags import ESFT, parse_args, score_kind
from data.report import Memory, memory_estimate
from data.run import InertCheck, Log, check_finite, check_same_run, peak_memory, state_tensors, steps_done
from data.shard import RANK, WORLD, meet, micro_batches, shard, start, stop, total, whole
from data.tokenizer import Tokenizer
from eval import DTYPES, RUN_FILES, TINY, accuracies, load_base, load_config
from model import MoETransformer, hub_tensors
from moe import Routing, expert_counts, load_balancing_loss
from perft import PerftConfig, apply_perft, report, save_adapter, warnings_for

# The step ------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, args) -> float:
    """Linear warm-up to args.lr, linear decay to 0 after the last step."""
    return args.lr * min((step + 1) / args.warmup, (args.steps - step) / max(args.steps - args.warmup, 1), 1.0)


def mean_balance(routings: list[Routing], mask, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Balance loss, mean of the layers, of a part of a step's `tokens` (parts add up) -> it, and (L, E) choices counted
    over all processes. The shares f are those of all processes and the loss is linear in P: their parts sum exactly."""
    counts = total(torch.stack([expert_counts(routing, mask) for routing in routings]))  # (L, E)
    loads = counts.float() / counts.sum(-1, keepdim=True)
    losses = [load_balancing_loss(routing, mask, load, tokens) for routing, load in zip(routings, loads)]
    return torch.stack(losses).mean(), counts


def make_optimizer(model, args) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},  # norms
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), eps=1e-8, fused=True)
    for p in trained:  # made here, not at the first step, so that a saved state has somewhere to go
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
    return optimizer


# The run -------------------------------------------------------------------------------------------------------------


class Built(NamedTuple):
    model: MoETransformer  # with what trains
    tokenizer: Tokenizer
    data: Data
    notes: list[str]  # to print
    write_scores: Callable  # ESFT's, of (model, folder)
    estimate: Memory


def build(args) -> Built:
    """All that a run needs. What trains is attached before the model has memory, so that of several processes none ever
    holds the whole."""
    config, tokenizer = load_config(args.base)
    data = load_data(args, tokenizer, config.max_position_embeddings)
    notes, write_scores = [], lambda model, folder: None
    if args.variant == "scratch":
        memory = estimate(config, lambda model: model, args, data)
        torch.manual_seed(args.seed % 2**63)
        model = MoETransformer(config).requires_grad_(True)  # every process draws it all, and keeps its share
        shard(model, args.device)
        return Built(model.to(args.device), tokenizer, data, notes, write_scores, memory)
    if args.variant in ESFT:

        def attach(model):  # the choice as it then stands
            also = bool(args.train_router) or choice.train_router, choice.train_non_experts
            return esft.apply_esft(model, choice.experts, *also)

        known, E = args.experts not in (None, "random"), config.num_experts
        if known:
            choice = esft.read_choice(args.experts, config)
        else:  # at most so many reach p where a layer's scores sum to 1; a guess for gate
            assumed = math.ceil(args.p * E)
            choice = esft.EsftConfig([list(range(assumed))] * config.num_hidden_layers)
        memory = estimate(config, attach, args, data)
        if not known:
            print(f"    with {assumed} of {E} experts chosen; a sample is read now, to choose")
        model = load_base(args.base, args.dtype, args.device)[0]
        choice, notes, usage, write_scores = choose_experts(args, model, tokenizer, data, choice if known else None)
        memory = memory if known else estimate(config, attach, args, data)
    else:
        options = {k: v for k, v in vars(args).items() if k in PerftConfig.__dataclass_fields__ and v is not None}
        if args.experts:
            options["experts"] = esft.read_choice(args.experts, config).experts

        def attach(model):
            torch.manual_seed(args.seed % 2**63)  # adapters start alike on every device, on every number of devices
            return apply_perft(model, **options)

        memory = estimate(config, attach, args, data)
    if args.variant in ESFT and WORLD == 1:
        attach(model)
    else:
        tensors = esft.current_tensors if args.variant in ESFT else hub_tensors
        model = None  # the one that was scored
        model = MoETransformer.from_pretrained(args.base or TINY, DTYPES[args.dtype], args.device, attach, tensors)
        model.config.eos_token_id = config.eos_token_id
    if args.variant in ESFT:
        notes.append(esft.report(model, usage))
    else:
        notes += [f"warning: {note}" for note in warnings_for(model.adapter_config, config)]
    return Built(model, tokenizer, data, notes, write_scores, memory)


def estimate(config, attach, args, data: Data) -> Memory:
    """Say how much memory a step will take, before there are weights."""
    with torch.device("meta"):
        shapes = attach(MoETransformer(config).to(DTYPES[args.dtype]))
    shapes.checkpoint_activations = args.checkpoint_activations
    rows = min(args.micro_batch or args.batch_size, -(-args.batch_size // WORLD))
    length = max(data.train.lengths()) if data.train else 64  # scratch: about the longest of its rows
    memory = memory_estimate(shapes, rows, length, args.compile, WORLD)
    print(memory)
    return memory


def choose_experts(args, model, tokenizer, data: Data, choice: esft.EsftConfig | None):
    """ESFT: score the experts on rows of the task, and choose if no choice was given -> it, what to print, how the
    experts are used, and what writes the scores into a folder."""
    kind = score_kind(args)
    if args.data:
        examples = [data.train[i] for i in range(min(args.score_rows, len(data.train)))]
    else:
        examples = encode_rows(skills.sample(args.task, "train", args.score_rows, args.seed), tokenizer)
    rows = args.micro_batch or args.batch_size
    cuts = [examples[i : i + rows] for i in range(0, len(examples), rows)]
    usage = esft.collect(model, (pad_batch(cut, tokenizer.pad_id, args.device) for cut in cuts))
    scores = esft.expert_scores(*usage, model.config.num_experts_per_tok, kind)
    notes = []
    if choice is None:
        chosen, notes = esft.select_experts(scores, args.p, args.bind_groups), esft.warnings_for(scores, args.p)
        if args.experts == "random":
            chosen = esft.random_experts(chosen, model.config.num_experts, args.seed)
        choice = esft.EsftConfig(chosen)
    notes = [f"warning: {note}" for note in notes]
    how = {"task": args.task or args.data, "kind": kind, "p": args.p, "experts": args.experts or "by score"}
    return choice, notes, usage, lambda model, folder: esft.save_scores(model, folder, usage, scores, **how)


def train(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    args.compile = args.device.startswith("cuda") if args.compile is None else args.compile
    out, scratch = Path(args.out), args.variant == "scratch"
    model, tokenizer, data, notes, write_scores, memory = build(args)
    args.balance = model.config.router_aux_loss_coef if args.balance is None else args.balance
    if args.variant == "perft_r" and args.adapter_balance is None:
        args.adapter_balance = model.config.router_aux_loss_coef
    if args.warmup >= args.steps:
        reached = learning_rate(args.steps - 1, args)
        notes.append(f"warning: --warmup {args.warmup} is not shorter than the run: its last rate is {reached:.1e}")
    optimizer = make_optimizer(model, args)
    base = os.path.abspath(args.base) if args.base else None  # a path that holds from everywhere
    file = args.data if args.data in NAMED else args.data and os.path.abspath(args.data)
    config = vars(args) | {"base": base, "data": file, "data_sha256": data.sha256, "world": WORLD}
    config |= {"torch": torch.__version__, "base_config": model.config.to_dict()}
    if args.resume:
        check_same_run(read_json(out / "config.json"), config)
        read_safetensors(out / "state.safetensors", state_tensors(model, optimizer))
    first = steps_done(optimizer)

    settings = " ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None and v is not False)
    print(textwrap.fill(f"configuration: {settings}", 110, subsequent_indent="    ", break_on_hyphens=False))
    print("\n".join([*data.notes, *notes, report(model)]))
    before = None if args.resume else measure(model, tokenizer, data, args)

    out.mkdir(parents=True, exist_ok=True)  # from here on files are written, and a run that is replaced is lost
    log = Log(out / "metrics.jsonl", first if args.resume else None)
    if not args.resume:
        for old in RUN_FILES if RANK == 0 else ():
            (out / old).unlink(missing_ok=True)
        write_scores(model, out)
        write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
        log.write(before.text("before"), event="before", **before.record)
    run_steps(args, model, tokenizer, data, optimizer, first, log)
    check_finite(model)
    if scratch:
        model.save_pretrained(out / "model", torch.bfloat16)
        for file in Path(args.base or TINY).glob("tokenizer*.json") if RANK == 0 else ():
            shutil.copy(file, out / "model")
        saved = out / "model" / "model.safetensors"
        meet()
        read_back = MoETransformer.from_pretrained(out / "model", device=args.device)
        model.load_state_dict(read_back.state_dict())  # what is reported is what is in the file
    elif args.variant in ESFT:
        esft.save(model, out)
        saved = out / esft.WEIGHTS
    else:
        save_adapter(model, out)
        saved = out / "adapter_model.safetensors"
    meet()  # the first process has written it
    after = measure(model, tokenizer, data, args)
    log.write(after.text("after"), event="after", **after.record)
    if RANK == 0:
        (out / "state.safetensors").unlink(missing_ok=True)
    peak = {"peak": peak_memory(args.device), "estimate": memory.total}
    log.write(f"memory: at most {peak['peak'] / 1e9:.2f} GB, {memory.total / 1e9:.2f} were estimated without the "
              "libraries' own", event="memory", **peak, **memory._asdict())  # fmt: skip
    size = saved.stat().st_size
    log.write(f"saved {saved} ({size:,} bytes)", event="saved", file=str(saved), bytes=size)


class Measured(NamedTuple):
    """What is measured before and after: a line for the screen, with {} for when, and a record for metrics.jsonl."""

    line: str
    record: dict

    def text(self, when: str) -> str:
        return self.line.format(when)


@torch.compiler.set_stance("force_eager")  # a few batches, of other lengths: not worth a graph
def measure(model, tokenizer, data: Data, args) -> Measured:
    """--task: accuracy on it, and how much of the pre-training families is still there. --data: held-out loss."""
    if args.data:
        if data.held_out is None:
            return Measured("no rows are held out to measure {} training", {})
        loss, n = held_out_loss(model, data.held_out, args, tokenizer.pad_id), len(data.held_out)
        return Measured(f"cross-entropy of {n} held-out rows {{}}: {loss:.4f}", {"held_out": loss})
    names = [*([args.task] if args.task else []), *skills.FAMILIES]
    accuracy = accuracies(model, tokenizer, names, args.eval_rows, args.task)
    task = f"{args.task} {100 * accuracy[args.task]:.1f} %, " if args.task else ""
    without, mean = skills.PARENT.get(args.task), kept(accuracy, args.task)
    line = f"accuracy {{}}: {task}pre-training families {100 * mean:.1f} % (mean"
    line += f", without {without})" if without else ")"
    families = " ".join(f"{name} {100 * accuracy[name]:.0f}" for name in skills.FAMILIES)
    return Measured(f"{line}\n    {families}", {"accuracy": accuracy, "kept": mean})


@torch.no_grad()
def held_out_loss(model, held_out: Dataset, args, pad_id: int) -> float:
    """Mean cross-entropy over the labels of the held-out rows."""
    model.eval()
    total = labels_seen = 0
    for cut in epoch_batches(held_out.lengths(), args.micro_batch or args.batch_size, "held out"):
        input_ids, labels, _ = pad_batch([held_out[i] for i in cut], pad_id, args.device)
        n = (labels[:, 1:] != -100).sum().item()
        total, labels_seen = total + n * model(input_ids, labels=labels).loss.item(), labels_seen + n
    return total / labels_seen


def kept(accuracy: dict[str, float], task: str | None) -> float:
    """Mean accuracy on the families, without the one whose prompts the task answers differently."""
    names = [name for name in skills.FAMILIES if name != skills.PARENT.get(task)]
    return sum(accuracy[name] for name in names) / len(names)


def run_steps(args, model, tokenizer, data: Data, optimizer, first: int, log: Log):
    """The training loop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    inert = InertCheck(model)
    warned = args.variant == "perft_r" and warnings_for(model.adapter_config, model.config)
    model.checkpoint_activations = args.checkpoint_activations
    if args.compile:  # each block by itself, equal blocks share their graphs; what is measured runs as it is written
        torch._dynamo.config.recompile_limit = 64  # ESFT: a graph for each number of experts that a layer may train
        for block in model.layers:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)
    model.train()
    source = batches(args, data, tokenizer, first)
    per_epoch = args.steps // args.epochs if args.epochs else 0
    seen, since = 0, time.perf_counter()
    print("  step cross-entropy  balance        lr grad norm  tokens/s    memory   load")
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=RANK > 0 or None, leave=False)
    for step in bar:
        torch.manual_seed((args.seed * 1_000_003 + step + RANK * 7_919) % 2**63)  # dropout: the step's own
        batch = next(source)
        labels_in_step, tokens = int((batch[1][:, 1:] != -100).sum()), int(batch[2].sum())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        sums = torch.zeros(3, device=args.device)  # cross-entropy, balance, adapters' balance
        counts = adapter_counts = 0
        for input_ids, labels, mask in micro_batches(batch, args.micro_batch or args.batch_size):
            input_ids, mask = input_ids.to(args.device), mask.to(args.device)  # labels are sorted out on the CPU
            output = model(input_ids, labels=labels, loss_divisor=labels_in_step)
            balance, chosen = mean_balance(output.routings, mask, tokens)
            loss, counts, parts = output.loss + args.balance * balance, counts + chosen, [output.loss, balance]
            if adapters := [routing.adapter for routing in output.routings if routing.adapter is not None]:
                balance, chosen = mean_balance(adapters, mask, tokens)
                loss, adapter_counts = loss + args.adapter_balance * balance, adapter_counts + chosen
                parts.append(balance)
            (loss * WORLD).backward()  # sharded gradients are averaged over the processes, and should be summed
            sums[: len(parts)] += torch.stack(parts).detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        if step < first + 2:
            inert.watch(counts)
        done = step + 1
        log_now, save_now = done % args.log_every == 0 or done == args.steps, done % args.save_every == 0
        if log_now or save_now:  # before the step: what is saved is whole
            cross_entropy, balance, adapter_balance = total(sums).tolist()
            if not math.isfinite(cross_entropy + balance + adapter_balance + whole(grad_norm).item()):
                raise ValueError(f"step {done}: the loss is {cross_entropy}, the gradient's norm "
                                 f"{whole(grad_norm).item()}; try a lower --lr (it is {args.lr})")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        seen += tokens
        if step == first + 1:
            inert.verdict("adapters.router" if warned else None)

        if log_now:
            load = counts / counts.sum(-1, keepdim=True)
            record = {
                "cross_entropy": cross_entropy,
                "balance": balance,
                "lr": learning_rate(step, args),
                "grad_norm": whole(grad_norm).item(),
                "tokens_per_second": seen / (time.perf_counter() - since),
                "memory": peak_memory(args.device),
                "largest_load": load.max().item(),
            }
            r = list(record.values())
            line = f"{done:6} {r[0]:13.4f} {r[1]:8.3f} {r[2]:9.2e} {r[3]:9.3f} {r[4]:9,.0f} {r[5] / 1e9:6.2f} GB"
            line += f" {r[6]:6.3f}"
            if args.variant == "perft_r":
                record["adapter_balance"] = adapter_balance
                record["adapter_load"] = (adapter_counts / adapter_counts.sum(-1, keepdim=True)).tolist()
                line += f"   adapters: balance {adapter_balance:.3f}"
            log.write(line, event="step", step=done, **record, expert_load=load.tolist())
            seen, since = 0, time.perf_counter()
        if per_epoch and data.held_out and done % per_epoch == 0 and done < args.steps:
            epoch = measure(model, tokenizer, data, args)
            log.write(epoch.text(f"after epoch {done // per_epoch}"), event="epoch", step=done, **epoch.record)
            model.train()
        if save_now and done < args.steps:
            check_finite(model)
            write_safetensors(Path(args.out) / "state.safetensors", state_tensors(model, optimizer))
    model.eval()


def main(argv=None):
    args = parse_args(argv)
    args.device = start(args.device)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one process speaks for all)
    try:
        train(args)
        stop()
    except (ValueError, OSError) as error:  # the user's input: one line, no traceback
        sys.exit(f"error: {error}" if RANK == 0 else f"error in process {RANK}: {error}")
    except KeyboardInterrupt:
        saved = Path(args.out, "state.safetensors").exists()
        print(f"stopped; {'continue with --resume' if saved else 'nothing was saved, begin again with --overwrite'}")
        sys.exit(130)


if __name__ == "__main__":
    main()
