"""Fine-tune a Mixture-of-Experts model: one visible loop for every method.

    python train.py --variant perft_s                      the embedded base learns 16 new words
    python train.py --variant perft_r --num_adapters 8     adapters with a router of their own
    python train.py --variant perft_s --data rows.json     a file of alpaca or messages records
    python train.py --variant perft_r --base data/downloads/OLMoE-1B-7B-0924 --data commonsense \\
                    --recipe perft_paper                   the papers' experiment
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
so a run that was stopped and continued with --resume gives the numbers of one that was not.
--micro_batch runs a step's rows in parts, for less memory; the parts' cross-entropies are divided
by the labels of the whole step and add up. The balance loss of a step is then the mean of its
parts', which is not quite the balance loss of the whole.
"""

import difflib
import math
import os
import shutil
import sys
import textwrap
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import esft
import eval
import perft
from data import dataset, hub, pictures, run, skills, tasks
from data import shard as processes
from data.run import count, from_zero, number, positive
from model import DTYPES, EMBEDDED, Config, MoETransformer
from moe import expert_counts, prob_sums, unevenness
from perft import BASELINES, LORA, PERFT, PerftConfig

# Flags -------------------------------------------------------------------------------------------

ESFT = ("esft_token", "esft_gate")
VARIANTS = (*PERFT, *ESFT, *BASELINES, "scratch")
TRAIN_THE_BASE = ("full", "frozen_experts", "scratch")

# For the embedded model: the best rate of the grids in assets/results.csv (router, frozen_experts
# and scratch: one try each, not a grid).
LEARNING_RATES = {
    "perft_s": 1e-3,
    "perft_d": 3e-4,
    "perft_r": 1e-3,
    "perft_e": 1e-3,
    "esft_token": 3e-3,
    "esft_gate": 3e-3,
    "lora_qv": 2e-3,
    "lora_experts": 1e-3,  # not a grid
    "router": 5e-3,
    "frozen_experts": 3e-4,
    "full": 1e-4,
    "scratch": 3e-3,
}


class Asked(NamedTuple):
    """What decides which other flags there are."""

    variant: str
    data: str | None = None
    recipe: str | None = None
    base: str | None = None
    experts: str | None = None
    gate_share: bool = False

    @property
    def chooses_experts(self) -> bool:
        """Does ESFT score the experts and choose, or does a file say which?"""
        return self.variant in ESFT and self.experts in (None, "random")


def make_parser(asked: Asked) -> run.Parser:
    """The parser of a variant holds its own flags, and no others."""
    parser = run.Parser(
        description="Fine-tune a Mixture-of-Experts model; train.py's first page says how.",
        usage="python train.py --variant NAME [options]",
    )
    what = f"what trains: {', '.join(VARIANTS)}"
    parser.add_argument("--variant", choices=VARIANTS, required=True, metavar="NAME", help=what)
    add_model_flags(parser, asked)
    if asked.data is not None:
        add_file_flags(parser, asked)
    else:
        add_task_flags(parser, asked.variant)
    if asked.variant in (*PERFT, *LORA):
        add_adapter_flags(parser, asked.variant)
    if asked.variant in (*ESFT, "perft_e", "lora_experts"):
        add_expert_flags(parser, asked)
    add_optimisation_flags(parser, asked)
    add_run_flags(parser, asked)
    parser.set_defaults(**paper_recipe(asked) if asked.recipe else {})
    return parser


def add_model_flags(parser, asked: Asked):
    add = parser.add_argument_group("model").add_argument
    add("--base", metavar="DIR", help="model folder (the embedded data/tiny_olmoe)")
    add("--device", type=eval.device, default=eval.DEVICE, metavar="NAME", help="(%(default)s)")
    threads = None if asked.base else 1  # a small model is faster with one
    add("--threads", type=count, default=threads, metavar="N", help="of the CPU (%(default)s)")
    # where weights of the base train, small steps need float32
    dtypes = ("float32",) if asked.variant in TRAIN_THE_BASE else DTYPES
    add("--dtype", choices=dtypes, default="float32", help="of the base (%(default)s)")


def add_task_flags(parser, variant: str):
    add = parser.add_argument_group("task of the embedded world").add_argument
    if variant != "scratch":  # which learns all families, from rows that never end
        names = [*skills.TARGETS, *skills.FAMILIES]
        about = f"what to learn (%(default)s): {', '.join(names)}"
        add("--task", choices=names, default=skills.DEFAULT_TARGET, metavar="NAME", help=about)
        add("--train_rows", type=count, default=4000, metavar="N", help="to draw (%(default)s)")
        add("--data", metavar="FILE", help="rows of a file instead; with --help: their flags")
    about = "test rows of the task, a fifth of it for each family (%(default)s)"
    add("--eval_rows", type=count, default=500, metavar="N", help=about)


def add_file_flags(parser, asked: Asked):
    add = parser.add_argument_group("rows of a file").add_argument
    about = "commonsense, math, or JSON (lines) of alpaca or messages records"
    add("--data", metavar="FILE", help=about)
    if asked.variant in (*PERFT, *BASELINES):
        add("--recipe", choices=("perft_paper",), help="the papers' settings, see paper_recipe")
    add("--max_length", type=count, default=1024, metavar="N", help="of a row (%(default)s tokens)")
    add("--template", choices=tasks.TEMPLATES, help="of alpaca records' prompts (papers)")
    about = "rows kept out to measure on (%(default)s, as many as in the papers)"
    add("--held_out", type=number(int, 0), default=120, metavar="N", help=about)


def add_adapter_flags(parser, variant: str):
    add = parser.add_argument_group("adapters").add_argument
    defaults = PerftConfig
    add(
        "--rank",
        type=count,
        default=defaults.rank,
        metavar="N",
        help="r (%(default)s)",
    )
    add("--alpha", type=from_zero, metavar="X", help="scale is alpha/r (2r)")
    add("--dropout", type=from_zero, default=defaults.dropout, metavar="X", help="(%(default)s)")
    if variant == "lora_experts":
        add("--shared_outer", action="store_true", help="one outer half for a layer's experts")
    if variant in LORA:
        return
    add("--kind", choices=("lora", "parallel"), default=defaults.kind, help="(%(default)s)")
    about = "weights at the start (%(default)s)"
    add("--init", choices=("paper", "lora"), default=defaults.init, help=about)
    add("--train_router", action="store_true", help="also train the pretrained routers")
    if variant in ("perft_d", "perft_r"):
        add("--num_adapters", type=count, default=defaults.num_adapters, help="M (%(default)s)")
    if variant == "perft_r":
        add("--top_k", type=count, default=defaults.top_k, metavar="N", help="K (%(default)s)")
        about = "which router weighs: base as in the released OLMoE code (%(default)s)"
        add(
            "--adapter_weights",
            choices=("own", "base"),
            default=defaults.adapter_weights,
            help=about,
        )
        add(
            "--adapter_balance",
            type=from_zero,
            metavar="X",
            help="c_adapter (that of the config, too)",
        )


def add_expert_flags(parser, asked: Asked):
    add = parser.add_argument_group("experts").add_argument
    if asked.variant not in ESFT:
        add("--experts", metavar="FILE", help="adapters for the experts of an expert_cfg.json only")
        return
    about = "the choice of an expert_cfg.json; or 'random': as many, drawn by --seed"
    add("--experts", metavar="FILE", help=about)
    about = "rows of the task that are read for the scores (%(default)s)"
    add("--score_rows", type=count, default=500, metavar="N", help=about)
    add("--train_router", action="store_true", help="also train the pretrained routers")
    if not asked.chooses_experts:
        return
    p = 0.2  # the paper's, as 0.1 for gate
    if asked.variant == "esft_gate":
        add("--gate_share", action="store_true", help="scores as shares of their layer's sum")
        p = 0.25 if asked.gate_share else 0.1
    about = "score that a layer's choice reaches (%(default)s)"
    add("--p", type=number(float, 0, above=True, most=1), default=p, metavar="X", help=about)
    about = "choose whole groups of N experts, as a control (%(default)s)"
    add("--bind_groups", type=count, default=1, metavar="N", help=about)


def add_optimisation_flags(parser, asked: Asked):
    group = parser.add_argument_group("optimisation (AdamW, warm-up, then linear decay to 0)")
    add = group.add_argument
    scratch = asked.variant == "scratch"
    rate = LEARNING_RATES[asked.variant]
    add("--lr", type=positive, default=rate, metavar="X", help="peak rate (%(default)s)")
    if asked.data is None:
        steps = 8000 if scratch else 200
        add("--steps", type=count, default=steps, metavar="N", help="(%(default)s)")
    else:
        add = group.add_mutually_exclusive_group().add_argument
        about = "times through the rows (%(default)s)"
        add("--epochs", type=count, default=1, metavar="N", help=about)
        add("--steps", type=count, metavar="N", help="instead of --epochs")
        add = group.add_argument
    rows, warmup, decay, beta2 = (96, 200, 0.1, 0.98) if scratch else (64, 20, 0.0, 0.999)
    add("--batch_size", type=count, default=rows, metavar="N", help="rows a step (%(default)s)")
    add("--warmup", type=count, default=warmup, metavar="N", help="steps (%(default)s)")
    about = "on matrices that train (%(default)s)"
    add("--weight_decay", type=from_zero, default=decay, metavar="X", help=about)
    about = "AdamW's memory of squared gradients (%(default)s)"
    add("--beta2", type=number(float, 0, most=0.999999), default=beta2, metavar="X", help=about)
    add("--clip", type=positive, default=1.0, metavar="X", help="gradient norm (%(default)s)")
    about = "c_base (router_aux_loss_coef of the base's config)"
    add("--balance", type=from_zero, metavar="X", help=about)
    about = "labels on the prompt too, not only on the answer"
    add("--train_on_inputs", action=BooleanOptionalAction, default=False, help=about)
    about = "of weights, row order, dropout (%(default)s)"
    add("--seed", type=number(int, 0, most=2**63 - 1), default=0, metavar="N", help=about)


def add_run_flags(parser, asked: Asked):
    add = parser.add_argument_group("run").add_argument
    add("--out", default=f"out/{asked.variant}", metavar="DIR", help="run folder (%(default)s)")
    add("--overwrite", action="store_true", help="replace the run that the folder holds")
    add("--resume", action="store_true", help="continue the run that the folder holds")
    add("--log_every", type=count, default=20, metavar="N", help="steps a line (%(default)s)")
    about = "steps between accuracies on validation rows (none)"
    add("--eval_every", type=count, metavar="N", help=about)
    about = "steps between states to resume from (%(default)s)"
    add("--save_every", type=count, default=50, metavar="N", help=about)
    about = "rows at a time on a device (all of the batch that are its)"
    add("--micro_batch", type=count, metavar="N", help=about)
    about = "compute blocks twice, keep only their inputs"
    add("--checkpoint_activations", action="store_true", help=about)
    about = "compile the blocks (a minute at the start; on for cuda)"
    add("--compile", action=BooleanOptionalAction, help=about)


def paper_recipe(asked: Asked) -> dict:
    """The settings of the papers and of the authors' code (2411.08212), beside what is the default
    anyway: alpha 2r, --kind lora, --init paper, --dropout 0.05, --held_out 120, AdamW (0.9, 0.999)
    with eps 1e-8, linear decay.

    Their balance loss is transformers', which is K times ours on one layer, hence c * K. (It also
    pools all layers, which ours does not: moe.load_balancing_loss.)
    """
    config = Config.from_folder(asked.base or EMBEDDED)
    mixtral = config.model_type == "mixtral"
    lora_on_commonsense = asked.variant == "lora_qv" and asked.data == "commonsense"
    return {
        "lr": 2e-5 if mixtral or lora_on_commonsense else 1e-5,
        "balance": paper_balance(config) * config.num_experts_per_tok,
        "batch_size": 16,
        "epochs": 3,
        "max_length": 256,
        "warmup": 100,
        "train_on_inputs": True,
        "weight_decay": 0.0,
        "beta2": 0.999,
        "clip": 1.0,
    }


def paper_balance(config: Config) -> float:
    """The papers' c."""
    return 0.02 if config.model_type == "mixtral" else 0.01


# what the rest of the program asks of every run, though not every parser has it: None there
NOT_ALWAYS = """task train_rows eval_rows data recipe epochs max_length template held_out experts p
    bind_groups score_rows train_router adapter_balance gate_share top_k""".split()


def parse_args(argv=None) -> Namespace:
    asked = peek(argv)
    try:
        parser = make_parser(asked)
    except (ValueError, OSError) as error:
        run.Parser(prog="train.py").error(str(error))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(explain(unknown[0].split("=")[0], asked, parser))
    for name in NOT_ALWAYS:
        if not hasattr(args, name):
            setattr(args, name, None)
    try:
        check_args(args)
        files = eval.RUN_FILES
        run.check_run_folder(Path(args.out), args.resume, args.overwrite, files)
    except ValueError as error:
        parser.error(str(error))
    return args


def peek(argv) -> Asked:
    """Read the flags that decide which others there are."""
    parser = run.Parser(prog="train.py", add_help=False)
    parser.add_argument("--gate_share", action="store_true")
    for name in ("variant", "data", "recipe", "base", "experts"):
        parser.add_argument(f"--{name}")
    known, rest = parser.parse_known_args(argv)
    if known.variant == "scratch":
        return Asked("scratch", base=known.base)
    if known.variant in VARIANTS:
        return Asked(**vars(known))
    if known.variant is None and not {"-h", "--help"} & set(rest):
        meant = ["--variant", *(f"--variant {v}" for v in VARIANTS)]
        for word in [text.split("=")[0] for text in rest]:
            if difflib.get_close_matches(word, ["--variant", *VARIANTS], cutoff=0.8):
                parser.error(not_understood(word, meant))
    return Asked("perft_s")  # its parser helps, or says what is missing


def not_understood(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.55)
    return f"{word} was not understood" + (f"; did you mean {near[0]}?" if near else "")


def explain(flag: str, asked: Asked, parser) -> str:
    """Why this command has no such flag."""

    def exists(**changes):
        return flag in make_parser(asked._replace(recipe=None, **changes)).flags()

    if exists(experts=None):
        return f"{flag} does not apply: the choice is that of --experts {asked.experts}"
    takes = [v for v in VARIANTS if exists(variant=v, experts=None)]
    if takes:
        others = ", ".join(takes)
        return f"{flag} does not apply to --variant {asked.variant}; it applies to {others}"
    if asked.data is None and exists(data="FILE"):
        return f"{flag} applies to --data only"
    if asked.data and exists(data=None):
        return f"{flag} does not apply to --data, which brings its own rows"
    return not_understood(flag, parser.flags())


def check_args(args):
    """ValueError for values that cannot go together."""
    if args.variant in (*PERFT, *BASELINES):
        PerftConfig(**adapter_options(args))
    if getattr(args, "kind", None) == "parallel" and args.alpha is not None:
        raise ValueError("--alpha does not apply to --kind parallel, which has no scale")
    if args.variant not in ESFT and args.experts == "random":
        raise ValueError(
            "--experts random is a control for esft_token and esft_gate; adapters take a file"
        )


def adapter_options(args) -> dict:
    """The flags that are fields of PerftConfig; --experts is a file, which is not read yet."""
    names = PerftConfig.__dataclass_fields__.keys() - {"experts"}
    given = {name: value for name, value in vars(args).items() if name in names}
    return {name: value for name, value in given.items() if value is not None}


# What a run needs --------------------------------------------------------------------------------


class Scored(NamedTuple):
    """How a sample uses the base's experts, what each scores for it, and how that was asked."""

    usage: esft.Usage
    scores: torch.Tensor  # (L, E)
    how: dict


class Plan(NamedTuple):
    """What a variant does to the base."""

    edit: Callable  # of (model), before it has memory: attach what trains, return it
    notes: list[str] = []  # to print
    scored: Scored | None = None  # ESFT


class Built(NamedTuple):
    model: MoETransformer  # with what trains
    plan: Plan


def build(args, config: Config, tokenizer, data: dataset.Data) -> Built:
    """The model with all that trains. Of several processes none ever holds the whole."""
    if args.variant == "scratch":
        plan = Plan(lambda model: model.requires_grad_(True))
    elif args.variant in ESFT:
        plan = plan_esft(args, config, tokenizer, data)
    else:
        plan = plan_adapters(args, config)
    say_memory(args, config, plan.edit)
    if args.variant != "scratch":
        model = eval.load_model(args.base, config, args.dtype, args.device, plan.edit)
        return Built(model, plan)
    torch.manual_seed(args.seed)
    model = plan.edit(MoETransformer(config))  # every process draws it all, and keeps its share
    processes.cut(model, args.device)
    return Built(model.to(args.device), plan)


def plan_adapters(args, config: Config) -> Plan:
    options = adapter_options(args)
    if args.experts:
        options["experts"] = esft.read_choice(args.experts, config).experts

    def edit(model):
        torch.manual_seed(args.seed)  # adapters start alike on every device
        return perft.apply_perft(model, **options)

    return Plan(edit, perft.warnings_for(PerftConfig(**options), config))


def plan_esft(args, config: Config, tokenizer, data: dataset.Data) -> Plan:
    """Score the experts, and choose unless a file says which."""
    say_memory(args, config, lambda model: model.requires_grad_(False))
    print("    a sample is read now, to score the experts, of which some then train")
    scored = score_experts(args, config, tokenizer, data)
    notes = []
    if args.experts in (None, "random"):
        chosen = esft.select_experts(scored.scores, args.p, args.bind_groups)
        if args.experts == "random":
            chosen = esft.random_experts(chosen, config.num_experts, args.seed)
        choice = esft.EsftConfig(chosen, args.train_router)
        notes = esft.warnings_for(esft.bind_groups(scored.scores, args.bind_groups), args.p)
    else:
        choice = esft.read_choice(args.experts, config)
        choice = choice._replace(train_router=args.train_router or choice.train_router)
    print(esft.describe_choice(choice.experts, scored.usage))
    return Plan(lambda model: esft.apply_esft(model, *choice), notes, scored)


def score_experts(args, config: Config, tokenizer, data: dataset.Data) -> Scored:
    """Read rows of the task with the base. The model that reads is gone afterwards."""
    examples = [data.train[i] for i in range(min(args.score_rows, len(data.train)))]
    size = args.micro_batch or args.batch_size
    cuts = [examples[i : i + size] for i in range(0, len(examples), size)]
    batches = (dataset.pad_batch(cut, tokenizer.pad_id, args.device) for cut in cuts)
    model = eval.load_model(args.base, config, args.dtype, args.device)
    usage = esft.collect(model, batches)
    kind = "token"
    if args.variant == "esft_gate":
        kind = "gate_share" if args.gate_share else "gate"
    scores = esft.expert_scores(*usage, config.num_experts_per_tok, kind)
    how = {"task": args.task or args.data, "kind": kind, "p": args.p}
    return Scored(usage, scores, how | {"experts": args.experts or "by score"})


def say_memory(args, config: Config, edit: Callable):
    """Print the memory that a step takes for sure, of a model that takes none itself."""
    with torch.device("meta"):
        model = MoETransformer(config).to(DTYPES[args.dtype])
        edit(model)
    print(certain_memory(model, args.device))


def certain_memory(model, device: str) -> str:
    """The memory that a step takes for sure, in a line, before the weights are loaded. ValueError
    if the device has not as much."""
    frozen = trained = 0
    for p in model.parameters():
        if p.requires_grad:
            trained += p.nbytes
        else:
            frozen += p.nbytes
    frozen, trained = frozen // processes.WORLD, trained // processes.WORLD
    gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if gpu else run.free_memory()
    total = frozen + 4 * trained  # gradients, and AdamW's two moments
    if total > free:
        raise ValueError(
            f"at least {total / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free; try "
            "a lower --rank, --dtype bfloat16, or several GPUs (torchrun)"
        )
    return (
        f"memory in GB a device: weights {frozen / 1e9:,.2f}, trains {trained / 1e9:,.2f}, "
        f"gradients {trained / 1e9:,.2f}, AdamW {2 * trained / 1e9:,.2f}; activations come on top"
    )


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
    return optimizer


def state_places(model, optimizer) -> dict[str, hub.Place]:
    """Everything that a step changes: the trained parameters, AdamW's moments and step count."""
    table = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            table[f"param.{name}"] = hub.Place(p)
            for key, value in optimizer.state[p].items():
                table[f"{key}.{name}"] = hub.Place(value)
    return table


def steps_done(optimizer) -> int:
    return int(next(iter(optimizer.state.values()))["step"])


# What is measured --------------------------------------------------------------------------------


VALIDATION_ROWS = 90  # of each skill; the smallest, lexicon_new, has 94


@torch.compiler.set_stance("force_eager")  # a few batches, of other lengths: not worth a graph
def measure(when: str, model, tokenizer, data: dataset.Data, args, split="test"):
    """-> a text for the screen, and a record for metrics.jsonl.

    --task: accuracy on it, and how much of the pre-training families is still there.
    --data: loss of the held-out rows, whatever the split.
    """
    if args.data and data.held_out is None:
        return f"no rows are held out to measure {when} training", {}
    if args.data:
        loss = held_out_loss(model, data.held_out, args, tokenizer.pad_id)
        text = f"cross-entropy of {len(data.held_out)} held-out rows {when}: {loss:.4f}"
        return text, {"held_out": loss}
    names = [*([args.task] if args.task else []), *skills.FAMILIES]
    if split == "test":
        accuracy = eval.accuracies(model, tokenizer, names, args.eval_rows, args.task)
    else:
        accuracy = eval.accuracies(model, tokenizer, names, VALIDATION_ROWS, split=split)
    record = {"accuracy": accuracy, "kept": eval.kept(accuracy, args.task)}
    task = f"{args.task} {100 * accuracy[args.task]:.1f} %, " if args.task else ""
    text = f"accuracy {when}: {task}{eval.kept_text(accuracy, args.task)}"
    if split == "test":
        others = [name for name in accuracy if name != args.task]
        text += "\n    " + " ".join(f"{name} {100 * accuracy[name]:.0f}" for name in others)
    return text, record


@torch.no_grad()
def held_out_loss(model, held_out: dataset.Dataset, args, pad_id: int) -> float:
    """Mean cross-entropy over the labels of the held-out rows."""
    model.eval()
    total = labels_seen = 0
    size = args.micro_batch or args.batch_size
    for cut in dataset.epoch_batches(held_out.lengths(), size, "held out"):
        batch = [held_out[i] for i in cut]
        input_ids, labels, _ = dataset.pad_batch(batch, pad_id, args.device)
        n = (labels[:, 1:] != -100).sum().item()
        total += n * model(input_ids, labels=labels).loss.item()
        labels_seen += n
    return total / labels_seen


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator, or of this process."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else run.peak_memory()


# The step ----------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up to args.lr, linear decay to 0 after the last step."""
    warm = (step + 1) / args.warmup
    decayed = (steps - step) / max(steps - args.warmup, 1)
    return args.lr * min(warm, decayed, 1.0)


class Balance(NamedTuple):
    loss: torch.Tensor  # mean of the layers; the parts of a step add up
    counts: torch.Tensor  # (L, E) choices, of all processes


def mean_balance(routings: list, mask: torch.Tensor, tokens: int) -> Balance:
    """moe.load_balancing_loss, mean of the layers, of a part of a step's `tokens`.

    The shares f are those of all processes, and the loss is linear in P: the processes' terms sum
    exactly. (Micro-batches each have their own f.)
    """
    counts = torch.stack([expert_counts(routing, mask) for routing in routings])
    counts = processes.total(counts)  # (L, E)
    loads = counts.float() / counts.sum(-1, keepdim=True)
    losses = []
    for routing, load in zip(routings, loads):
        losses.append(unevenness(load, prob_sums(routing, mask), tokens))
    return Balance(torch.stack(losses).mean(), counts)


class StepLosses(NamedTuple):
    """Of a whole step; parts add up."""

    losses: torch.Tensor  # (3,) cross-entropy, balance, the adapters' balance; no gradient
    counts: torch.Tensor  # (L, E)
    adapter_counts: torch.Tensor  # (L, M); 0 without such adapters


def forward_backward(model, batch, args, c_base, c_adapter) -> StepLosses:
    """One step's gradients, in parts of --micro_batch rows."""
    labels_in_step = int((batch[1][:, 1:] != -100).sum())
    tokens = int(batch[2].sum())
    sums = torch.zeros(3, device=args.device)
    counts = adapter_counts = 0
    for input_ids, labels, mask in processes.micro_batches(
        batch, args.micro_batch or args.batch_size
    ):
        input_ids, mask = input_ids.to(args.device), mask.to(args.device)
        # labels stay on the CPU, where those that count are found without waiting for the GPU;
        # no attention mask: padding is on the right, where no token sees it
        output = model(input_ids, labels=labels, loss_divisor=labels_in_step)
        balance = mean_balance(output.routings, mask, tokens)
        loss = output.loss + c_base * balance.loss
        counts = counts + balance.counts
        parts = [output.loss, balance.loss]
        adapters = [r.adapter for r in output.routings if hasattr(r, "adapter")]
        if adapters:
            balance = mean_balance(adapters, mask, tokens)
            loss = loss + c_adapter * balance.loss
            adapter_counts = adapter_counts + balance.counts
            parts.append(balance.loss)
        # sharded gradients are averaged over the processes, and should be summed
        (loss * processes.WORLD).backward()
        sums[: len(parts)] += torch.stack(parts).detach()
    return StepLosses(sums, counts, adapter_counts)


# The run -----------------------------------------------------------------------------------------


def train(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    config, tokenizer = eval.load_config(args.base)
    data = dataset.load_data(args, tokenizer, config.max_position_embeddings)
    model, plan = build(args, config, tokenizer, data)
    optimizer = make_optimizer(model, args)
    settings = settings_of(args, config, data)
    settings["chosen"] = getattr(getattr(model, "adapter_config", None), "experts", None)
    rows = perft.what_trains(model)
    settings["trains"] = sum(row.parameters for row in rows)
    settings["activated"] = sum(row.activated for row in rows)  # of those, by one token
    out = Path(args.out)
    if args.resume:
        check_same_run(run.read_json(out / "config.json"), settings)
        hub.Tensors(out / "state.safetensors").fill(state_places(model, optimizer))
    first = steps_done(optimizer)

    print(configuration_text(settings))
    for note in data.notes:
        print(note)
    for note in [*plan.notes, *advice(args, data.steps)]:
        print(f"warning: {note}")
    print(perft.report(model))
    if args.resume:
        log = open_log(out, first)
    else:
        text, record = measure("before", model, tokenizer, data, args)
        if processes.RANK == 0:  # from here on a run that is replaced is lost
            begin_folder(out, settings)
            if plan.scored:
                esft.save_scores(model, out, *plan.scored)
        log = open_log(out, None)
        log.write(text, event="before", **record)
    run_steps(args, settings, model, tokenizer, data, optimizer, first, log)

    eval.check_finite(model)
    saved = save(args, model, out)
    processes.meet()  # the first process has written it
    text, record = measure("after", model, tokenizer, data, args)
    log.write(text, event="after", **record)
    if processes.RANK == 0:
        (out / "state.safetensors").unlink(missing_ok=True)
    peak, size = peak_memory(args.device), saved.stat().st_size
    log.write(f"memory: at most {peak / 1e9:.2f} GB", event="memory", peak=peak)
    log.write(f"saved {saved} ({size:,} bytes)", event="saved", file=str(saved), bytes=size)
    if processes.RANK == 0:
        pictures.draw(out)


def begin_folder(out: Path, settings: dict):
    """A folder with the settings of the run, and nothing of one that it replaces."""
    out.mkdir(parents=True, exist_ok=True)
    for name in eval.RUN_FILES:
        (out / name).unlink(missing_ok=True)
    run.write_json(out / "config.json", settings, indent=2)


def open_log(out: Path, keep_until: int | None) -> run.Log:
    return run.Log(out / "metrics.jsonl" if processes.RANK == 0 else None, keep_until)


def settings_of(args, config: Config, data: dataset.Data) -> dict:
    """Every value in force: the flags, and what was derived from them, the base and the rows."""
    balance, adapter_balance = args.balance, args.adapter_balance
    if balance is None:
        balance = config.router_aux_loss_coef
    if adapter_balance is None and args.variant == "perft_r":
        adapter_balance = config.router_aux_loss_coef
        if args.recipe:
            adapter_balance = paper_balance(config) * args.top_k
    on_gpu = args.device.startswith("cuda")
    rows = args.data
    if rows is not None and rows not in dataset.NAMED:
        rows = os.path.abspath(rows)  # a path that holds from everywhere
    settings = vars(args) | {
        "balance": balance,
        "adapter_balance": adapter_balance,
        "steps": data.steps,
        "epochs": None if args.steps else args.epochs,
        "max_length": data.max_length,
        "template": data.template,
        "compile": on_gpu if args.compile is None else args.compile,
        "base": os.path.abspath(args.base) if args.base else None,
        "data": rows,
        "data_sha256": data.sha256,
        "world": processes.WORLD,
        "torch": torch.__version__,
        "base_config": config.to_dict(),
    }
    if args.variant in (*PERFT, *LORA):
        settings["alpha"] = PerftConfig(**adapter_options(args)).alpha
    return settings


def configuration_text(settings: dict) -> str:
    hidden = ("data_sha256", "world", "torch", "base_config", "chosen", "trains", "activated")
    words = []
    for name, value in settings.items():
        if name not in hidden and value is not None and value is not False:
            words.append(f"{name}={value}")
    text = f"configuration: {' '.join(words)}"
    return textwrap.fill(text, 100, subsequent_indent="    ", break_on_hyphens=False)


def advice(args, steps: int) -> list[str]:
    """What a user should know of settings that are likely not meant."""
    notes = []
    if args.warmup >= steps:
        last = learning_rate(steps - 1, steps, args)
        notes.append(f"--warmup is not shorter than the run: its last rate is {last:.1e}")
    if args.base and not args.recipe and args.lr == LEARNING_RATES[args.variant]:
        notes.append(
            f"--lr {args.lr} was found on the embedded model; a real base wants less; --data "
            "with --recipe perft_paper has the papers' settings"
        )
    if args.base and not args.data and not eval.is_embedded(args.base):
        notes.append("--task is of the embedded world, which this base does not know; give --data")
    return notes


def check_same_run(then: dict, now: dict):
    """A run is continued with the flags it was begun with."""
    free = {"resume", "overwrite", "out", "log_every", "save_every"}
    free |= {"threads", "torch", "world", "device"}
    fixed = {name: value for name, value in now.items() if name not in free}
    changed = run.changes(then, fixed)
    if changed:
        raise ValueError(f"--resume continues a run as it was begun; changed: {changed}")


def save(args, model, out: Path) -> Path:
    """Write what was trained -> the file of its weights."""
    if args.variant in ESFT:
        esft.save(model, out)
        return out / esft.WEIGHTS
    if args.variant != "scratch":
        perft.save_adapter(model, out)
        return out / perft.WEIGHTS
    model.save_pretrained(out / "model", torch.bfloat16)
    if processes.RANK == 0:
        for file in Path(args.base or EMBEDDED).glob("tokenizer*.json"):
            shutil.copy(file, out / "model")
    processes.meet()
    read_back = MoETransformer.from_pretrained(out / "model", device=args.device)
    model.load_state_dict(read_back.state_dict())  # what is reported is what is in the file
    return out / "model" / "model.safetensors"


def run_steps(args, settings, model, tokenizer, data, optimizer, first: int, log: run.Log):
    """The training loop, from step `first` on."""
    steps = settings["steps"]
    trained = [p for p in model.parameters() if p.requires_grad]
    c_base, c_adapter = settings["balance"], settings["adapter_balance"]
    model.checkpoint_activations = args.checkpoint_activations
    if settings["compile"]:
        # each block by itself: equal blocks share their graphs
        torch._dynamo.config.recompile_limit = 64  # ESFT: a graph for each number of experts
        for block in model.layers:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)
    model.train()
    batches = dataset.batches(args, data, tokenizer, first)
    inert_checked = False
    choices = 0  # (L, E), since `first`
    seen, since = 0, time.perf_counter()
    print("  step cross-entropy  balance        lr grad norm  tokens/s    memory   load")
    off = processes.RANK > 0 or None  # None: shown on a terminal
    for step in tqdm(range(first, steps), initial=first, total=steps, disable=off, leave=False):
        # dropout: the step's own
        torch.manual_seed((args.seed * 1_000_003 + step + processes.RANK * 7_919) % 2**63)
        rate = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches)
        losses, counts, adapter_counts = forward_backward(model, batch, args, c_base, c_adapter)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        choices = choices + counts
        seen += int(batch[2].sum())

        done = step + 1
        log_now = done % args.log_every == 0 or done == steps
        save_now = done % args.save_every == 0 and done < steps
        if log_now or save_now:  # before the step: nothing that is not finite is saved
            cross_entropy, balance, adapter_balance = processes.total(losses).tolist()
            grad_norm = processes.whole(grad_norm).item()
            if not math.isfinite(cross_entropy + balance + adapter_balance + grad_norm):
                raise ValueError(
                    f"step {done}: the loss is {cross_entropy}, the gradient's norm {grad_norm}; "
                    f"try a lower --lr (it is {args.lr})"
                )
        optimizer.step()
        optimizer.zero_grad()

        if log_now:
            load = counts / counts.sum(-1, keepdim=True)
            record = {
                "cross_entropy": cross_entropy,
                "balance": balance,
                "lr": rate,
                "grad_norm": grad_norm,
                "tokens_per_second": seen / (time.perf_counter() - since),
                "memory": peak_memory(args.device),
                "largest_load": load.max().item(),
            }
            text = step_text(done, record)
            if args.variant == "perft_r":
                adapter_load = adapter_counts / adapter_counts.sum(-1, keepdim=True)
                record["adapter_balance"] = adapter_balance
                record["adapter_load"] = adapter_load.tolist()
                text += f"   adapters: balance {adapter_balance:.3f}"
            log.write(text, event="step", step=done, **record, expert_load=load.tolist())
            seen, since = 0, time.perf_counter()
        # not after one step: where B starts at 0, A has no gradient in it
        if log_now and not inert_checked and done >= first + 2:
            check_inert(model, optimizer, choices)
            inert_checked = True
        if (
            done < steps
            and settings["epochs"]
            and data.held_out
            and done % data.steps_per_epoch == 0
        ):
            when = f"after epoch {done // data.steps_per_epoch}"
            text, record = measure(when, model, tokenizer, data, args)
            log.write(text, event="epoch", step=done, **record)
            model.train()
        if args.eval_every and done % args.eval_every == 0:
            when = f"at step {done}, validation rows"
            paused = time.perf_counter()
            text, record = measure(when, model, tokenizer, data, args, "validation")
            log.write(text, event="eval", step=done, **record)
            model.train()
            since += time.perf_counter() - paused
        if save_now:
            eval.check_finite(model)
            hub.write_tensors(Path(args.out) / "state.safetensors", state_places(model, optimizer))
    model.eval()


def step_text(step: int, record: dict) -> str:
    return (
        f"{step:6} {record['cross_entropy']:13.4f} {record['balance']:8.3f} {record['lr']:9.2e} "
        f"{record['grad_norm']:9.3f} {record['tokens_per_second']:9,.0f} "
        f"{record['memory'] / 1e9:6.2f} GB {record['largest_load']:6.3f}"
    )


def check_inert(model, optimizer, choices: torch.Tensor):
    """Attached, listed, stepped, and inert is the commonest silent failure: ValueError if a tensor
    that trains never had a gradient, of which AdamW's first moment would know.

    Excused: a layer whose chosen experts no token reached, an adapter router that was warned about.
    choices (L, E): how often tokens chose each expert.
    """
    config = getattr(model, "adapter_config", None)
    excused = []
    for i, ids in enumerate(getattr(config, "experts", None) or []):
        if choices[i][ids].sum() == 0:
            excused.append(f"layers.{i}.")
    if isinstance(config, PerftConfig) and perft.warnings_for(config, model.config):
        excused.append("adapters.router")
    silent = []
    for name, p in model.named_parameters():
        if p.requires_grad and not processes.whole(optimizer.state[p]["exp_avg"]).any():
            if not any(part in name for part in excused):
                silent.append(name)
    if silent:
        raise ValueError(
            f"{len(silent)} trainable tensors never had a gradient: {', '.join(silent[:3])}; "
            "attached but inert. Is their output detached, or does no token reach them?"
        )


@run.command
def main(argv=None):
    args = parse_args(argv)
    args.device = processes.start(args.device)
    if processes.RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one process speaks for all)
    begun = time.time()
    try:
        train(args)
        processes.stop()
    except (ValueError, OSError) as error:
        if processes.RANK == 0:
            raise
        raise ValueError(f"in process {processes.RANK}: {error}") from None
    except KeyboardInterrupt as stop:
        code = getattr(stop, "code", 130)  # run.Stopped has the signal's
        raise run.Stopped(what_is_where(args, begun), code) from None


def what_is_where(args, begun: float) -> str:
    """After a stop: what this run, begun at that time, has written, and how to go on."""
    out = Path(args.out)
    for name in (perft.WEIGHTS, esft.WEIGHTS, "model/model.safetensors"):
        if (out / name).exists() and (out / name).stat().st_mtime > begun:
            return f"training is done, {out / name} is saved; accuracies: eval.py --adapter {out}"
    state = out / "state.safetensors"
    if state.exists() and (args.resume or state.stat().st_mtime > begun):
        return "continue with --resume"
    return "nothing was saved, begin again with --overwrite"


if __name__ == "__main__":
    main()
