"""From a file of rows to batches of token ids: reading, what is labelled, the order of batches.

A file holds one kind of record, recognised by its first one, as a JSON list or as one JSON object a
line:

    alpaca      {"instruction": str, "input": str (or null, or missing), "output": str}
                -> a template of data/tasks.py
    messages    {"messages": [{"role": "system" | "user" | "assistant", "content": str}, ...]}
                -> ChatML, if the tokenizer has ids for <|im_start|> and <|im_end|> (Qwen3), each
                message between the two; else the chat form of data/tasks.py

An example is token ids and, for each, whether it is a label. Labels are the answers and the end
token behind each; `train_on_inputs` adds the prompts. An example longer than max_length is cut on
the right, end token included, so that a cut answer does not teach to stop. One whose answer lies
wholly behind the cut has no label left: it is dropped, and counted.

Rows are cut into batches so that like lengths stand together and little is padding, and so that the
order depends on the seed and the epoch only: see `epoch_batches`.

Shapes: B rows of a batch, T tokens of the longest of them.
"""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import run, skills
from data.tasks import TEMPLATES, TRAINING_SETS, chat_turns

DOWNLOADS = Path(__file__).resolve().parent / "downloads"  # where prepare.py puts things
NAMED = {name: DOWNLOADS / f"{file}.json" for name, file in TRAINING_SETS.items()}
# Of the rows held out: the authors', not --seed, so that runs of all seeds hold out the same.
SPLIT_SEED = 42


class Example(NamedTuple):
    ids: list[int]  # or an array, in a Dataset
    labelled: list[bool]  # for each id: is the model to be trained to say it?

    @property
    def trains(self) -> bool:
        """Is there a label behind the first token, which nothing predicts?"""
        return True in self.labelled[1:]


def encode_prompt(text: str, tokenizer) -> list[int]:
    """Ids of a text that is to be continued: after the begin token, if there is one (Mixtral)."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return begin + tokenizer.encode(text)


def encode(turns, tokenizer, train_on_inputs=False, max_length=None) -> Example:
    """[(prompt, answer)], one pair a turn of a conversation -> Example, an end token behind each;
    the labels are the answers with their end tokens."""
    parts = [encode_turn(*turn, tokenizer, tokenizer.eos_id) for turn in turns]
    return joined(parts, tokenizer, train_on_inputs, max_length)


def encode_turn(prompt, answer, tokenizer, end):
    """Example of both together, and an end token; labelled from the answer's first token on.

    Together, as they will be read: sentencepiece would put a space before an answer alone, and a
    token may reach across the border. Such a token is the answer's. Where "un" is answered by
    "believable", 10 bytes, and the ids stand for

        unbel  iev  able

    we count the answer's bytes from the end: behind "able" 6 are left, behind "iev" 3, and "unbel"
    holds those: it is the first label.
    """
    ids = tokenizer.encode(prompt + answer)
    left = size(tokenizer.normalise(prompt + answer)) - size(tokenizer.normalise(prompt))
    first = len(ids)
    while left > 0:
        first -= 1
        left -= len(tokenizer.pieces[ids[first]])
    ids.append(end)
    return Example(ids, [i >= first for i in range(len(ids))])


def encode_chatml(messages, tokenizer, train_on_inputs=False, max_length=None):
    """Messages up to the assistant's last -> Example: <|im_start|>, the role, a newline, the
    content, <|im_end|>, and a newline between two. Labels: the assistant's contents and the
    <|im_end|> behind each. A text that spells such a token stays text.

    Qwen3's own template also thinks, in an empty <think></think> if need be: left out.
    """
    start, end = tokenizer.chat_ids
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    before = [start]
    parts = []
    for message in messages[: last + 1]:
        role = message["role"]
        ids, labelled = encode_turn(f"{role}\n", message["content"], tokenizer, end)
        if role != "assistant":
            labelled = [False] * len(ids)
        parts.append(Example(before + ids, [False] * len(before) + labelled))
        before = [*tokenizer.encode("\n"), start]
    return joined(parts, tokenizer, train_on_inputs, max_length)


def joined(parts, tokenizer, train_on_inputs, max_length):
    """The parts of a row, one behind the other."""
    ids = encode_prompt("", tokenizer)
    labelled = [False] * len(ids)
    for part in parts:
        ids += part.ids
        labelled += part.labelled
    if train_on_inputs:
        labelled = [True] * len(ids)
    return Example(ids[:max_length], labelled[:max_length])


def encode_rows(rows: list[skills.Row], tokenizer, train_on_inputs=False) -> list[Example]:
    return [encode([(row.prompt, row.answer)], tokenizer, train_on_inputs) for row in rows]


def size(text):
    """In bytes. Half a surrogate pair, which JSON may hold, counts 3, as the U+FFFD it becomes."""
    return len(text.encode("utf-8", "surrogatepass"))


def rendered(example, tokenizer):
    """A row as text, its labels between « and »: a prompt«its answer<|endoftext|>»."""
    text = ""
    pairs = zip(example.ids, example.labelled)
    for is_label, span in itertools.groupby(pairs, key=lambda pair: pair[1]):
        part = tokenizer.decode([i for i, _ in span], skip_special=False)
        text += f"«{part}»" if is_label else part
    return text


class Batch(NamedTuple):
    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, -100 where nothing is to be learnt
    mask: torch.Tensor  # (B, T) bool, False on padding


def pad_batch(examples: list[Example], pad_id: int, device) -> Batch:
    """Padding is on the right: attention is causal, so no token sees it, and needs no mask."""
    ids = [torch.as_tensor(example.ids, dtype=torch.int64) for example in examples]
    labelled = [torch.as_tensor(example.labelled) for example in examples]
    ids = pad_sequence(ids, batch_first=True, padding_value=-1).to(device)
    labelled = pad_sequence(labelled, batch_first=True).to(device)
    mask = ids >= 0
    return Batch(ids.masked_fill(~mask, pad_id), ids.masked_fill(~labelled, -100), mask)


class Dataset(list):
    """Examples whose ids and labels are arrays: as lists they would take ten times the memory."""

    def __init__(self, examples: Iterable[Example]):
        for ids, labelled in examples:
            self.append(Example(np.asarray(ids, np.int32), np.asarray(labelled, bool)))

    def trainable(self, places):
        """The examples there, without those that have no label."""
        return Dataset(self[i] for i in places if self[i].trains)

    def lengths(self) -> list[int]:
        return [len(example.ids) for example in self]


# Files -------------------------------------------------------------------------------------------


REMEDY = (
    "give a file of JSON records, or get one: python data/prepare.py math "
    "(or math_10k, math_14k, commonsense)"
)
ROLES = "system", "user", "assistant"
EXPECTED = {
    "alpaca": '{"instruction": text, "input": text (may be missing), "output": text}',
    "messages": '{"messages": [{"role": "system", "user" or "assistant", "content": text}, ...]}',
}


def read_rows(path: Path) -> tuple[str, list[dict]]:
    """A file of records -> their kind, "alpaca" or "messages", and they. ValueError of one line for
    anything else: file:line, what was found, what was expected."""
    text = run.read_text(path, REMEDY).removeprefix("\ufeff")  # some editors begin with it
    is_list = text.lstrip().startswith("[")
    if is_list:
        records = run.parse_json(text, path)
    else:
        lines = enumerate(text.split("\n"), 1)  # not splitlines: a text may hold U+2028
        records = [run.parse_json(line, f"{path}:{i}") for i, line in lines if line.strip()]
    if not records:
        raise ValueError(f"{path}: holds no records; {REMEDY}")

    has_messages = isinstance(records[0], dict) and "messages" in records[0]
    kind = "messages" if has_messages else "alpaca"
    misfit = misfit_of_messages if has_messages else misfit_of_alpaca
    for i, record in enumerate(records):
        found = misfit(record) if isinstance(record, dict) else ("found", record)
        if found:
            what, value = found
            place = f"{path}:{line_of(text, i)}"
            if is_list:
                place += f": record {i + 1}"  # all may stand on line 1
            raise ValueError(f"{place}: {what} {run.shown(value)}, expected {EXPECTED[kind]}")
    return kind, records


def misfit_of_alpaca(record):
    """What of a record is not as expected, and its value; None if all is."""
    if not {"instruction", "output"} <= record.keys():
        return "found", sorted(record)
    for key in ("instruction", "input", "output"):
        value = record.get(key, "")
        if not isinstance(value, str) and (key, value) != ("input", None):
            return f"{key} is", value


def misfit_of_messages(record):
    messages = record.get("messages")
    if not isinstance(messages, list):
        return "messages is", messages
    for message in messages:
        fits = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not fits or message.get("role") not in ROLES:
            return "a message is", message
    if "assistant" not in [message["role"] for message in messages]:
        return "the assistant says nothing in", messages


def line_of(text, i):
    """On which line record i begins, of a text that could be parsed."""
    between = re.compile(r"[\s,]*")
    end = re.match(r"\s*\[?", text).end()
    for _ in range(i + 1):
        begin = between.match(text, end).end()
        _, end = json.JSONDecoder().raw_decode(text, begin)
    return text.count("\n", 0, begin) + 1


def encode_row(row: dict, template: str, tokenizer, *options) -> Example:
    """A row of a file. template: of TEMPLATES, or "chat" for messages. options: as `encode` has."""
    if template != "chat":
        turns = [(TEMPLATES[template](row, evaluation=False), row["output"])]
    elif tokenizer.chat_ids:
        return encode_chatml(row["messages"], tokenizer, *options)
    else:
        turns = chat_turns(row["messages"])
    return encode(turns, tokenizer, *options)


def ends(tokenizer) -> list[int]:
    """What may stand behind an answer."""
    return [tokenizer.eos_id, *(tokenizer.chat_ids or ())[1:]]


def split(n, held_out, seed):
    """n rows -> which train, which are held out, as `datasets.Dataset.train_test_split` chooses."""
    order = np.random.default_rng(seed).permutation(n).tolist()
    return order[held_out:], order[:held_out]


# Batches -----------------------------------------------------------------------------------------


def epoch_batches(lengths: list[int], batch_size: int, seed: str) -> list[list[int]]:
    """One epoch: the indices of every row once, in batches, the last of them perhaps smaller.

    Rows are shuffled; each 16 batches' worth of them is sorted by length, which leaves little
    padding and still mixes (rows of one length stay as they are); the batches are shuffled. They
    depend on the seed alone, not on how many processes there are: each takes its share of the same
    batch.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(lengths)), len(lengths))
    step = 16 * batch_size
    rows = []
    for i in range(0, len(order), step):
        rows += sorted(order[i : i + step], key=lengths.__getitem__)
    cuts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return rng.sample(cuts, len(cuts))


def padding_share(lengths, cuts):
    """The part of the batches' positions that is padding."""
    positions = 0
    for cut in cuts:
        positions += len(cut) * max(lengths[i] for i in cut)
    return 1 - sum(lengths) / positions


# What a run of train.py trains on ----------------------------------------------------------------


class Data(NamedTuple):
    """What a run trains on, and what follows from its rows."""

    train: Dataset | None  # None for scratch, whose rows never end
    held_out: Dataset | None = None  # of --data
    steps: int | None = None  # of the run
    steps_per_epoch: int = 16  # scratch: with so many batches of new rows
    template: str | None = None  # of --data, as all that follows
    max_length: int | None = None
    notes: Sequence[str] = ()  # for the screen
    sha256: str | None = None  # of the file


def load_data(args, tokenizer, positions: int) -> Data:
    """The rows of --task or --data as token ids; `positions`: the longest row that the model takes.
    FileNotFoundError or ValueError of one line for a file that cannot be used."""
    if args.variant == "scratch":
        return Data(None, steps=args.steps)
    if args.data:
        return load_file(args, tokenizer, positions)
    rows = skills.sample(args.task, "train", args.train_rows, args.seed)
    train = Dataset(encode_rows(rows, tokenizer, args.train_on_inputs))
    steps_per_epoch = -(-len(train) // args.batch_size)
    return Data(train, steps=args.steps, steps_per_epoch=steps_per_epoch)


def load_file(args, tokenizer, positions):
    path = NAMED.get(args.data, Path(args.data))
    kind, rows = read_rows(path)
    template = args.template or "papers"
    if kind == "messages":
        if args.template:
            raise ValueError(f"{path}: holds messages, which have one form; drop --template")
        template = "chat"
    max_length = min(args.max_length, positions)
    bar = tqdm(rows, desc="tokenising", unit=" rows", disable=None, leave=False)
    whole = Dataset(
        encode_row(row, template, tokenizer, args.train_on_inputs, max_length) for row in bar
    )

    kept, out = split(len(rows), args.held_out, SPLIT_SEED)
    train, held_out = whole.trainable(kept), whole.trainable(out)
    if not train:
        raise ValueError(
            f"{path}: of {len(rows)} rows none is left to train on: {args.held_out} are held out, "
            f"{len(rows) - len(held_out)} have no label within --max_length {max_length}; lower "
            f"--held_out or raise --max_length (the model takes {positions})"
        )
    cuts = epoch_batches(train.lengths(), args.batch_size, f"{args.seed} 0")
    data = Data(
        train,
        held_out or None,
        steps=args.steps or args.epochs * len(cuts),
        steps_per_epoch=len(cuts),
        template=template,
        max_length=max_length,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    title = f"{path}, {len(rows):,} {kind} rows"
    return data._replace(notes=describe(title, data, whole, cuts, tokenizer))


def describe(title, data, whole, cuts, tokenizer):
    """What the rows amount to, for the screen. whole: with those that are cut or left out."""
    train, held_out = data.train, data.held_out or []
    lengths = train.lengths()
    tokens = sum(lengths)
    labels = sum(example.labelled.sum() for example in train)
    notes = [
        f"data: {title}: {len(train):,} train, {len(held_out):,} are held out (drawn by seed "
        f"{SPLIT_SEED})",
        f"      {tokens:,} tokens, {labels / tokens:.1%} of them labels; batches hold "
        f"{padding_share(lengths, cuts):.1%} padding; {len(cuts):,} steps are an epoch",
        f"      how a row ends, labels in «»: {rendered(train[0], tokenizer)[-200:]!r}",
    ]
    if all(example.ids[example.labelled][0] in ends(tokenizer) for example in train):
        notes.append("warning: every answer is empty: all there is to learn is to end")
    cut = sum(example.ids[-1] not in ends(tokenizer) for example in whole)
    if cut:
        dropped = len(whole) - len(train) - len(held_out)
        notes.append(
            f"      {cut:,} rows lost their end to --max_length {data.max_length}; {dropped:,} of "
            "them had no label left and were dropped"
        )
    return notes


def batches(settings, data: Data, tokenizer, start: int) -> Iterator[Batch]:
    """The batches from step `start` on, for ever, on the CPU.

    An epoch is every row once, see `epoch_batches`. Pre-training is not sorted by length, as if all
    had the same (nor repeated: its epoch is 16 batches of new rows): like length is like family
    there, and the balance loss would spread each family over all experts.
    """
    for epoch in itertools.count(start // data.steps_per_epoch):
        seed = f"{settings.seed} {epoch}"
        if data.train is None:
            rows = skills.mixture(data.steps_per_epoch * settings.batch_size, seed)
            examples = encode_rows(rows, tokenizer, settings.train_on_inputs)
            lengths = [0] * len(examples)
        else:
            examples = data.train
            lengths = examples.lengths()
        cuts = epoch_batches(lengths, settings.batch_size, seed)
        used = max(start - epoch * data.steps_per_epoch, 0)  # by the run that is continued
        for cut in cuts[used:]:
            yield pad_batch([examples[i] for i in cut], tokenizer.pad_id, "cpu")
