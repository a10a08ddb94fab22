"""A run that is killed at any moment, and continued, ends as one that nobody disturbed: the same
weights bit for bit, the same log.

SIGKILL asks nobody and leaves no last word, as a power cut does. It comes here in three ways, drawn
by a seed: from outside at some time; right before the nth moment at which a step begins or a file
of the run is opened, renamed or removed; and in the middle of a file that is written, at some byte.
Where a state was saved the run goes on with --resume, else it begins again with --overwrite, until
it has been killed often enough and ends.

    pytest tests/test_kill.py              a few kills of each kind of run
    KILLS=20 pytest tests/test_kill.py     more of them

This file is also the script that the test starts, which imports torch once and forks a process for
each life of a run; and of a run of two processes, each of those two, behind torchrun.
"""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SMALL

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from data.shard import RANK
from model import Config, MoETransformer

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("KILLS", 0))
MOMENTS = 60  # about as many as a run has
STATE = "state.safetensors"
FLAGS = "--steps 5 --save_every 1 --log_every 1 --warmup 1 --batch_size 2 --lr 1e-2 --threads 1"
FLAGS += " --train_rows 6 --eval_rows 1"


def arguments(variant: str, folder: Path, out: str) -> list[str]:
    flags = f"{FLAGS} --score_rows 4" if variant == "esft_token" else FLAGS
    places = ["--base", f"{folder}/base", "--out", f"{folder}/{out}"]
    return ["--variant", variant, *places, *flags.split()]


def go_on(out: Path) -> list[str]:
    """How to start again, whatever a run left."""
    if (out / STATE).exists():
        return ["--resume"]
    return ["--overwrite"] if out.exists() else []


# Ways to die -------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: int, out: Path, of: str = ""):
    """Right before the nth moment of this run, or of those whose file's name begins with `of`."""
    left = moment
    rate = train.learning_rate

    def step(*words):
        sys.audit("train.step", str(out))
        return rate(*words)

    def watch(event, words):
        nonlocal left
        if event not in ("train.step", "open", "os.rename", "os.remove") or not words:
            return
        path = str(words[0])
        mine = path.startswith(str(out)) and Path(path).name.startswith(of)
        left -= mine
        if mine and left == 0:
            die()

    train.learning_rate = step
    sys.addaudithook(watch)


def die_writing(size: int):
    """As soon as a file has so many bytes: the system's own limit, at which a process is ended."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Lives of a run ----------------------------------------------------------------------------------


def live(argv: list[str], prepare=lambda: None, seconds: float | None = None) -> bool:
    """Run train.main in a fork, with its death prepared or ended after some seconds. Did it reach
    its end?"""
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            train.main(argv)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status) != 0:
        sys.exit(f"train.py {' '.join(argv)} did not end well")
    return True


def live_on(folder: Path, variant: str, kills: int):
    """Runs 0, 1, ... of a variant, each to its end, until some number of kills came through."""
    argv = arguments(variant, folder, "whole")
    begin = time.perf_counter()
    live(argv)
    span = time.perf_counter() - begin
    largest = max(path.stat().st_size for path in (folder / "whole").iterdir())

    rng = random.Random(f"{variant} {kills}")
    runs = 0
    while kills > 0:
        out = folder / f"{runs}"
        ended = False
        while not ended:
            argv = [*arguments(variant, folder, out.name), *go_on(out)]
            way = rng.choice(["moment", "moment", "writing", "time"]) if kills > 0 else "none"
            if way == "moment":
                ended = live(argv, partial(die_at, rng.randrange(1, MOMENTS), out))
            elif way == "writing":
                ended = live(argv, partial(die_writing, rng.randrange(largest)))
            elif way == "time":
                ended = live(argv, seconds=rng.uniform(0, span))
            else:
                ended = live(argv)
            kills -= not ended
        runs += 1


def script():
    """lives FOLDER VARIANT KILLS: a run that is whole, and killed ones.
    life FOLDER VARIANT OUT RANK MOMENT [OF]: one life, or a part of it, of one process or two, of
    which one dies."""
    what, folder, variant, *words = sys.argv[1:]
    folder = Path(folder)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the end)
    if what == "lives":
        return live_on(folder, variant, int(words[0]))
    name, rank, moment, *of = words
    out = folder / name
    argv = [*arguments(variant, folder, name), *go_on(out)]
    if RANK == int(rank):
        die_at(int(moment), out, *of)
    train.main(argv)


# The tests ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = MoETransformer(Config(**SMALL))
    model.save_pretrained(tmp_path / "base")
    tokenizer = ROOT / "data" / "tiny_olmoe" / "tokenizer.json"
    (tmp_path / "base" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return tmp_path


def start(*words, torchrun=False):
    prefix = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *(prefix if torchrun else []), __file__, *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


CLOCKED = ("tokens_per_second", "memory", "peak", "seconds", "file")
MAY_DIFFER = ("out", "resume", "overwrite")


def log(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] != "resumed"]
    return [{key: line[key] for key in line if key not in CLOCKED} for line in lines]


def settings(out: Path) -> dict:
    content = json.loads((out / "config.json").read_text())
    return {key: content[key] for key in content if key not in MAY_DIFFER}


def files(out: Path) -> dict[str, bytes]:
    """All that a run leaves but its log and settings. Temporary files: the last test."""
    others = ("metrics.jsonl", "config.json")
    paths = [path for path in out.iterdir() if path.name not in others and path.suffix != ".tmp"]
    return {path.name: path.read_bytes() for path in paths}


def assert_same(out: Path, whole: Path):
    assert log(out) == log(whole)
    assert settings(out) == settings(whole)
    assert files(out) == files(whole)
    assert any(name.endswith(".safetensors") for name in files(whole))


@pytest.mark.parametrize("variant", ["perft_r", "esft_token"])
def test_a_killed_run_ends_as_one_that_was_not(variant, folder):
    done = start("lives", folder, variant, KILLS or 6)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = sorted(path for path in folder.iterdir() if path.name.isdigit())
    assert killed
    for out in killed:
        assert_same(out, folder / "whole")


def test_a_run_of_two_processes_of_which_one_is_killed_ends_as_one_that_was_not(folder):
    def live(name, rank=0, moment=0):
        return start("life", folder, "perft_r", name, rank, moment, torchrun=True)

    ends = [live("whole")]
    rng, kills = random.Random(0), KILLS or 1
    while kills > 0:
        rank = rng.randrange(2)
        # the second process only steps, which is a moment of a run too
        moment = rng.randrange(1, 5) if rank else rng.randrange(1, MOMENTS)
        life = live("killed", rank, moment)
        if life.returncode != 0:
            kills -= 1
            # what the other one says is a line, and torchrun's report, which comes last, quotes it;
            # unless torchrun saw the kill first, and stopped the other one before it found out
            assert "[rank" not in life.stderr, life.stderr
            report = life.stderr.partition("ChildFailedError")[2]
            told = re.findall("traceback : (.*)", report)
            ours = ("error: another process is gone", "stopped")
            assert all(text.startswith((*ours, "Signal 9 ", "Signal 15 ")) for text in told), report
            found_out = any(text.startswith(ours) for text in told)
            assert found_out or "closing signal SIGTERM" in life.stderr, life.stderr
            assert "SIGKILL" in report
    ends.append(live("killed"))
    for end in ends:
        assert end.returncode == 0, end.stderr[-3000:]
    assert_same(folder / "killed", folder / "whole")


def test_what_a_dead_process_was_writing_is_gone_after_the_next_start(folder):
    """And what a living one writes is not. Of a temporary file the first moment is that it is
    opened, the second that it gets its name."""
    out = folder / "run"
    killed = start("life", folder, "perft_r", out.name, 0, 2, f"{STATE}.")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [left] = out.glob("*.tmp")
    assert left.name.startswith(STATE)
    alive = out / f"metrics.jsonl.{os.getpid()}.tmp"
    alive.write_text("")
    ended = start("life", folder, "perft_r", out.name, 0, 0)
    assert ended.returncode == 0, ended.stderr
    assert list(out.glob("*.tmp")) == [alive]


if __name__ == "__main__":
    script()
