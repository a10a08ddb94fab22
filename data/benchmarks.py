"""The papers' test sets: answering their rows by generation or by likelihood, continuing where it stopped, the table.

data/tasks.py holds prompts and rules, data/prepare.py downloads the rows.

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
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import esft
from data.checkpoint import checkpoint_files, read_json, write_text
from data.dataset import encode_prompt, read_rows
from data.decode import Decoder
from data.run import changes, whole_lines
from data.tasks import GROUPS, TASKS, Task
from model import MoETransformer


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
    trained = [Path(folder) / name for name in ("adapter_model.safetensors", esft.WEIGHTS)]
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


def evaluate_sets(args, model, tokenizer, base: str, run: dict):
    """Answer the test sets of args.tasks, print the table, write predictions.jsonl and results.json. `base`: the model
    folder, `run`: the settings of the run that trained args.adapter, if there is one."""
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
