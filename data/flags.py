"""The command line of train.py: which flags a variant takes, their defaults, and the papers' recipe.

A flag that does not apply to the variant is an error and not ignored; what was not given is filled in here, so that the
configuration that a run prints and keeps says every value in force.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from data import skills
from data.cli import Parser, count, device, from_zero, number, positive
from data.run import check_run_folder
from data.tasks import TEMPLATES
from eval import DEVICE, DTYPES, RUN_FILES, TINY
from model import Config
from perft import BASELINES, PERFT, PerftConfig

ESFT = ("esft_token", "esft_gate")
VARIANTS = (*PERFT, *ESFT, *BASELINES, "scratch")

TASK_DEFAULTS = {"task": skills.DEFAULT_TARGET, "train_rows": 4000, "steps": 200, "eval_rows": 500, "score_rows": 500,
                 "bind_groups": 1}  # fmt: skip
FILE_DEFAULTS = {"epochs": 1, "max_length": 1024, "held_out": 120}  # held out: as many as the papers
P_DEFAULTS = {"token": 0.2, "gate": 0.1, "gate_share": 0.25}  # the first two are the paper's

# The flags that only some variants take; given to another one, they are an error and not ignored.
DATA = {"task", "train_rows", "data", "recipe", "template", *FILE_DEFAULTS}
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
# --init paper, --dropout 0.05, --held_out 120, AdamW (0.9, 0.999) with eps 1e-8, linear decay.
PAPER = {"batch_size": 16, "epochs": 3, "max_length": 256, "warmup": 100, "train_on_inputs": True,
          "weight_decay": 0.0, "beta2": 0.999, "clip": 1.0}  # fmt: skip
PAPER_BY_BASE = {"olmoe": {"lr": 1e-5, "balance": 0.01}, "mixtral": {"lr": 2e-5, "balance": 0.02}}


def paper_recipe(variant: str, base: str | None, data: str | None) -> dict:
    kind = Config.from_folder(base or TINY).model_type
    settings = PAPER | PAPER_BY_BASE[kind]
    if variant == "perft_r":
        settings["adapter_balance"] = settings["balance"]
    if variant == "lora_qv" and kind == "olmoe" and data == "commonsense":
        settings["lr"] = 2e-5
    return settings


def parse_args(argv=None) -> argparse.Namespace:
    own = PerftConfig("perft_s")  # the defaults of the adapter flags stand there
    about = "Fine-tune a Mixture-of-Experts model; the page at the top of train.py says what happens"
    parser = Parser(description=about, usage="python train.py --variant NAME [options]")
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
    add("--template", choices=TEMPLATES, help="of alpaca records' prompts (papers)")
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
    add("--lr", type=positive, metavar="X", help="peak learning rate (by variant: see RECIPES in data/flags.py)")
    add("--steps", type=count, metavar="N", help=f"optimiser steps ({TASK_DEFAULTS['steps']}; --data: as --epochs)")
    add("--batch_size", type=count, metavar="N", default=64, help="rows a step (%(default)s)")
    add("--warmup", type=count, metavar="N", default=20, help="steps of warm-up (%(default)s)")
    add("--weight_decay", type=from_zero, metavar="X", default=0.0, help="on matrices that train (%(default)s)")
    add("--beta2", type=from_zero, metavar="X", default=0.999, help="AdamW's memory of squared gradients (%(default)s)")
    add("--clip", type=positive, metavar="X", default=1.0, help="largest gradient norm (%(default)s)")
    add("--balance", type=from_zero, metavar="X", help="c_base (router_aux_loss_coef of the base's config)")
    add("--adapter_balance", type=from_zero, metavar="X", help="c_adapter of perft_r (the same)")
    add("--seed", type=number(int, 0), metavar="N", default=0, help="of weights, row order, dropout (%(default)s)")

    group = parser.add_argument_group("speed and memory")
    add = group.add_argument
    add("--micro_batch", type=count, metavar="N", help="rows at a time on a device (all of the batch that are its)")
    add("--checkpoint_activations", action="store_true", help="compute blocks twice, keep only their inputs")
    on = "compile the blocks (a minute at the start; on for cuda)"
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help=on)

    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--out", metavar="DIR", help="run folder (out/VARIANT)")
    add("--overwrite", action="store_true", help="replace the run that the folder holds")
    add("--resume", action="store_true", help="continue the run that the folder holds")
    add("--log_every", type=count, metavar="N", default=20, help="steps a line (%(default)s)")
    add("--save_every", type=count, metavar="N", default=50, help="steps between states to resume from (%(default)s)")
    add("--eval_rows", type=count, metavar="N", help="test rows of the task (500), a fifth of it for families")

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
    check_run_folder(parser, Path(args.out), args.resume, args.overwrite, RUN_FILES)
    return args


def fill_defaults(parser, args):
    """What was not given and applies: the values that will be in force, so that the configuration says them."""
    applies, given = APPLIES[args.variant], {flag for flag, value in vars(args).items() if value is not None}
    defaults = TASK_DEFAULTS | {"p": P_DEFAULTS[score_kind(args)]}
    if args.data:
        defaults |= FILE_DEFAULTS | {"task": None, "train_rows": None, "steps": None, "eval_rows": None}
        if args.steps:
            defaults["epochs"] = None
        if clash := [flag for flag in ("task", "train_rows", "eval_rows") if flag in given]:
            parser.error(f"--{clash[0]} does not apply to --data, which brings its own rows")
        if args.steps and args.epochs:
            parser.error("--steps and --epochs: choose one")
    elif clash := sorted({"template", *FILE_DEFAULTS} & given):
        parser.error(f"--{clash[0]} applies to --data only")
    if args.variant in (*PERFT, *BASELINES):
        options = given & PerftConfig.__dataclass_fields__.keys() - {"experts"}  # that is a file name still
        try:
            defaults |= asdict(PerftConfig(**{name: getattr(args, name) for name in options}))
        except ValueError as error:
            parser.error(str(error))
    for flag in (applies | {"steps", "eval_rows"}) & defaults.keys():
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
    if (args.p or 0) > 1:
        parser.error(f"--p {args.p:g}: scores of a layer sum to 1 at most; choose from 0 to 1")
    if args.beta2 >= 1:
        parser.error(f"--beta2 {args.beta2}: must be below 1")


def score_kind(args) -> str:
    """Which of esft's scores the variant goes by."""
    return "token" if args.variant == "esft_token" else "gate_share" if args.gate_share else "gate"
