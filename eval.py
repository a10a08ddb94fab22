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
import hashlib
import json
import math
import os
import sys
from collections import defaultdict
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import esft
import perft
from data import hub, skills
from data import shard as processes
from data.dataset import DOWNLOADS, encode_prompt, encode_row, encode_rows, pad_batch, read_rows
from data.decode import Decoder, KVCache
from data.run import ON, Flag, count, fraction, from_zero, group, natural, number
from data.tasks import GROUPS, TASKS, TEMPLATES
from data.tokenizer import load_tokenizer
from model import EMBEDDED, Config, MoETransformer

SKILLS = [*skills.TARGETS, *skills.FAMILIES]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVAL_FILES = ("settings.json", "results.json", "predictions.jsonl")  # of a folder RUN/eval_METHOD
KEPT = "answers so far are kept: the same command, without --overwrite, continues"
LESS_MEMORY = (
    "try --dtype bfloat16; for test sets a lower --batch_size or --num_beams (answers are kept), "
    "for one answer a lower --num_beams or --max_new_tokens"
)
MOST_ROWS = 10**7  # of a skill: train.py takes no more
NOT_FINITE = "the model's logits are not finite: did its training diverge?"


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


def accuracies(model, tokenizer, names, rows, task=None, split="test") -> dict[str, float]:
    """Share of right answers of each skill, on its first `rows` rows.

    If there is a task, the other skills only tell what it costs, and get a fifth of so many rows. A
    target that mixes others (skills.PARTS) gets the mean of its parts, which are measured, and
    told, each for itself.
    """
    accuracy = {}
    for name in names:
        n = rows if task in (None, name) else max(rows // 5, 1)
        parts = skills.PARTS.get(name, (name,))
        for part in parts:
            right = is_right(model, tokenizer, skills.sample(part, split, n))
            accuracy[part] = sum(right) / n
        accuracy[name] = sum(accuracy[part] for part in parts) / len(parts)
    return accuracy


def kept(accuracy, task):
    """How much of pre-training is still there: the mean accuracy on the families. Without those
    whose prompts the task answers in another way (skills.CONTRADICTS): who learns kinship_new is to
    give up kinship, which is no forgetting."""
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
    model = MoETransformer.from_pretrained(folder or EMBEDDED, hub.DTYPES[dtype], device, edit)
    model.config.eos_token_id = config.eos_token_id
    return model


def load_trained(model, folder):
    """Attach what a run of train.py saved in its folder, adapters or chosen experts -> the model.
    ValueError if it was made for another base."""
    load = esft.load if (Path(folder) / esft.CONFIG).exists() else perft.load_adapter
    return load(model, folder)


def is_embedded(folder):
    """Is a model of the embedded world, which is: has it the tokenizer of data/tiny_olmoe?"""
    theirs = (EMBEDDED / "tokenizer.json").read_bytes()
    return (Path(folder) / "tokenizer.json").read_bytes() == theirs


# Answering the rows of a test set ----------------------------------------------------------------

# args: the flags --template, --num_beams and --max_new_tokens (generate), --choices (likelihood).


def generate(model, tokenizer, args, task, rows):
    """Rows -> a record each: the response, what it answers, is it right, was the prompt cut."""
    new = args.max_new_tokens[task.group]
    room = model.config.max_position_embeddings - new
    prompts = [encode_prompt(task.render_eval(row, args.template), tokenizer) for row in rows]
    short = [shorten(ids, room, tokenizer) for ids in prompts]
    outputs = continuations(model, short, new, args.num_beams)
    records = []
    for row, ids, output in zip(rows, prompts, outputs):
        response = tokenizer.decode(output)
        record = {
            "response": response,
            "answer": task.answer(response),
            "correct": task.correct(response, row),
            "cut": len(ids) > room,
        }
        if task.other_rule:
            record[f"correct_{task.other_rule}"] = task.correct(response, row, task.other_rule)
        records.append(record)
    return records


def likelihood(model, tokenizer, args, task, rows):
    """Rows -> a record each: the choices' log-probabilities, the likeliest, is it right, is the
    likeliest by character, was a prompt cut."""
    limit = model.config.max_position_embeddings + 1  # the last token is not read
    asked = [choices_of(task, row, args) for row in rows]
    requests, cut = [], []
    for prompt, text in sum(asked, []):
        context, continuation = encode_pair(prompt, f" {text}", tokenizer)
        room = limit - len(continuation)
        requests.append((shorten(context, room, tokenizer), continuation))
        cut.append(len(context) > room)
    found = zip(log_likelihoods(model, requests), cut)  # row after row, choice after choice

    records = []
    for row, choices in zip(rows, asked):
        scores, was_cut = zip(*islice(found, len(choices)))
        by_character = [score / (len(text) or 1) for score, (_, text) in zip(scores, choices)]
        words = task.choices(row)
        answer = likeliest(words, scores)
        record = {
            "scores": scores,
            "answer": answer,
            "correct": answer == row["answer"],
            "correct_norm": likeliest(words, by_character) == row["answer"],
            "cut": any(was_cut),
        }
        records.append(record)
    return records


def shorten(ids, room, tokenizer):
    """The end of a prompt that is longer than the model's positions allow: the question's last
    words and the cue. A begin token stays."""
    begin = ids[:1] if len(ids) > room and ids[0] == tokenizer.bos_id else []
    return begin + ids[-max(room - len(begin), 1) :]


def continuations(model, prompts, max_new_tokens, num_beams, **options):
    """model.generate's; ValueError if memory is short: Linux would give it, and later end this
    process without a word."""
    weight = model.norm.weight
    length = max(map(len, prompts)) + max_new_tokens
    cache = KVCache(model.config, num_beams * len(prompts), length, weight.to("meta"))
    need = cache.stored.nbytes * min(num_beams, 2)  # a step of beam search copies it
    if weight.is_cpu and need > run.free_memory():
        raise ValueError(f"{need / 1e9:,.1f} GB of memory are needed; {LESS_MEMORY}")
    return model.generate(prompts, max_new_tokens, num_beams=num_beams, **options)


def choices_of(task, row, args):
    """(context, text) of each choice of a row. ValueError if it has none."""
    if args.choices == "texts":
        return task.cloze(row)
    prompt = task.render_eval(row, args.template)
    return [(prompt, word) for word in task.choices(row)]


def likeliest(words, scores):
    return words[scores.index(max(scores))]


def encode_pair(context, continuation, tokenizer):
    """Ids of a context and of what continues it, tokenised together; spaces at the context's end
    belong to the continuation (lm-evaluation-harness's rule: most tokenizers bind a space to the
    word behind it)."""
    before = encode_prompt(context.rstrip(), tokenizer)
    whole = encode_prompt(context + continuation, tokenizer)
    return before or [tokenizer.eos_id], whole[len(before) :]  # something must predict the first


@torch.no_grad()
def log_likelihoods(model, requests):
    """log p(continuation | context) of each pair of id lists.

    The choices of a question share their context. It is run once: each context's keys and values
    are cached, then copied for every continuation that has it, and all continuations are run at
    once behind them.
    """
    contexts = {}  # each once -> its row in the batch
    for context, _ in requests:
        contexts.setdefault(tuple(context), len(contexts))
    continuations = [torch.tensor(ids) for _, ids in requests]
    longest = max(map(len, continuations))
    length = max(map(len, contexts)) + longest - 1  # the last token is predicted, never read
    if length > model.config.max_position_embeddings and len(requests) > 1:
        # the longest context and the longest continuation are of two requests, which fit alone
        return [log_likelihoods(model, [request])[0] for request in requests]

    decoder = Decoder(model, list(contexts), longest - 1)
    rows = decoder.ids.new_tensor([contexts[tuple(context)] for context, _ in requests])  # (R,)
    ids = pad_sequence(continuations, True, -100).to(rows.device)  # (R, longest)
    logits = decoder.next_logits()[rows][:, None]  # (R, 1, V): a context predicts the first
    if longest > 1:
        decoder.select(rows)
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
    earlier = earlier_settings(folder)
    path = folder / "predictions.jsonl"
    # without a last line that was cut off: its row is answered again
    lines = run.whole_lines(path) if path.exists() and not overwrite else []
    changed = run.changes(earlier, settings)
    if lines and changed:
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


def earlier_settings(folder):
    """The settings of the evaluation that a folder holds. ValueError if they are not there to prove
    that its files are ours: what is somebody else's stays, whatever the flags."""
    settings = {}
    with suppress(OSError, ValueError):
        settings = run.read_json(folder / "settings.json")
    has_settings = {"base", "method", "weights"} <= settings.keys()
    ours = has_settings and (folder / "predictions.jsonl").is_file()
    for name in EVAL_FILES:
        file = folder / name
        if not os.path.lexists(file):
            continue
        if not file.is_file():
            raise ValueError(f"{file} is not a regular file; choose another --out")
        if file.stat().st_size > 0 and not ours:
            raise ValueError(
                f"{file} may be somebody's: no whole settings.json and predictions.jsonl of an "
                "evaluation are beside it; move it away, or choose another --out"
            )
    return settings


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


def predict(args, model, tokenizer, task, rows, known, path):
    """Answer the rows of a task that are not known yet, rows of like length together -> the records
    of all."""
    digests = [digest(row) for row in rows]
    left = [i for i, row in enumerate(digests) if row not in known]
    before = len(rows) - len(left)
    if before:
        print(f"{task.name}: {before} of {len(rows)} rows were answered before")
    left.sort(key=lambda i: -len(rows[i]["instruction"]))
    answers = generate if args.method == "generate" else likelihood
    starts = range(0, len(left), args.batch_size)
    for start in tqdm(starts, task.name, file=sys.stdout, mininterval=2, disable=not left):
        chosen = left[start : start + args.batch_size]
        records = answers(model, tokenizer, args, task, [rows[i] for i in chosen])
        # kept from here on, whatever happens
        with run.naming(path), open(path, "a", encoding="utf-8") as file:
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
    for name, row in table.items():
        print_line(name + TASKS[name].remark, row["n"], row, means)
    print_line("mean, unweighted", "", means, means)
    for name, row in table.items():
        rule = TASKS[name].other_rule
        if f"acc_{rule}" in row:
            print_line(f"not in it: {name}, as {rule}", "", row, [f"acc_{rule}"])
    cut = sum(row["cut"] for row in table.values())
    if cut:
        print(f"{cut} prompts were longer than the model's positions and lost their beginning")


def print_line(title, n, row, keys):
    line = f"{title:28} {n:>6}"
    for key in keys:
        share, error = row[key]
        line += f" {100 * share:9.1f} {100 * error:6.1f}"
    print(line)


# The questions -----------------------------------------------------------------------------------


def answer_prompt(args, model, tokenizer):
    """Print --prompt, or --chat as the model was taught to read it, and what continues it."""
    if args.chat is None:
        ids = encode_prompt(args.prompt, tokenizer)
    else:
        ids, end = encode_chat(args.chat, args.trained.get("template"), tokenizer)
        model.config.eos_token_id = [*model.config.eos_ids, end]
        if args.trained.get("task"):
            print("note: the run was trained on prompts of its --task, and never saw this form")
    new = continuations(
        model,
        [ids],
        args.max_new_tokens,
        args.num_beams,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(tokenizer.decode(ids + new[0]))
    if args.routing:
        draw_routing(model, tokenizer, ids, args.routing)


def encode_chat(text, template, tokenizer):
    """A question, as a row that a run with this template was trained on -> its ids up to the
    answer, and the token that ends one."""
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    row = {"messages": said, "instruction": text, "output": ""}
    form = template if template in TEMPLATES else "chat"
    *ids, end = encode_row(row, form, tokenizer).ids
    return ids, end


@torch.no_grad()
def draw_routing(model, tokenizer, ids, path):
    """A picture: the tokens of a prompt, a row a layer, in the colour of their first expert."""
    from data import pictures

    routings = model(torch.tensor([ids], device=model.norm.weight.device)).routings
    first = [routing.selected_experts[:, 0].tolist() for routing in routings]  # the likeliest
    tokens = [tokenizer.pieces[i].decode(errors="replace") for i in ids]
    run.write_text(path, pictures.routing_picture(tokens, first, model.config.num_experts))
    print(f"saved {path}")


def is_our_picture(path):
    """Did data/pictures.py make this file? No other is written over."""
    from data import pictures

    if not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return pictures.STYLE[:30] in file.read(4000)  # the rest of it may change


def measure_skills(args, model, tokenizer):
    """Print accuracies: of --tasks, or what a run reports: its task, all families, their mean."""
    if args.tasks:
        task = None
        names = [name for name in args.tasks if name in SKILLS]
    else:
        task = args.trained.get("task")
        names = [name for name in (task, *skills.FAMILIES) if name]
    rows = args.eval_rows or args.trained.get("eval_rows") or 500
    accuracy = accuracies(model, tokenizer, names, rows, task)
    for name, share in accuracy.items():
        print(f"{name:14} {100 * share:6.1f} %")
    if not args.tasks:
        print(kept_text(accuracy, task))


def settings_of(args):
    """What predictions depend on: those of other settings do not mix."""
    settings = {"adapter": args.adapter}
    for name in ("base", "dtype", "method", "max_new_tokens", "num_beams", "choices", "template"):
        if vars(args)[name] is not None:
            settings[name] = vars(args)[name]
    return settings


def measure_sets(args, load, tokenizer):
    """Test sets, and skills that are named with them: print accuracies, write settings.json,
    predictions.jsonl and results.json."""
    sets = {}
    for name, task in TASKS.items():
        if not {name, task.group}.isdisjoint(args.tasks):
            sets[name] = read_test_set(task, args)
    settings = settings_of(args)
    print("evaluation:", *(f"{name}={value}" for name, value in settings.items()))
    if args.trained.get("template") == "chat":
        print("note: the run was trained on chats, a form that test sets do not have")
    folders = filter(None, (args.base, args.adapter))
    settings["weights"] = [weights_identity(folder) for folder in folders]

    home = args.adapter or f"out/{Path(args.base).name}"
    out = Path(args.out or f"{home}/eval_{args.method}")
    with run.locked(out):
        predictions = open_predictions(out, settings, args.overwrite)
        file = out / "results.json"
        before = run.read_json(file, tasks=dict) if file.exists() else {}

        model = load()
        measure_skills(args, model, tokenizer)
        table = {}
        with run.last_words(lambda: KEPT):
            for name, rows in sets.items():
                task = TASKS[name]
                known, path = predictions[name], out / "predictions.jsonl"
                records = predict(args, model, tokenizer, task, rows, known, path)
                table[name] = summary(task, records)

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


# What a command may ask. Test sets, and skills that are named with them, are answered by one of two
# methods.
PROMPT = "--prompt and --chat"
SKILLS_ONLY = "skills"
SETS = "test sets"
GENERATE = "test sets by generation"
LIKELIHOOD = "test sets by --method likelihood"

FLAGS = [
    group(
        "model",
        adapter=Flag("DIR", None, "run folder of train.py; its base and task are taken"),
        base=Flag("DIR", str(EMBEDDED), "model folder"),
        dtype=Flag(hub.DTYPES, "float32", "of the base"),
        device=Flag("NAME", DEVICE, "where"),
        threads=Flag(run.threads, None, "of the CPU (embedded model: 1)"),
    ),
    group(
        "one answer",
        prompt=Flag("TEXT", None, "to continue, as it stands", (PROMPT,)),
        chat=Flag("TEXT", None, "the same, in the form of the run's rows", (PROMPT,)),
        routing=Flag(
            "FILE.svg", None, "draw the first expert of each token of the prompt", (PROMPT,)
        ),
        temperature=Flag(from_zero, 0.0, "0: the likeliest token each time", (PROMPT,)),
        top_p=Flag(fraction, 1.0, "draw from the likeliest tokens of this mass", (PROMPT,)),
        seed=Flag(natural, 0, "of what is drawn", (PROMPT,)),
        max_new_tokens=Flag(
            number(int, 1, most=10**6),
            32,
            "tokens; test sets: the papers' 4 or 256",
            (PROMPT, GENERATE),
        ),
        num_beams=Flag(
            number(int, 1, most=1000),
            1,
            "beams of a search; test sets: the papers' 4",
            (PROMPT, GENERATE),
        ),
    ),
    group(
        "accuracy",
        tasks=Flag([*GROUPS, *TASKS, *SKILLS], None, "what to measure", (SKILLS_ONLY, SETS)),
        eval_rows=Flag(
            count,
            None,
            "test rows of each (skills: as in the run, or 500; test sets: all)",
            (SKILLS_ONLY, SETS),
        ),
        method=Flag(("generate", "likelihood"), "generate", "of answering test sets", (SETS,)),
        choices=Flag(("words", "texts"), "words", "what likelihood scores", (LIKELIHOOD,)),
        template=Flag(TEMPLATES, "papers", "of the prompt", (SETS,)),
        test_dir=Flag("DIR", str(DOWNLOADS / "test"), "of the test sets", (SETS,)),
        batch_size=Flag(count, 32, "rows at a time", (SETS,)),
        out=Flag(
            "DIR",
            None,
            "predictions and results (RUN/eval_METHOD); a stopped one continues",
            (SETS,),
        ),
        overwrite=Flag(ON, False, "begin again where --out holds predictions", (SETS,)),
    ),
]


def check_device(name):
    """ValueError for a device that is not there."""
    try:
        if name == "cuda" and processes.WORLD > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # each process looks at its own
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device: {name} is not available here; try cpu") from None


def questions_of(values):
    """What a command asks, by the values of its flags."""
    if values.get("prompt") is not None or values.get("chat") is not None:
        return {PROMPT}
    if {*GROUPS, *TASKS}.isdisjoint(values.get("tasks") or ()):
        return {SKILLS_ONLY}
    return {SETS, LIKELIHOOD if values.get("method") == "likelihood" else GENERATE}


def decide(given):
    """Of run.read_flags: defaults, those of the run that made the adapter, and absent flags."""
    asked = questions_of(given)
    adapter = given.get("adapter")
    trained = settings_of_run(adapter)
    if adapter and not trained and "base" not in given:
        raise ValueError(f"{adapter}: no config.json says the base; is it a run? else give --base")
    defaults = {name: trained[name] for name in ("base", "dtype") if trained.get(name)}
    if trained.get("template") in TEMPLATES:
        defaults["template"] = trained["template"]
    if GENERATE in asked:
        defaults |= {"num_beams": 4, "max_new_tokens": None}  # None: as its papers, of each task
    absent = {}
    for name, flag in [item for _, flags in FLAGS for item in flags.items()]:
        if flag.of and asked.isdisjoint(flag.of) and given:  # nothing given: --help has them all
            absent[name] = f"applies to {' and '.join(flag.of)} only"
    if given.get("choices") == "texts":
        absent["template"] = "applies to --choices words only"
    if "chat" in given:
        absent["prompt"] = "does not apply to --chat; choose one"
    return defaults, absent


def settings_of_run(folder):
    """What the run in a folder was trained with; {} without a folder, and for one that was saved by
    hand."""
    trained = hub.read_run(Path(folder)) if folder else {}
    task = trained.get("task")
    if task not in (None, *SKILLS):
        raise ValueError(f"{folder}/config.json: task is {run.shown(task)}, no skill")
    return trained


def parse_args(argv=None):
    """-> the flags, and as `trained` the settings of the run that made the adapter."""
    args = run.read_flags(
        FLAGS,
        argv,
        decide,
        usage="python eval.py [--prompt TEXT | --chat TEXT | --tasks NAME ...] [options]",
        description="How good is a model? eval.py's first page says what is measured, and how.",
    )
    try:
        check_device(args.device)
    except ValueError as error:
        run.refuse(str(error))
    args.trained = settings_of_run(args.adapter)
    if GENERATE in questions_of(vars(args)):  # of each group of tasks
        limit = args.max_new_tokens
        args.max_new_tokens = {
            name: limit or TASKS[tasks[0]].max_new_tokens for name, tasks in GROUPS.items()
        }
    return args


def check_files(args, config):
    """Find what is wrong with files before the base's weights are read, which may take minutes."""
    if args.adapter:
        hub.Tensors(args.base).check_sizes(config)
        with torch.device("meta"):
            model = MoETransformer(config)
        load_trained(model, args.adapter)
    rows = args.trained.get("eval_rows")
    if rows is not None and not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"{args.adapter}/config.json: eval_rows is {rows}, which no run had")
    picture = args.routing
    if picture and os.path.lexists(picture) and not is_our_picture(Path(picture)):
        raise ValueError(
            f"--routing {picture} exists and is no picture of ours; choose another name"
        )


@run.command
def main(argv=None):
    args = parse_args(argv)
    config, tokenizer = load_config(args.base)
    embedded = is_embedded(args.base)
    knows_world = embedded and not args.trained.get("data")
    asked = questions_of(vars(args))
    if not (knows_world or PROMPT in asked or args.tasks):
        raise ValueError(
            f"{args.adapter or args.base} does not know the embedded world, whose skills are "
            "measured without --tasks; give --tasks commonsense, or --prompt TEXT"
        )
    if args.threads or embedded:
        torch.set_num_threads(args.threads or 1)
    check_files(args, config)

    def load():
        model = load_model(args.base, config, args.dtype, args.device)
        return load_trained(model, args.adapter) if args.adapter else model

    try:
        if SETS in asked:
            measure_sets(args, load, tokenizer)
        elif PROMPT in asked:
            answer_prompt(args, load(), tokenizer)
        else:
            measure_skills(args, load(), tokenizer)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise ValueError(f"out of memory; {LESS_MEMORY}") from None


if __name__ == "__main__":
    main()
