"""Whatever a file holds, a command reads it right or says in one line why not.

A file of each kind that the commands read is damaged at random: bits and bytes, keys and values of
its JSON, numbers that no float holds, encodings, and things that are no files. Then the command
runs, in this process, on a tiny random model, up to where it would begin its work. Three ends are
allowed:

    clean       what it read is what the undamaged file says
    as read     what it read is what the damaged file says, to an independent reader: Python's json,
                the safetensors library, the tokenizers library
    one line    printable, at most 1,000 characters, with the file's name; exit code 1 or 2

All else is a fault: another exception, 5 seconds, 64 MB more than twice the memory of the undamaged
file, a file written or changed that is not the command's to write, a value that nobody wrote.

    pytest tests/test_fuzz.py                          2,000 inputs
    FUZZ=20000 pytest tests/test_fuzz.py               more of them
    FUZZ_ONLY=tokenizer:17 pytest tests/test_fuzz.py   one of them again
    python tests/test_fuzz.py 20000                    the table, and the faults by where they arose

                     inputs     clean   as read  one line     fault
    config              909       161        73       675         0
    tokenizer           909       244         0       665         0
    weights             909        20       177       712         0
    index               909       364         0       545         0
    adapter_config      909       170         8       731         0
    adapter_model       909        39       189       681         0
    expert_cfg          909       157         0       752         0
    expert_weights      909        37       165       707         0
    experts             909       305         3       601         0
    run_evaluated       909       508        20       381         0
    run_exported        909       551         0       358         0
    run_resumed         909       156         0       753         0
    metrics             909       111       451       347         0
    state               909        21       212       676         0
    predictions         909       419        32       458         0
    settings            909        83         0       826         0
    results             909       562         3       344         0
    alpaca              909        57       124       728         0
    lines               909       105       224       580         0
    messages            909        78        53       778         0
    choices             909       138        43       728         0
    sums                909        99        60       750         0
    all              19,998     4,385     1,837    13,776         0

A file that holds times or folders is not quite the same in the next run, and so is its damage.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import tokenizers
import torch
from conftest import SMALL
from safetensors import SafetensorError
from safetensors.torch import load as load_with_safetensors

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import esft
import eval
import train
from data import dataset, hub, run
from data.tokenizer import Tokenizer, load_tokenizer
from model import Config, MoETransformer
from perft import PerftConfig

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 5  # that an input may take
ROOM = 64 << 20  # bytes of memory: what Python and torch take or keep as they like


# Damage ------------------------------------------------------------------------------------------

EVIL = [  # values, as they stand in JSON
    *("null", "true", "false", "[]", "{}", '""', "[[]]", "[null]", '[["a"]]', '{"a": 1}'),
    *("-1", "0", "1", "2", "0.5", "-0.0", "7", "4000000", "2000000000", "2147483648"),
    *("9223372036854775807", "9223372036854775808", "1" * 400, "1" * 5000),
    *("1e400", "-1e400", "1e300", "1e-320", "NaN", "Infinity", "-Infinity"),
    *('"a"', '"7"', '"nan"', '"a b c"', '"\\ud800"', '"\\u0000"', '"\\u2028\\u202e"', '"é🦉"'),
    *('"/dev/zero"', '"../../outside/x"', f'"{"long " * 20000}"'),
    *("[" * 2000 + "]" * 2000, '{"a":' * 2000 + "1" + "}" * 2000),
]


def damage_bytes(rng, data):
    """A few bits, or a piece: lost, doubled, moved, overwritten."""
    data = bytearray(data)
    if rng.random() < 0.4:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    begin = rng.randrange(len(data))
    end = begin + rng.choice([1, 2, 4, 30, len(data)])
    piece = data[begin:end]
    other = rng.randrange(len(data))
    noise = bytes(rng.choice(b'0123456789"{}[],:-.eE \n\\/\xff') for _ in piece[:100])
    return bytes(
        rng.choice(
            [
                data[:begin],  # cut off
                data[:begin] + data[end:],
                data[:end] + piece + data[end:],
                data[:other] + piece + data[other:],
                data[:begin] + bytes(len(piece)) + data[end:],  # a power cut leaves zeros
                data[:begin] + noise + data[end:],
            ]
        )
    )


def damage_encoding(rng, data):
    where = rng.randrange(len(data) + 1)
    inserted = [b"\xed\xa0\x80", b"\xff", b"\xc3", b"\0", b"\0\0\0\n", b"\n", b"\xe2\x80\xa8"]
    text = data.decode("utf-8", "replace")
    return rng.choice(
        [
            text.encode("utf-16"),
            text.encode("utf-16-le"),
            b"\xef\xbb\xbf" + data,
            data.replace(b"\n", b"\r\n"),
            data + b"\0" * 100,
            data + b" \n\n",
            data + data,
            b"",
            b"\n",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            *(data[:where] + piece + data[where:] for piece in inserted),
        ]
    )


def damage_json(rng, text):
    """A JSON text with one or two changes to its keys and values."""
    content = json.loads(text)
    texts = {}  # stand for what json.dumps would not write
    for _ in range(rng.choice([1, 1, 1, 2])):
        change_json(rng, content, texts)
    text = json.dumps(content)
    for name, value in texts.items():
        text = text.replace(f'"{name}"', value)
    return text


def change_json(rng, content, texts):
    place = some_place(rng, content)
    if place is None:
        return
    node, key = place
    other, other_key = some_place(rng, content)
    name = f"@{len(texts)}@"
    actions = ["drop", "evil", "evil", "evil", "copy", "swap", "number"]
    if isinstance(node, dict):
        actions += ["rename", "twice"]
    action = rng.choice(actions)
    value = node[key]
    if action == "number" and type(value) in (int, float):
        node[key] = rng.choice([value + 1, value - 1, -value, value * 2, value / 2, value * 1e9])
    elif action == "drop":
        del node[key]
    elif action == "copy":
        node[key] = json.loads(json.dumps(other[other_key]))
    elif action == "swap":
        node[key], other[other_key] = other[other_key], node[key]
        if name_in(node, node[key]) or name_in(other, other[other_key]):
            node[key], other[other_key] = None, 0  # one holds the other: no JSON
    elif action == "rename":
        names = [f"{key}x", key.upper(), "", key[:-1], str(other_key)]
        node[rng.choice(names)] = node.pop(key)
    elif action == "twice":
        node[name], texts[name] = rng.choice([value, 0, None, {}]), json.dumps(key)
    else:
        node[key], texts[name] = name, rng.choice(EVIL)


def name_in(node, inside):
    """Does a part of a tree hold the tree?"""
    if inside is node:
        return True
    parts = inside.values() if isinstance(inside, dict) else inside
    return isinstance(inside, (dict, list)) and any(name_in(node, part) for part in parts)


def some_place(rng, node):
    """(object or list, key) somewhere in a JSON content: shallow ones as often as deep ones."""
    place = None
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        place = node, key
        if rng.random() < 0.3:
            break
        node = node[key]
    return place


def damage_lines(rng, text):
    """JSON lines: one of them changed, lost, doubled, moved, or something else between them."""
    lines = text.split("\n")[:-1]
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    action = rng.choice(["change", "change", "change", "drop", "double", "swap", "insert", "tail"])
    if action == "change":
        lines[i] = damage_json(rng, lines[i])
    elif action == "drop":
        del lines[i]
    elif action == "double":
        lines.insert(j, lines[i])
    elif action == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    elif action == "insert":
        lines.insert(i, rng.choice(["", "\0\0\0", "{", "x", *EVIL]))
    whole = "".join(f"{line}\n" for line in lines)
    return whole + rng.choice(["{", "5", '{"step": 1}', "\0\0", "é"]) if action == "tail" else whole


def damage_tensors(rng, data):
    """A safetensors file: its length, its header, or the numbers behind them."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], bytearray(data[8 + length :])
    action = rng.choice(["length", "header", "header", "header", "numbers", "numbers"])
    if action == "length":
        length = rng.choice([0, 1, length - 1, length + 1, len(data), 2**63, rng.getrandbits(64)])
        return length.to_bytes(8, "little") + data[8:]
    if action == "header":
        header = damage_json(rng, header.decode()).encode()
        return len(header).to_bytes(8, "little") + header + tensors
    where = 4 * rng.randrange(len(tensors) // 4)
    bits = rng.choice([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0, 1, rng.getrandbits(32)])
    tensors[where : where + 4] = bits.to_bytes(4, "little")
    return data[: 8 + length] + tensors


def damage_text(rng, data):
    lines = data.count(b"\n") > 1 and data.startswith(b"{") and not data.startswith(b"{\n")
    return (damage_lines if lines else damage_json)(rng, data.decode()).encode()


def put_no_file(rng, path: Path, data):
    """In the place of the file: something of another kind, or a link to the file."""
    outside = path.parent.parent / "outside"
    kind = rng.choice(["folder", "pipe", "dangling", "circle", "zero", "null", "nothing", "link"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(outside / "gone")
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "null":
        path.symlink_to("/dev/null")
    elif kind == "link":
        whole = path.with_name(f"whole {path.name}")
        whole.write_bytes(data)
        path.symlink_to(whole)


def damage(rng, path: Path):
    """Damage a file where it lies."""
    data = path.read_bytes()
    if rng.random() < 0.04:
        return put_no_file(rng, path, data)
    inside = damage_tensors if path.suffix == ".safetensors" else damage_text
    way = rng.choice([damage_bytes, damage_encoding, inside, inside, inside])
    path.write_bytes(way(rng, data))


# The files ---------------------------------------------------------------------------------------

SHORT = "--batch_size 2 --warmup 1 --log_every 1 --threads 1"
STEPS = f"--steps 4 --save_every 2 --train_rows 6 --eval_rows 1 {SHORT}"
SAVED = 2  # the step that the unfinished run has saved
ANSWERS = ["ending1", "ending2", "ending3", "ending4"]


def make_files(root: Path):
    """Everything that the commands read, by the commands themselves."""
    torch.manual_seed(0)
    model = MoETransformer(Config(**SMALL))
    base = root / "base"
    model.save_pretrained(base)
    shutil.copy(ROOT / "data" / "tiny_olmoe" / "tokenizer.json", base)
    make_shards(base, root / "shards")
    (root / "outside").mkdir()
    (root / "nowhere").mkdir()

    rows = [{"instruction": f"say {n}", "input": "", "output": f"it is {n}"} for n in "abcde"]
    rows[1]["input"] = "é, twice:\n and more"
    del rows[2]["input"]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a b?"},
        {"role": "assistant", "content": "b a"},
    ]
    chats = [{"messages": turns}, {"messages": [*turns[1:], *turns[1:]]}, {"messages": turns[2:]}]
    (root / "data").mkdir()
    (root / "data" / "alpaca.json").write_text(json.dumps(rows, indent=1))
    (root / "data" / "lines.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (root / "data" / "messages.json").write_text(json.dumps(chats))
    (root / "tests").mkdir()
    (root / "tests" / "hellaswag.json").write_text(json.dumps(make_questions()))
    sums = [{"instruction": f"{n} + 1?", "output": "", "answer": f"{n + 1}"} for n in range(3)]
    (root / "tests" / "AddSub.json").write_text(json.dumps(sums))

    flags = ["--base", f"{base}", *STEPS.split()]
    command(train, ["--variant", "perft_r", "--out", f"{root}/adapter", *flags])
    flags += ["--score_rows", "4"]
    command(train, ["--variant", "esft_token", "--out", f"{root}/chosen", *flags])
    with stopped_after(SAVED):
        command(train, ["--variant", "perft_r", "--out", f"{root}/unfinished", *flags[:-2]])
    command(eval, PREDICTED.format(root=root, case=root / "answers").split()[1:])


def make_questions():
    questions = []
    for n, answer in enumerate(ANSWERS):
        endings = " ".join(f"Ending{i}: it is {i + n}." for i in range(1, 5))
        text = f"Please choose the ending: some sentence {n}\n\n{endings}\n\nAnswer format: "
        row = {"instruction": text + "/".join(ANSWERS), "input": "", "output": "", "answer": answer}
        questions.append(row)
    return questions


def make_shards(base, folder):
    """The model in two files and an index, with names as the hub has them."""
    from safetensors.torch import save_file

    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    tensors = load_with_safetensors((base / "model.safetensors").read_bytes())
    weight_map = {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@contextlib.contextmanager
def stopped_after(steps):
    """Ctrl-C in a training loop."""
    before = train.learning_rate

    def stopping(step, *others):
        if step == steps:
            raise KeyboardInterrupt
        return before(step, *others)

    train.learning_rate = stopping
    try:
        yield
    except SystemExit as stop:
        assert stop.code == 130, stop
    finally:
        train.learning_rate = before


def command(module, argv):
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        run.command(module.main)(argv)


# What a command holds when its work would begin --------------------------------------------------


class Reached(BaseException):
    """Instead of the work. Holds what it would work with, by type."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = parts

    def find(self, kind):
        return next(part for part in self.parts if isinstance(part, kind))


def reach(*parts, **more):
    raise Reached(*parts, *more.values())


TEXTS = ["sort : d b x a ->", "Zoe\u0301's 12 apples,  or\n\n more\t!", "<s> 7_é🦉 [INST]   x"]


def read_base(reached, out, folder):
    model, tokenizer = reached.find(MoETransformer), reached.find(Tokenizer)
    ids = [tokenizer.encode(text) for text in TEXTS]
    tensors = {name: place.of(place.parameter) for name, place in hub.places(model).items()}
    return {
        "config": dataclasses.asdict(model.config) | {"extra": None},
        "ids": ids,
        "texts": [tokenizer.decode(some, skip_special=False) for some in ids],
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
    }


def read_trained(reached, out, folder):
    """Of a model with adapters or chosen experts: how it was set up, and what trains."""
    model = reached.find(MoETransformer)
    if isinstance(model.adapter_config, esft.EsftConfig):
        config = model.adapter_config._asdict()
        table = esft.trained_places(model)
        tensors = {name: place.of(place.parameter) for name, place in table.items()}
    else:
        config = dataclasses.asdict(model.adapter_config)
        tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return {"config": config, "tensors": tensors}


def read_resumed(reached, out, folder):
    model, optimizer = reached.find(MoETransformer), reached.find(torch.optim.Optimizer)
    tensors = {"done": optimizer.done.clone()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors[f"param.{name}"] = p.detach().clone()
            for key, value in optimizer.state[p].items():
                tensors[f"{key}.{name}"] = value.clone()
    lines = (folder / "metrics.jsonl").read_text().split("\n")
    assert '"event": "resumed"' in lines.pop(-2)
    return {"tensors": tensors, "log": "\n".join(lines)}


def read_rows(reached, out, folder):
    data = reached.find(dataset.Data)
    return {"ids": sorted(example.ids.tolist() for example in data.train)}


def read_screen(reached, out, folder):
    return {"lines": [line for line in out.splitlines() if "%" in line]}


def read_results(reached, out, folder):
    """Of an evaluation: its accuracy, what others are kept beside it, and its predictions."""
    folder = next(path.parent for path in folder.rglob("results.json"))
    table = json.loads((folder / "results.json").read_text())["tasks"]
    lines = (folder / "predictions.jsonl").read_text().split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    [task] = {name for name in table if name in ("hellaswag", "AddSub")}
    mine = table.pop(task)
    return {
        "accuracy": [mine["n"], *mine["acc"]],
        "others": table,
        "right": {r["row"]: r["correct"] for r in records if r["task"] == task},
        "gold": {r["row"]: r.get("gold") for r in records if r["task"] == task},
    }


def read_experts(reached, out, folder):
    return {"experts": reached.find(MoETransformer).adapter_config.experts}


def read_gold(reached, out, folder):
    lines = next(folder.rglob("predictions.jsonl")).read_text().split("\n")[:-1]
    return {"gold": {r["index"]: r["gold"] for r in map(json.loads, lines)}}


def read_export(reached, out, folder):
    return {"weights": (folder / "new" / "model.safetensors").read_bytes()}


# What an independent reader finds ----------------------------------------------------------------


class Refuse(Exception):
    """A file that nobody should take."""


def need(condition, why):
    if not condition:
        raise Refuse(why)


def parse(data: bytes):
    """The JSON object in a file."""
    need(data is not None, "no file")
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Refuse("no JSON") from None
    need(isinstance(content, dict), "no object")
    return content


def parse_tensors(data: bytes, expected: dict) -> dict:
    """A safetensors file, as the library reads it. What it refuses we may take, if we read what the
    undamaged file held (`expected`)."""
    need(data is not None, "no file")
    try:
        tensors = load_with_safetensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError):
        return expected
    need(all(tensor.isfinite().all() for tensor in tensors.values()), "a number that is none")
    return {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}


def expect_config(data, whole, clean):
    content = parse(data)
    content["num_experts"] = content.get("num_experts", content.get("num_local_experts"))
    expected = {}
    for field in dataclasses.fields(Config):
        value = content.get(field.name)
        expected[field.name] = field.default if value is None else value
    expected["extra"] = None
    heads = expected["num_attention_heads"]
    expected["num_key_value_heads"] = expected["num_key_value_heads"] or heads
    expected["head_dim"] = expected["head_dim"] or expected["hidden_size"] // heads
    if expected["eos_token_id"] is None:
        expected["eos_token_id"] = SMALL["eos_token_id"]
    return clean | {"config": expected}


def expect_tokenizer(data, whole, clean):
    reader = with_tokenizers(data)
    if reader is None:  # the library is stricter in places that change no id
        return clean
    ids = [reader.encode(text, add_special_tokens=False).ids for text in TEXTS]
    texts = [reader.decode(some, skip_special_tokens=False) for some in ids]
    return clean | {"ids": ids, "texts": texts}


DECODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def with_tokenizers(data: bytes):
    """The tokenizers library's reading of a tokenizer.json, None where it refuses it. It takes no
    key twice; of those, as everywhere in JSON, the last counts. Pieces say how they decode."""
    content = parse(data) | {"decoder": DECODER}
    try:
        reader = tokenizers.Tokenizer.from_str(json.dumps(content))
    except BaseException as error:  # Rust panics are no Exception
        if isinstance(error, (KeyboardInterrupt, TooLong)):
            raise
        return None
    reader.no_truncation()
    reader.no_padding()
    return reader


def expect_weights(data, whole, clean):
    return clean | {"tensors": parse_tensors(data, clean["tensors"])}


def expect_index(data, whole, clean):
    need(isinstance(parse(data).get("weight_map"), dict), "no map")
    return clean


def expect_adapter(data, whole, clean):
    content = parse(data)
    need(isinstance(content.get("base"), dict), "no base")
    bases = content["base"], parse(whole)["base"]
    said, wanted = ({key: base[key] for key in base if base[key] is not None} for base in bases)
    need(said == wanted, "another base")
    given = {key: content[key] for key in clean["config"] if content.get(key) is not None}
    fields = dataclasses.fields(PerftConfig)[1:]  # all but the variant have a default
    expected = {field.name: field.default for field in fields} | given
    if expected["alpha"] is None:
        expected["alpha"] = 2 * expected["rank"]
    return clean | {"config": expected}


def expect_choice(data, whole, clean):
    content = parse(data)
    need(isinstance(content.get("experts"), dict), "no experts")
    need(content["experts"].keys() == {"0", "1"}, "other layers")
    experts = [content["experts"][layer] for layer in "01"]
    for ids in experts:
        need(isinstance(ids, list) and all(type(e) is int for e in ids), "no lists of ids")
    wanted = {
        "experts": experts,
        "train_router": content.get("router") is True,
        "train_non_experts": content.get("non_expert_modules") is True,
    }
    return clean | {"config": wanted}


def expect_experts(data, whole, clean):
    return {"experts": expect_choice(data, whole, clean)["config"]["experts"]}


def expect_screen(data, whole, clean):
    """The rows asked are the run's: other numbers of them give other shares, of the same skills."""
    content, before = parse(data), parse(whole)
    for key in ("base", "dtype"):
        need(content.get(key) in (before[key], None), f"another {key}")
    if any(content.get(key) != before[key] for key in ("task", "eval_rows", "data")):
        return None
    return clean


MAY_CHANGE = {"resume", "overwrite", "out", "log_every", "save_every", "threads", "torch", "world"}
MAY_CHANGE |= {"device", "lr", "checkpoint_activations"}


def expect_settings(data, whole, clean):
    """Another run's settings are refused. Keys that are new may stand there."""
    content = parse(data)
    for key, value in parse(whole).items():
        need(key in MAY_CHANGE or content.get(key) == value, f"another {key}")
    return clean


def expect_export(data, whole, clean):
    content, before = parse(data), parse(whole)
    for key in ("base", "dtype"):
        need(content.get(key) in (before[key], None), f"another {key}")
    return clean


def expect_log(data, whole, clean):
    """Whole lines up to the first of a step after the one that was saved."""
    need(data is not None, "no file")
    kept = []
    for line in data.decode().replace("\r\n", "\n").split("\n")[:-1]:
        step = parse(line.encode()).get("step", 0)
        need(type(step) is int, "a step that is none")
        if step > SAVED:
            break
        kept.append(f"{line}\n")
    return clean | {"log": "".join(kept)}


def expect_state(data, whole, clean):
    tensors = parse_tensors(data, clean["tensors"])
    done = tensors["done"].item()
    need(done in (1, 2, 3), "a step that is none of the run's")
    counts = {tensor.item() for name, tensor in tensors.items() if name.startswith("step.")}
    counts -= {0}  # of what never had a gradient
    need(len(counts) == 1, "steps of one tensor and not of another")
    need(counts.pop() in range(1, int(done) + 1), "steps that the run has not done")
    return clean | {"tensors": tensors}


def expect_predictions(data, whole, clean):
    """A row whose prediction is gone, or another row's, is answered again: as before. The row is
    what its digest says, whatever its number."""
    rows = {record["row"]: record for record in map(parse, whole.splitlines())}
    records = dict(rows)
    need(data is not None, "no file")
    for line in data.decode().split("\n")[:-1]:
        record = parse(line.encode())
        need(type(record.get("correct")) is bool, "no prediction")
        if record["task"] == "hellaswag":
            records[record["row"]] = record
    right = sum(records[row]["correct"] for row in rows)
    found = {"accuracy": accuracy(right, len(rows))}
    for name, key in (("right", "correct"), ("gold", "gold")):
        found[name] = {row: record.get(key) for row, record in records.items()}
    return clean | found


def accuracy(right, n):
    share = right / n
    return [n, share, math.sqrt(share * (1 - share) / (n - 1))]


def expect_results(data, whole, clean):
    """What other commands measured stays."""
    others = parse(data).get("tasks") if data is not None else {}
    others = dict(others) if isinstance(others, dict) else {}
    others.pop("hellaswag", None)
    return clean | {"others": others}


def records_in(data):
    """The records of a file of rows."""
    need(data is not None, "no file")
    text = data.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        records = json.loads(text)
    else:
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    need(all(isinstance(record, dict) for record in records), "no records")
    return records


def turns_of(record):
    """[(prompt, answer)] of a row, in the plain template and in the form of chats."""
    if "messages" not in record:
        parts = [record["instruction"]]
        if record.get("input"):
            parts.append(record["input"])
        return [("".join(f"{part}\n\n" for part in parts), record["output"])]
    turns, prompt = [], ""
    for message in record["messages"]:
        role, content = message["role"], message["content"]
        if role == "assistant":
            turns.append((f"{prompt}<|assistant|>\n", content))
            prompt = "\n"
        else:
            prompt += f"<|{role}|>\n{content}\n"
    return turns


def expect_rows(data, whole, clean):
    """The ids of each row, which lose what does not fit; a row that loses all its answer is
    dropped."""
    reader = with_tokenizers((ROOT / "data" / "tiny_olmoe" / "tokenizer.json").read_bytes())

    def encoded(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return reader.encode(text, add_special_tokens=False).ids

    found = []
    for record in records_in(data):
        ids = []
        turns = turns_of(record)
        need(turns, "no answer")
        for prompt, answer in turns:
            need(isinstance(prompt, str) and isinstance(answer, str), "no text")
            ids += [*encoded(prompt + answer), SMALL["eos_token_id"]]
        longest = SMALL["max_position_embeddings"]
        if len(encoded(turns[0][0])) < longest:
            found.append(ids[:longest])
    return {"ids": sorted(found)}


def expect_gold(data, whole, clean):
    gold = {i: row["answer"] for i, row in enumerate(records_in(data))}
    return {"gold": gold}


# The kinds of files ------------------------------------------------------------------------------


class Reader(NamedTuple):
    """A command that reads files. {root} holds all that make_files makes, {case} is a copy of one
    of its folders, in which a file is damaged."""

    command: str  # eval.py and its flags
    stop: str | None  # the function of the script that begins the work; None: the work is done
    result: Callable  # (Reached, what was printed, case) -> what was read
    writes: tuple = ()  # names in {case} that may be written


class Kind(NamedTuple):
    """A kind of file."""

    folder: str
    file: str
    reader: Reader
    expect: Callable  # (damaged bytes, undamaged bytes, what was read of those) -> the same


RUN = f"train.py --base {{root}}/base {STEPS}"
RESUME = f"{RUN} --variant perft_r --out {{case}} --resume"
CHOOSE = f"{RUN} --variant perft_e --out {{case}}/out --experts {{case}}/expert_cfg.json"
ROWS = f"train.py --base {{root}}/base {SHORT} --variant perft_s --held_out 0 --out {{case}}/out"
ROWS += " --data {case}/"
TEST = "eval.py --base {root}/base --threads 1 --tasks"
ENDINGS = f"{TEST} hellaswag --method likelihood --choices texts --test_dir"
PREDICTED = f"{ENDINGS} {{root}}/tests --out {{case}}"
SUMS = f"{TEST} AddSub --max_new_tokens 1 --num_beams 1 --test_dir {{case}} --out {{case}}/out"

base = Reader("eval.py --base {case} --prompt x", "answer_prompt", read_base)
trained = Reader(
    "eval.py --base {root}/base --prompt x --adapter {case}", "answer_prompt", read_trained
)
experts = Reader(CHOOSE, "measure", read_experts, ("out",))
evaluated = Reader("eval.py --adapter {case}", None, read_screen)
exported = Reader("esft.py export {case} {case}/new", None, read_export, ("new",))
resumed = Reader(RESUME, "run_steps", read_resumed, ("metrics.jsonl", "config.json"))
predicted = Reader(PREDICTED, None, read_results, eval.EVAL_FILES)
alpaca = Reader(f"{ROWS}alpaca.json --template plain", "edit_for", read_rows, ("out",))
lines = Reader(f"{ROWS}lines.jsonl --template plain", "edit_for", read_rows, ("out",))
messages = Reader(f"{ROWS}messages.json", "edit_for", read_rows, ("out",))
scored = Reader(f"{ENDINGS} {{case}} --out {{case}}/out", None, read_gold, ("out",))
summed = Reader(SUMS, None, read_gold, ("out",))

KINDS = {
    "config": Kind("base", "config.json", base, expect_config),
    "tokenizer": Kind("base", "tokenizer.json", base, expect_tokenizer),
    "weights": Kind("base", "model.safetensors", base, expect_weights),
    "index": Kind("shards", "model.safetensors.index.json", base, expect_index),
    "adapter_config": Kind("adapter", "adapter_config.json", trained, expect_adapter),
    "adapter_model": Kind("adapter", "adapter_model.safetensors", trained, expect_weights),
    "expert_cfg": Kind("chosen", "expert_cfg.json", trained, expect_choice),
    "expert_weights": Kind("chosen", "expert_weights.safetensors", trained, expect_weights),
    "experts": Kind("chosen", "expert_cfg.json", experts, expect_experts),
    "run_evaluated": Kind("adapter", "config.json", evaluated, expect_screen),
    "run_exported": Kind("chosen", "config.json", exported, expect_export),
    "run_resumed": Kind("unfinished", "config.json", resumed, expect_settings),
    "metrics": Kind("unfinished", "metrics.jsonl", resumed, expect_log),
    "state": Kind("unfinished", "state.safetensors", resumed, expect_state),
    "predictions": Kind("answers", "predictions.jsonl", predicted, expect_predictions),
    "settings": Kind("answers", "settings.json", predicted, expect_settings),
    "results": Kind("answers", "results.json", predicted, expect_results),
    "alpaca": Kind("data", "alpaca.json", alpaca, expect_rows),
    "lines": Kind("data", "lines.jsonl", lines, expect_rows),
    "messages": Kind("data", "messages.json", messages, expect_rows),
    "choices": Kind("tests", "hellaswag.json", scored, expect_gold),
    "sums": Kind("tests", "AddSub.json", summed, expect_gold),
}


# One input ---------------------------------------------------------------------------------------


class TooLong(BaseException):
    pass


class End(NamedTuple):
    """How a command ended on a damaged file."""

    name: str  # clean, as read, one line, fault
    told: str  # the line, or what is wrong
    where: str = ""  # file:function of a fault


def memory(key) -> int:
    """Of this process, in bytes. VmHWM is the most that it held since forget_peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def bounded():
    """TooLong after SECONDS; MemoryError at 1 GB more than there is now, for the machine's sake."""

    def ring(number, frame):
        raise TooLong

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (1 << 30), limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def contents(folder: Path, without=()) -> dict:
    """What is in a folder: bytes of files, None for what is no file."""
    found = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name) not in without]
        for name in files:
            path = Path(parent, name)
            if path not in without:
                regular = path.is_file() and not path.is_symlink()
                found[path] = path.read_bytes() if regular else None
    return found


def stamps(root: Path, case: Path) -> dict:
    """Times and sizes of all files that lie outside of a case."""
    found = {}
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(parent, name) != case]
        for name in (*folders, *files):
            stat = os.lstat(Path(parent, name))
            found[parent, name] = stat.st_size, stat.st_mtime_ns
    return found


undamaged = functools.cache(load_tokenizer)


def read_tokenizer(folder):
    """One that no damage reaches is read once: that takes longer than all else."""
    return load_tokenizer(folder) if Path(folder).name == "case" else undamaged(folder)


def call(reader: Reader, root: Path, case: Path):
    """Run a command in this process, up to where its work begins -> what it read."""
    script, *argv = [word.format(root=root, case=case) for word in reader.command.split()]
    module = {"eval.py": eval, "train.py": train, "esft.py": esft}[script]
    reached, printed = None, io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(mock.patch.object(eval, "load_tokenizer", read_tokenizer))
        # no file must outlast a power cut
        stack.enter_context(mock.patch.object(os, "fsync", lambda number: None))
        if reader.stop:
            stack.enter_context(mock.patch.object(module, reader.stop, reach))
        try:
            run.command(module.main)(argv)
        except Reached as stop:
            reached = stop
    return reader.result(reached, printed.getvalue(), case)


def wrong_with(line: str, names: list[str]) -> str:
    """What is wrong with the one line of a mistake, "" if nothing is. It has one of `names`, of the
    folder or of its files: of two that contradict each other, either may be the damaged one."""
    message = line.partition("error: ")[2]
    if not message:
        return f"it says {line[:200]!r}"
    if not message.isprintable():
        return f"it does not print: {line[:200]!r}"
    if len(message) > 1000:
        return f"{len(message)} characters: {line[:200]!r}"
    named = any(name in message for name in names)
    return "" if named else f"it names no file: {line[:300]!r}"


def difference(found, expected, place="") -> str:
    """Where two results differ first, "" where they do not."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if found.keys() != expected.keys():
            return f"{place}: keys {sorted(map(str, found.keys() ^ expected.keys()))[:3]}"
        places = (difference(found[key], expected[key], f"{place}/{key}") for key in expected)
        return next(filter(None, places), "")
    if isinstance(expected, torch.Tensor):
        same = found.dtype == expected.dtype and torch.equal(found, expected)
    else:
        same = found == expected or json.dumps(found) == json.dumps(expected)  # NaN is not NaN
    return "" if same else f"{place}: {str(found)[:100]}, expected {str(expected)[:100]}"


class Fuzzer:
    """Damages files of a folder and runs the commands on them."""

    def __init__(self, root: Path):
        make_files(root)
        self.root, self.case = root, root / "case"
        self.clean = {}  # kind -> what is read of the undamaged file
        self.memory = {}  # kind -> bytes that this took
        self.home = Path.cwd()

    def prepare(self, name: str, seed: int | None) -> Path:
        """The folder of a case, with its damage -> the file."""
        shutil.rmtree(self.case, ignore_errors=True)
        kind = KINDS[name]
        shutil.copytree(self.root / kind.folder, self.case)
        path = self.case / kind.file
        if seed is not None:
            damage(random.Random(f"{name} {seed}"), path)
        return path

    def learn(self, name: str):
        """What the undamaged file says, and the memory that it takes."""
        for _ in range(2):  # what comes only once is no memory of the second
            self.prepare(name, None)
            forget_peak()
            before = memory("VmRSS")
            self.clean[name] = call(KINDS[name].reader, self.root, self.case)
            self.memory[name] = memory("VmHWM") - before

    def end(self, name: str, seed: int) -> End:
        """How the command ends on the file with the damage of a seed."""
        kind = KINDS[name]
        if name not in self.clean:
            self.learn(name)
        path = self.prepare(name, seed)
        inside, outside = contents(self.case), stamps(self.root, self.case)
        forget_peak()
        before = memory("VmRSS")
        os.chdir(self.root / "nowhere")
        try:
            end, result = self.call(kind)
        finally:
            os.chdir(self.home)
        took = memory("VmHWM") - before
        if took > 2 * self.memory[name] + ROOM:
            return End("fault", f"took {took >> 20} MB", "memory")
        if stamps(self.root, self.case) != outside:
            return End("fault", "wrote outside of the folder", "writes")
        after = contents(self.case, [self.case / name for name in kind.reader.writes])
        if any(after[path] != inside.get(path, "new") for path in after):
            return End("fault", "wrote what is not its to write", "writes")
        if end:
            return end
        data = self.damaged_bytes(path, inside)
        return judged(kind, result, data, self.root, self.clean[name])

    def call(self, kind):
        """(End, None), or (None, what was read)."""
        told = io.StringIO()
        try:
            with bounded(), contextlib.redirect_stderr(told):
                return None, call(kind.reader, self.root, self.case)
        except SystemExit as stop:
            if stop.code in (130, 143):  # somebody stops the test
                raise
            line = stop.code if isinstance(stop.code, str) else told.getvalue()
            names = [str(self.case), *os.listdir(self.root / kind.folder)]
            wrong = wrong_with(line.removesuffix("\n"), names)
            return End("fault", wrong, "message") if wrong else End("one line", line), None
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            return End("fault", f"{type(error).__name__}: {error}"[:300], place_of(error)), None

    def damaged_bytes(self, path, inside):
        """What lay where the file should be: None unless it was a file, or a link to one."""
        if inside.get(path) is not None:
            return inside[path]
        return inside.get(path.with_name(f"whole {path.name}"))


def judged(kind, result, data, root, clean) -> End:
    """Compare what a command read with what an independent reader finds."""
    whole = (root / kind.folder / kind.file).read_bytes()
    try:
        expected = kind.expect(data, whole, clean)
    except Refuse as why:
        return End("fault", f"taken: {why}", "taken")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        return End("fault", f"taken, though no reader takes it: {error!r}"[:300], "taken")
    if expected is None:
        return End("as read", "")
    wrong = difference(result, expected)
    if wrong:
        return End("fault", f"read {wrong}", "value")
    return End("as read" if difference(result, clean) else "clean", "")


def place_of(error) -> str:
    """The innermost function of the project that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).parent in (ROOT, ROOT / "data")]
    if not ours:
        return "outside of the project"
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].name}"


def share(total: int) -> int:
    """How many inputs of a total each kind gets."""
    return max(total // len(KINDS), 1)


# The tests ---------------------------------------------------------------------------------------

INPUTS = int(os.environ.get("FUZZ", 2000))
ONLY = os.environ.get("FUZZ_ONLY", "")  # kind:seed


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_right_or_refused_in_one_line(name, fuzzer):
    seeds = range(share(INPUTS))
    if ONLY:
        only, _, seed = ONLY.partition(":")
        seeds = [int(seed)] if only == name else []
    faults = []
    for seed in seeds:
        end = fuzzer.end(name, seed)
        if end.name == "fault":
            faults.append(f"FUZZ_ONLY={name}:{seed} {end.where}: {end.told}")
    assert not faults, "\n".join([f"{len(faults)} of {len(seeds)}", *faults[:20]])


@pytest.mark.parametrize("name", ["tokenizer", "alpaca"])
def test_the_command_in_a_process_of_its_own_says_the_same_line(name, fuzzer):
    """Of the first damage that is refused."""
    ends = (fuzzer.end(name, seed) for seed in range(100))
    line = next(end.told for end in ends if end.name == "one line")
    words = KINDS[name].reader.command.format(root=fuzzer.root, case=fuzzer.case).split()
    words[0] = str(ROOT / words[0])
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stderr == f"{line}\n"


# The table ---------------------------------------------------------------------------------------


def print_table(total: int):
    """Counts of ends by kind, then the faults by what arose where, each with its first input."""
    ends = ("clean", "as read", "one line", "fault")
    print(f"    {'':15} {'inputs':>7}" + "".join(f" {end:>9}" for end in ends))
    faults, sums = {}, Counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder).resolve())
        for name in KINDS:
            seen = Counter()
            for seed in range(share(total)):
                end = fuzzer.end(name, seed)
                seen[end.name] += 1
                if end.name == "fault":
                    key = name, end.where, end.told.split(":")[0][:40]
                    faults.setdefault(key, []).append((seed, end.told))
            sums += seen
            print_row(name, share(total), [seen[end] for end in ends])
    print_row("all", sum(sums.values()), [sums[end] for end in ends])
    for (name, where, _), inputs in faults.items():
        seed, told = inputs[0]
        print(f"\n{len(inputs)} times {where}\n    FUZZ_ONLY={name}:{seed} {told}")


def print_row(name, count, counts):
    print(f"    {name:15} {count:7,}" + "".join(f" {n:9,}" for n in counts), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print_table(int(sys.argv[1]) if len(sys.argv) > 1 else INPUTS)
