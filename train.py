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
"""

from data import run  # first: from here on Ctrl-C is one line

# isort: split
import difflib
import os
import shutil
import signal
import sys
import textwrap
import time
from argparse import SUPPRESS, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import esft
import eval
import perft
from data import dataset, hub, pictures, skills, tasks
from data import shard as processes
from data.run import count, from_zero, number, positive
from model import DTYPES, EMBEDDED, Config, MoETransformer
from moe import expert_counts, prob_sums, unevenness
from perft import BASELINES, CHOICES, LORA, PERFT, PerftConfig

# Flags -------------------------------------------------------------------------------------------

ESFT = ("esft_token", "esft_gate")
VARIANTS = (*PERFT, *ESFT, *BASELINES, "scratch")
WITH_ROWS = VARIANTS[:-1]  # scratch draws rows without end
ADAPTERS = (*PERFT, *LORA)
KEEP_THE_BASE = (*PERFT, *ESFT, *LORA, "router")  # all of it, or float32 masters of what trains
TASKS = (*skills.TARGETS, *skills.FAMILIES)
# choices that are not every variant's
DTYPES_OF = {"float32": VARIANTS, "bfloat16": KEEP_THE_BASE}
RECIPES = {"perft_paper": (*PERFT, *BASELINES), "esft_paper": (*ESFT, *LORA, "full")}
WHOLE = number(int, 0, most=2**63 - 1)
BETA = number(float, 0, most=0.999999)
SHARE = number(float, 0, above=True, most=1)


class Flag(NamedTuple):
    """A row of the table."""

    takes: object  # a kind of number; a text, by what it is; names to choose from; a SWITCH
    default: object  # of most variants: see BY_VARIANT
    about: str
    variants: tuple[str, ...] = VARIANTS  # that have it


def group(title, **flags: Flag):
    return title, flags


SWITCH = "store_true", BooleanOptionalAction  # argparse's actions; the second has a --no-... too
ON, ON_OFF = SWITCH
# Groups that a command may lack whatever its variant: see `missing`.
TASK, ROWS, CHOICE = "task of the embedded world", "rows of a file", "choice of the experts"
FLAGS = [
    group(
        "model and rows",
        variant=Flag(VARIANTS, None, "what trains"),
        base=Flag("DIR", None, "model folder (the embedded data/tiny_olmoe)"),
        device=Flag("NAME", eval.DEVICE, "where"),
        threads=Flag(count, 1, "of the CPU"),
        dtype=Flag(DTYPES_OF, "float32", "of the base"),
        data=Flag("FILE", None, "rows of a file, no task; with --help: their flags", WITH_ROWS),
    ),
    group(
        TASK,
        task=Flag(TASKS, skills.DEFAULT_TARGET, "what to learn", WITH_ROWS),
        train_rows=Flag(count, 4000, "to draw", WITH_ROWS),
        eval_rows=Flag(count, 500, "test rows of the task, a fifth of it for each family"),
    ),
    group(
        ROWS,
        recipe=Flag(RECIPES, None, "a paper's settings"),
        max_length=Flag(count, 1024, "tokens of a row, at most"),
        template=Flag(tasks.TEMPLATES, None, "of alpaca records' prompts (papers)"),
        held_out=Flag(WHOLE, 120, "rows kept out to measure on, as many as in the papers"),
        epochs=Flag(count, 1, "times through the rows, if --steps is not given"),
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
        adapter_balance=Flag(from_zero, None, "c_adapter (as c_base)", ("perft_r",)),
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
        CHOICE,
        gate_share=Flag(ON, False, "scores as shares of their layer's sum", ("esft_gate",)),
        p=Flag(SHARE, 0.2, "score that a layer's choice reaches", ESFT),
        bind_groups=Flag(count, 1, "choose whole groups of so many, as a control", ESFT),
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
        seed=Flag(WHOLE, 0, "of weights, row order, dropout"),
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

# Defaults that differ. The rates: for the embedded model, the best of the grids on kinship_new in
# assets/results.csv; lora_experts, frozen_experts: on three_new (router, scratch: one try each).
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


def perft_paper(variant: str, given: dict) -> dict:
    """The settings of the papers and of the authors' code (2411.08212), beside what is the default
    anyway: alpha 2r, --kind lora, --init paper, --dropout 0.05, --held_out 120, AdamW (0.9, 0.999)
    with eps 1e-8 and no weight decay, --clip 1, linear decay.

    Their balance loss is transformers', which is K times ours on one layer, hence c * K. (It also
    pools all layers, which ours does not: moe.load_balancing_loss.)
    """
    config = Config.from_folder(given.get("base", EMBEDDED))
    mixtral = config.model_type == "mixtral"
    lora_on_commonsense = variant == "lora_qv" and given["data"] == "commonsense"
    return {
        "lr": 2e-5 if mixtral or lora_on_commonsense else 1e-5,
        "balance": paper_balance(config) * config.num_experts_per_tok,
        "batch_size": 16,
        "epochs": 3,
        "max_length": 256,
        "warmup": 100,
        "train_on_inputs": True,
    }


def paper_balance(config: Config) -> float:
    """The papers' c."""
    return 0.02 if config.model_type == "mixtral" else 0.01


def esft_paper(variant: str, given: dict) -> dict:
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
        "max_length": 4096,
        "warmup": 1,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "eval_every": 100,
    }


def not_for(variant, others):
    return f"does not apply to --variant {variant}; it applies to {', '.join(others)}"


def missing(variant, given):
    """The flags that a command does not have, and why."""
    causes = {}
    if "data" in given:
        causes[TASK] = "does not apply to --data, which brings its own rows"
    else:
        causes[ROWS] = "applies to --data only"
    if given.get("experts", "random") != "random":
        causes[CHOICE] = f"does not apply: the choice is that of --experts {given['experts']}"
    why = {}
    for title, flags in FLAGS:
        for name, flag in flags.items():
            if variant not in flag.variants:
                why[name] = not_for(variant, flag.variants)
            elif title in causes:
                why[name] = causes[title]
    return why


def in_force(variant, given):
    """The value of each flag: what is given, else the recipe's, else the default."""
    values = {name: flag.default for _, flags in FLAGS for name, flag in flags.items()}
    values |= BY_VARIANT[variant] | {"out": f"out/{variant}"}
    if "base" in given:
        values["threads"] = None  # as torch likes; a small model is faster with one
    if "gate_share" in given:
        values["p"] = 0.25
    if "data" in given:
        values["steps"] = None
    if "recipe" in given:
        recipe = {"perft_paper": perft_paper, "esft_paper": esft_paper}[given["recipe"]]
        values |= recipe(variant, given)
    return values | given


def make_parser(defaults, without=()):
    """A parser of all flags but some. Its help shows these defaults; a flag that is not given is
    not in what it reads."""
    parser = run.Parser(
        description="Fine-tune a Mixture-of-Experts model; train.py's first page says how.",
        usage="python train.py --variant NAME [options]",
        argument_default=SUPPRESS,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="the flags of a variant")
    for title, flags in FLAGS:
        add = parser.add_argument_group(title).add_argument
        for name, flag in flags.items():
            if name not in without:
                add(f"--{name}", **for_argparse(flag, defaults.get(name)))
    return parser


def for_argparse(flag, default):
    about = flag.about
    if default is not None and default is not False:
        about += f" ({default})"
    if flag.takes in SWITCH:
        return {"action": flag.takes, "help": about}
    if callable(flag.takes):
        return {"type": flag.takes, "metavar": "N", "help": about}
    if isinstance(flag.takes, str):
        return {"metavar": flag.takes, "help": about}
    about += f": {', '.join(flag.takes)}"
    return {"choices": tuple(flag.takes), "metavar": "NAME", "help": about}


def parse_args(argv=None) -> Namespace:
    """Every flag of every variant is read. Those that this command does not have are refused, and
    None where they are not given."""
    parser = make_parser({})
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    wants_help = given.pop("help", False)
    variant = given.get("variant", "perft_s")  # whose page --help shows
    absent = missing(variant, given)
    try:
        if wants_help:
            make_parser(in_force(variant, given), absent).print_help()
            sys.exit()
        if unknown:
            own = make_parser({}, absent).flags()
            raise ValueError(not_understood(unknown[0].split("=")[0], own))
        check_flags(given, absent)
        args = Namespace(**in_force(variant, given) | dict.fromkeys(absent))
        check_args(args)
        if args.resume and "lr" not in given:
            args.lr = begun_with(Path(args.out), args.lr)
    except (ValueError, OSError, ArgumentTypeError) as error:
        parser.error(str(error))
    return args


def begun_with(out, default):
    """The rate of the run that a folder holds; whether it holds one is found out later."""
    file = out / "config.json"
    then = run.read_json(file, lr=float) if file.is_file() else {}
    return then.get("lr") or default


def not_understood(word, flags):
    known = [*flags, *(f"--variant {variant}" for variant in VARIANTS)]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.55)
    return f"{word} was not understood" + (f"; did you mean {near[0]}?" if near else "")


def check_flags(given, absent):
    """ValueError for a flag that this command does not have, or must have."""
    if "variant" not in given:
        raise ValueError("--variant is required, it says what trains")
    for name in given:
        if name in absent:
            raise ValueError(f"--{name} {absent[name]}")
    if {"epochs", "steps"} <= given.keys():
        raise ValueError("--epochs: not allowed with argument --steps")


def check_args(args):
    """ValueError for values that cannot go together."""
    eval.device(args.device)
    for flag, others in (
        (f"--dtype {args.dtype}", DTYPES_OF[args.dtype]),
        (f"--recipe {args.recipe}", RECIPES.get(args.recipe, VARIANTS)),
    ):
        if args.variant not in others:
            raise ValueError(f"{flag} {not_for(args.variant, others)}")
    if args.variant in (*PERFT, *BASELINES):
        PerftConfig(**adapter_options(args))
    if args.kind == "parallel" and args.alpha is not None:
        raise ValueError("--alpha does not apply to --kind parallel, which has no scale")
    if args.variant not in ESFT and args.experts == "random":
        raise ValueError(
            "--experts random is a control for esft_token and esft_gate; adapters take a file"
        )


def adapter_options(args):
    """The flags that are fields of PerftConfig; --experts is a file, which is not read yet."""
    names = PerftConfig.__dataclass_fields__.keys() - {"experts"}
    return {name: vars(args)[name] for name in names if vars(args)[name] is not None}


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


def plan_adapters(args, config):
    options = adapter_options(args)
    if args.experts:
        options["experts"] = esft.read_choice(args.experts, config).experts

    def edit(model):
        torch.manual_seed(args.seed)  # adapters start alike on every device
        return perft.apply_perft(model, **options)

    return Plan(edit, perft.warnings_for(PerftConfig(**options), config))


def plan_esft(args, config, tokenizer, data):
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


def score_experts(args, config, tokenizer, data):
    """Read rows of the task with the base. The model that reads is gone afterwards."""
    examples = data.train[: args.score_rows]
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


def say_memory(args, config, edit):
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
    optimizer.done = torch.zeros(())  # steps of the run; "step" counts those that changed something
    for p in trained:  # made here, not at the first step, so that a saved state has a place to go
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def state_places(model, optimizer):
    """Everything that a step changes: the trained parameters, AdamW's moments and step counts."""
    table = {"done": hub.Place(optimizer.done)}
    for name, p in model.named_parameters():
        if p.requires_grad:
            table[f"param.{name}"] = hub.Place(p)
            for key, value in optimizer.state[p].items():
                table[f"{key}.{name}"] = hub.Place(value)
    return table


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


def peak_of(device):
    """Operations a second at most; None where nobody says."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def flops_per_token(model, counts: torch.Tensor, labels: float, keys: float) -> float:
    """Operations of a training step a token, in matrix products: of each weight that it meets 2
    forward, 2 for the gradient of what is multiplied, 2 for the weight's own where it trains.

    counts (L, E): the choices, of which ESFT's experts have a share. labels: the share of tokens
    that are one, since only these meet the head. keys: that a token attends to, on average.
    Too much, by the gradients that the lowest layer does not need above frozen embeddings; nothing
    that is computed twice counts twice.
    """
    c, config = model.config, getattr(model, "adapter_config", None)
    copies = isinstance(config, esft.EsftConfig)  # of a bank, which is counted
    # two products forward, four for their gradients
    flops = 12 * keys * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    for name, p in model.named_parameters():
        met = p.numel() * perft.share_met(model, name, p)
        products = 3 if p.requires_grad else 2
        if p is model.lm_head.weight:
            met *= labels
        elif p.dim() == 1 or p is model.embed_tokens.weight:
            products = 0
        elif copies and p.requires_grad and ".experts." in name:
            layer = int(name.split(".")[1])
            share = counts[layer, config.experts[layer]].sum() / counts[layer].sum()
            met = p.numel() / len(p) * c.num_experts_per_tok * share.item()
            products = 1
        flops += 2 * products * met
    return flops


def share_of_peak(model, batch, counts, device: str, speed: float) -> float | None:
    """The part of all devices' peak (MFU) that a speed in tokens a second is; None if unknown."""
    peak = peak_of(device)
    if peak is None:
        return None
    lengths = batch[2].sum(1)
    tokens = lengths.sum().item()
    labels = (batch[1][:, 1:] != -100).sum().item() / tokens
    keys = (lengths * (lengths + 1)).sum().item() / 2 / tokens
    return speed * flops_per_token(model, counts, labels, keys) / (peak * processes.WORLD)


# The step ----------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up to args.lr, linear decay to 0 after the last step."""
    warm = (step + 1) / args.warmup
    decayed = (steps - step) / max(steps - args.warmup, 1)
    return args.lr * min(warm, decayed, 1.0)


class Balance(NamedTuple):
    loss: torch.Tensor  # mean of the layers; the parts of a step add up
    layers: torch.Tensor  # (L,) each; no gradient
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
    layers = torch.stack(losses)
    return Balance(layers.mean(), layers.detach(), counts)


class StepLosses(NamedTuple):
    """Of a whole step; parts add up."""

    losses: torch.Tensor  # (3,) cross-entropy, balance, the adapters' balance; no gradient
    layers: torch.Tensor  # (L,) balance; no gradient
    counts: torch.Tensor  # (L, E)
    adapter_counts: torch.Tensor  # (L, M); 0 without such adapters


def forward_backward(model, batch, args, c_base, c_adapter) -> StepLosses:
    """One step's gradients, in parts of --micro_batch rows."""
    labels_in_step = int((batch[1][:, 1:] != -100).sum())
    tokens = int(batch[2].sum())
    sums = torch.zeros(3, device=args.device)
    layers = counts = adapter_counts = 0
    for input_ids, labels, mask in processes.micro_batches(
        batch, args.micro_batch or args.batch_size
    ):
        input_ids, mask = input_ids.to(args.device), mask.to(args.device)
        # labels stay on the CPU, where those that count are found without waiting for the GPU;
        # no attention mask: padding is on the right, where no token sees it
        output = model(input_ids, labels=labels, loss_divisor=labels_in_step)
        balance = mean_balance(output.routings, mask, tokens)
        loss = output.loss + c_base * balance.loss
        layers = layers + balance.layers
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
    return StepLosses(sums, layers, counts, adapter_counts)


class Guard:
    """Finds numbers that are not finite in their step, without waiting for the device: such a step
    changes neither weights nor moments, and is told of at the next line of the log, or save.

    What is looked at comes in the order in which a step computes: the first that is not finite is
    nearest to the cause.
    """

    def __init__(self, model):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.trained = trained[::-1]
        self.places = [f"the router of layers.{i}" for i in range(len(model.layers))]
        self.places += ["the loss", *(f"the gradient of {name}" for name, _ in self.trained)]
        self.values = torch.zeros(len(self.places), device=trained[0][1].device)
        self.step = self.in_a_row = self.values[0]
        self.told = ""

    def look(self, losses: StepLosses, step: int) -> torch.Tensor:
        """-> 1 if this step is to change nothing, else 0."""
        values = [*losses.layers, losses.losses.sum()]
        for _, p in self.trained:
            values.append(values[0] * 0 if p.grad is None else processes.held(p.grad)[0].norm())
        values = processes.total(torch.stack(values))
        bad = ~values.isfinite().all()
        begins = bad & (self.in_a_row == 0)
        self.values = torch.where(begins, values, self.values)
        self.step = torch.where(begins, step, self.step)
        self.in_a_row = (self.in_a_row + 1) * bad
        return bad.float()

    def read(self, args, log, is_last: bool) -> bool:
        """Tell the log of steps that were not finite. Is the last one? ValueError if it ends many
        in a row, or the run."""
        in_a_row = int(self.in_a_row)
        bad = (~self.values.isfinite()).nonzero()
        if len(bad) == 0:
            return True
        what = f"{self.places[bad[0]]} was not finite in step {int(self.step)}"
        if in_a_row >= IN_A_ROW or (in_a_row and is_last):
            raise ValueError(
                f"{what}, nor was any step since; lower --lr (it is {args.lr}): "
                f"{what_is_where(Path(args.out))}"
            )
        if what != self.told:
            log.write(f"warning: {what}, which changed nothing", event="not_finite", what=what)
            self.told = what
        return in_a_row == 0


IN_A_ROW = 10  # steps that are not finite: one may be chance, so many are not


# The run -----------------------------------------------------------------------------------------


def train(args):
    begun = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    config, tokenizer = eval.load_config(args.base)
    data = dataset.load_data(args, tokenizer, config.max_position_embeddings)
    model, plan = build(args, config, tokenizer, data)
    optimizer = make_optimizer(model, args)
    settings = settings_of(args, config, data) | settings_of_model(model)
    out = Path(args.out)
    if args.resume:
        check_same_run(settings, out)
        hub.Tensors(out / "state.safetensors").fill(state_places(model, optimizer))
        check_state(optimizer, data.steps, out)

    warnings = [f"warning: {note}" for note in [*plan.notes, *advice(args, data.steps)]]
    print(configuration_text(settings), *data.notes, *warnings, perft.report(model), sep="\n")

    def measured(when, split="test"):
        return measure(when, model, tokenizer, data, args, split)

    first = int(optimizer.done)
    if args.resume:
        log = open_folder(out, settings, first)
        text = f"goes on after step {first}, with --lr {args.lr}"
        log.write(text, event="resumed", step=first, lr=args.lr)
    else:
        text, record = measured("before")
        log = open_folder(out, settings, None)
        log.write(text, event="before", **record)
    if plan.scored and processes.RANK == 0:
        esft.save_scores(model, out, *plan.scored)
    batches = dataset.batches(args, data, tokenizer, first)
    with run.last_words(lambda: what_is_where(out)), run.noting() as noted:
        run_steps(args, settings, model, optimizer, batches, log, noted, data, measured)
        check_finite(model)
        saved = save(args, model, out)
    is_saved = f"training is done, {saved} is saved; accuracies: eval.py --adapter {out}"
    with run.last_words(lambda: is_saved):
        if noted:
            raise run.Stopped("", 128 + noted[0])
        processes.meet()  # the first process has written it
        text, record = measured("after")
        log.write(text, event="after", **record)
        finish(args, log, saved, begun)


def open_folder(out, settings, keep_until):
    """From here on a run that is replaced is lost. metrics.jsonl comes first: it makes a folder a
    run's, whatever happens next. keep_until: the step after which a run is resumed."""
    if processes.RANK > 0:
        return run.Log(None, None)
    if keep_until is None:
        for name in eval.RUN_FILES:
            (out / name).unlink(missing_ok=True)
    log = run.Log(out / "metrics.jsonl", keep_until)
    run.write_json(out / "config.json", settings, indent=2)
    return log


def finish(args, log, saved, begun):
    """Close the run. The state goes last: a run that is cut off before goes on from it and comes
    here again."""
    out, peak, size = Path(args.out), peak_memory(args.device), saved.stat().st_size
    seconds = time.perf_counter() - begun
    text = f"took {seconds:,.0f} s and at most {peak / 1e9:.2f} GB of memory"
    log.write(text, event="memory", seconds=seconds, peak=peak)
    log.write(f"saved {saved} ({size:,} bytes)", event="saved", file=str(saved), bytes=size)
    log.sync()
    if processes.RANK == 0:
        pictures.draw(out)
        (out / "state.safetensors").unlink(missing_ok=True)


def settings_of(args, config, data):
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


def settings_of_model(model):
    whole = perft.summed("all", perft.what_trains(model))
    return {
        "chosen": getattr(getattr(model, "adapter_config", None), "experts", None),
        "trains": whole.parameters,
        "activated": whole.activated,  # of those, by one token
    }


def configuration_text(settings):
    hidden = ("data_sha256", "world", "torch", "base_config", "chosen", "trains", "activated")
    words = []
    for name, value in settings.items():
        if name not in hidden and value is not None and value is not False:
            words.append(f"{name}={value}")
    text = f"configuration: {' '.join(words)}"
    return textwrap.fill(text, 100, subsequent_indent="    ", break_on_hyphens=False)


def advice(args, steps):
    """What a user should know of settings that are likely not meant."""
    notes = []
    if args.warmup >= steps:
        last = learning_rate(steps - 1, steps, args)
        notes.append(f"--warmup is not shorter than the run: its last rate is {last:.1e}")
    if args.lr > 100 * BY_VARIANT[args.variant]["lr"]:
        notes.append(
            f"--lr {args.lr} is far above what {args.variant} was found to bear, "
            f"{BY_VARIANT[args.variant]['lr']}: training will likely diverge"
        )
    recipes = [name for name, variants in RECIPES.items() if args.variant in variants]
    if args.base and not args.recipe and args.lr == BY_VARIANT[args.variant]["lr"] and recipes:
        notes.append(
            f"--lr {args.lr} was found on the embedded model; a real base wants less; --data "
            f"with --recipe {' or '.join(recipes)} has the papers' settings"
        )
    if args.base and not args.data and not eval.is_embedded(args.base):
        notes.append("--task is of the embedded world, which this base does not know; give --data")
    return notes


def check_same_run(now, out):
    """A run is continued with the flags it was begun with; its rate alone may change."""
    free = {"lr", "resume", "overwrite", "out", "log_every", "save_every"}
    free |= {"threads", "torch", "world", "device"}
    fixed = {name: value for name, value in now.items() if name not in free}
    changed = run.changes(run.read_json(out / "config.json"), fixed)
    if changed:
        raise ValueError(f"--resume continues {out} as it was begun; changed: {changed}")


def check_state(optimizer, steps, out):
    done = optimizer.done.item()
    counts = [float(state["step"]) for state in optimizer.state.values()]
    if done not in range(1, steps) or not all(0 <= count <= done for count in counts):
        raise ValueError(
            f"{out / 'state.safetensors'}: holds numbers of steps that no run has done; begin "
            "again with --overwrite"
        )


def save(args, model, out):
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


def run_steps(args, settings, model, optimizer, batches, log, noted, data, measured):
    """The training loop, from the steps that are done on. noted: signals that ask it to stop."""
    first, steps = int(optimizer.done), settings["steps"]
    guard = Guard(model)
    model.checkpoint_activations = args.checkpoint_activations
    if settings["compile"]:
        compile_blocks(model)
    model.train()
    inert_checked = False
    choices = 0  # (L, E), since `first`
    begun = since = time.perf_counter()
    seen = 0
    print("  step cross-entropy  balance        lr grad norm  tokens/s    memory   load")
    off = processes.RANK > 0 or None  # None: shown on a terminal
    for step in tqdm(range(first, steps), initial=first, total=steps, disable=off, leave=False):
        batch = next(batches)
        losses, grad_norm = take_step(args, settings, model, optimizer, guard, batch, step)
        choices = choices + losses.counts
        seen += int(batch[2].sum())
        done = step + 1
        optimizer.done.fill_(done)

        stop_now = processes.total(torch.tensor(len(noted))) > 0 and done < steps
        save_now = (stop_now or done % args.save_every == 0) and done < steps
        log_now = done % args.log_every == 0 or done == steps
        finite = not (log_now or save_now) or guard.read(args, log, done == steps)
        if log_now and finite:
            now = time.perf_counter()
            left = (now - begun) / (done - first) * (steps - done)
            speed = seen / (now - since)
            share = share_of_peak(model, batch, losses.counts, args.device, speed)
            log_step(args, optimizer, log, losses, grad_norm, speed, share, left)
            seen, since = 0, now
            # not after one step: where B starts at 0, A has no gradient in it
            if not inert_checked and next(iter(optimizer.state.values()))["step"] >= 2:
                check_inert(model, optimizer, choices)
                inert_checked = True
        paused = time.perf_counter()
        for event, *what in due(args, settings, data, done):
            text, record = measured(*what)
            log.write(text, event=event, step=done, **record)
            model.train()
        since += time.perf_counter() - paused
        if save_now and finite:
            save_state(args.out, model, optimizer, log)
        if stop_now:
            said = f"step {done} of {steps} is saved in {args.out}, go on with --resume"
            number = noted[0] if noted else signal.SIGTERM  # another process's
            raise run.Stopped(said if finite else "", 128 + number)
    model.eval()


def check_finite(model):
    """ValueError if training made a number that is none. Of several processes all find out."""
    bad = []
    for name, p in model.named_parameters():
        if p.requires_grad and not processes.whole(p.detach()).isfinite().all():
            bad.append(name)
    if bad:
        raise ValueError(
            f"{len(bad)} trained tensors are not finite, {bad[0]} is one: training diverged; "
            "lower --lr"
        )


def save_state(out, model, optimizer, log):
    """After the lines of the log that belong to it."""
    check_finite(model)
    log.sync()
    hub.write_tensors(Path(out) / "state.safetensors", state_places(model, optimizer))


def due(args, settings, data, done):
    """What is measured after a step: (event, when, split) of each."""
    if settings["epochs"] and data.held_out and done < settings["steps"]:
        if done % data.steps_per_epoch == 0:
            yield "epoch", f"after epoch {done // data.steps_per_epoch}", "test"
    if args.eval_every and done % args.eval_every == 0:
        yield "eval", f"at step {done}, validation rows", "validation"


def compile_blocks(model):
    """Each block by itself: equal blocks share their graphs."""
    torch._dynamo.config.recompile_limit = 64  # ESFT: a graph for each number of experts
    for block in model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)


def take_step(args, settings, model, optimizer, guard, batch, step):
    """-> its losses, and the norm of its gradients."""
    # dropout: the step's own
    torch.manual_seed((args.seed * 1_000_003 + step + processes.RANK * 7_919) % 2**63)
    rate = learning_rate(step, settings["steps"], args)
    for group in optimizer.param_groups:
        group["lr"] = rate
    c_base, c_adapter = settings["balance"], settings["adapter_balance"]
    losses = forward_backward(model, batch, args, c_base, c_adapter)
    optimizer.found_inf = guard.look(losses, step + 1)  # where it is 1, AdamW changes nothing
    trained = [p for p in model.parameters() if p.requires_grad]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
    optimizer.step()
    optimizer.zero_grad()
    return losses, grad_norm


def log_step(args, optimizer, log, losses, grad_norm, speed, peak_share, left):
    cross_entropy, balance, adapter_balance = processes.total(losses.losses).tolist()
    load = losses.counts / losses.counts.sum(-1, keepdim=True)
    done = int(optimizer.done)
    record = {
        "cross_entropy": cross_entropy,
        "balance": balance,
        "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": processes.whole(grad_norm).item(),
        "tokens_per_second": speed,
        "peak_share": peak_share,
        "memory": peak_memory(args.device),
        "largest_load": load.max().item(),
    }
    text = step_text(done, record)
    if args.variant == "perft_r":
        adapter_load = losses.adapter_counts / losses.adapter_counts.sum(-1, keepdim=True)
        record["adapter_balance"] = adapter_balance
        record["adapter_load"] = adapter_load.tolist()
        text += f"   adapters: balance {adapter_balance:.3f}"
    if left and not sys.stderr.isatty():  # where there is no bar that says it
        text += f"   {tqdm.format_interval(left)} left"
    log.write(text, event="step", step=done, **record, expert_load=load.tolist())


def step_text(step, record):
    share = record["peak_share"]
    peak = "" if share is None else f"   {100 * share:.1f} % of the peak"
    return (
        f"{step:6} {record['cross_entropy']:13.4f} {record['balance']:8.3f} {record['lr']:9.2e} "
        f"{record['grad_norm']:9.3f} {record['tokens_per_second']:9,.0f} "
        f"{record['memory'] / 1e9:6.2f} GB {record['largest_load']:6.3f}{peak}"
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
    out = Path(args.out)
    nothing = "nothing was written, the same command begins again"
    if processes.RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one process speaks for all)
    try:
        with run.locked(out), run.last_words(lambda: nothing):
            run.check_run_folder(out, args.resume, args.overwrite, eval.RUN_FILES)
            args.device = processes.start(args.device)
            train(args)
        processes.stop()
    except (ValueError, OSError) as error:
        if processes.RANK == 0:
            raise
        raise ValueError(f"in process {processes.RANK}: {error}") from None


def what_is_where(out):
    """Of a run whose steps have begun: what there is of it, and how to go on."""
    if (out / "state.safetensors").exists():
        return f"an earlier step is saved in {out}, go on with --resume"
    return "nothing was saved, begin again with --overwrite"


if __name__ == "__main__":
    main()
