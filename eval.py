"""How good is a model? Accuracy on the skills of the embedded world, or on the papers' test sets;
or one answer.

    python eval.py                                        the embedded base model, all families
    python eval.py --adapter out/perft_s                  the accuracies that its run reported
    python eval.py --prompt "sort : d b x a ->"           one answer; --chat: in the run's form
    python eval.py --prompt TEXT --routing FILE.svg       and a picture of the experts it met
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

from data import run  # first: from here on Ctrl-C is one line

# isort: split
import argparse
import hashlib
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import esft
import perft
from data import hub, skills
from data import shard as processes
from data.dataset import DOWNLOADS, encode_prompt, encode_row, encode_rows, pad_batch, read_rows
from data.decode import Decoder
from data.run import count, from_zero, number
from data.tasks import GROUPS, TASKS, TEMPLATES
from data.tokenizer import Tokenizer, load_tokenizer
from model import DTYPES, EMBEDDED, Config, MoETransformer

SKILLS = [*skills.TARGETS, *skills.FAMILIES]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVAL_FILES = ("settings.json", "results.json", "predictions.jsonl")  # of a folder RUN/eval_METHOD
NOT_FINITE = "the model's logits are not finite: did its training diverge?"
# What a run folder may hold beside config.json and metrics.jsonl: what --overwrite removes.
RUN_FILES = (
    "state.safetensors",
    "run.svg",
    perft.CONFIG,
    perft.WEIGHTS,
    esft.CONFIG,
    esft.WEIGHTS,
    esft.SCORES,
    esft.PICTURE,
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    *(f"eval_generate/{name}" for name in EVAL_FILES),
    *(f"eval_likelihood/{name}" for name in EVAL_FILES),
)


# Skills ------------------------------------------------------------------------------------------


@torch.no_grad()
def is_right(model, tokenizer, rows, batch_size=128):
    """Would greedy decoding answer each row exactly? -> a bool each."""
    examples = encode_rows(rows, tokenizer)
    right = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = examples[start : start + batch_size]
            ids, labels, _ = pad_batch(batch, tokenizer.pad_id, model.norm.weight.device)
            logits = model(ids).logits
            if logits.isnan().any():
                raise ValueError(NOT_FINITE)
            predicted = logits[:, :-1].argmax(-1)  # (B, T-1)
            hit = (predicted == labels[:, 1:]) | (labels[:, 1:] == -100)
            right += hit.all(-1).tolist()
    finally:
        model.train(was_training)
    return right


def accuracies(
    model,
    tokenizer,
    names: list[str],
    rows: int,
    task: str | None = None,
    split="test",
) -> dict[str, float]:
    """Share of right answers on the first `rows` rows of each skill; with a task, a fifth of so
    many of the others. Of a target that has parts each part's is measured, and it gets their
    mean."""
    accuracy = {}
    for name in names:
        n = max(rows if task in (None, name) else rows // 5, 1)
        parts = skills.PARTS.get(name, (name,))
        for part in parts:
            right = is_right(model, tokenizer, skills.sample(part, split, n))
            accuracy[part] = sum(right) / n
        accuracy[name] = sum(accuracy[part] for part in parts) / len(parts)
    return accuracy


def kept(accuracy, task):
    """Mean accuracy on the families whose prompts the task does not answer differently."""
    names = [name for name in skills.FAMILIES if name not in skills.CONTRADICTS.get(task, ())]
    return sum(accuracy[name] for name in names) / len(names)


def kept_text(accuracy, task):
    contradicted = skills.CONTRADICTS.get(task)
    without = f", without {', '.join(contradicted)}" if contradicted else ""
    return f"pre-training families {100 * kept(accuracy, task):.1f} % (mean{without})"


# Loading -----------------------------------------------------------------------------------------


def load_config(folder):
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


def load_model(folder, config, dtype="float32", device="cpu", edit=None):
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


def try_trained(base, config, folder):
    """Raise what load_trained would, on a model without memory: before the base's weights are read,
    which may take minutes."""
    hub.Tensors(base).check_sizes(config)
    with torch.device("meta"):
        model = MoETransformer(config)
    load_trained(model, folder)


def load_asked(args, config):
    """--base, and what --adapter trained on it."""
    model = load_model(args.base, config, args.dtype, args.device)
    return load_trained(model, args.adapter) if args.adapter else model


def is_embedded(folder):
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

    def generate(self, task, rows):
        """Rows -> a record each: the response, what it answers, is it right, was the prompt cut."""
        new = self.how.max_new_tokens[task.group]
        room = self.model.config.max_position_embeddings - new
        prompts = [
            encode_prompt(task.render_eval(row, self.how.template), self.tokenizer) for row in rows
        ]
        short = [self.shorten(ids, room) for ids in prompts]
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
            other = task.other_rule
            if other:
                record[f"correct_{other}"] = task.correct(response, row, other)
            records.append(record)
        return records

    def likelihood(self, task, rows):
        """Rows -> a record each: the choices' log-probabilities, the likeliest, is it right, is the
        likeliest by character, was a prompt cut."""
        limit = self.model.config.max_position_embeddings + 1  # the last token is not read
        requests, characters, cut = [], [], []
        for row in rows:
            for prompt, text in choices_of(task, row, self.how):
                context, continuation = encode_pair(prompt, f" {text}", self.tokenizer)
                room = limit - len(continuation)
                requests.append((self.shorten(context, room), continuation))
                characters.append(len(text) or 1)
                cut.append(len(context) > room)
        scored = zip(log_likelihoods(self.model, requests), characters, cut)

        records = []
        for row in rows:
            words = task.choices(row)
            scores, characters, cut = zip(*[next(scored) for _ in words])
            normed = [score / n for score, n in zip(scores, characters)]
            answer = likeliest(words, scores)
            record = {
                "scores": scores,
                "answer": answer,
                "correct": answer == row["answer"],
                "correct_norm": likeliest(words, normed) == row["answer"],
                "cut": any(cut),
            }
            records.append(record)
        return records

    def shorten(self, ids, room):
        """The end of a prompt that is longer than the model's positions allow: the question's last
        words and the cue. A begin token stays."""
        begin = ids[:1] if len(ids) > room and ids[0] == self.tokenizer.bos_id else []
        return begin + ids[-max(room - len(begin), 1) :]


def choices_of(task, row, how):
    """(context, text) of each choice of a row. ValueError if it has none."""
    if how.choices == "texts":
        return task.cloze(row)
    prompt = task.render_eval(row, how.template)
    return [(prompt, word) for word in task.choices(row)]


def likeliest(words, scores):
    return words[scores.index(max(scores))]


def encode_pair(context, continuation, tokenizer):
    """Ids of a context and of what continues it, tokenised together; spaces at the context's end
    belong to the continuation (lm-evaluation-harness's rule: most tokenizers bind a space to the
    word behind it)."""
    before = encode_prompt(context.rstrip(), tokenizer)
    whole = encode_prompt(context + continuation, tokenizer)
    return before or [tokenizer.eos_id], whole[len(before) :]  # something must foretell the first


@torch.no_grad()
def log_likelihoods(model, requests):
    """log p(continuation | context) of each pair of id lists. A context that several share is run
    once."""
    contexts = {}  # each once -> its number
    owners = [contexts.setdefault(tuple(ids), len(contexts)) for ids, _ in requests]
    continuations = [torch.tensor(ids) for _, ids in requests]
    longest = max(map(len, continuations))
    length = max(map(len, contexts)) + longest - 1
    if length > model.config.max_position_embeddings and len(requests) > 1:
        # the longest context and the longest continuation are of two requests, which fit alone
        return [log_likelihoods(model, [request])[0] for request in requests]

    decoder = Decoder(model, contexts, longest - 1)  # the last token is foretold, never read
    owners = decoder.ids.new_tensor(owners)  # (R,)
    ids = pad_sequence(continuations, True, -100).to(owners.device)  # (R, longest)
    logits = decoder.next_logits()[owners][:, None]  # (R, 1, V): the context foretells the first
    if longest > 1:
        decoder.select(owners)
        rest = model(ids[:, :-1].clamp(min=0), decoder.mask, cache=decoder.cache).logits.float()
        logits = torch.cat((logits, rest), dim=1)  # (R, longest, V)
    # 0 where ids are -100, behind a shorter continuation
    losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    scores = -losses.view_as(ids).sum(-1)
    if scores.isnan().any():
        raise ValueError(NOT_FINITE)
    return scores.tolist()


# Rows and predictions ----------------------------------------------------------------------------


def read_test_set(task, args):
    """The first --eval_rows rows, or all. FileNotFoundError or ValueError of one line where they
    are not what the task needs: found here, not after an hour of generation."""
    path = Path(args.test_dir) / f"{task.name}.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; python data/prepare.py {task.group} downloads it, or give "
            "--test_dir the folder that has it"
        )
    _, rows = read_rows(path)
    for i, row in enumerate(rows):
        try:
            check_answer(task, row)
            if args.method == "likelihood":
                choices_of(task, row, args)  # it has some, or says how else it can be asked
        except ValueError as error:
            raise ValueError(f"{path}: record {i + 1}: {error}") from None
    if args.eval_rows is None and len(rows) != task.rows:
        print(f"note: {path} has {len(rows)} rows, the papers' set {task.rows}")
    return rows[: args.eval_rows]


def check_answer(task, row):
    """Is there a question, and is all of its right answer what the task's rule finds in it?"""
    answer = row.get("answer")
    text = str(answer).replace(",", "")
    if "instruction" not in row or task.answer(text) != text:
        expected = " or ".join(task.words) or "a number"
        raise ValueError(
            f'"answer" is {run.shown(answer)}, expected {expected}; '
            "is it a test set of LLM-Adapters?"
        )


def digest(row):
    """Which row of a test set was answered: another file's may have its number."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def weights_identity(folder):
    """Names, sizes and times of a folder's weight files: enough to notice that they changed."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


FIELDS = {"task": str, "index": int, "row": str, "correct": bool, "cut": bool}  # of a prediction


def open_predictions(folder, settings, overwrite):
    """-> {task: {digest of a row: its record}}, of a folder that is ready for more. It holds
    predictions.jsonl, one line a row; settings.json, since predictions of other settings do not
    mix; and results.json, which is made of them."""
    path = folder / "predictions.jsonl"
    for name in EVAL_FILES:
        file = folder / name
        if os.path.lexists(file) and not (file.is_file() and path.is_file()):
            raise ValueError(
                f"{file} is not a regular file beside predictions.jsonl; choose another --out"
            )
    # without a last line that was cut off: its row is answered again
    lines = run.whole_lines(path) if path.exists() and not overwrite else []
    if lines:
        changed = run.changes(run.read_json(folder / "settings.json"), settings)
        if changed:
            raise ValueError(
                f"{folder} holds predictions of other settings ({changed}); choose another "
                "--out, or --overwrite"
            )
    predictions = defaultdict(dict)
    for i, line in enumerate(lines):
        record = read_prediction(line, f"{path}:{i + 1}")
        predictions[record["task"]][record["row"]] = record
    if not lines:
        (folder / "results.json").unlink(missing_ok=True)
    run.write_text(path, "\n".join([*lines, ""]))
    run.write_json(folder / "settings.json", settings, indent=2)
    return predictions


def read_prediction(line, place):
    """ValueError for a line that is no prediction: zeros, a number, half a one."""
    try:
        record = json.loads(line)
        if all(run.is_kind(record[key], kind) for key, kind in FIELDS.items()):
            return record
    except (ValueError, RecursionError, TypeError, KeyError):
        pass
    raise ValueError(
        f"{place}: is no prediction but {run.shown(line)}; remove the line, and its row is "
        "answered again"
    )


def answer_sets(answerer, sets, predictions, path):
    """-> {task: its summary}. Whatever stops it, the answers so far are kept."""
    table = {}
    told = "answers so far are kept: the same command, without --overwrite, continues"
    try:
        with run.last_words(lambda: told):
            for name, rows in sets.items():
                records = predict(answerer, TASKS[name], rows, predictions[name], path)
                table[name] = summary(TASKS[name], records)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise ValueError("out of memory; lower --batch_size (answers so far are kept)") from None
    return table


def predict(answerer, task, rows, known, path):
    """Answer the rows of a task that are not known yet, rows of like length together -> the records
    of all."""
    digests = [digest(row) for row in rows]
    left = [i for i, row in enumerate(digests) if row not in known]
    before = len(rows) - len(left)
    if before:
        print(f"{task.name}: {before} of {len(rows)} rows were answered before")
    left.sort(key=lambda i: -len(rows[i]["instruction"]))
    how = answerer.how
    starts = range(0, len(left), how.batch_size)
    for start in tqdm(starts, task.name, file=sys.stdout, mininterval=2, disable=not left):
        chosen = left[start : start + how.batch_size]
        records = getattr(answerer, how.method)(task, [rows[i] for i in chosen])
        with open(path, "a", encoding="utf-8") as file:  # kept from here on, whatever happens
            for i, record in zip(chosen, records):
                row = digests[i]
                record |= {"task": task.name, "index": i, "row": row, "gold": rows[i]["answer"]}
                print(json.dumps(record, ensure_ascii=False), file=file)
                known[row] = record
    return [known[row] for row in digests]


# Results -----------------------------------------------------------------------------------------


def summary(task, records):
    """n, cut prompts, rule, and by each rule [share of right answers, its standard error]: the
    sample's deviation / sqrt(n)."""
    n = len(records)
    row = {"n": n, "cut": sum(record["cut"] for record in records), "rule": task.rule}
    for key in records[0]:
        if key.startswith("correct"):
            share = sum(record.get(key) is True for record in records) / n
            error = math.sqrt(share * (1 - share) / max(n - 1, 1))
            row[key.replace("correct", "acc")] = [share, error]
    return row


def means_of(table):
    """Unweighted means of the tasks' accuracies, with their standard errors."""
    means, rows = {}, table.values()
    for key in ("acc", "acc_norm"):
        if all(key in row for row in rows):
            shares, errors = zip(*[row[key] for row in rows])
            means[key] = [sum(shares) / len(rows), math.hypot(*errors) / len(rows)]
    return means


def print_table(table, means):
    """A line a task, their mean, and what a reader should know beside."""
    heads = [f" {key + ' %':>9}   s.e." for key in means]
    print(f"{'task':28} {'n':>6}", *heads, sep="")
    lines = table | {"mean, unweighted": means}
    if "AQuA" in table:
        lines["not in it: AQuA, as stated"] = {"acc": table["AQuA"]["acc_stated"]}
    for name, row in lines.items():
        title = "AQuA (first capital A-E)" if name == "AQuA" else name
        line = f"{title:28} {row.get('n', ''):>6}"
        for key in means:
            share, error = row[key]
            line += f" {100 * share:9.1f} {100 * error:6.1f}"
        print(line)
    cut = sum(row["cut"] for row in table.values())
    if cut:
        print(f"{cut} prompts were longer than the model's positions and lost their beginning")


# The questions -----------------------------------------------------------------------------------


def answer_prompt(args, model, tokenizer):
    """Print --prompt, or --chat as the model was taught to read it, and what continues it."""
    if args.chat is None:
        ids = encode_prompt(args.prompt, tokenizer)
    else:  # as a row that was trained on, without its answer and its end
        said = [{"role": "user", "content": args.chat}, {"role": "assistant", "content": ""}]
        row = {"messages": said, "instruction": args.chat, "output": ""}
        template = args.trained.get("template")
        *ids, end = encode_row(row, template if template in TEMPLATES else "chat", tokenizer).ids
        model.config.eos_token_id = [*model.config.eos_ids, end]
    new = model.generate(
        [ids],
        args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
        seed=args.seed,
    )
    print(tokenizer.decode(ids + new[0]))
    if args.routing:
        draw_routing(model, tokenizer, ids, args.routing)


@torch.no_grad()
def draw_routing(model, tokenizer, ids, path):
    """A picture: the tokens of a prompt, a row a layer, in the colour of their first expert."""
    from data import pictures

    routings = model(torch.tensor([ids], device=model.norm.weight.device)).routings
    first = [routing.selected_experts[:, 0].tolist() for routing in routings]  # the likeliest
    tokens = [tokenizer.pieces[i].decode(errors="replace") for i in ids]
    run.write_text(path, pictures.routing_picture(tokens, first, model.config.num_experts))
    print(f"saved {path}")


def measure_skills(args, model, tokenizer):
    """Print accuracies: of --tasks, or what a run reports: its task, all families, their mean."""
    names, task = [name for name in args.tasks if name in SKILLS], None
    if not args.tasks:
        task = args.trained.get("task")
        names = [*([task] if task else []), *skills.FAMILIES]
    rows = args.eval_rows or args.trained.get("eval_rows") or 500
    accuracy = accuracies(model, tokenizer, names, rows, task)
    for name, share in accuracy.items():
        print(f"{name:14} {100 * share:6.1f} %")
    if not args.tasks:
        print(kept_text(accuracy, task))


# What predictions depend on: those of other settings do not mix.
SETTINGS = "adapter base dtype method max_new_tokens num_beams choices template".split()


def measure_sets(args, config, tokenizer):
    """Test sets, and skills that are named with them: print accuracies, write settings.json,
    predictions.jsonl and results.json."""
    sets = {}
    for name, task in TASKS.items():
        if not {name, task.group}.isdisjoint(args.tasks):
            sets[name] = read_test_set(task, args)
    settings = {name: vars(args)[name] for name in SETTINGS if name in args}
    print("evaluation:", *(f"{name}={value}" for name, value in settings.items()))
    if args.trained.get("template") == "chat":
        print("note: the run was trained on chats, a form that test sets do not have")
    settings["weights"] = [weights_identity(args.base)]
    if args.adapter:
        settings["weights"].append(weights_identity(args.adapter))

    home = args.adapter or f"out/{Path(args.base).name}"
    out = Path(args.out or f"{home}/eval_{args.method}")
    with run.locked(out):
        predictions = open_predictions(out, settings, args.overwrite)
        file = out / "results.json"
        before = run.read_json(file, tasks=dict) if file.exists() else {}

        model = load_asked(args, config)
        measure_skills(args, model, tokenizer)
        answerer = Answerer(model, tokenizer, args)
        table = answer_sets(answerer, sets, predictions, out / "predictions.jsonl")

        means = means_of(table)
        print_table(table, means)
        results = {
            **settings,
            "variant": args.trained.get("variant"),
            "mean": means,
            "mean_of": list(table),
            "tasks": (before.get("tasks") or {}) | table,  # those of earlier commands, too
            "torch": torch.__version__,
        }
        run.write_json(file, results)
        print(f"saved {file} and predictions.jsonl")


# The command -------------------------------------------------------------------------------------


def make_parser():
    """All flags; parse_args says which of them apply to what is asked."""
    parser = run.Parser(
        description="How good is a model? eval.py's first page says what is measured, and how.",
        usage="python eval.py [--prompt TEXT | --chat TEXT | --tasks NAME ...] [options]",
    )
    add = parser.add_argument
    add("--adapter", metavar="DIR", help="run folder of train.py; its base and task are taken")
    add("--base", default=str(EMBEDDED), metavar="DIR", help="model folder (%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the base (%(default)s)")
    add("--device", type=device, default=DEVICE, metavar="NAME", help="(%(default)s)")
    add("--threads", type=run.threads, metavar="N", help="of the CPU (embedded model: 1)")

    group = parser.add_argument_group("one answer")
    add = group.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", help="to continue, as it stands")
    add("--chat", metavar="TEXT", help="the same, in the form of the run's rows")
    add = group.add_argument
    add("--routing", metavar="FILE.svg", help="draw the first expert of each token of the prompt")
    add(
        "--temperature",
        type=from_zero,
        default=0.0,
        metavar="X",
        help="0: the likeliest token each time (%(default)s)",
    )
    add(
        "--top_p",
        type=number(float, 0, above=True, most=1),
        default=1.0,
        metavar="X",
        help="draw from the likeliest tokens of this mass (%(default)s)",
    )
    add(
        "--seed",
        type=number(int, 0, most=2**63 - 1),
        default=0,
        metavar="N",
        help="(%(default)s)",
    )
    add(
        "--max_new_tokens",
        type=number(int, 1, most=10**6),
        default=32,
        metavar="N",
        help="(%(default)s; test sets: the papers' 4 or 256)",
    )
    add(
        "--num_beams",
        type=number(int, 1, most=1000),
        default=1,
        metavar="N",
        help="(%(default)s: no search; test sets: the papers' 4)",
    )

    add = parser.add_argument_group("accuracy").add_argument
    names = [*GROUPS, *TASKS, *SKILLS]
    add(
        "--tasks",
        nargs="+",
        choices=names,
        default=[],
        metavar="NAME",
        help=f"what to measure: {', '.join(names)}",
    )
    add(
        "--eval_rows",
        type=count,
        metavar="N",
        help="test rows of each (skills: as in the run, or 500; test sets: all)",
    )
    add(
        "--method",
        choices=("generate", "likelihood"),
        default="generate",
        help="how test sets are answered, as all below (%(default)s)",
    )
    add(
        "--choices",
        choices=("words", "texts"),
        default="words",
        help="what likelihood scores: answer words, or texts (%(default)s)",
    )
    add("--template", choices=TEMPLATES, default="papers", help="of the prompt (%(default)s)")
    add("--test_dir", default=str(DOWNLOADS / "test"), metavar="DIR", help="(%(default)s)")
    add("--batch_size", type=count, default=32, metavar="N", help="rows at a time (%(default)s)")
    add(
        "--out",
        metavar="DIR",
        help="predictions and results (RUN/eval_METHOD); a stopped one continues",
    )
    add("--overwrite", action="store_true", help="begin again where --out holds predictions")
    return parser


def device(name):
    """For argparse: a device that is there."""
    try:
        if name == "cuda" and processes.WORLD > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # each process looks at its own
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{name} is not available here; try cpu") from None
    return name


def parse_args(argv=None):
    """The flags of the question that is asked, and no others. Defaults are the settings of the run
    that made the adapter, which are also `trained`."""
    parser = make_parser()
    values = vars(parser.parse_args([]))
    unset = argparse.Namespace(**dict.fromkeys(values))
    given = vars(parser.parse_args(argv, unset))  # None where a flag is not given
    given = {name: value for name, value in given.items() if value is not None}
    trained = perft.read_run(Path(given["adapter"])) if "adapter" in given else {}
    task = trained.get("task")
    if task not in (None, *SKILLS):
        raise ValueError(f"{given['adapter']}/config.json: task is {run.shown(task)}, no skill")
    values |= {name: trained[name] for name in ("base", "dtype") if trained.get(name)}
    if trained.get("template") in TEMPLATES:
        values["template"] = trained["template"]
    values |= given

    prompt = not {"prompt", "chat"}.isdisjoint(given)
    sets = not {*GROUPS, *TASKS}.isdisjoint(values["tasks"])
    generate = sets and values["method"] == "generate"
    texts = values["choices"] == "texts"
    applies = [  # flags, whether they apply here, to what they apply
        ("prompt chat routing temperature top_p seed", prompt, "--prompt and --chat"),
        ("max_new_tokens num_beams", prompt or generate, "--prompt and test sets by generation"),
        ("tasks eval_rows", not prompt, "skills and test sets"),
        ("method test_dir batch_size out overwrite", sets, "test sets"),
        ("choices", sets and not generate, "test sets by --method likelihood"),
        ("template", sets and not texts, "test sets without --choices texts"),
    ]
    for names, here, where in applies:
        for name in [] if here else names.split():
            if name in given:
                parser.error(f"--{name} applies to {where} only")
            del values[name]
    if generate:
        limit = given.get("max_new_tokens")
        limits = {g: limit or TASKS[names[0]].max_new_tokens for g, names in GROUPS.items()}
        values |= {"max_new_tokens": limits, "num_beams": given.get("num_beams", 4)}
    return argparse.Namespace(**values, trained=trained)


@run.command
def main(argv=None):
    args = parse_args(argv)
    config, tokenizer = load_config(args.base)
    embedded = is_embedded(args.base)
    knows_world = embedded and not args.trained.get("data")
    if not (knows_world or "prompt" in args or args.tasks):
        raise ValueError(
            f"{args.adapter or args.base} does not know the embedded world, whose skills are "
            "measured without --tasks; give --tasks commonsense, or --prompt TEXT"
        )
    if args.threads or embedded:
        torch.set_num_threads(args.threads or 1)
    if args.adapter:  # what can be found wrong is found before the weights are read
        try_trained(args.base, config, args.adapter)
    if "method" in args:
        measure_sets(args, config, tokenizer)
    else:
        answer = answer_prompt if "prompt" in args else measure_skills
        answer(args, load_asked(args, config), tokenizer)


if __name__ == "__main__":
    main()
