"""From a file of rows to batches of token ids: reading, tokenising once, what is labelled, and the order of batches.

A file holds one kind of record, recognised by its first one, as a JSON list or as one JSON object a line:

    alpaca      {"instruction": str, "input": str (may be missing), "output": str}    -> a template of data/tasks.py
    messages    {"messages": [{"role": "system" | "user" | "assistant", "content": str}, ...]}    -> its chat form

An example is token ids and, for each, whether it is a label. Labels are the answers and the end token behind each;
`train_on_inputs` adds the prompts. An example longer than max_length is cut on the right, end token included, so that
a cut answer does not teach to stop. One whose answer lies wholly behind the cut has no label left: it is dropped, and
counted.

Rows are cut into batches so that like lengths stand together and little is padding, and so that the order depends on
the seed and the epoch only: see `epoch_batches`.
"""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import skills
from data.checkpoint import SafetensorsFile, write_safetensors
from data.tasks import TEMPLATES, chat_turns

DOWNLOADS = Path(__file__).resolve().parent / "downloads"  # where prepare.py puts things
SPLIT_SEED = 42  # of the rows held out: the authors', not --seed, so that runs of all seeds have the same
NAMED = {"commonsense": "commonsense_170k", "math": "math_50k", "math_10k": "math_10k", "math_14k": "math_14k"}
NAMED = {name: DOWNLOADS / f"{file}.json" for name, file in NAMED.items()}
CACHE = DOWNLOADS / "cache"


class Example(NamedTuple):
    ids: list[int]
    labelled: list[bool]  # for each id: is the model to be trained to say it?


def encode_prompt(text: str, tokenizer) -> list[int]:
    """Ids of a text that is to be continued: after the begin token, where the model has one (Mixtral)."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)


def encode(turns: list[tuple[str, str]], tokenizer, train_on_inputs=False, max_length: int | None = None) -> Example:
    """[(prompt, answer)], one pair a turn of a conversation -> Example, with an end token behind each answer.

    A prompt and its answer are tokenised together, as they will be read, and a token that holds any byte of the answer
    is a label: sentencepiece would put a space before an answer alone, and a token may reach across the border.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids, labelled = begin, [train_on_inputs] * len(begin)
    for prompt, answer in turns:
        new = tokenizer.encode(prompt + answer)
        left = size(tokenizer.normalise(prompt + answer)) - size(tokenizer.normalise(prompt))
        first = len(new)
        while left > 0:  # backwards over the bytes of the answer
            first -= 1
            left -= len(tokenizer.pieces[new[first]])
        ids += [*new, tokenizer.eos_id]
        labelled += [train_on_inputs] * first + [True] * (len(new) - first + 1)
    return Example(ids[:max_length], labelled[:max_length])


def encode_rows(rows: list[skills.Row], tokenizer, train_on_inputs=False) -> list[Example]:
    return [encode([(row.prompt, row.answer)], tokenizer, train_on_inputs) for row in rows]


def size(text: str) -> int:
    """In bytes. Half a surrogate pair, which JSON may hold, counts 3, as the U+FFFD that it is tokenised as."""
    return len(text.encode("utf-8", "surrogatepass"))


def pad_batch(examples: list[Example], pad_id: int, device):
    """Examples -> input_ids (B, T), labels (B, T) with -100 where not trained, mask (B, T) of tokens.

    Padding is on the right: attention is causal, so no token sees it, and no attention mask is needed.
    """
    T = max(len(example.ids) for example in examples)
    input_ids, labels = torch.full((len(examples), T), pad_id), torch.full((len(examples), T), -100)
    mask = torch.zeros(len(examples), T, dtype=torch.bool)
    for i, (ids, labelled) in enumerate(examples):
        ids, n = torch.as_tensor(ids, dtype=torch.int64), len(ids)
        input_ids[i, :n], mask[i, :n] = ids, True
        labels[i, :n] = ids.masked_fill(~torch.as_tensor(labelled), -100)
    return input_ids.to(device), labels.to(device), mask.to(device)


class Dataset:
    """Many examples in three flat arrays: ids int32, labelled bool, ends int64 (where each example ends)."""

    def __init__(self, ids: np.ndarray, labelled: np.ndarray, ends: np.ndarray):
        self.ids, self.labelled, self.ends = ids, labelled, ends

    @classmethod
    def of(cls, examples) -> "Dataset":
        arrays = [(np.asarray(ids, np.int32), np.asarray(labelled, bool)) for ids, labelled in examples]
        ids = np.concatenate([ids for ids, _ in arrays] or [np.empty(0, np.int32)])
        labelled = np.concatenate([labelled for _, labelled in arrays] or [np.empty(0, bool)])
        return cls(ids, labelled, np.cumsum([len(ids) for ids, _ in arrays], dtype=np.int64))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i: int) -> Example:
        begin, end = (self.ends[i - 1] if i else 0), self.ends[i]
        return Example(self.ids[begin:end], self.labelled[begin:end])

    def take(self, indices: list[int]) -> "Dataset":
        return Dataset.of(self[i] for i in indices)

    def lengths(self) -> list[int]:
        return np.diff(self.ends, prepend=0).tolist()

    def trains(self) -> np.ndarray:
        """(len,) bool: which examples have a label that something predicts (nothing predicts the first token)."""
        begins = self.ends - np.diff(self.ends, prepend=0)
        counts = np.concatenate(([0], np.cumsum(self.labelled)))
        first = np.minimum(begins + 1, self.ends)
        return counts[self.ends] > counts[first]


# Files ---------------------------------------------------------------------------------------------------------------


def read_records(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line, object) of each record of a JSON list or of JSON lines. ValueError: file:line, for what is neither."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give --data a file, or download one: python data/prepare.py")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; expected JSON") from None
    decoder, space, lines, counted = json.JSONDecoder(), re.compile(r"[ \t\r\n]*"), 1, 0
    place = space.match(text).end()
    is_list = text.startswith("[", place)  # then a comma stands between records
    place = space.match(text, place + is_list).end()
    while place < len(text) and not (is_list and text[place] == "]"):
        lines, counted = lines + text.count("\n", counted, place), place
        try:
            record, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            what, line = getattr(error, "msg", "nested too deeply"), getattr(error, "lineno", lines)
            raise ValueError(f"{path}:{line}: not valid JSON ({what}); expected a record") from None
        yield lines, record
        place = space.match(text, place).end()
        if is_list and text.startswith(",", place):
            place = space.match(text, place + 1).end()
        elif is_list and place < len(text) and text[place] != "]":
            lines += text.count("\n", counted, place)
            raise ValueError(f"{path}:{lines}: found {found(text[place:])}, expected a comma or the end of the list")
    if is_list and place >= len(text):
        raise ValueError(f"{path}:{lines + text.count(chr(10), counted)}: the list does not end; is the file cut off?")
    behind = space.match(text, place + 1).end() if is_list else len(text)
    if behind < len(text):
        lines += text.count("\n", counted, behind)
        raise ValueError(f"{path}:{lines}: found {found(text[behind:])} behind the list, expected the end of the file")


def found(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_alpaca(record) -> str | None:
    """What is wrong with a record, as "found, expected"; None if nothing is."""
    expected = 'expected {"instruction": text, "input": text (may be missing), "output": text}'
    if not isinstance(record, dict) or not {"instruction", "output"} <= record.keys():
        return f"found {found(sorted(record) if isinstance(record, dict) else record)}, {expected}"
    for key in ("instruction", "input", "output"):
        if not isinstance(record.get(key, ""), str):
            return f"{key} is {found(record[key])}, {expected}"
    return None


def check_messages(record) -> str | None:
    expected = 'expected {"messages": [{"role": "system", "user" or "assistant", "content": text}, ...]}'
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        return f"found {found(sorted(record) if isinstance(record, dict) else record)}, {expected}"
    for m in messages:
        fits = isinstance(m, dict) and m.get("role") in ("system", "user", "assistant")
        if not fits or not isinstance(m.get("content"), str):
            return f"a message is {found(m)}, {expected}"
    if all(m["role"] != "assistant" for m in messages):
        return "no message of the assistant: there is nothing to learn; expected at least one"
    return None


def read_rows(path: str | Path) -> tuple[str, list[dict]]:
    """A file of records -> its kind, "alpaca" or "messages", and the records. ValueError: file:line, found, wanted."""
    rows, kind, check = [], None, None
    for line, record in read_records(path):
        if kind is None:
            kind = "messages" if isinstance(record, dict) and "messages" in record else "alpaca"
            check = check_messages if kind == "messages" else check_alpaca
        if wrong := check(record):
            raise ValueError(f"{path}:{line}: {wrong}")
        rows.append(record)
    if not rows:
        raise ValueError(f"{path}: holds no records; expected alpaca or messages records, as a JSON list or JSON lines")
    return kind, rows


def tokenise(path, rows, kind, tokenizer, template="papers", train_on_inputs=False, max_length=None) -> Dataset:
    """The rows of a file -> Dataset, in their order; from the cache if the same content was tokenised the same way."""

    def turns(row):
        if kind == "messages":
            return chat_turns(row["messages"])
        return [(TEMPLATES[template](row, evaluation=False), row["output"])]

    code = [Path(__file__).parent / name for name in ("dataset.py", "tasks.py", "tokenizer.py")]
    contents = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (path, *code)]
    ends = tokenizer.bos_id, tokenizer.eos_id
    key = json.dumps([*contents, tokenizer.fingerprint, ends, template, train_on_inputs, max_length])
    cached = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    try:
        file = SafetensorsFile(cached)
        return Dataset(*(file[name].numpy() for name in ("ids", "labelled", "ends")))
    except (OSError, ValueError, KeyError):
        pass  # not there, or damaged: made again
    bar = tqdm(rows, desc="tokenising", unit=" rows", disable=None, leave=False)
    data = Dataset.of(encode(turns(row), tokenizer, train_on_inputs, max_length) for row in bar)
    tensors = {name: torch.from_numpy(getattr(data, name)) for name in ("ids", "labelled", "ends")}
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        write_safetensors(cached, tensors)
    except OSError:
        pass  # a place that cannot be written costs the next run a few seconds, this one nothing
    return data


def split(n: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """n rows -> which train, which are held out: those that `datasets.Dataset.train_test_split` would choose."""
    order = np.random.default_rng(seed).permutation(n).tolist()
    return order[held_out:], order[:held_out]


# Batches -------------------------------------------------------------------------------------------------------------


def epoch_batches(lengths: list[int], batch_size: int, seed: str, window: int = 16) -> list[list[int]]:
    """One epoch: the indices of every row once, in batches, the last of them perhaps smaller.

    Rows are shuffled; each `window` batches' worth of them is sorted by length, which leaves little padding and still
    mixes (window 0: nothing is sorted); the batches are shuffled. They depend on the seed alone, not on how many
    processes there are: each takes its share of the same batch.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(lengths)), len(lengths))
    step = window * batch_size or 1
    for i in range(0, len(order), step):
        order[i : i + step] = sorted(order[i : i + step], key=lengths.__getitem__)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return rng.sample(batches, len(batches))


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    """The part of the batches' positions that is padding."""
    held = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / held


# What a run of train.py trains on ------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What a run trains on. `train` is None for scratch, whose rows never end."""

    train: Dataset | None
    held_out: Dataset | None = None  # of --data
    notes: tuple[str, ...] = ()
    sha256: str | None = None  # of the file


def load_data(args, tokenizer, positions: int) -> Data:
    """The rows of --task or --data as token ids. Fills in args.steps, where --epochs says how many."""
    if args.variant == "scratch":
        return Data(None)
    if not args.data:
        rows = skills.sample(args.task, "train", args.train_rows, args.seed)
        return Data(Dataset.of(encode_rows(rows, tokenizer, args.train_on_inputs)))
    path, args.max_length = NAMED.get(args.data, Path(args.data)), min(args.max_length, positions)
    if args.data in NAMED and not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; download it with: python data/prepare.py {args.data}")
    kind, rows = read_rows(path)
    if kind == "messages" and args.template:
        raise ValueError(f"{path}: holds messages, which have one form; --template {args.template} does not apply")
    args.template = "chat" if kind == "messages" else args.template or "papers"
    whole = tokenise(path, rows, kind, tokenizer, args.template, args.train_on_inputs, args.max_length)
    usable, (train, held_out) = whole.trains(), split(len(rows), args.held_out, SPLIT_SEED)
    train, held_out = (whole.take([i for i in some if usable[i]]) for some in (train, held_out))
    if not len(train):
        raise ValueError(f"{path}: of {len(rows)} rows none is left to train on: {args.held_out} are held out, "
                         f"{(~usable).sum()} have no label within --max_length {args.max_length}; lower --held_out or "
                         "raise --max_length")  # fmt: skip
    cuts = epoch_batches(train.lengths(), args.batch_size, f"{args.seed} 0")
    args.steps = args.steps or args.epochs * len(cuts)
    cut = (whole.ids[whole.ends - 1] != tokenizer.eos_id).sum()
    notes = (
        f"data: {path}, {len(rows):,} {kind} rows: {len(train):,} train, {len(held_out):,} are held out (drawn by "
        f"seed {SPLIT_SEED})",
        f"      {len(train.ids):,} tokens, {100 * train.labelled.mean():.1f} % of them labels; batches hold "
        f"{100 * padding_share(train.lengths(), cuts):.1f} % padding; {len(cuts):,} steps are an epoch",
    )
    if cut:
        lost = " (with --train_on_inputs, one that lost its whole answer stays)" if args.train_on_inputs else ""
        notes += (f"      {cut:,} rows lost their end to --max_length {args.max_length}; {(~usable).sum():,} of them "
                  f"had no label left and were dropped{lost}",)  # fmt: skip
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Data(train, held_out if len(held_out) else None, notes, digest)


def batches(args, data: Data, tokenizer, start: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batches from step `start` on, for ever: (input_ids, labels, mask), each (B, T), on the CPU; see `pad_batch`.

    An epoch is every row once, see `epoch_batches`. Pre-training is not sorted by length (nor repeated: its epoch is 16
    batches of new rows): like length is like family there, and the balance loss would spread each family over all
    experts.
    """
    per_epoch = -(-len(data.train) // args.batch_size) if data.train else 16
    for epoch in itertools.count(start // per_epoch):
        seed, examples = f"{args.seed} {epoch}", data.train
        if examples is None:
            examples = encode_rows(skills.mixture(16 * args.batch_size, seed), tokenizer, args.train_on_inputs)
        lengths = examples.lengths() if data.train else [0] * len(examples)
        cuts = epoch_batches(lengths, args.batch_size, seed, window=16 if data.train else 0)
        for cut in cuts[start - epoch * per_epoch if epoch == start // per_epoch else 0 :]:
            yield pad_batch([examples[i] for i in cut], tokenizer.pad_id, "cpu")
