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

import argparse
import functools
import json
import math
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

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


def read_json(path: str | Path, **kinds: type) -> dict:
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


def is_kind(value, kind: type) -> bool:
    """Is a value from a file of this kind? true is no number, and numbers are finite and have a
    size that an int64 holds."""
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) < 2**63
    return type(value) is kind


def read_text(path: Path, remedy=AGAIN) -> str:
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


def parse_json(text: str, place: str | Path):
    """JSON -> its content; ValueError naming `place` (a file, or file:line)."""
    try:
        return json.loads(text)
    except RecursionError:
        cause = "nested too deeply"
    except ValueError as error:  # a number of thousands of digits, too
        cause = str(error).replace(": line 1 ", ": ")  # of a file, or of the line that is named
    raise ValueError(f"{place}: not valid JSON ({cause}; is it cut off?); {AGAIN}")


def shown(value) -> str:
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


def whole_lines(path: Path) -> list[str]:
    """Of JSON lines that are written as the work goes on: all but a last one that was cut off."""
    return read_text(path).split("\n")[:-1]  # not splitlines: a text may hold U+2028


# Writing -----------------------------------------------------------------------------------------


def write_text(path: str | Path, text: str):
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: str | Path, content, indent: int | None = None):
    write_text(path, json.dumps(content, indent=indent) + "\n")


def write_atomically(path: str | Path, write: Callable):
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

    def flags(self) -> list[str]:
        return [text for action in self._actions for text in action.option_strings]

    def error(self, message):
        line = f"{self.prog}: error: {printable(message, 1000)}; see --help\n"
        self.exit(2, None if is_silent() else line)


def is_silent() -> bool:
    """Of several processes the first speaks."""
    torchruns = {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= os.environ.keys()
    return torchruns and os.environ["RANK"] != "0"


def refuse(message: str):
    """A usage error that a parser alone does not find."""
    Parser(prog=Path(sys.argv[0]).name).error(message)


HUGE = 1e300  # whatever is above is a slip, or infinity


def number(kind: type, lowest: float, above=False, most=HUGE):
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


# The boundary ------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with what a user should know: what is where, how to go on."""

    def __init__(self, message: str, code: int = 130):
        super().__init__(message)
        self.code = code  # 128 + the signal's number


def end_now(number, frame):
    """While Python imports (torch takes seconds, and an exception there may be swallowed), and when
    a stop itself is too slow for somebody."""
    if not is_silent():
        os.write(2, b"stopped\n")
    os._exit(128 + number)


def raise_stopped(number, frame):
    signal.signal(number, end_now)
    raise Stopped("", 128 + number)


def answer(handler):
    """From now on Ctrl-C and SIGTERM call handler(number, frame) -> what they called before."""
    before = {}
    with suppress(ValueError):  # of a thread that is not the main one
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as in the background of a shell
                before[number] = signal.signal(number, handler)
    return before


@contextmanager
def answering(handler):
    before = answer(handler)
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

    with answering(note):
        yield noted


@contextmanager
def last_words(text):
    """What text() says is told to who stops the work inside."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(str(stop) or text(), getattr(stop, "code", 130)) from None


def command(main: Callable) -> Callable:
    """Decorates a script's main: the one place where what goes wrong becomes a line and a code.

    ValueError and OSError are the user's input or machine: one line on stderr, exit code 1. Ctrl-C
    exits with 130, SIGTERM with 143. (Usage errors are argparse's: exit code 2.) Anything else is a
    defect of this project and keeps its traceback.
    """

    @functools.wraps(main)
    def guarded(*arguments):
        try:
            with answering(raise_stopped):
                return main(*arguments)
        except (ValueError, OSError) as error:
            line = f"error: {one_line(error)}"
            tell_torchrun(line)
            sys.exit(line)
        except KeyboardInterrupt as stop:
            line = f"stopped: {stop}" if str(stop) else "stopped"
            tell_torchrun(line)
            if not is_silent():
                print(line, file=sys.stderr)
            sys.exit(getattr(stop, "code", 130))

    return guarded


def tell_torchrun(line):
    """torchrun ends with a report of its own, which quotes the file that each process left."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        write_json(file, {"message": line, "timestamp": int(time.time())})


def one_line(error: Exception) -> str:
    """An error's message: whatever a library put into it, on one line of bounded length."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:  # else it would begin with "[Errno 28]"
        text = f"{error.filename}: {error.strerror}; is there room, and may it be written?"
    return printable(" ".join(text.split()), 1000)


# The scripts import this file first, so that Ctrl-C is one line while they import torch. Whoever
# imports it as a library keeps his own answers.
script = Path(sys.argv[0]).resolve()
if script.suffix == ".py" and script.parent in (ROOT, ROOT / "data"):
    answer(end_now)


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
def locked(folder: Path):
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
    here = platform.node()
    mine = folder / f"lock.{here}.{os.getpid()}"
    mine.write_text("")
    try:
        for other in set(folder.glob("lock.*.*")) - {mine}:
            host, _, pid = other.name.removeprefix("lock.").rpartition(".")
            if host != here or is_alive(pid):
                refuse(
                    f"{folder}: process {pid} on {host} is at work in it; wait, or choose another "
                    f"--out (if there is no such process, remove {other.name})"
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


def check_run_folder(out: Path, resume: bool, overwrite: bool, written: Iterable[str]):
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


def changes(then: dict, now: dict) -> str:
    """What differs in the settings of a continued work, "" if nothing does."""
    changed = []
    for name, value in now.items():
        before = then.get(name)
        if before != value:
            changed.append(f"{name} {shown(before)} then, {shown(value)} now")
    return "; ".join(changed)


class Log:
    """metrics.jsonl: one JSON object a line; and a text on the screen, above the progress bar.

    keep_until: a run is resumed at this step; lines of later ones will be written again.
    path None: the screen alone (of several processes the first writes the file).
    """

    def __init__(self, path: Path | None, keep_until: int | None):
        self.file = None
        if path:
            kept = [] if keep_until is None else log_lines(path, keep_until)
            write_text(path, "".join(f"{line}\n" for line in kept))
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (until the end)

    def write(self, text: str, **record):
        from tqdm import tqdm  # here: Ctrl-C is answered the sooner

        tqdm.write(text)
        if not self.file:
            return
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(f"{self.file.name}: {error.strerror}; is the disk full?") from None

    def sync(self):
        """All that was written is on the disk, whatever happens to the machine."""
        if self.file:
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


def peak_memory() -> int:
    """Bytes that this process held at most, of main memory; 0 where there is no way to ask."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> float:
    """Bytes of main memory that a process may still take; infinity where nobody says."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):  # "MemAvailable:   123 kB"
                return 1024 * int(line.split()[1])
    return math.inf
