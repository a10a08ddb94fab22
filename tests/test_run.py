"""What stands under every command: files that are read with suspicion and written whole, the
command line, its boundary for mistakes and interruptions, and the folder of a run."""

import argparse
import errno
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data import run

ROOT = Path(__file__).resolve().parent.parent


def fault(action, *words, kind=ValueError):
    """The message of the fault: of that kind, on one line, and with the words in it."""
    with pytest.raises(kind) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message
    return message


# Reading -----------------------------------------------------------------------------------------


def test_json_is_read_as_utf_8(tmp_path):
    run.write_text(tmp_path / "a.json", '{"größe": "重み"}')
    assert run.read_json(tmp_path / "a.json") == {"größe": "重み"}


NO_OBJECTS = {
    "empty": (b"", ["not valid JSON"]),
    "cut off": (b"{", ["not valid JSON"]),
    "syntax": (b'{"a": 1,\n\n"b": }', ["not valid JSON", "line 3"]),
    "two": (b'{"a": 1} {}', ["not valid JSON"]),
    "a list": (b"[1, 2]", ["a JSON list", "expected an object"]),
    "a text": (b'"a"', ["a JSON str", "expected an object"]),
    "null": (b"null", ["expected an object"]),
    "not UTF-8": (b'{"a": "\xff"}', ["byte 7 is not UTF-8"]),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), ["is not UTF-8"]),
    "lists nested deeply": (b"[" * 100_000, ["not valid JSON", "nested too deeply"]),
    "objects nested deeply": (b'{"a":' * 100_000, ["not valid JSON", "nested too deeply"]),
    "5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", ["not valid JSON"]),
}


@pytest.mark.parametrize("case", NO_OBJECTS)
def test_what_is_no_json_object_is_named(tmp_path, case):
    content, words = NO_OBJECTS[case]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    fault(lambda: run.read_json(path), path, *words)


KEYS = {
    "a": (str, 5, "a is 5, expected a text"),
    "rank": (int, True, "rank is true, expected a whole number"),
    "rank_": (int, 2**63, "rank_ is 9223372036854775808, expected a whole number"),
    "x": (float, float("nan"), "x is NaN, expected a number"),
    "y": (float, 10**400, "expected a number"),
    "b": (bool, 1, "b is 1, expected true or false"),
    "l": (list, {}, "l is {}, expected a list"),
    "o": (dict, [], "o is [], expected an object"),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_holds_another_kind_is_named(tmp_path, key):
    kind, value, words = KEYS[key]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({key: value}))
    fault(lambda: run.read_json(path, **{key: kind}), path, words)


def test_keys_of_the_right_kind_are_taken_and_missing_ones_are_no_fault(tmp_path):
    content = {"a": "t", "rank": -3, "x": 2, "b": False, "l": [1], "o": {}, "more": None}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    kinds = {"a": str, "rank": int, "x": float, "b": bool, "l": list, "o": dict}
    assert run.read_json(path, **kinds, more=int, missing=str) == content


def test_what_is_no_file_is_named_and_not_opened(tmp_path, monkeypatch):
    """Missing; a folder; a pipe, of which a read would never end; and more than any such file."""
    path = tmp_path / "a.json"
    fault(lambda: run.read_json(path), path, "no such file", kind=FileNotFoundError)
    fault(lambda: run.read_json(tmp_path), tmp_path, "not a regular file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        fault(lambda: run.read_json(tmp_path / "pipe"), "pipe", "not a regular file")
    path.write_text(json.dumps({"a": "x" * 100}))
    assert run.read_json(path)
    monkeypatch.setattr(run, "LARGEST_JSON", 100)
    fault(lambda: run.read_json(path), path, "more bytes than any file of its kind")


def test_a_line_of_a_file_is_named_like_a_file():
    """parse_json takes any place: the file, or the file and the line."""
    assert run.parse_json("[1]", "rows.jsonl:3") == [1]
    said = fault(lambda: run.parse_json("[1", "rows.jsonl:3"), "rows.jsonl:3: not valid JSON")
    assert "line 1" not in said


SHOWN = [
    ("two\nlines", '"two\\nlines"'),
    ("größe", '"größe"'),
    ("left\u202eright", '"left\\u202eright"'),
    ("\ud800", '"\\ud800"'),
    ("\x1b[31m", '"\\u001b[31m"'),
    (None, "null"),
    (True, "true"),
    ([1, {"a": 2.5}], '[1, {"a": 2.5}]'),
    (Path("a b"), "a b"),
    ({1}, "{1}"),
    ("x" * 98, '"' + "x" * 98 + '"'),
    ("x" * 99, '"' + "x" * 96 + "..."),
    ("x" * 10**6, '"' + "x" * 96 + "..."),
]


def test_a_value_is_shown_on_one_printable_line_of_at_most_100_characters():
    for value, text in SHOWN:
        shown = run.shown(value)
        assert shown == text and shown.isprintable() and len(shown) <= 100


def test_many_characters_that_do_not_print_are_shown_too():
    """Escaped they are longer: the cut comes after."""
    shown = run.shown("\u202e" * 1000)
    assert shown.isprintable() and len(shown) == 100


def test_values_nested_as_deeply_as_json_can_hold_them_are_shown():
    for depth in range(900, 1000):
        try:
            value = json.loads("[" * depth + "]" * depth)
        except RecursionError:
            return
        assert run.shown(value).startswith("[[[") and len(run.shown(value)) == 100


def test_of_json_lines_a_last_one_that_was_cut_off_does_not_count(tmp_path):
    """Nor do other line ends than \\n divide: a text may hold U+2028."""
    path = tmp_path / "lines"
    for text, lines in [("", []), ("a", []), ("a\n", ["a"]), ("a\nb\u2028c\nd", ["a", "b\u2028c"])]:
        path.write_text(text, encoding="utf-8")
        assert run.whole_lines(path) == lines


# Writing -----------------------------------------------------------------------------------------


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_text_and_json_are_written_as_utf_8(tmp_path):
    run.write_text(tmp_path / "a", "größe\r\n")
    assert (tmp_path / "a").read_bytes() == "größe\r\n".encode()
    run.write_json(tmp_path / "b", {"a": [1, 2.5, None], "größe": "重み"}, indent=2)
    assert run.read_json(tmp_path / "b") == {"a": [1, 2.5, None], "größe": "重み"}
    text = (tmp_path / "b").read_text()
    assert text.startswith('{\n  "a"') and text.endswith("}\n")
    run.write_json(tmp_path / "b", {})
    assert (tmp_path / "b").read_text() == "{}\n" and names(tmp_path) == ["a", "b"]


class Broken(Exception):
    """What happens in the middle of writing."""


@pytest.mark.parametrize("old", [None, "the old file"], ids=["a new file", "over an old file"])
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, old, where
):
    """Half of a file under the right name would be read one day; under another name it would fill
    the disk."""
    path = tmp_path / "config.json"
    if old:
        path.write_text(old)

    def fail(*args):
        raise Broken

    def write(file):
        file.write(b"half")
        if where == "write":
            raise Broken

    if where != "write":
        monkeypatch.setattr(run.os, where, fail)
    with pytest.raises(Broken):
        run.write_atomically(path, write)
    assert names(tmp_path) == (["config.json"] if old else [])
    assert not old or path.read_text() == old


def test_a_file_is_complete_and_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen, synced = tmp_path / "f", [], []
    path.write_text("old")
    replace, fsync = os.replace, os.fsync

    def look(source, target):
        seen.append((Path(source).read_text(), Path(target).read_text(), len(synced)))
        replace(source, target)

    monkeypatch.setattr(run.os, "replace", look)
    monkeypatch.setattr(run.os, "fsync", lambda number: synced.append(fsync(number)))
    run.write_text(path, "new")
    assert seen == [("new", "old", 1)] and path.read_text() == "new" and names(tmp_path) == ["f"]


def test_two_processes_that_write_one_file_do_not_share_a_temporary_one(tmp_path, monkeypatch):
    seen = []
    for number in (1, 2):
        monkeypatch.setattr(run.os, "getpid", lambda number=number: number)
        run.write_atomically(tmp_path / "f", lambda file: seen.append(file.name))
    assert len(set(seen)) == 2


def test_what_cannot_be_written_is_one_line_with_cause_and_remedy(tmp_path, monkeypatch):
    """A folder that is not there; a name that is a folder; a full disk."""
    missing = tmp_path / "missing" / "f"
    words = ("could not be written", "No such file or directory", "disk full")
    fault(lambda: run.write_text(missing, "a"), missing, *words, kind=OSError)
    (tmp_path / "folder").mkdir()
    fault(lambda: run.write_text(tmp_path / "folder", "a"), tmp_path / "folder", kind=OSError)

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.os, "fsync", full)
    fault(lambda: run.write_text(tmp_path / "f", "a"), "No space left on device", kind=OSError)
    assert names(tmp_path) == ["folder"]


# The command line --------------------------------------------------------------------------------


def refused(parser, argv, capsys):
    """What parser says about a wrong command line: one line, exit code 2, nothing on stdout."""
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(argv)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    return printed.err


def make_parser():
    parser = run.Parser(prog="train.py")
    parser.add_argument("--rank", type=run.count, default=16)
    parser.add_argument("--lr", type=run.positive)
    parser.add_argument("--warmup", type=run.from_zero)
    parser.add_argument("--p", type=run.number(float, 0, above=True, most=1))
    parser.add_argument("--seed", type=run.number(int, 0))
    return parser


def test_numbers_are_taken_at_their_bounds():
    argv = "--rank 1 --lr 1e-300 --warmup 0 --p 1 --seed 0".split()
    args = make_parser().parse_args(argv)
    assert vars(args) == {"rank": 1, "lr": 1e-300, "warmup": 0.0, "p": 1.0, "seed": 0}
    assert type(args.rank) is type(args.seed) is int and type(args.p) is float


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--rank", "0", "0 is out of range, it must be at least 1"),
        ("--rank", "-3", "-3 is out of range, it must be at least 1"),
        ("--rank", "2.5", "invalid whole number value: '2.5'"),
        ("--rank", "many", "invalid whole number value: 'many'"),
        ("--lr", "0", "0 is out of range, it must be more than 0"),
        ("--lr", "nan", "nan is out of range, it must be more than 0"),
        ("--lr", "inf", "inf is out of range, it must be more than 0"),
        ("--lr", "small", "invalid number value: 'small'"),
        ("--warmup", "-1e-9", "-1e-9 is out of range, it must be at least 0"),
        ("--warmup", "nan", "nan is out of range"),
        ("--p", "1.01", "1.01 is out of range, it must be more than 0 and at most 1"),
        ("--p", "nan", "nan is out of range, it must be more than 0 and at most 1"),
        ("--seed", "-1", "-1 is out of range, it must be at least 0"),
    ],
)
def test_a_number_out_of_range_is_told_with_its_bounds(flag, value, words, capsys):
    said = refused(make_parser(), [f"{flag}={value}"], capsys)
    assert said.startswith(f"train.py: error: argument {flag}: {words}")
    assert said.endswith("; see --help\n") and said.count("\n") == 1


def test_a_number_of_more_digits_than_python_or_a_float_takes_is_told_too(capsys):
    said = refused(make_parser(), ["--rank", "9" * 5000], capsys)
    assert said.startswith("train.py: error: argument --rank: invalid whole number value")
    said = refused(make_parser(), ["--rank", "9" * 400], capsys)
    assert "is out of range" in said and said.count("\n") == 1


def test_flags_are_not_abbreviated(capsys):
    """A flag that comes later may begin the same way."""
    assert make_parser().parse_args(["--rank", "2"]).rank == 2
    assert "--ran" in refused(make_parser(), ["--ran", "2"], capsys)


def test_a_parser_guesses_what_a_word_meant_among_its_flags_and_their_names():
    parser = make_parser()
    parser.add_argument("--task", choices=("sort", "kinship_new"))
    guesses = {
        "--rnak": "--rank",
        "warmup": "--warmup",
        "--kinship": "--task kinship_new",
        "sort": "--task sort",
        "--hepl": "--help",
    }
    for word, meant in guesses.items():
        assert parser.suggest(word) == f"; did you mean {meant}?"
    assert parser.suggest("--xyz") == ""


def test_a_table_of_flags_is_read_as_the_command_that_the_flags_make_it(capsys):
    """By hand, of three: what is given, what `decide` says, what the table says, None."""
    table = [
        run.group(
            "all",
            tasks=run.Flag(["sort", "add"], None, "what to learn"),
            rank=run.Flag(run.count, 16, "r"),
            fast=run.Flag(run.ON, False, "or slow"),
        )
    ]

    def decide(given):
        return {"rank": 4 + len(given)}, {"fast": "is for others"} if "tasks" in given else {}

    def read(line):
        return vars(run.read_flags(table, line.split(), decide, description="A test."))

    assert read("") == {"tasks": None, "rank": 4, "fast": False}
    assert read("--fast --rank 2") == {"tasks": None, "rank": 2, "fast": True}
    assert read("--tasks add sort") == {"tasks": ["add", "sort"], "rank": 5, "fast": None}
    for line, said in {
        "--tasks add --fast": "--fast is for others;",
        "--tasks juggle": "invalid choice: 'juggle'",
        "--fats": "--fats was not understood; did you mean --fast?;",
        "--fast --unknown=3": "--unknown was not understood;",
    }.items():
        with pytest.raises(SystemExit) as stop:
            read(line)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_of_several_processes_the_first_complains(monkeypatch, capsys):
    """Under torchrun; another launcher's RANK says nothing."""
    monkeypatch.setenv("RANK", "1")
    assert "error" in refused(make_parser(), ["--rank", "0"], capsys)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert "error" in refused(make_parser(), ["--rank", "0"], capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(make_parser(), ["--rank", "0"], capsys) == ""
    monkeypatch.setenv("RANK", "0")
    assert "error" in refused(make_parser(), ["--rank", "0"], capsys)


def test_help_has_lines_of_at_most_100_characters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    parser = run.Parser(prog="train.py", description="word " * 60)
    parser.add_argument("--flag", help="word " * 60)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and 90 < max(map(len, lines)) <= 100


# The boundary ------------------------------------------------------------------------------------


def ended(main, *arguments):
    """How run.command lets main end: its exit."""
    with pytest.raises(SystemExit) as stop:
        run.command(main)(*arguments)
    return stop.value.code


def raises(error):
    def main(argv=None):
        raise error

    return main


def test_a_command_gets_its_arguments_and_gives_its_result():
    @run.command
    def main(argv=None):
        """What it does."""
        return argv

    assert main(["a"]) == ["a"] and main() is None
    assert main.__name__ == "main" and main.__doc__ == "What it does."


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("config.json: no such thing"), "error: config.json: no such thing"),
        (ValueError("what a library\n  says on\tlines"), "error: what a library says on lines"),
        (FileNotFoundError("f: no such file"), "error: f: no such file"),
        (OSError("full"), "error: full"),
        (
            PermissionError(13, "Permission denied", "out/f"),
            "error: out/f: Permission denied; is there room, and may it be written?",
        ),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "error: 'utf-8' codec"),
    ],
    ids=repr,
)
def test_a_mistake_is_one_line_and_exit_code_1(error, line):
    """A text as the code of sys.exit goes to stderr, and the code is 1."""
    said = ended(raises(error))
    assert said.startswith(line) and "\n" not in said


def test_a_long_mistake_is_cut():
    said = ended(raises(ValueError("x" * 10**6)))
    assert len(said) < 1010 and said.endswith("...")


@pytest.mark.parametrize("error", [TypeError("a"), KeyError("a"), AssertionError(), RuntimeError()])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run.command(raises(error))()


def test_usage_errors_keep_their_exit_code():
    assert ended(lambda: make_parser().parse_args(["--rank", "0"])) == 2


def test_an_interruption_is_no_error(capsys):
    """Ctrl-C: 130, as shells count it; a command may say what is where, and how to go on."""
    assert ended(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "stopped\n")
    assert ended(raises(run.Stopped("out/x is complete up to step 3"))) == 130
    assert capsys.readouterr() == ("", "stopped: out/x is complete up to step 3\n")
    assert ended(raises(run.Stopped("", 143))) == 143


def test_a_request_to_end_is_an_interruption_with_143(capsys):
    """SIGTERM, while the command runs and no longer: what stood before is put back."""
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    assert ended(main) == 143 and cleaned == [True]
    assert capsys.readouterr() == ("", "stopped\n")
    assert signal.getsignal(signal.SIGTERM) == before
    ended(raises(ValueError()))
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_a_process_of_its_own(tmp_path):
    """Exit codes and both streams, as a shell sees them; and no torch was needed for that."""
    program = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys\nfrom data import run\n"
        "def main():\n    assert 'torch' not in sys.modules\n    raise {}\n"
        "run.command(main)()\n"
    )
    for error, code, said in [
        ("ValueError('cause\\nplace')", 1, "error: cause place\n"),
        ("KeyboardInterrupt", 130, "stopped\n"),
    ]:
        argv = [sys.executable, "-c", program.format(error)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def usage_error(action, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        action()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    return said


# A run's folder ----------------------------------------------------------------------------------

FILES = ("adapter_model.safetensors", "adapter_config.json")
RUN = ("config.json", "metrics.jsonl", *FILES)
UNFINISHED = (*RUN, "state.safetensors")


def make_folder(tmp_path, files):
    out = tmp_path / "out"
    if files is not None:
        out.mkdir()
        for name in files:
            (out / name).write_text(name)
    return out


@pytest.mark.parametrize(
    ("files", "resume", "overwrite"),
    [
        (None, False, False),
        ((), False, False),
        (("notes.txt",), False, False),
        ((), False, True),
        (RUN, False, True),
        (UNFINISHED, False, True),
        (UNFINISHED, True, False),
    ],
)
def test_a_free_folder_and_one_of_which_the_flags_speak_are_taken(
    tmp_path, files, resume, overwrite
):
    """And nothing in it is touched."""
    out = make_folder(tmp_path, files)
    run.check_run_folder(out, resume, overwrite, FILES)
    assert files is None or names(out) == sorted(files)
    assert out.exists() == (files is not None)


@pytest.mark.parametrize(
    ("files", "resume", "overwrite", "words"),
    [
        (RUN, False, False, ["already holds a run: replace it with --overwrite"]),
        (UNFINISHED, False, False, ["continue it with --resume, replace it with --overwrite"]),
        (RUN, True, False, ["no unfinished run", "drop --resume"]),
        (None, True, False, ["no unfinished run", "drop --resume"]),
        (UNFINISHED, True, True, ["--resume and --overwrite: choose one"]),
        (("config.json",), False, False, ["holds config.json, but no run", "another --out"]),
        (("config.json", "model.safetensors"), False, True, ["holds config.json, but no run"]),
        (FILES, False, True, [f"holds {FILES[0]}, but no run"]),
        (("state.safetensors", "config.json"), True, False, ["holds config.json, but no run"]),
    ],
)
def test_a_folder_that_holds_something_of_value_is_refused(
    tmp_path, capsys, files, resume, overwrite, words
):
    """A run that nobody said to replace, a model, an adapter; and flags that contradict."""
    out = make_folder(tmp_path, files)
    said = usage_error(lambda: run.check_run_folder(out, resume, overwrite, FILES), capsys)
    assert all(word in said for word in words)
    assert files is None or names(out) == sorted(files)


def test_what_changed_is_named_with_both_sides():
    """Keys that are asked for now; what was written and nobody asks for is no change."""
    assert run.changes({"a": 1, "b": [1, 2], "old": 3}, {"a": 1, "b": [1, 2]}) == ""
    assert run.changes({"lr": 1e-3}, {"lr": 1e-4}) == "lr 0.001 then, 0.0001 now"
    assert run.changes({}, {"task": "law"}) == 'task null then, "law" now'
    now = {"a": "x\ny", "b": "z" * 1000}
    text = run.changes({"a": 1, "b": 2}, now)
    assert "\n" not in text and len(text) < 300 and text.count(" then, ") == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = run.Log(tmp_path / "metrics.jsonl", None)
    log.file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(OSError) as told:
        log.write("text", event="step")
    assert run.one_line(told.value).startswith("/dev/full: No space left on device; is there room")


def test_a_log_is_json_lines_and_a_text_on_the_screen(tmp_path, capsys):
    """Each line is in the file when it is written; of several processes only the first has one."""
    path = tmp_path / "metrics.jsonl"
    log = run.Log(path, None)
    log.write("step 1", event="step", step=1, loss=0.5)
    (line,) = run.whole_lines(path)
    assert json.loads(line) == {"event": "step", "step": 1, "loss": 0.5}
    log.write("größe\u2028", event="note", note="größe\u2028")
    assert len(run.whole_lines(path)) == 2
    assert capsys.readouterr().out == "step 1\ngröße\u2028\n"
    run.Log(None, None).write("alone", step=9)
    assert capsys.readouterr().out == "alone\n" and names(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "damage", ["\0\0\0", "5", '{"step": 1', '"x"', '{"step": "a"}', "[" * 9999]
)
def test_a_damaged_line_of_a_log_is_named(damage, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 2}}\n{{"st')
    with pytest.raises(
        ValueError, match=r"metrics.jsonl:2: is no line of a log; remove it"
    ) as told:
        run.Log(path, 2)
    assert "\n" not in str(told.value)
    assert path.read_text().endswith('{"st'), "it stays as it was"


def test_a_log_that_is_continued_forgets_what_will_be_written_again(tmp_path, capsys):
    """Lines of later steps, and a last one that was cut off; a new run starts with none."""
    path = tmp_path / "metrics.jsonl"
    records = [{"event": "before"}, {"step": 1}, {"step": 2}, {"step": 3}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text + '{"step": 2, "cut o')
    log = run.Log(path, 2)
    log.write("step 3 again", step=3, again=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [*records[:3], {"step": 3, "again": True}]
    run.Log(path, None)
    assert path.read_text() == ""


def test_the_memory_of_this_process_and_of_the_machine_are_numbers_of_bytes():
    """More than Python itself takes, and less than there is."""
    assert 1e6 < run.peak_memory() < 1e13
    assert run.free_memory() == math.inf or 1e6 < run.free_memory() < 1e13


def test_types_of_flags_have_names_that_argparse_can_say():
    with pytest.raises(argparse.ArgumentTypeError):
        run.count("0")
    assert run.count.__name__ == "whole number" and run.positive.__name__ == "number"


def test_a_command_runs_in_another_thread_too():
    """Where Python allows no signal handler: a notebook, a server."""
    done = []
    thread = threading.Thread(target=run.command(lambda: done.append(1)))
    thread.start()
    thread.join()
    assert done == [1]


def test_a_command_whose_standard_output_is_closed_does_its_work_all_the_same(tmp_path):
    folder = tmp_path / "world"
    folder.mkdir()
    command = [sys.executable, str(ROOT / "data" / "skills.py"), str(folder)]
    for argv, code in ((command, 0), ([*command[:2], str(tmp_path / "no" / "folder")], 1)):
        done = subprocess.run(f"{shlex.join(argv)} >&-", shell=True, capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr
        assert done.stderr.count("\n") == code
    assert (folder / "tokenizer.json").exists()


def test_what_a_full_disk_does_not_take_is_named(tmp_path):
    with pytest.raises(OSError) as caught, run.naming(tmp_path / "predictions.jsonl"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert run.one_line(caught.value).startswith(f"{tmp_path / 'predictions.jsonl'}: No space left")
