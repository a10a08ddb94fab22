"""How good is a model? Exact-match accuracy on the skills of the embedded world, or its answer to one prompt.

A row is right if greedy decoding would produce its answer, then the end token, and nothing else. That needs no
decoding: run the model once over prompt + answer. Greedy decoding reproduces the answer if and only if the most likely
token is the right one at every position of it; at the first where it is not, decoding would leave the path.

    python eval.py --adapter out/perft_s                  the accuracies that its training run reported
    python eval.py                                        the embedded base model, all families
    python eval.py --prompt "sort : d b x a ->"           answer one prompt; --adapter, --num_beams, --temperature apply
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

import esft
from data import skills
from data.checkpoint import read_json
from data.tokenizer import load_tokenizer
from model import Config, MoETransformer
from perft import load_adapter

TINY = Path(__file__).resolve().parent / "data" / "tiny_olmoe"
TINY = str(TINY.relative_to(Path.cwd()) if TINY.is_relative_to(Path.cwd()) else TINY)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRAINED_FILES = ("adapter_config.json", "adapter_model.safetensors", esft.CONFIG, esft.WEIGHTS, *esft.PICTURES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def encode_prompt(text: str, tokenizer) -> list[int]:
    """Ids of a text that is to be continued: after the begin token, where the model has one (Mixtral)."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)


def encode(row: skills.Row, tokenizer) -> tuple[list[int], list[int]]:
    """A row -> ids of its prompt, ids of its answer with the end token.

    The answer is tokenised where it stands, behind the prompt: sentencepiece would put a space before it alone.
    """
    prompt, whole = (encode_prompt(text, tokenizer) for text in (row.prompt, row.prompt + row.answer))
    return prompt, whole[len(prompt) :] + [tokenizer.eos_id]


def pad_batch(examples, pad_id: int, device, train_on_inputs=False):
    """[(prompt ids, answer ids)] -> input_ids (B, T), labels (B, T) with -100 where not trained, mask (B, T) of tokens.

    Padding is on the right: attention is causal, so no token sees it, and no attention mask is needed.
    """
    T = max(len(prompt) + len(answer) for prompt, answer in examples)
    input_ids, labels = torch.full((len(examples), T), pad_id), torch.full((len(examples), T), -100)
    mask = torch.zeros(len(examples), T, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(examples):
        ids = torch.tensor(prompt + answer)
        first = 0 if train_on_inputs else len(prompt)
        input_ids[i, : len(ids)], labels[i, first : len(ids)], mask[i, : len(ids)] = ids, ids[first:], True
    return input_ids.to(device), labels.to(device), mask.to(device)


@torch.no_grad()
def is_right(model: MoETransformer, tokenizer, rows: list[skills.Row], batch_size=128) -> list[bool]:
    """Would greedy decoding answer each row exactly? Rows of like length share a batch; the order is kept."""
    examples = [encode(row, tokenizer) for row in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(examples[i][0]) + len(examples[i][1]))
    right, training = [False] * len(rows), model.training
    model.eval()
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        ids, labels, _ = pad_batch([examples[i] for i in chosen], tokenizer.pad_id, next(model.parameters()).device)
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


def load_trained(model: MoETransformer, folder: str | Path) -> MoETransformer:
    """Attach what a run of train.py saved in its folder: adapters, or chosen experts."""
    load = esft.load if (Path(folder) / esft.CONFIG).exists() else load_adapter
    return load(model, folder)


def load_base(folder: str | None, dtype="float32", device="cpu", random_weights=False):
    """A model folder (None: the embedded one) -> (model in eval mode, tokenizer). random_weights: not its weights."""
    folder = folder or TINY
    if random_weights:
        model = MoETransformer(Config.from_folder(folder)).to(device)
    else:
        model = MoETransformer.from_pretrained(folder, DTYPES[dtype], device)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model "
                         f"{model.config.vocab_size}: tokenizer.json and config.json do not belong together")
    if tokenizer.eos_id is None:
        raise ValueError(f"{folder}: no end token; give config.json an eos_token_id")
    if model.config.eos_token_id is None:
        model.config.eos_token_id = tokenizer.eos_id
    return model, tokenizer


def number(kind, lowest, above=False):
    """For argparse's type=: an int or float that is at least (or above) `lowest`, and finite."""

    def parse(text):
        value = kind(text)
        if not (value > lowest if above else value >= lowest) or value == float("inf"):
            bound = f"more than {lowest}" if above else f"at least {lowest}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {bound}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse says "invalid whole number value: ..."
    return parse


count, positive, from_zero = number(int, 1), number(float, 0, above=True), number(float, 0)


def device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{name} is not available here; try cpu") from None
    return name


class Parser(argparse.ArgumentParser):
    """argparse with help that reads like a page, and with mistakes in one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=partial(argparse.HelpFormatter, max_help_position=26, width=110), **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], usage="python eval.py [options]")
    add = parser.add_argument
    add("--adapter", metavar="DIR", help="run folder of train.py; its base and task are taken from there")
    add("--base", metavar="DIR", help="model folder (default: the adapter's, or data/tiny_olmoe)")
    add("--tasks", nargs="+", choices=[*skills.TARGETS, *skills.FAMILIES], metavar="NAME", help="skills to measure")
    add("--eval_rows", type=count, metavar="N", help="test rows of each of --tasks, or as in the run (500)")
    add("--dtype", choices=DTYPES, help="of the base (default: the run's, or float32)")
    add("--device", type=device, metavar="NAME", default=DEVICE, help="cpu, cuda, cuda:1 ... (%(default)s)")

    group = parser.add_argument_group("answer one prompt instead")
    add = group.add_argument
    add("--prompt", metavar="TEXT", help="the text to continue")
    add("--max_new_tokens", type=count, metavar="N", default=32, help="at most so many (%(default)s)")
    add("--num_beams", type=count, metavar="N", default=1, help="beams of a beam search (1: none)")
    add("--temperature", type=from_zero, metavar="X", default=0.0, help="0: the likeliest token each time")
    add("--top_p", type=positive, metavar="X", default=1.0, help="draw from the likeliest tokens of this mass (1: all)")
    add("--seed", type=int, metavar="N", default=0, help="of the draws (%(default)s)")
    args = parser.parse_args(argv)
    if args.prompt is not None and (args.tasks or args.eval_rows):
        parser.error("--prompt answers one prompt; --tasks and --eval_rows do not apply")
    drawn = [flag for flag in ("max_new_tokens", "num_beams", "temperature", "top_p", "seed")
             if getattr(args, flag) != parser.get_default(flag)]  # fmt: skip
    if args.prompt is None and drawn:
        parser.error(f"--{drawn[0]} applies to --prompt only")
    return args


def evaluate(args):
    run = {}
    if args.adapter:
        if (Path(args.adapter) / "model").is_dir():
            raise ValueError(f"{args.adapter} holds a whole model, no adapter: use --base {args.adapter}/model")
        file = Path(args.adapter) / "config.json"  # absent where save_adapter was called by hand
        run = read_json(file) if file.exists() else {}
    model, tokenizer = load_base(args.base or run.get("base"), args.dtype or run.get("dtype", "float32"), args.device)
    if args.adapter:
        load_trained(model, args.adapter)
    if args.prompt is not None:
        ids = encode_prompt(args.prompt, tokenizer)
        new = model.generate([ids], args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                             num_beams=args.num_beams, seed=args.seed)[0]  # fmt: skip
        print(tokenizer.decode(ids + new))
        return
    task, rows = run.get("task"), args.eval_rows or run.get("eval_rows", 500)
    if args.tasks:
        accuracy = accuracies(model, tokenizer, args.tasks, rows)
    else:  # as the run reported it
        accuracy = accuracies(model, tokenizer, [*([task] if task else []), *skills.FAMILIES], rows, task)
    print("\n".join(f"{name:14} {100 * value:6.1f} %" for name, value in accuracy.items()))


def main(argv=None):
    args = parse_args(argv)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:  # the user's input: one line, no traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
