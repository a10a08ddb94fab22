"""What stands under every command: files that are read with suspicion and written whole, the
command line, its one boundary for mistakes and interruptions, and the folder of a run.

Everything on disk is JSON or text (tensors: data/hub.py). A file that is read may be damaged, or a
stranger's: whatever it holds, the answer is the right content or one line that says cause, place
and remedy. A file that is written gets a temporary name first, so that a reader sees the old file
or the new one, and nothing in between.

A run folder holds config.json (every setting), metrics.jsonl (one JSON object a line), what was
trained, while the run is unfinished state.safetensors (the trained parameters and AdamW's moments),
and while a process is at work a file lock.HOST.PID.

This file imports no torch: tokenizers, skills and downloads stand on it, and do without.
"""

# ruff: noqa: E402 (Ctrl-C comes before the imports)

import os
import signal
import sys

# Ctrl-C, before anything else --------------------------------------------------------------------


def is_shared():
    """Did torchrun start this process, with others? It is believed alone: other launchers set some
    of this too, for processes that do not work together."""
    return {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= os.environ.keys()


def is_silent():
    """Of several processes the first speaks."""
    return is_shared() and os.environ["RANK"] != "0"


def end_now(number, frame):
    """While Python imports (torch takes seconds, and an exception there may be swallowed), and when
    a stop itself is too slow for somebody."""
    if not is_silent():
        os.write(2, b"stopped\n")
    os._exit(128 + number)


def send_signals_to(handler):
    """From now on Ctrl-C and SIGTERM call handler(number, frame) -> what they called before."""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:  # as in the background of a shell
            continue
        try:
            before[number] = signal.signal(number, handler)
        except ValueError:  # in a thread that is not the main one
            pass
    return before


# The scripts import this file first. Whoever imports it as a library keeps his own answers.
here = os.path.dirname(os.path.realpath(__file__))
script = os.path.realpath(sys.argv[0])
if script.endswith(".py") and os.path.dirname(script) in (here, os.path.dirname(here)):
    send_signals_to(end_now)

import argparse
import difflib
import functools
import io
import json
import math
import platform
import re
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# Reading -----------------------------------------------------------------------------------------

LARGEST_JSON = 200_000_000  # bytes; the largest tokenizer.json that we know has 17 million
AGAIN = "copy or download it again"
KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def read_json(path, **kinds):
    """The JSON object in a file, whoever wrote it. `rank=int, base=dict`: what these keys hold, if
    they are there and not null. FileNotFoundError or ValueError of one line otherwise."""
    path = Path(path)
    if path.is_file() and path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path}: has more bytes than any file of its kind; {AGAIN}")
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    for key, kind in kinds.items():
        value = content.get(key)
        if value is not None and not is_kind(value, kind):
            raise ValueError(f"{path}: {key} is {shown(value)}, expected {KINDS[kind]}")
    return content


def is_kind(value, kind):
    """Is a value from a file of this kind? true is no number, and numbers are finite and have a
    size that an int64 holds."""
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) < 2**63
    return type(value) is kind


def read_text(path, remedy=AGAIN):
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; is it the right folder, and is it complete? {remedy}"
        )
    if not path.is_file():  # a folder, or a device or pipe, of which a read may never end
        raise ValueError(f"{path}: is not a regular file; {remedy}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; {remedy}") from None


def parse_json(text, place):
    """JSON -> its content; ValueError naming `place` (a file, or file:line)."""
    try:
        return json.loads(text)
    except RecursionError:
        cause = "nested too deeply"
    except ValueError as error:  # a number of thousands of digits, too
        cause = str(error).replace(": line 1 ", ": ")  # of a file, or of the line that is named
    raise ValueError(f"{place}: not valid JSON ({cause}; is it cut off?); {AGAIN}")


def shown(value):
    """A value from a file, for a message: on one line, printable, at most 100 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, RecursionError):
        text = str(value)
    return printable(text, 100)


def printable(text, most):
    """What does not print is escaped, and what is too long is cut."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def whole_lines(path):
    """Of JSON lines that are written as the work goes on: all but a last one that was cut off."""
    return read_text(path).split("\n")[:-1]  # not splitlines: a text may hold U+2028


# Writing -----------------------------------------------------------------------------------------


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path, content, indent=None):
    write_text(path, json.dumps(content, indent=indent) + "\n")


def write_atomically(path, write):
    """Call write(file) with a binary file that is renamed to `path` once all of it is written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # two runs may write one file, each for itself
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        cause = error.strerror or error
        raise OSError(
            f"{path}: could not be written ({cause}); is the disk full, or the folder read-only?"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)  # gone by now unless something failed


# The command line --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with help that reads like a page and mistakes in one line."""

    def __init__(self, **options):
        page = functools.partial(argparse.HelpFormatter, max_help_position=26, width=100)
        super().__init__(formatter_class=page, allow_abbrev=False, **options)

    def suggest(self, word):
        """What a word that was not understood may have meant, "" if nothing is near."""
        meant = {}
        for action in self._actions:
            flag = action.option_strings[0]
            meant |= {name: f"{flag} {name}" for name in action.choices or ()}
            meant |= {text.strip("-"): text for text in action.option_strings}
        near = difflib.get_close_matches(word.strip("-"), meant, cutoff=0.6)
        return f"; did you mean {meant[near[0]]}?" if near else ""

    def error(self, message):
        line = f"{self.prog}: error: {printable(message, 1000)}; see --help\n"
        self.exit(2, None if is_silent() else line)


def refuse(message):
    """A usage error that a parser alone does not find."""
    Parser(prog=Path(sys.argv[0]).name).error(message)


HUGE = 1e300  # whatever is above is a slip, or infinity


def number(kind, lowest, above=False, most=HUGE):
    """For argparse's type=: an int or float, at least (or above) `lowest`, at most `most`."""

    def parse(text):
        value = kind(text)
        fits = value > lowest if above else value >= lowest  # no comparison holds for NaN
        if not fits or value > most:
            bound = f"more than {lowest}" if above else f"at least {lowest}"
            if most < HUGE:
                bound += f" and at most {most}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {bound}")
        return value

    # argparse says "invalid whole number value: ..."
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


count = number(int, 1)
threads = number(int, 1, most=1024)  # of more, some systems die without a word
positive = number(float, 0, above=True)
from_zero = number(float, 0)
natural = number(int, 0, most=2**63 - 1)
fraction = number(float, 0, above=True, most=1)


# A table of flags --------------------------------------------------------------------------------

# A switch, as argparse calls it; the second has a --no-... too.
ON, ON_OFF = SWITCH = "store_true", argparse.BooleanOptionalAction


class Flag(NamedTuple):
    """A row of a command's table of flags."""

    # A kind of number (count, positive, ...); or "DIR", a text, shown so in --help; or ("a", "b"),
    # one of these names, of a list ["a", "b"] several; or ON, ON_OFF, a switch.
    takes: object
    default: object  # unless `decide` of read_flags has another
    about: str
    of: tuple[str, ...] | None = None  # the kinds of command that have it; None: all
    only_with: str | None = None  # a flag, without which this one says nothing
    not_with: str | None = None  # a flag, beside which it says nothing


def group(title, **flags):
    return title, flags


def read_flags(table, argv, decide, **page):
    """A command line -> the value of each flag in a table of groups.

    It is read twice: first every flag there is, to see which command this is. Of that one
    decide(given) says {name: default} where it is not the table's, and {name: why} for the flags
    that the command does not have: these are None. page: argparse's usage and description.
    """
    every = [name for _, flags in table for name in flags]
    first = make_parser(table, dict.fromkeys(every, argparse.SUPPRESS), (), add_help=False)
    given = vars(first.parse_known_args(argv)[0])
    defaults, absent = decide(given)
    parser = make_parser(table, defaults, absent, **page)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        why = absent.get(word.removeprefix("--"))
        parser.error(f"{word} {why or 'was not understood' + parser.suggest(word)}")
    return args


def make_parser(table, defaults, absent, **page):
    """A parser of all flags but those that are absent."""
    parser = Parser(**page)
    parser.set_defaults(**dict.fromkeys(absent))
    for title, flags in table:
        add = parser.add_argument_group(title).add_argument
        for name, flag in flags.items():
            if name not in absent:
                add(f"--{name}", **for_argparse(flag, defaults.get(name, flag.default)))
    return parser


def for_argparse(flag, default):
    """The options of add_argument."""
    about = flag.about
    if default is not None and default is not False:
        about += f" ({default})"
    if flag.takes in SWITCH:
        options = {"action": flag.takes}
    elif callable(flag.takes):
        options = {"type": flag.takes, "metavar": "N"}
    elif isinstance(flag.takes, str):
        options = {"metavar": flag.takes}
    else:
        options = {"choices": flag.takes, "metavar": "NAME"}
        about += f": {', '.join(flag.takes)}"
    if isinstance(flag.takes, list):
        options["nargs"] = "+"
    return options | {"default": default, "help": about}


# The boundary ------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with what a user should know: what is where, how to go on."""

    def __init__(self, message, code=130):
        super().__init__(message)
        self.code = code  # 128 + the signal's number


def raise_stopped(number, frame):
    signal.signal(number, end_now)
    raise Stopped("", 128 + number)


@contextmanager
def signals_go_to(handler):
    before = send_signals_to(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def noting():
    """Inside, the first Ctrl-C or SIGTERM is put into the list that this gives, and no more: the
    work ends where it is whole. A second one stops it at once."""
    noted = []

    def note(number, frame):
        if noted:
            raise_stopped(number, frame)
        noted.append(number)
        if not is_silent():
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    with signals_go_to(note):
        yield noted


@contextmanager
def last_words(text):
    """What text() says is told to who stops the work inside."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(str(stop) or text(), getattr(stop, "code", 130)) from None


def command(main):
    """Decorates a script's main: the one place where what goes wrong becomes a line and a code.

    ValueError and OSError are the user's input or machine: one line on stderr, exit code 1. Ctrl-C
    exits with 130, SIGTERM with 143. (Usage errors are argparse's: exit code 2.) Anything else is a
    defect of this project and keeps its traceback.
    """

    @functools.wraps(main)
    def guarded(*arguments):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # "?" for what the terminal does not have
        try:
            with signals_go_to(raise_stopped):
                result = main(*arguments)
                if sys.stdout:
                    sys.stdout.flush()  # what was said must be out, too
                return result
        except (ValueError, OSError) as error:
            line = f"error: {one_line(error)}"
            forget_output()
            tell_torchrun(line)
            sys.exit(line)
        except KeyboardInterrupt as stop:
            forget_output()
            line = f"stopped: {stop}" if str(stop) else "stopped"
            tell_torchrun(line)
            if not is_silent():
                print(line, file=sys.stderr)
            sys.exit(getattr(stop, "code", 130))

    return guarded


def forget_output():
    """What standard output does not take (a full disk, `| head -1`) goes nowhere. Else Python would
    try again at its end, and complain."""
    if not sys.stdout:  # it was closed
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell_torchrun(line):
    """torchrun ends with a report of its own, which quotes the file that each process left."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        write_json(file, {"message": line, "timestamp": int(time.time())})


def one_line(error):
    """An error's message: whatever a library put into it, on one line of bounded length."""
    text = str(error)
    if isinstance(error, OSError) and error.errno:  # else it would begin with "[Errno 28]"
        if error.filename:
            text = f"{error.filename}: {error.strerror}; is there room, and may it be written?"
        else:  # whoever writes a file says which
            text = f"standard output: {error.strerror}; is its disk full, or its reader gone?"
    return printable(" ".join(text.split()), 1000)


# A run's folder ----------------------------------------------------------------------------------


def is_alive(pid):
    """Might another process have this number? Not where it is this one's: in a container the next
    process may get the number of the last."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):  # no number of a process; somebody else's
        pass
    return pid != str(os.getpid())


@contextmanager
def locked(folder):
    """Inside, a folder, made if it is not there, is this process's alone, by its file
    lock.HOST.PID: each makes its own, then looks for others', so that no two go on. What dead
    processes left there is removed."""
    if is_silent():  # the first of several processes locks for all
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is not a folder; choose another")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    host = platform.node()
    mine = folder / f"lock.{host}.{os.getpid()}"
    mine.write_text("")
    try:
        for other in set(folder.glob("lock.*.*")) - {mine}:
            theirs, _, pid = other.name.removeprefix("lock.").rpartition(".")
            if theirs != host or is_alive(pid):
                refuse(
                    f"{folder}: process {pid} on {theirs} is at work in it; wait, or choose "
                    f"another --out (if there is no such process, remove {other.name})"
                )
            other.unlink(missing_ok=True)
        for file in [*folder.glob("*.*.*.tmp"), *folder.glob("model/*.*.*.tmp")]:
            ours = re.fullmatch(r"\w+\.(?:json|jsonl|safetensors|svg)\.(\d+)\.tmp", file.name)
            if ours and file.is_file() and not is_alive(ours[1]):
                file.unlink()
        yield
    finally:
        mine.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def check_run_folder(out, resume, overwrite, written):
    """Nothing that a user has is lost: refuse unless the folder is free of what a run writes there
    (`written`), or holds a run and the flags say what to do with it."""
    if resume and overwrite:
        refuse("--resume and --overwrite: choose one")
    has_run = (out / "metrics.jsonl").exists()
    unfinished = (out / "state.safetensors").exists()
    if resume and not unfinished:
        refuse(f"{out} holds no unfinished run to resume (no state.safetensors); drop --resume")
    others = [name for name in ("config.json", *written) if (out / name).exists()]
    if others and not has_run:
        refuse(
            f"{out} holds {others[0]}, but no run (a model folder, an adapter?); "
            "choose another --out"
        )
    if has_run and not (resume or overwrite):
        go_on = "continue it with --resume, " if unfinished else ""
        refuse(
            f"{out} already holds a run: {go_on}replace it with --overwrite, "
            "or choose another --out"
        )


def changes(then, now):
    """What differs in the settings of a continued work, "" if nothing does."""
    changed = []
    for name, value in now.items():
        before = then.get(name)
        if before != value:
            changed.append(f"{name} {shown(before)} then, {shown(value)} now")
    return "; ".join(changed)


@contextmanager
def naming(path):
    """A full disk does not say which file it could not take."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


class Log:
    """metrics.jsonl: one JSON object a line; and a text on the screen, above the progress bar.

    keep_until: a run is resumed at this step; lines of later ones will be written again.
    path None: the screen alone (of several processes the first writes the file).
    """

    def __init__(self, path, keep_until):
        self.file = None
        if path:
            kept = [] if keep_until is None else log_lines(path, keep_until)
            write_text(path, "".join(f"{line}\n" for line in kept))
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (until the end)

    def write(self, text, **record):
        from tqdm import tqdm  # here: Ctrl-C is answered the sooner

        tqdm.write(text)
        if not self.file:
            return
        with naming(self.file.name):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def sync(self):
        """All that was written is on the disk, whatever happens to the machine."""
        if not self.file:
            return
        with naming(self.file.name):
            os.fsync(self.file.fileno())


def log_lines(path, last_step):
    """The lines of a metrics.jsonl up to a step: those before the first of a later one. ValueError,
    with file:line, for a damaged one of them."""
    kept = []
    for i, line in enumerate(whole_lines(path)):
        try:
            step = json.loads(line).get("step", 0)
            if not is_kind(step, int):
                raise ValueError
            if step > last_step:
                break
            kept.append(line)
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(
                f"{path}:{i + 1}: is no line of a log; remove it, then --resume again"
            ) from None
    return kept


def peak_memory():
    """Bytes that this process held at most, of main memory; 0 where there is no way to ask."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory():
    """Bytes of main memory that a process may still take; infinity where nobody says."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):  # "MemAvailable:   123 kB"
                return 1024 * int(line.split()[1])
    return math.inf
