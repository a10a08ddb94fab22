"""How good is a model? Accuracy on the skills of the embedded world or on the papers' test sets; or one answer.

    python eval.py --adapter out/perft_s                  the accuracies that its training run reported
    python eval.py                                        the embedded base model, all families
    python eval.py --prompt "sort : d b x a ->"           answer one prompt; --adapter, --num_beams, --temperature apply
    python eval.py --adapter RUN --tasks commonsense      the papers' eight test sets, by beam search
    python eval.py --adapter RUN --tasks commonsense --method likelihood      the same, far cheaper

Skills. A row is right if greedy decoding would produce its answer, then the end token, and nothing else. That needs no
decoding: run the model once over prompt + answer. Greedy decoding reproduces the answer if and only if the most likely
token is the right one at every position of it; at the first where it is not, decoding would leave the path.

Test sets: the page of data/benchmarks.py says how a row is answered and scored.
"""

import sys
from pathlib import Path

import torch

import esft
from data import skills
from data.benchmarks import METHODS, evaluate_sets
from data.checkpoint import read_json
from data.cli import Parser, count, device, from_zero, positive
from data.dataset import DOWNLOADS, encode_prompt, encode_rows, pad_batch
from data.run import check_finite
from data.tasks import GROUPS, TASKS, TEMPLATES
from data.tokenizer import load_tokenizer
from model import Config, MoETransformer
from perft import load_adapter

HERE = Path(__file__).resolve().parent
TINY = HERE / "data" / "tiny_olmoe"
TINY = str(TINY.relative_to(Path.cwd()) if TINY.is_relative_to(Path.cwd()) else TINY)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRAINED_FILES = ("adapter_config.json", "adapter_model.safetensors", esft.CONFIG, esft.WEIGHTS, *esft.PICTURES)
EVAL_FILES = ("predictions.jsonl", "results.json", "settings.json")  # of a folder RUN/eval_METHOD
# What a run folder may hold beside config.json and metrics.jsonl: what --overwrite removes, and nothing else.
RUN_FILES = ("state.safetensors", *TRAINED_FILES, "model/config.json", "model/model.safetensors",
             *(f"eval_{method}/{name}" for method in METHODS for name in EVAL_FILES))  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# Skills --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def is_right(model: MoETransformer, tokenizer, rows: list[skills.Row], batch_size=128) -> list[bool]:
    """Would greedy decoding answer each row exactly? Rows of like length share a batch; the order is kept."""
    examples = encode_rows(rows, tokenizer)
    by_length = sorted(range(len(rows)), key=lambda i: len(examples[i].ids))
    right, training = [False] * len(rows), model.training
    model.eval()
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        ids, labels, _ = pad_batch([examples[i] for i in chosen], tokenizer.pad_id, model.norm.weight.device)
        predicted = model(ids).logits[:, :-1].argmax(-1)  # (B, T-1)
        hit = (predicted == labels[:, 1:]) | (labels[:, 1:] == -100)
        for i, ok in zip(chosen, hit.all(-1).tolist(), strict=True):
            right[i] = ok
    model.train(training)
    return right


def accuracies(model, tokenizer, names: list[str], rows: int, task: str | None = None) -> dict[str, float]:
    """Share of right answers on the first `rows` test rows of each skill; with a task, a fifth of it of others."""
    drawn = {name: skills.sample(name, "test", rows if task in (None, name) else max(rows // 5, 1)) for name in names}
    right = iter(is_right(model, tokenizer, [row for some in drawn.values() for row in some]))
    return {name: sum(next(right) for _ in some) / len(some) for name, some in drawn.items()}


# Loading -------------------------------------------------------------------------------------------------------------


def load_trained(model: MoETransformer, folder: str | Path) -> MoETransformer:
    """Attach what a run of train.py saved in its folder: adapters, or chosen experts."""
    load = esft.load if (Path(folder) / esft.CONFIG).exists() else load_adapter
    return load(model, folder)


def load_config(folder: str | None):
    """A model folder (None: the embedded one) -> (Config, tokenizer), which belong together and have an end token."""
    folder = folder or TINY
    config, tokenizer = Config.from_folder(folder), load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: "
                         "tokenizer.json and config.json do not belong together")  # fmt: skip
    if tokenizer.eos_id is None:
        raise ValueError(f"{folder}: no end token; give config.json an eos_token_id")
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_id
    return config, tokenizer


def load_base(folder: str | None, dtype="float32", device="cpu"):
    """A model folder (None: the embedded one) -> (model in eval mode, tokenizer)."""
    config, tokenizer = load_config(folder)
    model = MoETransformer.from_pretrained(folder or TINY, DTYPES[dtype], device)
    model.config.eos_token_id = config.eos_token_id
    return model, tokenizer


# The command ---------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], usage="python eval.py [options]")
    add = parser.add_argument
    add("--adapter", metavar="DIR", help="run folder of train.py; its base and task are taken from there")
    add("--base", metavar="DIR", help="model folder (default: the adapter's, or data/tiny_olmoe)")
    tasks = [*GROUPS, *TASKS, *skills.TARGETS, *skills.FAMILIES]
    add("--tasks", nargs="+", choices=tasks, metavar="NAME", help=f"what to measure: {', '.join(tasks)}")
    add("--eval_rows", type=count, metavar="N", help="test rows of each (skills: as in the run, 500; test sets: all)")
    add("--dtype", choices=DTYPES, help="of the base (default: the run's, or float32)")
    add("--device", type=device, metavar="NAME", default=DEVICE, help="cpu, cuda, cuda:1 ... (%(default)s)")

    group = parser.add_argument_group("test sets")
    add = group.add_argument
    add("--method", choices=METHODS, help="how a row is answered (generate)")
    add("--choices", choices=("words", "texts"), help="likelihood: what is scored, answer words or texts (words)")
    add("--template", choices=TEMPLATES, help="of the prompt (the run's, or papers)")
    add("--test_dir", metavar="DIR", help="folder of NAME.json files (data/downloads/test)")
    add("--batch_size", type=count, metavar="N", help="rows at a time (32)")
    add("--out", metavar="DIR", help="predictions and results (RUN/eval_METHOD); a stopped one continues")
    add("--overwrite", action="store_true", default=None, help="begin again where --out holds predictions")

    group = parser.add_argument_group("one prompt instead; test sets by generation take the first two")
    add = group.add_argument
    add("--max_new_tokens", type=count, metavar="N", help="at most so many (32; test sets: the papers' 4 or 256)")
    add("--num_beams", type=count, metavar="N", help="beams of a beam search, 1: none (1; test sets: 4)")
    add("--prompt", metavar="TEXT", help="the text to continue")
    add("--temperature", type=from_zero, metavar="X", help="0: the likeliest token each time (0)")
    add("--top_p", type=positive, metavar="X", help="draw from the likeliest tokens of this mass (1: all)")
    add("--seed", type=int, metavar="N", help="of the draws (0)")
    args = parser.parse_args(argv)

    sets = [name for name in args.tasks or [] if name in GROUPS or name in TASKS]
    generating = bool(sets) and args.method != "likelihood"
    about_prompts = "temperature", "top_p", "seed"
    about_sets = "method", "choices", "template", "test_dir", "batch_size", "out", "overwrite"
    if args.prompt is not None and (args.tasks or args.eval_rows):
        parser.error("--prompt answers one prompt; --tasks and --eval_rows do not apply")
    wrong = [] if args.prompt is not None else [(flag, "--prompt") for flag in about_prompts]
    wrong += [] if args.prompt is not None or generating else [
        (flag, "--prompt and to test sets by generation") for flag in ("max_new_tokens", "num_beams")]  # fmt: skip
    wrong += [] if sets else [(flag, "test sets (--tasks commonsense, math, ...)") for flag in about_sets]
    wrong += [("choices", "--method likelihood")] if args.method != "likelihood" else []
    for flag, where in wrong:
        if getattr(args, flag) is not None:
            parser.error(f"--{flag} applies to {where} only")
    if args.choices == "texts" and args.template:
        parser.error("--template does not apply to --choices texts, which asks the question alone")
    defaults = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "method": "generate", "choices": "words", "batch_size": 32,
                "test_dir": str(DOWNLOADS / "test"), "num_beams": 4 if sets else 1}  # fmt: skip
    defaults |= {} if sets else {"max_new_tokens": 32}
    for flag, value in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    return args


def evaluate(args):
    run = {}
    if args.adapter:
        saved = any((Path(args.adapter) / name).exists() for name in ("adapter_config.json", esft.CONFIG))
        if (Path(args.adapter) / "model").is_dir() and not saved:
            raise ValueError(f"{args.adapter} holds a whole model, no adapter: use --base {args.adapter}/model")
        file = Path(args.adapter) / "config.json"  # absent where save_adapter was called by hand
        run = read_json(file) if file.exists() else {}
    args.dtype = args.dtype or run.get("dtype", "float32")
    asked = args.tasks and not args.template and run.get("template") not in (None, *TEMPLATES)
    if asked:
        print(f"note: the run was trained on {run['template']} data; test sets are asked with --template papers")
    args.template = args.template or (not asked and run.get("template")) or "papers"
    model, tokenizer = load_base(args.base or run.get("base"), args.dtype, args.device)
    if args.adapter:
        check_finite(load_trained(model, args.adapter))
    if args.prompt is not None:
        ids = encode_prompt(args.prompt, tokenizer)
        new = model.generate([ids], args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                             num_beams=args.num_beams, seed=args.seed)[0]  # fmt: skip
        print(tokenizer.decode(ids + new))
        return
    task, rows = run.get("task"), args.eval_rows or run.get("eval_rows", 500)
    names = [name for name in args.tasks or [] if name in skills.FAMILIES or name in skills.TARGETS]
    accuracy = {}
    if names:
        accuracy = accuracies(model, tokenizer, names, rows)
    elif not args.tasks:  # as the run reported it
        if run.get("data"):
            raise ValueError(f"{args.adapter} was trained on --data; say what to measure: --tasks commonsense, ...")
        accuracy = accuracies(model, tokenizer, [*([task] if task else []), *skills.FAMILIES], rows, task)
    for name, value in accuracy.items():
        print(f"{name:14} {100 * value:6.1f} %")
    if len(names) < len(args.tasks or []):
        evaluate_sets(args, model, tokenizer, str(args.base or run.get("base") or TINY), run)


def main(argv=None):
    args = parse_args(argv)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:  # the user's input: one line, no traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        go_on = "the command without --overwrite" if args.overwrite else "the same command"
        print(f"stopped; answers so far are kept: {go_on} continues" if args.tasks else "stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
