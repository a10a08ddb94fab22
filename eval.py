"""How good is a model? Accuracy on the skills of the embedded world, or on the papers' test sets;
or one answer.

    python eval.py                                        the embedded base model, all families
    python eval.py --adapter out/perft_s                  the accuracies that its run reported
    python eval.py --prompt "sort : d b x a ->"           one answer; --chat: in the run's form
    python eval.py --adapter RUN --tasks commonsense      the papers' eight sets, by beam search
    python eval.py --adapter RUN --tasks commonsense --method likelihood      the same, far cheaper

Skills. A row is right if greedy decoding would produce its answer, then the end token, and nothing
else. That needs no decoding: run the model once over prompt + answer. Greedy decoding reproduces
the answer if and only if the most likely token is the right one at every position of it; at the
first where it is not, decoding would leave the path.

Test sets. data/tasks.py holds prompts and rules, data/prepare.py downloads the rows.

    generate     the papers' way: 4 beams, 4 new tokens (commonsense) or 256 (arithmetic), the rule
                 of the task finds the answer in what was generated
    likelihood   no decoding: log p(choice | prompt) for each choice, summed over its tokens, the
                 largest wins (acc), or the largest after dividing by the choice's characters
                 (acc_norm): lm-evaluation-harness's definitions. A choice is scored with the space
                 before it, which is not counted as a character. --choices words scores the papers'
                 answer words behind the prompt of --template; texts scores the choices themselves.

Predictions go to --out as JSON lines while they are made: a stopped evaluation continues where it
was, and further tasks join those that are there. The mean over tasks is unweighted, as in the
papers. Standard errors are those of drawing other questions, not of training again. Where two
experts are nearly as likely, rounding decides between them, and rounding depends on the batch: a
likelihood may differ a little with --batch_size.

Shapes: R requests, V vocabulary, B batch, T time.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import esft
import perft
from data import hub, run, skills
from data import shard as processes
from data.dataset import DOWNLOADS, encode_prompt, encode_rows, pad_batch, read_rows, turns_of
from data.decode import Decoder
from data.run import count, from_zero, number
from data.tasks import GROUPS, TASKS, TEMPLATES, Task
from data.tokenizer import Tokenizer, load_tokenizer
from model import DTYPES, EMBEDDED, Config, MoETransformer

SKILLS = [*skills.TARGETS, *skills.FAMILIES]
TITLE, CELL = "{:28} {:>6}", " {:9.1f} {:6.1f}"  # of the table of test sets
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVAL_FILES = ("settings.json", "results.json", "predictions.jsonl")  # of a folder RUN/eval_METHOD
# What a run folder may hold beside config.json and metrics.jsonl: what --overwrite removes.
RUN_FILES = (
    "state.safetensors",
    perft.CONFIG,
    perft.WEIGHTS,
    esft.CONFIG,
    esft.WEIGHTS,
    esft.SCORES,
    esft.PICTURE,
    "model/config.json",
    "model/model.safetensors",
    *(f"eval_generate/{name}" for name in EVAL_FILES),
    *(f"eval_likelihood/{name}" for name in EVAL_FILES),
)


# Skills ------------------------------------------------------------------------------------------


@torch.no_grad()
def is_right(model, tokenizer, rows: list[skills.Row], batch_size=128) -> list[bool]:
    """Would greedy decoding answer each row exactly? Rows of like length share a batch; the order
    is kept."""
    examples = encode_rows(rows, tokenizer)
    by_length = sorted(range(len(rows)), key=lambda i: len(examples[i].ids))
    right = [False] * len(rows)
    was_training = model.training
    model.eval()
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = [examples[i] for i in chosen]
        ids, labels, _ = pad_batch(batch, tokenizer.pad_id, model.norm.weight.device)
        predicted = model(ids).logits[:, :-1].argmax(-1)  # (B, T-1)
        hit = (predicted == labels[:, 1:]) | (labels[:, 1:] == -100)
        for i, ok in zip(chosen, hit.all(-1).tolist()):
            right[i] = ok
    model.train(was_training)
    return right


def accuracies(model, tokenizer, names: list[str], rows: int, task: str | None = None) -> dict:
    """Share of right answers on the first `rows` test rows of each skill; with a task, a fifth of
    so many of the others."""
    accuracy = {}
    for name in names:
        n = rows if task in (None, name) else max(rows // 5, 1)
        right = is_right(model, tokenizer, skills.sample(name, "test", n))
        accuracy[name] = sum(right) / n
    return accuracy


def kept(accuracy: dict[str, float], task: str | None) -> float:
    """Mean accuracy on the families, without the one whose prompts the task answers differently."""
    names = [name for name in skills.FAMILIES if name != skills.PARENT.get(task)]
    return sum(accuracy[name] for name in names) / len(names)


def kept_text(accuracy: dict[str, float], task: str | None) -> str:
    parent = skills.PARENT.get(task)
    without = f", without {parent}" if parent else ""
    return f"pre-training families {100 * kept(accuracy, task):.1f} % (mean{without})"


# Loading -----------------------------------------------------------------------------------------


def load_config(folder: str | Path | None) -> tuple[Config, Tokenizer]:
    """A model folder (None: the embedded one) -> what belongs together, and has an end token."""
    folder = folder or EMBEDDED
    config, tokenizer = Config.from_folder(folder), load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"{config.vocab_size}: tokenizer.json and config.json do not belong together"
        )
    if tokenizer.eos_id is None:
        raise ValueError(f"{folder}: no end token; give config.json an eos_token_id")
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_id
    return config, tokenizer


def load_model(folder, config: Config, dtype="float32", device="cpu", edit=None) -> MoETransformer:
    """The weights for a config of load_config. edit(model): before it has any, see model.py."""
    model = MoETransformer.from_pretrained(folder or EMBEDDED, DTYPES[dtype], device, edit)
    model.config.eos_token_id = config.eos_token_id
    return model


def load_base(folder: str | Path | None, dtype="float32", device="cpu"):
    """A model folder (None: the embedded one) -> (model in eval mode, tokenizer)."""
    config, tokenizer = load_config(folder)
    return load_model(folder, config, dtype, device), tokenizer


def load_trained(model: MoETransformer, folder: str | Path) -> MoETransformer:
    """Attach what a run of train.py saved in its folder: adapters, or chosen experts."""
    load = esft.load if (Path(folder) / esft.CONFIG).exists() else perft.load_adapter
    return load(model, folder)


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


def is_embedded(folder: str | Path) -> bool:
    """Is a model of the embedded world, which is: has it the tokenizer of data/tiny_olmoe?"""
    theirs = (EMBEDDED / "tokenizer.json").read_bytes()
    return (Path(folder) / "tokenizer.json").read_bytes() == theirs


# Answering the rows of a test set ----------------------------------------------------------------


class Answerer(NamedTuple):
    """A model, and how it is asked the rows of a test set.

    how: template of the prompts (not for texts); for generate num_beams, and max_new_tokens of each
    group of tasks; for likelihood choices, "words" or "texts".
    """

    model: MoETransformer
    tokenizer: Tokenizer
    how: argparse.Namespace

    def generate(self, task: Task, rows: list[dict]) -> list[dict]:
        """Rows -> a record each: the response, what it answers, is it right, was the prompt cut."""
        new = self.how.max_new_tokens[task.group]
        room = self.model.config.max_position_embeddings - new
        prompts = [encode_prompt(self.prompt(task, row), self.tokenizer) for row in rows]
        short = [shorten(ids, room, self.tokenizer.bos_id) for ids in prompts]
        outputs = self.model.generate(short, new, num_beams=self.how.num_beams)
        records = []
        for row, ids, output in zip(rows, prompts, outputs):
            response = self.tokenizer.decode(output)
            record = {
                "response": response,
                "answer": task.answer(response),
                "correct": task.correct(response, row),
                "cut": len(ids) > room,
            }
            if task.other_rule:
                right = task.correct(response, row, task.other_rule)
                record[f"correct_{task.other_rule}"] = right
            records.append(record)
        return records

    def likelihood(self, task: Task, rows: list[dict]) -> list[dict]:
        """Rows -> a record each: the choices' log-probabilities, the likeliest, is it right, is the
        likeliest by character, was a prompt cut."""
        limit = self.model.config.max_position_embeddings + 1  # the last token is not read
        requests, cut, characters = [], [], []  # of the choices of all rows
        for row in rows:
            for prompt, text in self.choices(task, row):
                context, continuation = encode_pair(prompt, f" {text}", self.tokenizer)
                room = limit - len(continuation)
                requests.append((shorten(context, room, self.tokenizer.bos_id), continuation))
                cut.append(len(context) > room)
                characters.append(max(len(text), 1))
        scores = log_likelihoods(self.model, requests)

        records, first = [], 0
        for row in rows:
            words = task.choices(row)
            mine = slice(first, first + len(words))
            first += len(words)
            normed = [score / n for score, n in zip(scores[mine], characters[mine])]
            answer = likeliest(words, scores[mine])
            record = {
                "scores": scores[mine],
                "answer": answer,
                "correct": answer == row["answer"],
                "correct_norm": likeliest(words, normed) == row["answer"],
                "cut": any(cut[mine]),
            }
            records.append(record)
        return records

    def prompt(self, task: Task, row: dict) -> str:
        """What the model continues, as the run's rows looked, or the papers'."""
        return task.render_eval(row, self.how.template)

    def choices(self, task: Task, row: dict) -> list[tuple[str, str]]:
        """(context, text) of each choice of a row."""
        if self.how.choices == "texts":
            return task.cloze(row)
        return [(self.prompt(task, row), word) for word in task.choices(row)]


def shorten(ids: list[int], room: int, bos_id) -> list[int]:
    """The end of a prompt that is longer than the model's positions allow: the question's last
    words and the cue. A begin token stays."""
    begin = ids[:1] if len(ids) > room and ids[0] == bos_id else []
    return begin + ids[-max(room - len(begin), 1) :]


def likeliest(words, scores):
    return words[scores.index(max(scores))]


def encode_pair(context: str, continuation: str, tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a context and of what continues it, tokenised together; spaces at the context's end
    belong to the continuation (lm-evaluation-harness's rule: most tokenizers bind a space to the
    word behind it)."""
    before = encode_prompt(context.rstrip(), tokenizer)
    whole = encode_prompt(context + continuation, tokenizer)
    return before or [tokenizer.eos_id], whole[len(before) :]  # something must foretell the first


@torch.no_grad()
def log_likelihoods(model, requests: list[tuple[list[int], list[int]]]) -> list[float]:
    """log p(continuation | context) of each pair of id lists. A context that several share is run
    once."""
    owners = [tuple(context) for context, _ in requests]
    contexts = list(dict.fromkeys(owners))
    continuations = [torch.tensor(ids) for _, ids in requests]
    longest = max(map(len, continuations))
    length = max(map(len, contexts)) + longest - 1
    if length > model.config.max_position_embeddings and len(requests) > 1:
        # the longest context and the longest continuation are of two requests, which fit alone
        return [log_likelihoods(model, [request])[0] for request in requests]

    decoder = Decoder(model, contexts, longest - 1)  # the last token is foretold, never read
    device = decoder.ids.device
    owner = torch.tensor([contexts.index(context) for context in owners], device=device)  # (R,)
    ids = pad_sequence(continuations, True, -100).to(device)  # (R, longest)
    logits = decoder.next_logits()[owner][:, None]  # (R, 1, V): the context foretells the first
    if longest > 1:
        decoder.select(owner)
        rest = model(ids[:, :-1].clamp(min=0), decoder.mask, cache=decoder.cache).logits.float()
        logits = torch.cat((logits, rest), dim=1)  # (R, longest, V)
    # 0 where ids are -100, behind a shorter continuation
    losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    scores = -losses.view_as(ids).sum(-1)
    if scores.isnan().any():
        raise ValueError("the model's logits are not finite: did its training diverge?")
    return scores.tolist()


# Rows and predictions ----------------------------------------------------------------------------

NUMBER = re.compile(r"-?[\d,]*\.?\d+")  # what may be a right answer of arithmetic


def read_test_set(task: Task, folder: str, limit: int | None) -> list[dict]:
    """The first `limit` rows (None: all). FileNotFoundError or ValueError of one line where they
    are not what the task needs: found here, not after an hour of generation."""
    path = Path(folder) / f"{task.name}.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; python data/prepare.py {task.group} downloads it, or give "
            "--test_dir the folder that has it"
        )
    _, rows = read_rows(path)
    for i, row in enumerate(rows):
        answer = row.get("answer")
        fits = answer in task.words if task.words else NUMBER.fullmatch(str(answer))
        if not fits:
            expected = " or ".join(task.words) or "a number"
            raise ValueError(
                f'{path}: record {i + 1}: "answer" is {run.shown(answer)}, expected {expected}; '
                "is it a test set of LLM-Adapters?"
            )
    if limit is None and len(rows) != task.rows:
        print(f"note: {path} has {len(rows)} rows, the papers' set {task.rows}")
    return rows[:limit]


def digest(row):
    """Which row of a test set was answered: another file's may have its number."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


FIELDS = {"task": str, "index": int, "row": str, "correct": bool, "cut": bool}  # of a prediction


class Predictions:
    """What a folder holds of an evaluation: predictions.jsonl, one line a row; settings.json, since
    predictions of other settings do not mix; and results.json, which is made of them."""

    def __init__(self, folder: Path, settings: dict, overwrite: bool):
        self.folder, self.path = folder, folder / "predictions.jsonl"
        self.done = {}  # (task, index) -> record
        self.check_files()
        if overwrite:
            for name in EVAL_FILES:
                (folder / name).unlink(missing_ok=True)
        # a last line that was cut off is left out: its row is answered again
        lines = run.whole_lines(self.path) if self.path.exists() else []
        if lines:
            self.check_settings(settings)
        for i, line in enumerate(lines):
            self.take(line, f"{self.path}:{i + 1}")
        folder.mkdir(parents=True, exist_ok=True)
        run.write_text(self.path, "".join(f"{line}\n" for line in lines))
        run.write_json(folder / "settings.json", settings, indent=2)

    def check_files(self):
        """ValueError where something else would be written to, or be lost."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder} is not a folder; choose another")
        for name in EVAL_FILES:
            file = self.folder / name
            if os.path.lexists(file) and not file.is_file():
                raise ValueError(f"{file} is not a regular file; choose another --out")
            if file.exists() and not self.path.exists():
                raise ValueError(f"{file} is there, but no predictions; choose another --out")

    def check_settings(self, settings):
        """ValueError if the predictions that are there were made in another way."""
        then = run.read_json(self.folder / "settings.json")
        changed = run.changes(then, settings)
        if changed:
            raise ValueError(
                f"{self.folder} holds predictions of other settings ({changed}); choose another "
                "--out, or --overwrite"
            )

    def take(self, line, place):
        """A line of the file. ValueError for what is no prediction: zeros, a number, half a one."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = line
        keys = record if isinstance(record, dict) else ()
        if not FIELDS.items() <= {(key, type(record[key])) for key in keys}:
            raise ValueError(
                f"{place}: is no prediction but {run.shown(record)}; remove the line, and its row "
                "is answered again"
            )
        self.done[record["task"], record["index"]] = record

    def has(self, task, index, row) -> bool:
        return self.done.get((task, index), {}).get("row") == digest(row)

    def add(self, records: list[dict]):
        """Kept from here on: at the end of the file, whatever stops the evaluation."""
        with open(self.path, "a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                self.done[record["task"], record["index"]] = record


def predict(answerer: Answerer, sets: dict, predictions: Predictions) -> float:
    """Answer every row that has no prediction yet, rows of like length together -> rows a second,
    0 if none was left."""
    size, answer = answerer.how.batch_size, getattr(answerer, answerer.how.method)
    batches, left = [], 0
    for name, rows in sets.items():
        missing = [i for i, row in enumerate(rows) if not predictions.has(name, i, row)]
        missing.sort(key=lambda i: len(rows[i]["instruction"]), reverse=True)
        batches += [(name, missing[i : i + size]) for i in range(0, len(missing), size)]
        left += len(missing)
    total = sum(map(len, sets.values()))
    if left < total:
        print(f"{total - left} of {total} rows were answered before")
    if left == 0:
        return 0.0
    start = time.perf_counter()
    pause = 0.1 if sys.stdout.isatty() else 30  # seconds between two lines of progress
    for name, chosen in tqdm(batches, unit=" batches", file=sys.stdout, mininterval=pause):
        rows = [sets[name][i] for i in chosen]
        records = answer(TASKS[name], rows)
        for i, row, record in zip(chosen, rows, records):
            record |= {"task": name, "index": i, "row": digest(row), "gold": row["answer"]}
        predictions.add(records)
    return left / (time.perf_counter() - start)


# Results -----------------------------------------------------------------------------------------


def accuracy_of(right: list[bool]):
    """[share of True, its standard error]: the sample's deviation / sqrt(n)."""
    n = len(right)
    share = sum(right) / n
    return [share, math.sqrt(share * (1 - share) / max(n - 1, 1))]


def summary(sets: dict, predictions: Predictions) -> dict:
    """{task: rows} -> {task: n, cut prompts, rule, and [accuracy, standard error] by each rule}."""
    table = {}
    for name, rows in sets.items():
        records = [predictions.done[name, i] for i in range(len(rows))]
        cut = sum(record["cut"] for record in records)
        table[name] = {"n": len(rows), "cut": cut, "rule": TASKS[name].rule}
        for key in records[0]:
            if key.startswith("correct"):
                right = [record.get(key) is True for record in records]
                table[name][key.replace("correct", "acc")] = accuracy_of(right)
    return table


def means_of(table: dict) -> dict:
    """Unweighted means of the tasks' accuracies, with their standard errors."""
    means = {}
    for key in ("acc", "acc_norm"):
        if all(key in row for row in table.values()):
            shares, errors = zip(*[row[key] for row in table.values()])
            means[key] = [sum(shares) / len(table), math.hypot(*errors) / len(table)]
    return means


def print_table(table: dict, means: dict):
    """A line a task, their mean, and what a reader should know beside."""
    head = [f" {key + ' %':>9} {'s.e.':>6}" for key in means]
    print(TITLE.format("task", "n") + "".join(head))
    for name, row in [*table.items(), ("mean, unweighted", means)]:
        title = "AQuA (first capital A-E)" if name == "AQuA" else name
        cells = [CELL.format(*percent(row[key])) for key in means]
        print(TITLE.format(title, row.get("n", "")) + "".join(cells))
    if "AQuA" in table:
        stated = "{:.1f} % (s.e. {:.1f})".format(*percent(table["AQuA"]["acc_stated"]))
        print(f"beside the mean: AQuA by the letter that is stated {stated}")
    cut = sum(row["cut"] for row in table.values())
    if cut:
        print(f"{cut} prompts were longer than the model's positions and lost their beginning")


def percent(accuracy):
    return [100 * value for value in accuracy]


def weights_identity(folder):
    """Names, sizes and times of a folder's weight files: enough to notice that they changed."""
    trained = [Path(folder) / name for name in (perft.WEIGHTS, esft.WEIGHTS)]
    files = [file for file in trained if file.exists()] or hub.checkpoint_files(folder)
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


# The questions -----------------------------------------------------------------------------------


def answer_prompt(args, model, tokenizer):
    """Print --prompt, or --chat as the model was taught to read it, and what continues it."""
    text = args.prompt
    if args.chat is not None:  # as a row that was trained on, without its answer
        said = [{"role": "user", "content": args.chat}, {"role": "assistant", "content": ""}]
        row = {"messages": said, "instruction": args.chat, "output": ""}
        template = args.trained.get("template")
        [(text, _)] = turns_of(row, template if template in TEMPLATES else "chat")
    ids = encode_prompt(text, tokenizer)
    new = model.generate(
        [ids],
        args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
        seed=args.seed,
    )
    print(tokenizer.decode(ids + new[0]))


def measure_skills(args, model, tokenizer):
    """Print accuracies: of --tasks, or what a run reports: its task, all families, their mean."""
    names, task = [name for name in args.tasks if name in SKILLS], None
    if not args.tasks:
        task = args.trained.get("task")
        names = [*([task] if task else []), *skills.FAMILIES]
    rows = args.eval_rows or max(args.trained.get("eval_rows") or 500, 1)
    accuracy = accuracies(model, tokenizer, names, rows, task)
    for name, share in accuracy.items():
        print(f"{name:14} {100 * share:6.1f} %")
    if not args.tasks:
        print(kept_text(accuracy, task))


def evaluate_sets(args, model, tokenizer):
    """Answer test sets, print the table, write predictions.jsonl and results.json."""
    measure_skills(args, model, tokenizer)  # those that --tasks names as well
    sets = read_test_sets(args)
    settings = {name: value for name, value in vars(args).items() if name in SETTINGS}
    if args.trained.get("template") == "chat":
        print("note: the run was trained on chats, a form that test sets do not have")
    print("evaluation:", *(f"{name}={value}" for name, value in settings.items()))
    folders = [args.base, *([args.adapter] if args.adapter else [])]
    settings["weights"] = [weights_identity(folder) for folder in folders]
    home = args.adapter or f"out/{Path(args.base).name}"
    out = Path(args.out or f"{home}/eval_{args.method}")
    predictions = Predictions(out, settings, args.overwrite)
    before = run.read_json(out / "results.json") if (out / "results.json").exists() else {}
    try:
        speed = predict(Answerer(model, tokenizer, args), sets, predictions)
    except KeyboardInterrupt as stop:
        go_on = "the command without --overwrite" if args.overwrite else "the same command"
        code = getattr(stop, "code", 130)
        raise run.Stopped(f"answers so far are kept: {go_on} continues", code) from None

    table = summary(sets, predictions)
    means = means_of(table)
    print_table(table, means)
    others = before.get("tasks")  # of earlier commands
    results = {
        **settings,
        "variant": args.trained.get("variant"),
        "mean": means,
        "mean_of": list(table),
        "tasks": others | table if isinstance(others, dict) else table,
        "prompts_per_second": speed or before.get("prompts_per_second"),
        "torch": torch.__version__,
    }
    run.write_json(out / "results.json", results)
    told = f" ({speed:.1f} prompts/s)" if speed else ""
    print(f"saved {out}/results.json and predictions.jsonl{told}")


def read_test_sets(args) -> dict[str, list[dict]]:
    """The rows of the test sets among --tasks: groups in full, each set once."""
    names = []
    for name in args.tasks:
        names += GROUPS.get(name, [name])
    names = [name for name in dict.fromkeys(names) if name in TASKS]
    numbers = [name for name in names if TASKS[name].group != "commonsense"]
    if args.method == "likelihood" and numbers:
        raise ValueError(
            f"--method likelihood scores choices, {', '.join(numbers)} have none; "
            "use --method generate"
        )
    return {name: read_test_set(TASKS[name], args.test_dir, args.eval_rows) for name in names}


# The command -------------------------------------------------------------------------------------

QUESTIONS = {
    "prompt": "--prompt and --chat",
    "skills": "skills",
    "generate": "test sets by generation",
    "likelihood": "test sets by --method likelihood",
    "texts": "--choices texts",
}
LIMITS = {group: TASKS[names[0]].max_new_tokens for group, names in GROUPS.items()}  # the papers'
# What predictions depend on: those of other settings do not mix.
SETTINGS = {
    "base",
    "adapter",
    "dtype",
    "method",
    "choices",
    "template",
    "num_beams",
    "max_new_tokens",
}


def make_parser(question: str, trained: dict) -> run.Parser:
    """The parser of one of QUESTIONS holds its flags, and no others. trained: the settings of the
    run that made the adapter, which are defaults here."""
    parser = run.Parser(
        description="How good is a model? eval.py's first page says what is measured, and how.",
        usage="python eval.py [--prompt TEXT | --chat TEXT | --tasks NAME ...] [options]",
        epilog="With --prompt or with a test set, --help shows the flags for that.",
    )
    parser.set_defaults(trained=trained, act=measure_skills)
    add = parser.add_argument
    add("--adapter", metavar="DIR", help="run folder of train.py; its base and task are taken")
    base = trained.get("base") or str(EMBEDDED)
    add("--base", default=base, metavar="DIR", help="model folder (%(default)s)")
    dtype = trained.get("dtype") or "float32"
    add("--dtype", choices=DTYPES, default=dtype, help="of the base (%(default)s)")
    add("--device", type=device, default=DEVICE, metavar="NAME", help="(%(default)s)")
    add("--threads", type=count, metavar="N", help="of the CPU (embedded model: 1)")
    if question == "prompt":
        group = parser.add_mutually_exclusive_group()
        group.add_argument("--prompt", metavar="TEXT", help="to continue, as it stands")
        group.add_argument("--chat", metavar="TEXT", help="the same, in the form of the run's rows")
        add("--max_new_tokens", type=count, default=32, metavar="N", help="(%(default)s)")
        add("--num_beams", type=count, default=1, metavar="N", help="(%(default)s: no search)")
        hint = "0: the likeliest token each time (%(default)s)"
        add("--temperature", type=from_zero, default=0.0, metavar="X", help=hint)
        hint = "draw from the likeliest tokens of this mass (%(default)s)"
        share = number(float, 0, above=True, most=1)
        add("--top_p", type=share, default=1.0, metavar="X", help=hint)
        add(
            "--seed",
            type=number(int, 0, most=2**63 - 1),
            default=0,
            metavar="N",
            help="(%(default)s)",
        )
        parser.set_defaults(act=answer_prompt)
        return parser

    names = [*GROUPS, *TASKS, *SKILLS]
    hint = f"what to measure: {', '.join(names)}"
    add("--tasks", nargs="+", choices=names, default=[], metavar="NAME", help=hint)
    hint = "test rows of each (skills: as in the run, or 500; test sets: all)"
    add("--eval_rows", type=count, metavar="N", help=hint)
    if question == "skills":
        return parser

    parser.set_defaults(act=evaluate_sets)
    add = parser.add_argument_group("test sets").add_argument
    add("--method", choices=("generate", "likelihood"), default="generate", help="(%(default)s)")
    if question == "generate":
        add("--max_new_tokens", type=limits, default=LIMITS, metavar="N", help="(%(default)s)")
        add("--num_beams", type=count, default=4, metavar="N", help="(%(default)s)")
    else:
        hint = "what is scored, answer words or texts (%(default)s)"
        add("--choices", choices=("words", "texts"), default="words", help=hint)
    if question != "texts":  # which ask the question alone
        template = trained.get("template")
        template = template if template in TEMPLATES else "papers"
        hint = "of the prompt (%(default)s)"
        add("--template", choices=TEMPLATES, default=template, help=hint)
    add("--test_dir", default=str(DOWNLOADS / "test"), metavar="DIR", help="(%(default)s)")
    add("--batch_size", type=count, default=32, metavar="N", help="rows at a time (%(default)s)")
    hint = "predictions and results (RUN/eval_METHOD); a stopped one continues"
    add("--out", metavar="DIR", help=hint)
    hint = "begin again where --out holds predictions"
    add("--overwrite", action="store_true", help=hint)
    return parser


def limits(text: str) -> dict[str, int]:
    """For argparse: --max_new_tokens of each group of tasks."""
    return dict.fromkeys(GROUPS, count(text))


def device(name: str) -> str:
    """For argparse: a device that is there."""
    try:
        if name == "cuda" and processes.WORLD > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # each process looks at its own
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{name} is not available here; try cpu") from None
    return name


def parse_args(argv=None) -> argparse.Namespace:
    """The flags of the question that is asked, and what to do with them: args.act."""
    peek = run.Parser(prog="eval.py", add_help=False)
    for flag in ("--prompt", "--chat", "--adapter", "--method", "--choices"):
        peek.add_argument(flag)
    peek.add_argument("--tasks", nargs="+", default=[])
    known, _ = peek.parse_known_args(argv)
    question, trained = question_of(known), read_run(known.adapter)
    parser = make_parser(question, trained)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        takes = [QUESTIONS[q] for q in QUESTIONS if flag in make_parser(q, trained).flags()]
        if not takes:
            parser.error(f"{flag} was not understood")
        parser.error(f"{flag} does not apply to {QUESTIONS[question]}, but to {', '.join(takes)}")
    return args


def question_of(known) -> str:
    """Which of QUESTIONS is asked? It decides which flags there are."""
    if known.prompt is not None or known.chat is not None:
        return "prompt"
    if not {*GROUPS, *TASKS} & {*known.tasks}:
        return "skills"
    if known.method != "likelihood":
        return "generate"
    return "texts" if known.choices == "texts" else "likelihood"


def read_run(adapter: str | None) -> dict:
    """The settings of the run that made an adapter; {} where there are none (save_adapter was
    called by hand). ValueError for values that no run writes."""
    if adapter is None:
        return {}
    folder = Path(adapter)
    saved = any((folder / name).exists() for name in (perft.CONFIG, esft.CONFIG))
    if (folder / "model").is_dir() and not saved:
        raise ValueError(f"{folder} holds a whole model, no adapter: use --base {folder}/model")
    file = folder / "config.json"
    settings = run.read_json(file) if file.exists() else {}
    kinds = {"base": str, "dtype": str, "task": str, "template": str, "eval_rows": int}
    for name, kind in kinds.items():
        value = settings.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{file}: {name} is {run.shown(value)}, expected {kind.__name__}")
    dtype = settings.get("dtype") or "float32"
    if dtype not in DTYPES:
        raise ValueError(f"{file}: dtype is {dtype}, expected {' or '.join(DTYPES)}")
    return settings


@run.command
def main(argv=None):
    args = parse_args(argv)
    config, tokenizer = load_config(args.base)
    embedded = is_embedded(args.base)
    unknown = args.trained.get("data") or not embedded
    if args.act is measure_skills and not args.tasks and unknown:
        raise ValueError(
            f"{args.adapter or args.base} does not know the embedded world, whose skills are "
            "measured without --tasks; give --tasks commonsense, or --prompt TEXT"
        )
    if vars(args).get("num_beams", 1) > config.vocab_size:
        most = config.vocab_size
        raise ValueError(f"--num_beams {args.num_beams}: there are {most} tokens; choose fewer")
    if args.threads or embedded:
        torch.set_num_threads(args.threads or 1)
    model = load_model(args.base, config, args.dtype, args.device)
    if args.adapter:
        check_finite(load_trained(model, args.adapter))
    args.act(args, model, tokenizer)


if __name__ == "__main__":
    main()
