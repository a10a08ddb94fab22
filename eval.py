"""How good is a model? Accuracy on the skills of the embedded world or on the papers' test sets; or one answer.

    python eval.py --adapter out/perft_s                  the accuracies that its training run reported
    python eval.py                                        the embedded base model, all families
    python eval.py --prompt "sort : d b x a ->"           answer one prompt; --adapter, --num_beams, --temperature apply
    python eval.py --adapter RUN --tasks commonsense      the papers' eight test sets, by beam search
    python eval.py --adapter RUN --tasks commonsense --method likelihood      the same, far cheaper

Skills. A row is right if greedy decoding would produce its answer, then the end token, and nothing else. That needs no
decoding: run the model once over prompt + answer. Greedy decoding reproduces the answer if and only if the most likely
token is the right one at every position of it; at the first where it is not, decoding would leave the path.

Test sets (data/tasks.py holds prompts and rules; data/prepare.py downloads the rows):

    generate     the papers' way: 4 beams, 4 new tokens (commonsense) or 256 (arithmetic), the rule of the task finds
                 the answer in what was generated
    likelihood   no decoding: log p(choice | prompt) for each choice, summed over its tokens, the largest wins (acc), or
                 the largest after dividing by the choice's characters (acc_norm): lm-evaluation-harness's definitions.
                 A choice is scored with the space before it, which is not counted as a character. --choices words
                 scores the papers' answer words behind the papers' prompt; texts scores the choices themselves.

Predictions go to --out as JSON lines while they are made: a stopped evaluation continues where it was. The mean over
tasks is unweighted, as in the papers. Standard errors are those of drawing other questions, not of training again.
"""

import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import esft
from data import skills
from data.checkpoint import checkpoint_files, read_json, write_text
from data.cli import Parser, count, device, from_zero, positive
from data.dataset import DOWNLOADS, Example, encode, encode_prompt, pad_batch, read_rows
from data.decode import Decoder
from data.run import changes, check_finite, whole_lines
from data.tasks import GROUPS, TASKS, TEMPLATES, Task
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
             *(f"eval_{method}/{name}" for method in ("generate", "likelihood") for name in EVAL_FILES))  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# Skills --------------------------------------------------------------------------------------------------------------


def encode_rows(rows: list[skills.Row], tokenizer, train_on_inputs=False) -> list[Example]:
    return [encode([(row.prompt, row.answer)], tokenizer, train_on_inputs) for row in rows]


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


# Test sets -----------------------------------------------------------------------------------------------------------


def encode_pair(context: str, continuation: str, tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a context and of what continues it, tokenised together; spaces at the context's end belong to the
    continuation (lm-evaluation-harness's rule: most tokenizers bind a space to the word behind it)."""
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    before, whole = encode_prompt(context, tokenizer), encode_prompt(context + continuation, tokenizer)
    return before or [tokenizer.eos_id], whole[len(before) :]  # something must foretell the first token


@torch.no_grad()
def log_likelihoods(model: MoETransformer, requests: list[tuple[list[int], list[int]]]) -> list[float]:
    """log p(continuation | context) of each pair of id lists. A context that several share is run once."""
    contexts = list(dict.fromkeys(tuple(context) for context, _ in requests))
    place = {context: i for i, context in enumerate(contexts)}
    longest = max(len(ids) for _, ids in requests)
    decoder = Decoder(model, [list(context) for context in contexts], longest)
    device = decoder.ids.device
    owner = torch.tensor([place[tuple(context)] for context, _ in requests], device=device)  # (R,)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in requests], device=device)  # (R, longest)
    real = torch.tensor([[1.0] * len(ids) + [0.0] * (longest - len(ids)) for _, ids in requests], device=device)
    logits = decoder.next_logits()[owner][:, None]  # (R, 1, V): the context foretells the first token
    if longest > 1:
        decoder.select(owner)
        mask = decoder.mask[:, : decoder.cache.used + longest - 1]
        rest = model(ids[:, :-1], mask, cache=decoder.cache).logits.float()
        logits = torch.cat((logits, rest), dim=1)  # (R, longest, V)
    losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(real)
    scores = (-losses * real).sum(-1)
    if scores.isnan().any():
        raise ValueError("the model's logits are not finite: did its training diverge?")
    return scores.tolist()


def shorten(ids: list[int], room: int, bos_id: int | None) -> list[int]:
    """The end of a prompt that is longer than the model's positions allow: the question's last words and the cue."""
    begin = ids[:1] if len(ids) > room and ids[0] == bos_id else []
    return begin + ids[-max(room - len(begin), 1) :]


def answer_by_generation(model, tokenizer, task: Task, rows: list[dict], args) -> list[dict]:
    """Rows of a test set -> a record each: response, answer, correct, and whether the prompt had to be cut."""
    new = args.max_new_tokens or task.max_new_tokens
    prompts = [encode_prompt(task.render_eval(row, args.template), tokenizer) for row in rows]
    kept = [shorten(ids, model.config.max_position_embeddings - new, tokenizer.bos_id) for ids in prompts]
    records = []
    for row, ids, left, out in zip(rows, prompts, kept, model.generate(kept, new, num_beams=args.num_beams)):
        response = tokenizer.decode(out)
        record = {"response": response, "answer": task.answer(response), "correct": task.correct(response, row)}
        if task.other_rule:
            record[f"correct_{task.other_rule}"] = task.correct(response, row, task.other_rule)
        records.append(record | {"cut": len(ids) > len(left)})
    return records


def answer_by_likelihood(model, tokenizer, task: Task, rows: list[dict], args) -> list[dict]:
    """Rows of a test set -> a record each: log-probabilities of the choices, the likeliest, also by character."""
    pairs = [task.cloze(row) if args.choices == "texts" else
             [(task.render_eval(row, args.template), word) for word in task.choices(row)] for row in rows]  # fmt: skip
    encoded = [[encode_pair(context, f" {text}", tokenizer) for context, text in some] for some in pairs]
    room = model.config.max_position_embeddings - max(len(ids) for some in encoded for _, ids in some)
    requests = [(shorten(a, room, tokenizer.bos_id), b) for some in encoded for a, b in some]
    scores = iter(log_likelihoods(model, requests))
    records = []
    for row, some, ids in zip(rows, pairs, encoded):
        mine, words = [next(scores) for _ in some], task.choices(row)
        normed = [score / max(len(text), 1) for score, (_, text) in zip(mine, some)]
        answer, answer_norm = (words[values.index(max(values))] for values in (mine, normed))
        right = {"correct": answer == row["answer"], "correct_norm": answer_norm == row["answer"]}
        records.append({"scores": mine, "answer": answer, **right, "cut": any(len(a) > room for a, _ in ids)})
    return records


METHODS = {"generate": answer_by_generation, "likelihood": answer_by_likelihood}


def read_test_set(task: Task, folder: Path, limit: int | None) -> list[dict]:
    path = folder / f"{task.name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; python data/prepare.py {task.group} downloads it, or give "
                                "--test_dir the folder that has it")  # fmt: skip
    kind, rows = read_rows(path)
    if kind != "alpaca" or not all("answer" in row for row in rows):
        raise ValueError(f'{path}: not every record has an "answer"; expected rows of the LLM-Adapters test sets')
    for row in rows:
        try:
            fits = row["answer"] in task.words if task.words else task.correct("0", row) in (True, False)
        except ValueError:
            fits = False
        if not fits:
            expected = " or ".join(task.words) or "a number"
            raise ValueError(f"{path}: an answer is {row['answer']!r}, expected {expected}")
    if limit is None and len(rows) != task.rows:
        print(f"note: {path} has {len(rows)} rows, the papers' set {task.rows}")
    return rows[:limit]


def weights_identity(folder: str | Path) -> list:
    """Names, sizes and times of a folder's weight files: enough to notice that they were replaced."""
    trained = [Path(folder) / name for name in (TRAINED_FILES[1], esft.WEIGHTS)]
    files = [file for file in trained if file.exists()] or checkpoint_files(folder)
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def digest(row: dict) -> str:
    """Which row of a test set was answered: another file's may have its number."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


class Predictions:
    """predictions.jsonl of a folder, one line a row, and settings.json: predictions of other settings do not mix."""

    def __init__(self, folder: Path, settings: dict, overwrite: bool):
        self.path, self.done = folder / "predictions.jsonl", {}
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is not a folder; choose another")
        if overwrite:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            if changed := changes(read_json(folder / "settings.json"), settings):
                raise ValueError(f"{folder} holds predictions of other settings ({changed}); choose another --out, or "
                                 "--overwrite")  # fmt: skip
            whole = whole_lines(self.path)
            write_text(self.path, "".join(f"{line}\n" for line in whole))
            self.done = {(r["task"], r["index"]): r for r in map(json.loads, whole)}
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "settings.json", json.dumps(settings, indent=2) + "\n")

    def has(self, task: str, index: int, row: dict) -> bool:
        return self.done.get((task, index), {}).get("row") == digest(row)

    def add(self, records: list[dict]):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        self.done |= {(r["task"], r["index"]): r for r in records}


def predict(model, tokenizer, sets: dict[str, list[dict]], predictions: Predictions, args) -> float:
    """Answer every row that has no prediction yet, rows of like length together -> prompts a second."""
    todo = [(name, i) for name, rows in sets.items() for i, r in enumerate(rows) if not predictions.has(name, i, r)]
    total = sum(map(len, sets.values()))
    if len(todo) < total:
        tqdm.write(f"{total - len(todo)} of {total} rows were answered before")
    start = time.perf_counter()
    with tqdm(total=total, initial=total - len(todo), unit=" rows", disable=None, leave=False) as bar:
        for name, rows in sets.items():
            mine = sorted((i for n, i in todo if n == name), key=lambda i: len(rows[i]["instruction"]), reverse=True)
            bar.set_description(name)
            told = time.perf_counter()
            for at in range(0, len(mine), args.batch_size):
                indices = mine[at : at + args.batch_size]
                batch = [rows[i] for i in indices]
                records = METHODS[args.method](model, tokenizer, TASKS[name], batch, args)
                which = ({"task": name, "index": i, "row": digest(rows[i]), "gold": rows[i]["answer"]} for i in indices)
                predictions.add([a | b for a, b in zip(which, records)])
                bar.update(len(indices))
                if bar.disable and (time.perf_counter() - told > 30 or at + args.batch_size >= len(mine)):
                    told = time.perf_counter()
                    print(f"{name}: {at + len(indices)} of {len(mine)} rows answered", flush=True)
    return len(todo) / (time.perf_counter() - start) if todo else 0.0


def summary(sets: dict[str, list[dict]], predictions: Predictions) -> dict[str, dict]:
    """For each task: n, cut prompts, and accuracy and standard error under each rule."""
    table = {}
    for name, rows in sets.items():
        records = [predictions.done[name, i] for i in range(len(rows))]
        row = table[name] = {"n": len(rows), "cut": sum(r["cut"] for r in records), "rule": TASKS[name].rule}
        for key in [key for key in records[0] if key.startswith("correct")]:
            share = sum(r[key] for r in records) / len(records)
            error = math.sqrt(share * (1 - share) / max(len(records) - 1, 1))  # the sample's deviation / sqrt(n)
            row[key.replace("correct", "acc")] = [share, error]
    return table


def mean_of(values: list[list[float]]) -> list[float]:
    """Unweighted mean of accuracies and its standard error."""
    shares, errors = zip(*values)
    return [sum(shares) / len(shares), math.sqrt(sum(e * e for e in errors)) / len(errors)]


def evaluate_sets(args, model, tokenizer, run: dict):
    names = list(dict.fromkeys(n for name in args.tasks for n in GROUPS.get(name, [name]) if n in TASKS))
    if args.method == "likelihood" and (numbers := [n for n in names if TASKS[n].group != "commonsense"]):
        raise ValueError(f"--method likelihood scores choices, {', '.join(numbers)} have none; use --method generate")
    sets = {name: read_test_set(TASKS[name], Path(args.test_dir), args.eval_rows) for name in names}
    shown = {"generate": ("num_beams", "max_new_tokens"), "likelihood": ("choices",)}[args.method]
    settings = {"method": args.method} | {key: getattr(args, key) for key in shown}
    if args.method == "generate":
        limits = {group: TASKS[tasks[0]].max_new_tokens for group, tasks in GROUPS.items()}  # the papers'
        settings["max_new_tokens"] = args.max_new_tokens or limits
    if args.choices != "texts":
        settings["template"] = args.template
    base = str(args.base or run.get("base") or TINY)
    settings |= {"base": base, "adapter": args.adapter, "dtype": args.dtype}
    settings["weights"] = [weights_identity(folder) for folder in (base, args.adapter) if folder]
    out = Path(args.out or f"{args.adapter or f'out/{Path(base).name}'}/eval_{args.method}")
    shown = settings | {"eval_rows": args.eval_rows or "all"}
    print(f"evaluation: {' '.join(f'{k}={v}' for k, v in shown.items() if k != 'weights')}")
    predictions = Predictions(out, settings, args.overwrite)
    speed = predict(model, tokenizer, sets, predictions, args)

    table = summary(sets, predictions)
    keys = [key for key in ("acc", "acc_norm") if all(key in row for row in table.values())]
    means = {key: mean_of([row[key] for row in table.values()]) for key in keys}
    print(f"{'task':28} {'n':>6}" + "".join(f" {key + ' %':>9} {'s.e.':>6}" for key in keys))
    lines = [(name, row["n"], [row[key] for key in keys]) for name, row in table.items()]
    for name, n, values in [*lines, ("mean, unweighted", "", list(means.values()))]:
        if name == "AQuA":
            name = "AQuA (first capital A-E)"
        print(f"{name:28} {n:>6}" + "".join(f" {100 * share:9.1f} {100 * error:6.1f}" for share, error in values))
    if "AQuA" in table:
        share, error = table["AQuA"]["acc_stated"]
        print(f"beside the mean: AQuA by the letter that is stated {100 * share:.1f} % (s.e. {100 * error:.1f})")
    if cut := sum(row["cut"] for row in table.values()):
        print(f"{cut} prompts were longer than the model's positions and lost their beginning")
    if not speed and (out / "results.json").exists():  # nothing was left to answer
        speed = read_json(out / "results.json").get("prompts_per_second", 0.0)
    result = {**settings, "variant": run.get("variant"), "mean": means, "tasks": table, "prompts_per_second": speed,
              "torch": torch.__version__}  # fmt: skip
    write_text(out / "results.json", json.dumps(result) + "\n")
    print(f"saved {out}/results.json and predictions.jsonl" + (f" ({speed:.1f} prompts/s)" if speed else ""))


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
        evaluate_sets(args, model, tokenizer, run)


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
