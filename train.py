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

balance is moe.load_balancing_loss, averaged over the layers: 1 is even. The labels are the answer and the end token;
--train_on_inputs adds the prompt, as the papers do. The base routers are frozen in most variants, yet c_base still
moves adapters: those of earlier layers change what later routers see.

A step depends on the seed and its own number only (data order, dropout), so a run that was stopped and continued with
--resume gives the numbers of one that was not.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import esft
from data import skills
from data.checkpoint import read_json, read_safetensors, write_safetensors, write_text
from data.cli import Parser, count, device, from_zero, number, positive
from data.dataset import NAMED, Dataset, epoch_batches, pad_batch, padding_share, read_rows, split, tokenise
from data.run import InertCheck, Log, check_run_folder, check_same_run, peak_memory, state_tensors, steps_done
from data.tasks import TEMPLATES
from eval import DEVICE, DTYPES, TINY, TRAINED_FILES, accuracies, encode_rows, load_base
from model import Config, MoETransformer
from moe import Routing, expert_load, load_balancing_loss
from perft import BASELINES, PERFT, PerftConfig, apply_perft, report, save_adapter, warnings_for

ESFT = ("esft_token", "esft_gate")
VARIANTS = (*PERFT, *ESFT, *BASELINES, "scratch")

TASK_DEFAULTS = {"task": skills.DEFAULT_TARGET, "train_rows": 4000, "steps": 200, "score_rows": 500, "bind_groups": 1}
FILE_DEFAULTS = {"epochs": 1, "max_length": 1024, "held_out": 120, "template": "papers"}
P_DEFAULTS = {"token": 0.2, "gate": 0.1, "gate_share": 0.25}  # the first two are the paper's

# The flags that only some variants take; given to another one, they are an error and not ignored.
DATA = {"task", "train_rows", "data", "recipe", *FILE_DEFAULTS}
LORA, UNIT = {"rank", "alpha", "dropout", "train_router"}, {"kind", "init"}
ROUTED = {"num_adapters", "top_k", "adapter_weights", "adapter_balance"}
CHOICE = {"experts", "p", "bind_groups", "score_rows", "train_router"}
APPLIES = {
    "perft_s": DATA | LORA | UNIT,
    "perft_d": DATA | LORA | UNIT | {"num_adapters"},
    "perft_r": DATA | LORA | UNIT | ROUTED,
    "perft_e": DATA | LORA | UNIT | {"experts"},
    "esft_token": DATA | CHOICE,
    "esft_gate": DATA | CHOICE | {"gate_share"},
    "lora_qv": DATA | LORA - {"train_router"},
    "router": DATA,
    "frozen_experts": DATA,
    "full": DATA,
    "scratch": set(),
}
# Defaults that differ by variant, for the embedded model: the best learning rate of the grids in assets/results.csv
# (router, frozen_experts and scratch: one try each, not a grid).
RECIPES = {
    "perft_s": {"lr": 1e-3},
    "perft_d": {"lr": 3e-4},
    "perft_r": {"lr": 1e-3},
    "perft_e": {"lr": 1e-3},
    "esft_token": {"lr": 3e-3},
    "esft_gate": {"lr": 3e-3},
    "lora_qv": {"lr": 2e-3},
    "router": {"lr": 5e-3},
    "frozen_experts": {"lr": 3e-4},
    "full": {"lr": 1e-4},
    "scratch": {"lr": 3e-3, "steps": 8000, "batch_size": 96, "warmup": 200, "weight_decay": 0.1, "beta2": 0.98},
}
# The papers' settings (2411.08212 and the authors' code), beside what is the default anyway: alpha 2r, --kind lora,
# --init paper, --dropout 0.05, AdamW (0.9, 0.999) with eps 1e-8, linear decay.
PAPER = {"batch_size": 16, "epochs": 3, "max_length": 256, "held_out": 120, "template": "papers", "warmup": 100,
         "train_on_inputs": True, "weight_decay": 0.0, "beta2": 0.999, "clip": 1.0}  # fmt: skip
PAPER_BY_BASE = {"olmoe": {"lr": 1e-5, "balance": 0.01}, "mixtral": {"lr": 2e-5, "balance": 0.02}}
SPLIT_SEED = 42  # of the rows held out, the authors' and not --seed: runs of other seeds are compared on the same rows


def paper_recipe(variant: str, base: str | None, data: str | None) -> dict:
    kind = Config.from_folder(base or TINY).model_type
    lora = {"lr": 2e-5} if variant == "lora_qv" and kind == "olmoe" and data == "commonsense" else {}
    return PAPER | PAPER_BY_BASE[kind] | lora


def parse_args(argv=None) -> argparse.Namespace:
    own = PerftConfig("perft_s")  # the defaults of the adapter flags stand there
    parser = Parser(description=__doc__.split("\n\n")[0], usage="python train.py --variant NAME [options]")
    add = parser.add_argument
    add("--variant", choices=VARIANTS, required=True, metavar="NAME", help=f"what trains: {', '.join(VARIANTS)}")

    group = parser.add_argument_group("model and task")
    add = group.add_argument
    add("--base", metavar="DIR", help="model folder (data/tiny_olmoe)")
    tasks = [*skills.TARGETS, *skills.FAMILIES]
    add("--task", choices=tasks, metavar="NAME", help=f"what to learn ({TASK_DEFAULTS['task']}): {', '.join(tasks)}")
    rows = TASK_DEFAULTS["train_rows"]
    add("--train_rows", type=count, metavar="N", help=f"draws of the task that training cycles through ({rows})")
    inputs = "labels on the prompt too, not only on the answer"
    add("--train_on_inputs", action=argparse.BooleanOptionalAction, default=False, help=inputs)
    add("--dtype", choices=DTYPES, default="float32", help="of the base, adapters are float32 always (float32)")
    add("--device", type=device, metavar="NAME", default=DEVICE, help="cpu, cuda, cuda:1 ... (%(default)s)")
    add("--threads", type=count, metavar="N", help="CPU threads of torch (its own choice if not given)")

    group = parser.add_argument_group("data instead of a task: a file, or what data/prepare.py downloaded")
    add, file = group.add_argument, FILE_DEFAULTS
    add("--data", metavar="FILE", help="commonsense, math, or JSON (lines) of alpaca or messages records")
    add("--recipe", choices=("perft_paper",), help="the papers' settings as defaults, for the base's kind: see PAPER")
    add("--epochs", type=count, metavar="N", help=f"times through the data; --steps overrides ({file['epochs']})")
    add("--max_length", type=count, metavar="N", help=f"tokens a row is cut to, on the right ({file['max_length']})")
    add("--template", choices=TEMPLATES, help=f"of alpaca records' prompts ({file['template']})")
    add("--held_out", type=number(int, 0), metavar="N", help=f"rows kept out to measure on ({file['held_out']})")

    group = parser.add_argument_group("adapters (which apply depends on the variant)")
    add = group.add_argument
    add("--rank", type=count, metavar="N", help=f"r, width of an adapter ({own.rank})")
    add("--alpha", type=from_zero, metavar="X", help="scale is alpha/r (2r)")
    add("--num_adapters", type=count, metavar="N", help=f"M of perft_d and perft_r ({own.num_adapters})")
    add("--top_k", type=count, metavar="N", help=f"K of perft_r ({own.top_k})")
    add("--kind", choices=("lora", "parallel"), help=f"adapter unit ({own.kind})")
    add("--init", choices=("paper", "lora"), help=f"adapter weights at the start ({own.init})")
    add("--adapter_weights", choices=("own", "base"), help=f"perft_r: which router weighs ({own.adapter_weights})")
    add("--dropout", type=from_zero, metavar="X", help=f"on the adapter's input ({own.dropout})")
    add("--train_router", action="store_true", default=None, help="also train the pretrained routers")

    group = parser.add_argument_group("experts (esft_token, esft_gate; --experts also perft_e)")
    add = group.add_argument
    by_kind = ", ".join(f"{kind} {p}" for kind, p in P_DEFAULTS.items())
    add("--p", type=positive, metavar="X", help=f"score that a layer's choice reaches ({by_kind})")
    add("--gate_share", action="store_true", default=None, help="esft_gate: scores as shares of their layer's sum")
    add("--experts", metavar="FILE", help="this expert_cfg.json's choice; esft: or 'random', as many drawn by --seed")
    add("--bind_groups", type=count, metavar="N", help="choose whole groups of N experts, a control for the grain (1)")
    add("--score_rows", type=count, metavar="N", help=f"rows read for the scores ({TASK_DEFAULTS['score_rows']})")

    group = parser.add_argument_group("optimisation (AdamW, warm-up, then linear decay to 0)")
    add = group.add_argument
    add("--lr", type=positive, metavar="X", help="peak learning rate (by variant: see RECIPES in this file)")
    add("--steps", type=count, metavar="N", help=f"optimiser steps ({TASK_DEFAULTS['steps']}; --data: as --epochs)")
    add("--batch_size", type=count, metavar="N", default=64, help="rows a step (%(default)s)")
    add("--warmup", type=count, metavar="N", default=20, help="steps of warm-up (%(default)s)")
    add("--weight_decay", type=from_zero, metavar="X", default=0.0, help="on matrices that train (%(default)s)")
    add("--beta2", type=from_zero, metavar="X", default=0.999, help="AdamW's memory of squared gradients (%(default)s)")
    add("--clip", type=positive, metavar="X", default=1.0, help="largest gradient norm (%(default)s)")
    add("--balance", type=from_zero, metavar="X", help="c_base (router_aux_loss_coef of the base's config)")
    add("--adapter_balance", type=from_zero, metavar="X", help="c_adapter of perft_r (the same)")
    add("--seed", type=number(int, 0), metavar="N", default=0, help="of weights, row order, dropout (%(default)s)")

    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--out", metavar="DIR", help="run folder (out/VARIANT)")
    add("--overwrite", action="store_true", help="replace the run that the folder holds")
    add("--resume", action="store_true", help="continue the run that the folder holds")
    add("--log_every", type=count, metavar="N", default=20, help="steps a line (%(default)s)")
    add("--save_every", type=count, metavar="N", default=50, help="steps between states to resume from (%(default)s)")
    add("--eval_rows", type=count, metavar="N", default=500, help="test rows of the task, a fifth of it for families")

    known = parser.parse_known_args(argv)[0]
    parser.set_defaults(**RECIPES[known.variant])
    if known.recipe:
        if not known.data or known.variant not in (*PERFT, *BASELINES):
            parser.error("--recipe perft_paper is for --data, with a PERFT variant or one of its baselines")
        try:
            parser.set_defaults(**paper_recipe(known.variant, known.base, known.data))
        except (ValueError, OSError) as error:
            parser.error(str(error))
        if known.steps:
            parser.set_defaults(epochs=None)
    args = parser.parse_args(argv)
    for flag in sorted(set().union(*APPLIES.values()) - APPLIES[args.variant]):
        if getattr(args, flag) is not None:
            takes = ", ".join(v for v in VARIANTS if flag in APPLIES[v])
            parser.error(f"--{flag} does not apply to --variant {args.variant}; it applies to {takes}")
    fill_defaults(parser, args)
    args.out = args.out or f"out/{args.variant}"
    check_run_folder(parser, Path(args.out), args.resume, args.overwrite)
    return args


def fill_defaults(parser, args):
    """What was not given and applies: the values that will be in force, so that the configuration says them."""
    applies, given = APPLIES[args.variant], {flag for flag, value in vars(args).items() if value is not None}
    defaults = TASK_DEFAULTS | {"p": P_DEFAULTS[score_kind(args)]}
    if args.data:
        defaults |= FILE_DEFAULTS | {"task": None, "train_rows": None, "steps": None}
        if args.steps:
            defaults["epochs"] = None
        if clash := [flag for flag in ("task", "train_rows") if flag in given]:
            parser.error(f"--{clash[0]} does not apply to --data, which brings its own rows")
        if args.steps and args.epochs:
            parser.error("--steps and --epochs: choose one")
    elif clash := sorted(FILE_DEFAULTS.keys() & given):
        parser.error(f"--{clash[0]} applies to --data only")
    if args.variant in (*PERFT, *BASELINES):
        options = given & PerftConfig.__dataclass_fields__.keys() - {"experts"}  # that is a file name still
        try:
            defaults |= asdict(PerftConfig(**{name: getattr(args, name) for name in options}))
        except ValueError as error:
            parser.error(str(error))
    for flag in (applies | {"steps"}) & defaults.keys():
        if getattr(args, flag) is None:
            setattr(args, flag, defaults[flag])
    if args.kind == "parallel" and "alpha" in given:
        parser.error("--alpha does not apply to --kind parallel, which has no scale")
    if args.variant in ESFT and args.experts not in (None, "random"):
        if chosen_by := [flag for flag in ("p", "bind_groups", "gate_share") if flag in given]:
            parser.error(f"--{chosen_by[0]} does not apply: the choice is that of --experts {args.experts}")
        args.p = args.bind_groups = None
    if args.variant == "perft_e" and args.experts == "random":
        parser.error("--experts random is a control for esft_token and esft_gate; perft_e takes a file")
    if args.variant in ("scratch", "full", "frozen_experts") and args.dtype != "float32":
        parser.error(f"--dtype {args.dtype} with --variant {args.variant}: weights of the base train, so it is float32")
    if args.beta2 >= 1:
        parser.error(f"--beta2 {args.beta2}: must be below 1")


def score_kind(args) -> str:
    """Which of esft's scores the variant goes by."""
    return "token" if args.variant == "esft_token" else "gate_share" if args.gate_share else "gate"


# Data ----------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What a run trains on. `train` is None for scratch, whose rows never end."""

    train: Dataset | None
    held_out: Dataset | None = None  # of --data
    notes: tuple[str, ...] = ()


def load_data(args, tokenizer, positions: int) -> Data:
    """The rows of --task or --data as token ids. Fills in args.steps, where --epochs says how many."""
    if args.variant == "scratch":
        return Data(None)
    if not args.data:
        rows = skills.sample(args.task, "train", args.train_rows, args.seed)
        return Data(Dataset.of(encode_rows(rows, tokenizer, args.train_on_inputs)))
    path, args.max_length = NAMED.get(args.data, Path(args.data)), min(args.max_length, positions)
    if args.data in NAMED and not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; download it with: python data/prepare.py {args.data}")
    kind, rows = read_rows(path)
    args.template = args.template if kind == "alpaca" else "chat"
    whole = tokenise(path, rows, kind, tokenizer, args.template, args.train_on_inputs, args.max_length)
    usable, (train, held_out) = whole.trains(), split(len(rows), args.held_out, SPLIT_SEED)
    train, held_out = (whole.take([i for i in some if usable[i]]) for some in (train, held_out))
    if not len(train):
        raise ValueError(f"{path}: of {len(rows)} rows none is left to train on: {args.held_out} are held out, "
                         f"{(~usable).sum()} have no label within --max_length {args.max_length}")  # fmt: skip
    cuts = epoch_batches(train.lengths(), args.batch_size, f"{args.seed} 0")
    args.steps = args.steps or args.epochs * len(cuts)
    cut = (whole.ids[whole.ends - 1] != tokenizer.eos_id).sum()
    notes = (
        f"data: {path}, {len(rows):,} {kind} rows: {len(train):,} train, {len(held_out):,} are held out (drawn by "
        f"seed {SPLIT_SEED})",
        f"      {len(train.ids):,} tokens, {100 * train.labelled.mean():.1f} % of them labels; batches hold "
        f"{100 * padding_share(train.lengths(), cuts):.1f} % padding; {len(cuts):,} steps are an epoch",
    )
    if cut:
        notes += (f"      {cut:,} rows lost their end to --max_length {args.max_length}; {(~usable).sum():,} of them "
                  "had no label left and were dropped",)  # fmt: skip
    return Data(train, held_out if len(held_out) else None, notes)


def batches(args, data: Data, tokenizer, start: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batches from step `start` on, for ever: (input_ids, labels, mask), each (B, T); see `pad_batch`.

    An epoch is every row once, see `epoch_batches`. Pre-training is not sorted by length (nor repeated: its epoch is 16
    batches of new rows): like length is like family there, and the balance loss would spread each family over all
    experts.
    """
    per_epoch = -(-len(data.train) // args.batch_size) if data.train else 16
    for epoch in itertools.count(start // per_epoch):
        seed, examples = f"{args.seed} {epoch}", data.train
        if examples is None:
            examples = encode_rows(skills.mixture(16 * args.batch_size, seed), tokenizer, args.train_on_inputs)
        lengths = examples.lengths() if data.train else [0] * len(examples)
        cuts = epoch_batches(lengths, args.batch_size, seed, window=16 if data.train else 0)
        for cut in cuts[start - epoch * per_epoch if epoch == start // per_epoch else 0 :]:
            yield pad_batch([examples[i] for i in cut], tokenizer.pad_id, args.device)


@torch.no_grad()
def held_out_loss(model, held_out: Dataset, args, pad_id: int) -> float:
    """Mean cross-entropy over the labels of the held-out rows."""
    model.eval()
    total = labels_seen = 0
    for cut in epoch_batches(held_out.lengths(), args.batch_size, "held out"):
        input_ids, labels, _ = pad_batch([held_out[i] for i in cut], pad_id, args.device)
        n = (labels[:, 1:] != -100).sum().item()
        total, labels_seen = total + n * model(input_ids, labels=labels).loss.item(), labels_seen + n
    return total / labels_seen


# The step ------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, args) -> float:
    """Linear warm-up to args.lr, linear decay to 0 after the last step."""
    return args.lr * min((step + 1) / args.warmup, (args.steps - step) / max(args.steps - args.warmup, 1), 1.0)


def mean_balance(routings: list[Routing], mask) -> torch.Tensor:
    return torch.stack([load_balancing_loss(routing, mask) for routing in routings]).mean()


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


def build(args):
    """The model with what trains, ready to train, the tokenizer, the data, what to print of it, what to write of it."""
    model, tokenizer = load_base(args.base, args.dtype, args.device, random_weights=args.variant == "scratch")
    data = load_data(args, tokenizer, model.config.max_position_embeddings)
    torch.manual_seed(args.seed % 2**63)
    if args.variant == "scratch":
        model.init_weights()
        model.requires_grad_(True)
        return model, tokenizer, data, [], lambda folder: None
    if args.variant in ESFT:
        return model, tokenizer, data, *choose_experts(args, model, tokenizer, data)
    options = {k: v for k, v in vars(args).items() if k in PerftConfig.__dataclass_fields__ and v is not None}
    if args.experts:
        options["experts"] = esft.read_choice(args.experts, model.config).experts
    apply_perft(model, **options)
    notes = [f"warning: {note}" for note in warnings_for(model.adapter_config, model.config)]
    return model, tokenizer, data, notes, lambda folder: None


def choose_experts(args, model, tokenizer, data: Data):
    """ESFT: score the experts on rows of the task, choose (or take the choice given), let the chosen train."""
    kind = score_kind(args)
    if args.data:
        examples = [data.train[i] for i in range(min(args.score_rows, len(data.train)))]
    else:
        examples = encode_rows(skills.sample(args.task, "train", args.score_rows, args.seed), tokenizer)
    cuts = [examples[i : i + args.batch_size] for i in range(0, len(examples), args.batch_size)]
    usage = esft.collect(model, (pad_batch(cut, tokenizer.pad_id, args.device) for cut in cuts))
    scores = esft.expert_scores(*usage, model.config.num_experts_per_tok, kind)
    if args.experts not in (None, "random"):
        choice, notes = esft.read_choice(args.experts, model.config), []
    else:
        chosen, notes = esft.select_experts(scores, args.p, args.bind_groups), esft.warnings_for(scores, args.p)
        if args.experts == "random":
            chosen = esft.random_experts(chosen, model.config.num_experts, args.seed)
        choice = esft.EsftConfig(chosen)
    esft.apply_esft(model, choice.experts, bool(args.train_router) or choice.train_router, choice.train_non_experts)
    notes = [*(f"warning: {note}" for note in notes), esft.report(model, usage)]
    how = {"task": args.task or args.data, "kind": kind, "p": args.p, "experts": args.experts or "by score"}
    return notes, lambda folder: esft.save_scores(model, folder, usage, scores, **how)


def train(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    out, scratch = Path(args.out), args.variant == "scratch"
    model, tokenizer, data, notes, write_scores = build(args)
    args.balance = model.config.router_aux_loss_coef if args.balance is None else args.balance
    if args.variant == "perft_r" and args.adapter_balance is None:
        args.adapter_balance = model.config.router_aux_loss_coef
    optimizer = make_optimizer(model, args)
    base = os.path.abspath(args.base) if args.base else None  # a path that holds from everywhere
    file = args.data if args.data in NAMED else args.data and os.path.abspath(args.data)
    config = vars(args) | {"base": base, "data": file, "torch": torch.__version__}
    config["base_config"] = model.config.to_dict()
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
        for old in ("state.safetensors", *TRAINED_FILES):
            (out / old).unlink(missing_ok=True)
        write_scores(out)
        write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
        log.write(before.text("before"), event="before", **before.record)
    run_steps(args, model, tokenizer, data, optimizer, first, log)
    if scratch:
        model.save_pretrained(out / "model", torch.bfloat16)
        for file in Path(args.base or TINY).glob("tokenizer*.json"):
            shutil.copy(file, out / "model")
        saved = out / "model" / "model.safetensors"
        read_back = MoETransformer.from_pretrained(out / "model", device=args.device)
        model.load_state_dict(read_back.state_dict())  # what is reported is what is in the file
    elif args.variant in ESFT:
        esft.save(model, out)
        saved = out / esft.WEIGHTS
    else:
        save_adapter(model, out)
        saved = out / "adapter_model.safetensors"
    after = measure(model, tokenizer, data, args)
    log.write(after.text("after"), event="after", **after.record)
    (out / "state.safetensors").unlink(missing_ok=True)
    size = saved.stat().st_size
    log.write(f"saved {saved} ({size:,} bytes)", event="saved", file=str(saved), bytes=size)


class Measured(NamedTuple):
    """What is measured before and after: a line for the screen, with {} for when, and a record for metrics.jsonl."""

    line: str
    record: dict

    def text(self, when: str) -> str:
        return self.line.format(when)


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


def kept(accuracy: dict[str, float], task: str | None) -> float:
    """Mean accuracy on the families, without the one whose prompts the task answers differently."""
    names = [name for name in skills.FAMILIES if name != skills.PARENT.get(task)]
    return sum(accuracy[name] for name in names) / len(names)


def run_steps(args, model, tokenizer, data: Data, optimizer, first: int, log: Log):
    """The training loop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    inert = InertCheck(model)
    warned = args.variant == "perft_r" and warnings_for(model.adapter_config, model.config)
    model.train()
    source = batches(args, data, tokenizer, first)
    per_epoch = args.steps // args.epochs if args.epochs else 0
    tokens, since = 0, time.perf_counter()
    print("  step cross-entropy  balance        lr grad norm  tokens/s    memory   load")
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=None, leave=False)
    for step in bar:
        torch.manual_seed((args.seed * 1_000_003 + step) % 2**63)  # dropout: the step's own, resumed or not
        input_ids, labels, mask = next(source)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        output = model(input_ids, labels=labels)
        balance = mean_balance(output.routings, mask)
        loss = output.loss + args.balance * balance
        adapters = [routing.adapter for routing in output.routings if routing.adapter is not None]
        adapter_balance = mean_balance(adapters, mask) if adapters else None
        if adapters:
            loss = loss + args.adapter_balance * adapter_balance
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        if step < first + 2:
            inert.watch(output.routings)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(mask.sum())
        if step == first + 1:
            inert.verdict("adapters.router" if warned else None)

        done = step + 1
        log_now, save_now = done % args.log_every == 0 or done == args.steps, done % args.save_every == 0
        if (log_now or save_now) and not torch.isfinite(loss):
            raise ValueError(f"step {done}: the loss is {loss.item()}; try a lower --lr (it is {args.lr})")
        if log_now:
            load = [expert_load(routing, mask).tolist() for routing in output.routings]
            record = {
                "cross_entropy": output.loss.item(),
                "balance": balance.item(),
                "lr": learning_rate(step, args),
                "grad_norm": grad_norm.item(),
                "tokens_per_second": tokens / (time.perf_counter() - since),
                "memory": peak_memory(args.device),
                "largest_load": max(max(layer) for layer in load),
            }
            r = list(record.values())
            line = f"{done:6} {r[0]:13.4f} {r[1]:8.3f} {r[2]:9.2e} {r[3]:9.3f} {r[4]:9,.0f} {r[5] / 1e9:6.2f} GB"
            line += f" {r[6]:6.3f}"
            if adapters:
                record["adapter_balance"] = adapter_balance.item()
                record["adapter_load"] = [expert_load(routing, mask).tolist() for routing in adapters]
                line += f"   adapters: balance {record['adapter_balance']:.3f}"
            log.write(line, event="step", step=done, **record, expert_load=load)
            tokens, since = 0, time.perf_counter()
        if per_epoch and data.held_out and done % per_epoch == 0 and done < args.steps:
            epoch = measure(model, tokenizer, data, args)
            log.write(epoch.text(f"after epoch {done // per_epoch}"), event="epoch", step=done, **epoch.record)
            model.train()
        if save_now and done < args.steps:
            write_safetensors(Path(args.out) / "state.safetensors", state_tensors(model, optimizer))
    model.eval()


def main(argv=None):
    args = parse_args(argv)
    try:
        train(args)
    except (ValueError, OSError) as error:  # the user's input: one line, no traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        saved = Path(args.out, "state.safetensors").exists()
        print(f"stopped; {'continue with --resume' if saved else 'nothing was saved, begin again with --overwrite'}")
        sys.exit(130)


if __name__ == "__main__":
    main()
