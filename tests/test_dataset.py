"""data/dataset.py reads what users have, says what is wrong and where, labels the answers, loses no
row in silence.

References: json.loads, plain Python lists, tokenizer.encode on the whole text, NumPy's permutation.
Where the real tokenizers and rows stand beside the repository (../shared), every row of them is
checked.
"""

import json
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import failure, make_base, one_thread  # noqa: F401 (the fixture is used by being here)

import eval
import train
from data import dataset
from data.dataset import Dataset, Example, encode, encode_prompt, epoch_batches, pad_batch, split
from data.tasks import TEMPLATES, chat_turns
from data.tokenizer import load_tokenizer
from model import MoETransformer

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(__file__).resolve().parents[2] / "shared"
ALPACA = 'expected {"instruction": text, "input": text (may be missing), "output": text}'
MESSAGES = (
    'expected {"messages": [{"role": "system", "user" or "assistant", "content": text}, ...]}'
)


@pytest.fixture(scope="module")
def world():
    """The embedded world's tokenizer."""
    return load_tokenizer(ROOT / "data" / "tiny_olmoe")


@pytest.fixture(scope="module", params=["embedded", "olmoe", "mixtral"])
def tokenizer(request, tmp_path_factory):
    """Each tokenizer in turn; the two real ones with the special ids that their checkpoints'
    config.json give."""
    if request.param == "embedded":
        return load_tokenizer(ROOT / "data" / "tiny_olmoe")
    source = SHARED / "tokenizers" / request.param / "tokenizer.json"
    if not source.is_file():
        pytest.skip(f"the real tokenizer is not here: {source}")
    folder = tmp_path_factory.mktemp(request.param)
    ids = {
        "olmoe": {"eos_token_id": 50279, "pad_token_id": 1},
        "mixtral": {"bos_token_id": 1, "eos_token_id": 2},
    }
    (folder / "config.json").write_text(json.dumps(ids[request.param]))
    (folder / "tokenizer.json").symlink_to(source)
    return load_tokenizer(folder)


def record(i=0, **changes):
    return {"instruction": f"say {i}", "input": "", "output": f"{i}"} | changes


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Reading -----------------------------------------------------------------------------------------

ROWS = [
    *map(record, range(3)),
    record(3, instruction="Zürich → 東京 \u2028 \x85 {[\n", output=']}\\ "q"'),
]
LAYOUTS = {
    "a list on one line": json.dumps(ROWS),
    "a list without spaces": json.dumps(ROWS, separators=(",", ":")),
    "a list, pretty-printed": json.dumps(ROWS, indent=4, ensure_ascii=False),
    "a list, a record a line": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    "a list behind empty lines": "\n \t\r\n" + json.dumps(ROWS) + "\n\n",
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "lines without the last newline": "\n".join(
        json.dumps(row, ensure_ascii=False) for row in ROWS
    ),
    "lines with empty ones between": "\n\n"
    + "\n \n\n".join(json.dumps(row) for row in ROWS)
    + "\n\n",
    "lines as Windows ends them": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    + "\r\n",
    "a list behind a byte order mark": "\ufeff" + json.dumps(ROWS),
    "lines behind a byte order mark": "\ufeff" + "\n".join(json.dumps(row) for row in ROWS),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_a_file_gives_the_same_records(tmp_path, name):
    """As json.dumps wrote them, whatever stands inside the texts: line separators, brackets,
    quotes."""
    assert dataset.read_rows(write(tmp_path / "rows.json", LAYOUTS[name])) == ("alpaca", ROWS)


@pytest.mark.parametrize("template", dataset.TEMPLATES)
def test_an_input_of_null_is_none(tmp_path, world, template):
    path = write(tmp_path / "rows.json", json.dumps([record(), record(input=None)]))
    _, rows = dataset.read_rows(path)
    empty, null = (dataset.encode_row(row, template, world) for row in rows)
    assert empty == null


def test_messages_are_recognised_by_their_first_record(tmp_path):
    rows = [
        chat(("user", "hi"), ("assistant", "yo")),
        chat(("system", "s"), ("user", "a"), ("assistant", "")),
    ]
    for text in (json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        assert dataset.read_rows(write(tmp_path / "rows.jsonl", text)) == ("messages", rows)


def test_each_record_is_told_with_the_line_that_it_begins_on():
    text = '\n[\n {"a": 1}, {"a":\n 2},\n\n  {"a": [\n3,\n4]}\n]'
    assert [dataset.line_of(text, i) for i in range(3)] == [3, 3, 6]
    text = '\n {"a": 1}\n\n\t{"a": 2}\n'
    assert [dataset.line_of(text, i) for i in range(2)] == [2, 4]


def lines_of(*records):
    return "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records)


OK = record()
TALK = chat(("user", "hi"), ("assistant", "yo"))
BAD = {  # name: (content of the file, what the error says behind the file's name)
    "a key is missing": (
        lines_of(OK, {"instruction": "x"}),
        f':2: found ["instruction"], {ALPACA}',
    ),
    "keys of another kind": (
        lines_of({"text": "x", "meta": 1}),
        f':1: found ["meta", "text"], {ALPACA}',
    ),
    "output is a number": (lines_of(OK, OK, record(output=3)), f":3: output is 3, {ALPACA}"),
    "instruction is null": (
        lines_of(record(instruction=None)),
        f":1: instruction is null, {ALPACA}",
    ),
    "input is a list": (lines_of(record(input=["a"])), f':1: input is ["a"], {ALPACA}'),
    "a record is a text": (lines_of(OK, '"abc"'), f':2: found "abc", {ALPACA}'),
    "a record is a list": (lines_of(OK, "[1, 2]"), f":2: found [1, 2], {ALPACA}"),
    "a long value is cut": (
        lines_of(record(output=["x" * 100_000])),
        f':1: output is ["{"x" * 95}..., {ALPACA}',
    ),
    "what cannot be printed is escaped": (
        lines_of(record(output=["\x1b[31m\x07\u202e"])),
        f':1: output is ["\\u001b[31m\\u0007\\u202e"], {ALPACA}',
    ),
    "one in a list on one line": (
        json.dumps([*[OK] * 5, record(output=3), OK]),
        f":1: record 6: output is 3, {ALPACA}",
    ),
    "one in a list": (
        json.dumps([OK, record(output=None)], indent=1),
        f":7: record 2: output is null, {ALPACA}",
    ),
    "one behind several lines": (
        "[\n\n" + json.dumps(OK, indent=1) + ",\n\n{}\n]",
        f":9: record 2: found [], {ALPACA}",
    ),
    "messages is no list": (lines_of({"messages": "hi"}), f':1: messages is "hi", {MESSAGES}'),
    "messages is empty": (
        lines_of(TALK, {"messages": []}),
        f":2: the assistant says nothing in [], {MESSAGES}",
    ),
    "a role that is none": (
        lines_of(chat(("human", "hi"))),
        f':1: a message is {{"role": "human", "content": "hi"}}, {MESSAGES}',
    ),
    "a content that is none": (
        lines_of(TALK, chat(("user", None))),
        f':2: a message is {{"role": "user", "content": null}}, {MESSAGES}',
    ),
    "a message that is a text": (
        lines_of(TALK, {"messages": ["hi"]}),
        f':2: a message is "hi", {MESSAGES}',
    ),
    "nobody answers": (
        lines_of(TALK, chat(("user", "hi"))),
        f':2: the assistant says nothing in [{{"role": "user", "content": "hi"}}], {MESSAGES}',
    ),
    "a later record of the other kind": (lines_of(OK, TALK), f':2: found ["messages"], {ALPACA}'),
    "a later record of the other kind, messages first": (
        lines_of(TALK, TALK, OK),
        f":3: messages is null, {MESSAGES}",
    ),
    "the wrong JSON": (json.dumps({"data": [OK]}), f':1: found ["data"], {ALPACA}'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_told_with_file_line_what_was_found_and_what_was_expected(tmp_path, name):
    content, message = BAD[name]
    path = write(tmp_path / "rows.json", content)
    with pytest.raises(ValueError) as error:
        dataset.read_rows(path)
    assert str(error.value) == f"{path}{message}"


NOT_JSON = {  # name: (content of the file, a pattern of what the error says behind the file's name)
    "empty": (b"", ": holds no records; give a file .*"),
    "only white space": (b" \n\n ", ": holds no records; give a file .*"),
    "an empty list": (b"[]\n", ": holds no records; give a file .*"),
    "a text": (b"hello\nworld\n", ":1: not valid JSON .*"),
    "CSV behind a record": (
        lines_of(OK).encode() + b"\na,b,c\n",
        ":3: not valid JSON .*",
    ),
    "something behind a record": (
        lines_of(OK).encode() * 2 + b'{"a": 1} x',
        r":3: .*(JSON|found \[\"a\"\]).*",
    ),
    "a line that is cut off": (
        lines_of(OK).encode() + b'{"instruction": "x',
        ":2: not valid JSON .*cut off.*",
    ),
    "a list that is cut off in a record": (
        json.dumps([OK, OK]).encode()[:-9],
        ": not valid JSON .*",
    ),
    "a list that is cut off behind a record": (
        b"[\n" + lines_of(OK).encode(),
        ": not valid JSON .*line [23] .*cut off.*",
    ),
    "a list that is cut off behind a comma": (
        b"[\n" + lines_of(OK).encode() + b",",
        ": .*line [23] .*cut off.*",
    ),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00\xff", ": byte 0 is not UTF-8; give a file .*"),
    "Latin-1": (
        '{"instruction": "Zürich", "output": ""}'.encode("latin-1"),
        ": byte 18 is not UTF-8; give a file .*",
    ),
    "UTF-16": ("[]".encode("utf-16"), ": byte 0 is not UTF-8; give a file .*"),
    "zeros": (bytes(100), ":1: not valid JSON .*"),
    "brackets without end": (b"[" + b'{"a":' * 100_000, ": not valid JSON .*nested too deeply.*"),
    "text behind a list": (json.dumps([OK]).encode() + b"\noops", ": .*line 2 .*"),
    "a list behind a list": (
        json.dumps([OK]).encode() + b"\n" + json.dumps([OK, OK]).encode(),
        ": .*line 2 .*",
    ),
    "a list a line": (b"\n".join(json.dumps([OK]).encode() for _ in range(3)), ": .*line 2 .*"),
    "lists in a list": (json.dumps([[OK, OK], [OK]]).encode(), ":1: .*"),
    "a record behind a list": (
        json.dumps([OK]).encode() + b"\n\n" + lines_of(OK).encode(),
        ": .*line 3 .*",
    ),
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_a_file_that_is_not_what_it_should_be_is_one_line_that_names_it(tmp_path, name):
    """What stands behind a list would be lost in silence: joining two files with `cat` makes such a
    file."""
    content, pattern = NOT_JSON[name]
    path = write(tmp_path / "rows.json", content)
    with pytest.raises(ValueError) as error:
        dataset.read_rows(path)
    assert re.fullmatch(re.escape(str(path)) + pattern, str(error.value)), str(error.value)


def test_a_file_that_is_not_there_is_told_with_the_remedy(tmp_path):
    path = tmp_path / "nothing.json"
    with pytest.raises(FileNotFoundError, match=f"{path}: no such file; .*prepare.py"):
        dataset.read_rows(path)


def test_what_is_no_file_is_told_and_not_read(tmp_path):
    """A folder; a pipe, of which a read would never end; a device, which has no end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path}: is not a regular file; give a file"):
            dataset.read_rows(path)


# Encoding ----------------------------------------------------------------------------------------


def begin(tokenizer):
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def spans(tokenizer, ids):
    """[(first byte, byte behind the last)] of each id in the bytes that the ids decode to."""
    ends = np.cumsum([len(tokenizer.pieces[i]) for i in ids]).tolist()
    return list(zip([0, *ends[:-1]], ends)) if ends else []


def check_turns(tokenizer, turns, example):
    """Every token of every turn, against its bytes: labelled if and only if a byte of it belongs to
    the answer."""
    ids, labelled = [list(part) for part in example]
    assert ids[: len(begin(tokenizer))] == begin(tokenizer) and not any(
        labelled[: len(begin(tokenizer))]
    )
    at = len(begin(tokenizer))
    for prompt, answer in turns:
        whole = tokenizer.encode(prompt + answer)
        assert ids[at : at + len(whole) + 1] == [*whole, tokenizer.eos_id]
        size = len(b"".join(tokenizer.pieces[i] for i in whole))
        border = (
            size - len(tokenizer.normalise(answer).lstrip(" ").encode()) if answer.strip() else size
        )
        if answer == answer.lstrip():
            expected = [end > border for _, end in spans(tokenizer, whole)]
            assert labelled[at : at + len(whole)] == expected
        assert labelled[at + len(whole)], "the end token is a label"
        said = tokenizer.decode([i for i, on in zip(whole, labelled[at:]) if on])
        assert tokenizer.normalise(answer).strip() in said
        at += len(whole) + 1
    assert at == len(ids) == len(labelled)


def real_rows():
    files = [SHARED / "data" / name for name in ("commonsense_sample.json", "gsm8k_sample.json")]
    if not all(file.is_file() for file in files):
        pytest.skip("the real rows are not here: ../shared/data")
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]


def test_every_real_row_has_the_ids_of_its_whole_text_and_its_answers_tokens_as_labels(tokenizer):
    """All 5,000 rows in the papers' template. The labels decode to the output, perhaps with white
    space in front."""
    for row in real_rows():
        prompt = TEMPLATES["papers"](row, evaluation=False)
        example = encode([(prompt, row["output"])], tokenizer)
        whole = tokenizer.encode(prompt + row["output"])
        assert example.ids == [*begin(tokenizer), *whole, tokenizer.eos_id]
        first = example.labelled.index(True)
        assert not any(example.labelled[:first]) and all(example.labelled[first:])
        said = b"".join(tokenizer.pieces[i] for i in example.ids[first:-1]).decode()
        assert said.endswith(row["output"]) and not said[: -len(row["output"])].strip(), row
        without_first = b"".join(tokenizer.pieces[i] for i in example.ids[first + 1 : -1])
        assert len(without_first) < len(row["output"].encode()), (
            "the first label holds a byte of the answer"
        )


TURNS = {
    "a plain answer": [("What is 2 + 2?\n", "4")],
    "an answer that begins inside a token": [("un", "believable story")],
    "one character of several bytes": [("東", "京は大きい 😀")],
    "an accent that joins the letter before it": [("cafe", "\u0301 au lait")],
    "an answer of nothing": [("Say nothing.\n", "")],
    "no prompt": [("", "only an answer")],
    "spaces before the answer": [("x:" + " " * 16, "the correct answer is true")],
    "several turns": [
        ("<|user|>\nhi\n<|assistant|>\n", "hello"),
        ("\n<|user|>\n2+2?\n<|assistant|>\n", "4, or so"),
    ],
    "the name of an end token": [("<|endoftext|></s>", "<|endoftext|> </s> <s>")],
}


@pytest.mark.parametrize("name", TURNS)
def test_a_token_that_holds_any_byte_of_an_answer_is_a_label_and_no_other(tokenizer, name):
    if (
        name == "an accent that joins the letter before it"
    ):  # the joined letter is a token's, and so a label
        example = encode(TURNS[name], tokenizer)
        said = tokenizer.decode([i for i, on in zip(example.ids, example.labelled) if on])
        assert "au lait" in said and "caf" not in said
    else:
        check_turns(tokenizer, TURNS[name], encode(TURNS[name], tokenizer))


def test_the_name_of_a_special_token_in_a_row_does_not_become_one(tokenizer):
    """The end token is a label once, where the answer ends: a row cannot stop the model by writing
    its name."""
    example = encode(TURNS["the name of an end token"], tokenizer)
    assert example.ids.count(tokenizer.eos_id) == 1 and example.ids[-1] == tokenizer.eos_id


def test_labels_of_a_conversation_are_what_the_assistant_says_and_the_end_tokens(tokenizer):
    """Decoded, they are the assistants' contents in turn, each with an end token behind it."""
    turns = [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "hello you"),
        ("user", "and now?"),
        ("assistant", "good bye"),
        ("user", "dropped"),
    ]
    example = encode(chat_turns(chat(*turns)["messages"]), tokenizer)
    said = [i for i, on in zip(example.ids, example.labelled) if on]
    answers, now = [], []
    for i in said:
        if i == tokenizer.eos_id:
            answers.append(tokenizer.decode(now).strip())
            now = []
        else:
            now.append(i)
    assert answers == ["hello you", "good bye"] and now == []
    assert "dropped" not in tokenizer.decode(example.ids)


def test_train_on_inputs_labels_everything(tokenizer):
    turns = TURNS["several turns"]
    example = encode(turns, tokenizer, train_on_inputs=True)
    assert example.ids == encode(turns, tokenizer).ids and all(example.labelled)


def test_a_row_is_cut_on_the_right_and_ends_with_an_end_token_only_if_that_fits(tokenizer):
    """The papers' code: n ids of text cut to max_length, the end token appended if they are fewer
    than max_length."""
    for turns in (TURNS["a plain answer"], TURNS["an answer that begins inside a token"]):
        whole = encode(turns, tokenizer)
        text, n = whole.ids[:-1], len(whole.ids) - 1
        for length in range(1, n + 4):
            theirs = text[:length]
            theirs += [tokenizer.eos_id] if len(theirs) < length else []
            cut = encode(turns, tokenizer, max_length=length)
            assert cut.ids == theirs and cut.labelled == whole.labelled[: len(theirs)]
        ends = [
            tokenizer.eos_id in encode(turns, tokenizer, max_length=n + i).ids for i in (-1, 0, 1)
        ]
        assert ends == [False, False, True]


def test_a_prompt_to_continue_is_the_beginning_token_and_the_texts_ids(tokenizer):
    assert encode_prompt("Who is it?", tokenizer) == begin(tokenizer) + tokenizer.encode(
        "Who is it?"
    )


def test_a_character_that_is_half_a_pair_is_read_or_told_with_file_and_line(tmp_path, world):
    r"""JSON can write "\ud83d" alone, which no UTF-8 has; cut texts hold it."""
    path = write(tmp_path / "rows.json", lines_of(OK, record(instruction="\ud83d")))
    try:
        args = SimpleNamespace(
            variant="perft_s",
            data=str(path),
            template=None,
            train_on_inputs=False,
            max_length=400,
            held_out=0,
            batch_size=2,
            seed=0,
            epochs=1,
            steps=None,
        )
        assert len(dataset.load_data(args, world, 400).train) == 2
    except ValueError as error:
        assert str(error).startswith(f"{path}:2: "), error


# ChatML ------------------------------------------------------------------------------------------

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHATS = {
    "a question": [("user", "What is 2 + 2?"), ("assistant", "4")],
    "a system, several turns, an end that nobody answers": [
        ("system", "Be brief.\n"),
        ("user", "hi"),
        ("assistant", "\nhello  you"),
        ("user", "東京 😀 cafe\u0301"),
        ("assistant", "un peu, 12345 d'accord"),
        ("user", "and?"),
    ],
    "empty contents": [("user", ""), ("assistant", "")],
    "the assistant begins": [("assistant", "yes?"), ("user", "no"), ("assistant", " ok ")],
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Qwen3's tokenizer and transformers' of the same file, with a template that is ChatML."""
    transformers = pytest.importorskip("transformers")
    source = SHARED / "tokenizers" / "qwen3" / "tokenizer.json"
    if not source.is_file():
        pytest.skip(f"the real tokenizer is not here: {source}")
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "config.json").write_text('{"eos_token_id": [151645, 151643]}')
    (folder / "tokenizer.json").symlink_to(source)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source))
    theirs.chat_template = CHATML
    return load_tokenizer(folder), theirs


def template_ids(theirs, messages, **options):
    return theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("name", CHATS)
def test_messages_of_a_tokenizer_that_has_chatml_are_what_its_template_makes_of_them(qwen, name):
    """Ids against apply_chat_template, up to the assistant's last <|im_end|>; a token is a label if
    it is behind the template's prompt for an answer, up to the answer's <|im_end|>."""
    ours, theirs = qwen
    messages = chat(*CHATS[name])["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    *expected, newline = template_ids(theirs, messages[: last + 1])
    example = dataset.encode_row({"messages": messages}, "chat", ours)
    assert example.ids == expected and ours.decode([newline]) == "\n"

    labelled = set()
    for i, message in enumerate(messages[: last + 1]):
        if message["role"] == "assistant":
            prompt = theirs.encode("<|im_start|>assistant\n")
            if i:  # the template wants a message
                prompt = template_ids(theirs, messages[:i], add_generation_prompt=True)
            whole = template_ids(theirs, messages[: i + 1])
            begun = len(prompt)
            while whole[:begun] != prompt[:begun]:  # the border is inside a token
                begun -= 1
            labelled |= set(range(begun, len(whole) - 1))
    assert {i for i, on in enumerate(example.labelled) if on} == labelled
    everything = dataset.encode_row({"messages": messages}, "chat", ours, True)
    assert everything.ids == expected and all(everything.labelled)
    cut = dataset.encode_row({"messages": messages}, "chat", ours, False, 5)
    assert (cut.ids, cut.labelled) == (example.ids[:5], example.labelled[:5])


def test_a_question_is_put_as_the_template_puts_it_for_an_answer(qwen):
    """As eval.py --chat does: a row without its answer and its end."""
    ours, theirs = qwen
    messages = chat(("user", "hi, you"), ("assistant", ""))["messages"]
    *ids, end = dataset.encode_row({"messages": messages}, "chat", ours).ids
    assert ids == template_ids(theirs, messages[:1], add_generation_prompt=True)
    assert end == theirs.convert_tokens_to_ids("<|im_end|>")


def test_what_a_user_writes_does_not_end_a_message(qwen):
    """The names of the two tokens in a content are letters; transformers takes them for the
    tokens."""
    ours, theirs = qwen
    messages = chat(("user", "a<|im_end|>\n<|im_start|>system"), ("assistant", "b"))["messages"]
    example = dataset.encode_row({"messages": messages}, "chat", ours)
    assert [example.ids.count(i) for i in ours.chat_ids] == [2, 2]
    assert [template_ids(theirs, messages).count(i) for i in ours.chat_ids] == [3, 3]


def test_a_run_on_chatml_shows_it_and_counts_what_was_cut(qwen, base, tmp_path):
    rows = [chat(("user", "hi"), ("assistant", "w " * 9 if i else "x")) for i in range(3)]
    path = write(tmp_path / "chat.jsonl", lines_of(*rows))
    flags = ("--held_out", 0, "--max_length", 12)
    data = dataset.load_data(arguments(base, path, *flags), qwen[0], 256)
    assert (
        data.template == "chat"
        and "2 rows lost their end to --max_length 12; 0 of" in data.notes[3]
    )
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«x<|im_end|>»"
    assert (repr(text) in data.notes[2]) == (split(3, 0, 42)[0][0] == 0)
    path = write(tmp_path / "short.jsonl", lines_of(rows[0]))
    notes = dataset.load_data(arguments(base, path, "--held_out", 0), qwen[0], 256).notes
    assert repr(text) in notes[2] and len(notes) == 3, "not cut, and not empty"
    path = write(tmp_path / "empty.jsonl", lines_of(chat(("user", "hi"), ("assistant", ""))))
    notes = dataset.load_data(arguments(base, path, "--held_out", 0), qwen[0], 256).notes
    assert "every answer is empty" in notes[3]


def test_a_chat_is_asked_in_chatml_and_its_answer_ends_where_the_messages_end(
    tmp_path, monkeypatch, capsys
):
    """A base whose tokenizer has the two tokens and whose own end of text is another, as
    Qwen3-Base's: what eval.py --chat hands to generate, token by token."""
    folder = make_base(tmp_path / "base", vocab_size=702)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for i, name in ((700, "<|im_start|>"), (701, "<|im_end|>")):
        spec["added_tokens"].append({**spec["added_tokens"][0], "id": i, "content": name})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    path = write(tmp_path / "chat.jsonl", lines_of(TALK, TALK))
    flags = ["--variant", "perft_s", "--base", folder, "--data", path, "--held_out", 0]
    train.main([str(word) for word in (*flags, "--steps", 1, "--out", tmp_path / "run")])
    assert "«yo<|im_end|>»" in capsys.readouterr().out

    def generate(self, prompts, max_new_tokens, **options):
        asked.append((prompts, self.config.eos_ids))
        return [[]]

    asked = []
    monkeypatch.setattr(MoETransformer, "generate", generate)
    eval.main(["--adapter", str(tmp_path / "run"), "--chat", "hi"])
    told = load_tokenizer(folder).encode
    prompt = [700, *told("user\nhi"), 701, *told("\n"), 700, *told("assistant\n")]
    assert asked == [([prompt], [0, 701])]


# Datasets ----------------------------------------------------------------------------------------


def some_examples(n=200, seed=0):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 9) for _ in range(n)]
    return [
        Example([rng.randrange(99) for _ in range(k)], [rng.random() < 0.2 for _ in range(k)])
        for k in lengths
    ]


def as_lists(data):
    return [
        Example(list(map(int, e.ids)), list(map(bool, e.labelled)))
        for e in (data[i] for i in range(len(data)))
    ]


def test_a_dataset_holds_its_examples_in_order():
    examples = some_examples()
    data = Dataset(iter(examples))
    assert (
        len(data) == 200
        and as_lists(data) == examples
        and data.lengths() == [len(e.ids) for e in examples]
    )
    chosen = [7, 199, 0, 0, 8]
    assert as_lists(Dataset(data[i] for i in chosen)) == [examples[i] for i in chosen]
    empty = Dataset([])
    assert len(empty) == 0 and empty.lengths() == []
    assert data[0].ids.dtype == np.int32 and data[0].labelled.dtype == bool, "arrays: small"


def test_a_row_trains_if_it_has_a_label_behind_its_first_token():
    """Nothing predicts the first token, so a label there teaches nothing."""
    edges = [Example([1], [True]), Example([1, 2], [True, False]), Example([1, 2], [False, True])]
    examples = some_examples(500) + edges
    expected = [any(e.labelled[1:]) for e in examples]
    assert [e.trains for e in Dataset(examples)] == expected == [e.trains for e in examples]
    assert 100 < sum(expected) < 400


def test_a_padded_batch_has_each_row_at_the_left_and_labels_only_where_they_are():
    examples = some_examples(6)
    ids, labels, mask = pad_batch([Dataset(examples)[i] for i in range(6)], 77, "cpu")
    T = max(len(e.ids) for e in examples)
    pad = [[0] * (T - len(e.ids)) for e in examples]
    assert ids.tolist() == [e.ids + [77 for _ in p] for e, p in zip(examples, pad)]
    assert mask.tolist() == [
        [True] * len(e.ids) + [False for _ in p] for e, p in zip(examples, pad)
    ]
    expected = [
        [i if on else -100 for i, on in zip(*e)] + [-100 for _ in p] for e, p in zip(examples, pad)
    ]
    assert labels.tolist() == expected and ids.dtype == labels.dtype == torch.int64


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), max_position_embeddings=256)


def arguments(base, path, *flags):
    argv = ["--variant", "perft_s", "--base", base, "--out", "nowhere", "--data", path, *flags]
    return train.parse_args([str(word) for word in argv])


def test_rows_whose_answer_lies_behind_the_cut_are_dropped_and_counted_and_no_row_lacks_a_label(
    base, tmp_path, world
):
    """Of 40 rows every fourth has a prompt longer than max_length. Counts against the rows; batches
    one by one."""
    long = "x " * 400
    rows = [record(i, instruction=long if i % 4 == 0 else f"say {i}") for i in range(40)]
    path = write(tmp_path / "rows.json", json.dumps(rows))
    args = arguments(
        base, path, "--template", "plain", "--max_length", 100, "--held_out", 8, "--batch_size", 4
    )
    data = dataset.load_data(args, world, 256)
    kept, out = split(40, 8, 42)
    texts = [[f"say {i}\n\n{i}" for i in some if i % 4] for some in (kept, out)]
    for part, expected in zip((data.train, data.held_out), texts):
        assert [world.decode(part[i].ids) for i in range(len(part))] == expected
    said = "\n".join(data.notes)
    assert f"40 alpaca rows: {len(texts[0])} train, {len(texts[1])} are held out" in said
    assert (
        "10 rows lost their end to --max_length 100; 10 of them had no label left and were dropped"
        in said
    )
    assert data.steps == data.steps_per_epoch == -(-len(texts[0]) // 4), "an epoch is what is left"
    assert args.steps is None, "what is derived stands in Data, not among the flags"
    source = dataset.batches(args, data, world, 0)
    for _ in range(2 * data.steps):
        _, labels, mask = next(source)
        assert mask.any(1).all() and (labels[:, 1:] != -100).any(1).all()


def test_notes_tell_tokens_share_of_labels_and_padding(base, tmp_path, world):
    rows = [record(i, instruction="word " * (i % 7)) for i in range(50)]
    path = write(tmp_path / "rows.json", json.dumps(rows))
    args = arguments(base, path, "--held_out", 0, "--batch_size", 8)
    data = dataset.load_data(args, world, 256)
    examples = [encode([(TEMPLATES["papers"](row, False), row["output"])], world) for row in rows]
    tokens, labels = (
        sum(map(f, examples)) for f in (lambda e: len(e.ids), lambda e: sum(e.labelled))
    )
    assert f"{tokens:,} tokens, {labels / tokens:.1%} of them labels" in data.notes[1]
    assert (
        data.held_out is None and len(data.train) == 50 and "7 steps are an epoch" in data.notes[1]
    )
    assert len(data.notes) == 3, "nothing was cut, so nothing is said of it"
    assert data.template == "papers" and data.max_length == 256


def test_nothing_left_to_train_on_is_told_with_the_numbers(base, tmp_path):
    path = write(tmp_path / "rows.json", json.dumps([record(i) for i in range(9)]))
    for flags, parts in (
        (["--held_out", 9], ["9 rows", "9 are held out"]),
        (["--held_out", 0, "--max_length", 3], ["9 rows", "9 have no label within --max_length 3"]),
    ):
        run = ["--variant", "perft_s", "--base", base, "--data", path, "--out", tmp_path / "run"]
        code, message = failure(*run, *flags)
        assert (
            code == 1
            and str(path) in message
            and "\n" not in message
            and all(part in message for part in parts)
        )


def test_held_out_rows_are_those_of_datasets_train_test_split():
    """Its source: permutation = generator.permutation(n); the first are the test rows, the rest in
    order train."""
    for n, held_out in ((4000, 120), (10, 3), (5, 0)):
        order = np.random.default_rng(42).permutation(n).tolist()
        kept, out = split(n, held_out, 42)
        assert out == order[:held_out] and kept == order[held_out:]
        try:
            from datasets import Dataset as Theirs
        except ImportError:
            continue
        if held_out:
            theirs = Theirs.from_dict({"i": list(range(n))}).train_test_split(
                test_size=held_out, seed=42
            )
            assert (theirs["train"]["i"], theirs["test"]["i"]) == (kept, out)


def test_a_file_is_tokenised_as_encode_says_in_the_order_of_its_rows(base, tmp_path, world):
    """Whatever decides about ids is in force: template, labels on the prompt, length."""
    rows = [record(i, instruction="word " * i) for i in range(12)]
    path = write(tmp_path / "rows.json", json.dumps(rows))
    cases = [
        (["--template", "plain", "--max_length", 30], "plain", {"max_length": 30}),
        (["--template", "plain"], "plain", {}),
        (
            ["--train_on_inputs", "--max_length", 200],
            "papers",
            {"max_length": 200, "train_on_inputs": True},
        ),
    ]
    for flags, template, options in cases:
        data = dataset.load_data(arguments(base, path, "--held_out", 0, *flags), world, 256)
        turns = [(TEMPLATES[template](row, False), row["output"]) for row in rows]
        examples = [encode([turn], world, **{"max_length": 256} | options) for turn in turns]
        order, _ = split(12, 0, 42)
        assert as_lists(data.train) == [examples[i] for i in order if examples[i].trains]


def test_a_row_is_shown_with_its_labels_marked(base, tmp_path, world):
    """On the screen, too: what the first row ends with. What is marked is what the labels say."""
    example = encode([("say no\n", "no"), ("say it\n", "it is")], world)
    assert dataset.rendered(example, world) == (
        "say no\n«no<|endoftext|>»say it\n«it is<|endoftext|>»"
    )
    everything = encode([("say no\n", "no")], world, train_on_inputs=True)
    assert dataset.rendered(everything, world) == "«say no\nno<|endoftext|>»"

    turns = [("user", "hi"), ("assistant", "hello you"), ("user", "and?"), ("assistant", "bye")]
    path = write(tmp_path / "chat.jsonl", lines_of(chat(*turns)))
    data = dataset.load_data(arguments(base, path, "--held_out", 0), world, 256)
    text = "<|user|>\nhi\n<|assistant|>\n«hello you<|endoftext|>»"
    text += "\n<|user|>\nand?\n<|assistant|>\n«bye<|endoftext|>»"
    assert data.template == "chat" and repr(text) in data.notes[2]


def test_answers_that_are_all_empty_are_warned_about(base, tmp_path, world):
    """Nothing is learnt from them but to end at once. One that is not empty is enough."""
    for answers, warned in ((["", "", ""], True), (["", "x", ""], False)):
        path = write(tmp_path / "rows.json", lines_of(*[record(output=text) for text in answers]))
        flags = ("--held_out", 0, "--template", "plain")
        notes = dataset.load_data(arguments(base, path, *flags), world, 256).notes
        assert any("every answer is empty" in note for note in notes) == warned
        path = write(
            tmp_path / "chat.jsonl",
            lines_of(*[chat(("user", "hi"), ("assistant", text)) for text in answers]),
        )
        notes = dataset.load_data(arguments(base, path, "--held_out", 0), world, 256).notes
        assert any("every answer is empty" in note for note in notes) == warned


# Batches -----------------------------------------------------------------------------------------


def skewed(n=4000, seed=1):
    """Lengths as texts have them: most short, some long."""
    rng = random.Random(seed)
    return [int(rng.lognormvariate(4.5, 0.6)) + 1 for _ in range(n)]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000, 4001])
@pytest.mark.parametrize("lengths", [skewed, lambda n: [1] * n])
def test_an_epoch_is_every_row_once(n, lengths):
    batches = epoch_batches(lengths(n), 16, "0 0")
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert sorted(map(len, batches), reverse=True) == [16] * (n // 16) + (
        [n % 16] if n % 16 else []
    )


def test_the_order_of_batches_depends_on_the_seed_alone():
    lengths = skewed(1000)
    random.seed(5)
    one = epoch_batches(lengths, 16, "0 0")
    random.seed(6)
    assert epoch_batches(lengths, 16, "0 0") == one and random.random() == random.Random(6).random()
    assert epoch_batches(lengths, 16, "0 1") != one != epoch_batches(lengths, 16, "1 0")
    longest = [max(lengths[i] for i in batch) for batch in one]
    rises = sum(a < b for a, b in zip(longest, longest[1:]))
    assert 20 < rises < 42, (
        "batches are shuffled: of 62 neighbours about half rise, not each window from short to long"
    )


def test_rows_of_one_length_are_in_random_order_and_of_others_padding_is_a_small_part_of_that():
    """Padding counted position by position. Here random order wastes six tenths, sorting a few
    batches at a time two."""
    lengths = skewed()
    by_length, at_random = epoch_batches(lengths, 16, "0 0"), epoch_batches([1] * 4000, 16, "0 0")
    shares = []
    for batches in (by_length, at_random):
        cells = [
            1 if t < lengths[i] else 0
            for b in batches
            for i in b
            for t in range(max(lengths[j] for j in b))
        ]
        shares.append(1 - sum(cells) / len(cells))
        assert dataset.padding_share(lengths, batches) == pytest.approx(shares[-1], abs=1e-12)
    assert shares[1] > 0.35 and shares[0] < shares[1] / 3, shares
    spread = [len({lengths[i] for i in batch}) for batch in by_length]
    assert sum(spread) > 2 * len(spread), "still mixed: batches are not of one length"


def test_training_sees_other_batches_each_epoch_and_all_rows_in_each(base, tmp_path, world):
    """train.batches from any step on: the same as from the beginning, so that a resumed run
    continues."""
    path = write(
        tmp_path / "rows.json",
        json.dumps([record(i, instruction="w " * (i % 9)) for i in range(30)]),
    )
    args = arguments(base, path, "--held_out", 0, "--batch_size", 4, "--template", "plain")
    data = dataset.load_data(args, world, 256)
    assert data.steps == 8

    def first(n, start):
        source = dataset.batches(args, data, world, start)
        return [next(source)[0].tolist() for _ in range(n)]

    whole = first(24, 0)
    for start in (1, 7, 8, 9, 17):
        assert first(24 - start, start) == whole[start:]
    said = [
        sorted(
            world.decode([i for i in row if i != world.pad_id])
            for b in whole[e : e + 8]
            for row in b
        )
        for e in (0, 8, 16)
    ]
    assert said[0] == said[1] == said[2] and len(set(said[0])) == 30 and whole[:8] != whole[8:16]


def test_a_row_is_never_longer_than_the_models_positions(base, tmp_path, world):
    path = write(
        tmp_path / "rows.json", json.dumps([record(i, output="w " * 500) for i in range(9)])
    )
    args = arguments(base, path, "--held_out", 0, "--max_length", 5000)
    data = dataset.load_data(args, world, 256)
    assert data.max_length == 256 and data.train.lengths() == [256] * 9
    assert "9 rows lost their end to --max_length 256; 0 of them" in data.notes[3]
