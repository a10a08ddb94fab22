"""The sweep behind every table and picture of results: python tests/results.py

    python tests/results.py --quick        two seeds of the main methods at their rates
    python tests/results.py                everything, for hours; it stops and continues
    python tests/results.py --only perft   runs whose name has this in it
    python tests/results.py --list         what would be run

Each run is one command of train.py, with a folder of its own in --work; from the folders come
assets/results.csv, a row a run, and assets/curves.csv, a row an evaluation along a run. A run whose
folder is finished is not repeated, one that was killed is continued, and any row can be had again
with the same digits: its columns are the flags.

What is chosen, and on which rows. A method's rate is chosen from its grid (RATES) with seed 0 and
on validation rows alone: of the rates at which it learns enough (ENOUGH of the target) the one that
keeps most of the families; where none does, the one that learns most. The chosen rate is then run
with the other seeds. `target` and `kept` in results.csv are measured on test rows, which nobody
looked at for a choice; curves.csv has validation rows, at each of which a run could have been
stopped.

Columns: trains and activated count parameters that train, and those of them that one token meets.
target: share of right answers (of three_new: the mean of its parts, which stand beside it). kept:
mean of the families that the target does not contradict. seconds: of one core's time.
"""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import run, skills  # noqa: E402

ENOUGH = 0.95
SEEDS = range(5)
STEPS = {"three_new": 300, "kinship_new": 200, "cipher_new": 200, "order_new": 200}
EVAL_EVERY = {300: 30, 200: 25}
GRID = (1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 2e-2)


class Method(NamedTuple):
    name: str  # of the tables
    config: str  # rank and the like
    flags: str  # of train.py
    lowest: float  # rates of its grid: GRID from here
    highest: float  # to here


# Each method at a size at which it can learn three tasks; the first ones are those of the frontier.
METHODS = [
    Method("perft_s", "r16", "--variant perft_s --rank 16", 1e-3, 1e-2),
    Method("perft_d", "4 x r16", "--variant perft_d --rank 16", 3e-4, 3e-3),
    Method("perft_r", "Top2/4 r16", "--variant perft_r --rank 16", 1e-3, 6e-3),
    Method("perft_e", "r16", "--variant perft_e --rank 16", 3e-4, 3e-3),
    Method("lora_qv", "r32", "--variant lora_qv --rank 32", 1e-3, 6e-3),
    Method("esft_token", "p 0.2", "--variant esft_token", 1e-3, 1e-2),
    Method("esft_gate", "p 0.1", "--variant esft_gate", 1e-3, 1e-2),
    Method("esft_token", "random", "--variant esft_token --experts random", 1e-3, 1e-2),
    Method("full", "all", "--variant full", 1e-4, 1e-3),
]
# At one rate: that which the method of the same name was found best with.
SIZES = [
    Method("perft_s", "r4", "--variant perft_s --rank 4", 0, 0),
    Method("perft_s", "r64", "--variant perft_s --rank 64", 0, 0),
    Method("perft_d", "4 x r4", "--variant perft_d --rank 4", 0, 0),
    Method("perft_r", "Top2/4 r4", "--variant perft_r --rank 4", 0, 0),
    Method("perft_r", "Top2/8 r16", "--variant perft_r --rank 16 --num_adapters 8", 0, 0),
    Method("perft_r", "Top1/8 r16", "--variant perft_r --rank 16 --num_adapters 8 --top_k 1", 0, 0),
    Method("perft_e", "r2", "--variant perft_e --rank 2", 0, 0),
    Method("perft_e", "r4", "--variant perft_e --rank 4", 0, 0),
    Method("lora_qv", "r8", "--variant lora_qv --rank 8", 0, 0),
    Method("lora_qv", "r128", "--variant lora_qv --rank 128", 0, 0),
    Method("esft_token", "groups of 2", "--variant esft_token --bind_groups 2", 0, 0),
    Method("esft_token", "groups of 4", "--variant esft_token --bind_groups 4", 0, 0),
    Method("esft_token", "groups of 8", "--variant esft_token --bind_groups 8", 0, 0),
    Method("esft_gate", "share", "--variant esft_gate --gate_share", 0, 0),
]


class Run(NamedTuple):
    task: str
    method: str
    config: str
    flags: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        words = [self.task, self.method, self.config, f"{self.lr:g}", str(self.seed)]
        return " ".join(words).replace(" ", "_").replace("/", "of")

    def command(self, folder: Path) -> list[str]:
        steps = STEPS[self.task]
        flags = self.flags.split()
        flags += ["--task", self.task, "--lr", f"{self.lr:g}", "--seed", str(self.seed)]
        flags += ["--steps", str(steps), "--eval_every", str(EVAL_EVERY[steps])]
        flags += ["--threads", "1", "--device", "cpu", "--out", str(folder)]
        return [sys.executable, str(ROOT / "train.py"), *flags]


# What to run --------------------------------------------------------------------------------------


def grid(method: Method) -> list[float]:
    return [rate for rate in GRID if method.lowest <= rate <= method.highest]


def best_rate(task: str, method: Method, work: Path) -> float | None:
    """By the rule of the first page, or None while a run of the grid is missing."""
    ends = {}
    for rate in grid(method):
        points = curve(work / Run(task, method.name, method.config, "", rate, 0).name)
        if not points:
            return None
        ends[rate] = points[-1]
    learnt = [rate for rate in ends if ends[rate]["target"] >= ENOUGH]
    if learnt:
        return max(learnt, key=lambda rate: ends[rate]["kept"])
    return max(ends, key=lambda rate: ends[rate]["target"])


def edge(task: str, method: Method, work: Path) -> bool:
    """Is the best rate at an end of the grid, so that a better one may lie outside?"""
    return best_rate(task, method, work) in (grid(method)[0], grid(method)[-1])


def stages(task: str, work: Path):
    """Lists of runs, each list after the ones before it are finished."""
    runs = []
    for method in METHODS:
        for rate in grid(method):
            runs.append(Run(task, method.name, method.config, method.flags, rate, 0))
    yield runs

    chosen = {(m.name, m.config): best_rate(task, m, work) for m in METHODS}
    yield [
        Run(task, m.name, m.config, m.flags, chosen[m.name, m.config], seed)
        for seed in SEEDS[1:]
        for m in METHODS
    ]

    of_name = {}
    for (name, _), rate in chosen.items():
        of_name.setdefault(name, rate)
    yield [Run(task, m.name, m.config, m.flags, of_name[m.name], 0) for m in SIZES]
    yield [
        Run(task, m.name, m.config, m.flags, of_name[m.name], seed)
        for seed in SEEDS[1:3]
        for m in SIZES
    ]


def quick(task: str) -> list[Run]:
    """Eight methods at the rates that the whole sweep chose, as the committed table has them."""
    with open(ROOT / "assets" / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    runs = []
    for seed in (0, 1):
        for m in METHODS:
            of_method = [r for r in rows if (r["method"], r["config"]) == (m.name, m.config)]
            rates = {float(r["lr"]) for r in of_method if r["task"] == task and r["seed"] == "1"}
            if rates:
                runs.append(Run(task, m.name, m.config, m.flags, min(rates), seed))
    return runs


# Running ------------------------------------------------------------------------------------------


def records(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in run.whole_lines(path)] if path.exists() else []


def finished(folder: Path) -> bool:
    return any(record["event"] == "saved" for record in records(folder))


def work_off(runs: list[Run], work: Path, jobs: int):
    """So many processes at a time, each with one thread."""
    waiting = [r for r in dict.fromkeys(runs) if not finished(work / r.name)]
    if not waiting:
        return
    print(f"{len(waiting)} runs of {len(runs)} are left")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running: dict[Run, subprocess.Popen] = {}
    total, done = len(waiting), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            r = waiting.pop(0)
            folder = work / r.name
            command = r.command(folder)
            if (folder / "state.safetensors").exists():
                command.append("--resume")
            elif folder.exists():
                command.append("--overwrite")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{folder}.log", "w", encoding="utf-8") as log:
                running[r] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        time.sleep(0.5)
        for r, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[r]
            done += 1
            if not finished(work / r.name):
                raise SystemExit(f"{r.name} failed: {work / r.name}.log says why")
            row = row_of(r, work / r.name)
            print(
                f"{done:4}/{total} {r.name:50} target {100 * row['target']:5.1f} "
                f"kept {100 * row['kept']:5.1f}",
                flush=True,
            )


# From folders to tables ---------------------------------------------------------------------------


def curve(folder: Path) -> list[dict]:
    """A run's validation accuracies -> step, target, kept; [] unless it is finished."""
    if not finished(folder):
        return []
    task = run.read_json(folder / "config.json")["task"]
    return [
        {"step": r["step"], "target": r["accuracy"][task], "kept": r["kept"]}
        for r in records(folder)
        if r["event"] == "eval"
    ]


def row_of(r: Run, folder: Path) -> dict:
    settings = run.read_json(folder / "config.json")
    events = {record["event"]: record for record in records(folder)}
    before, after = events["before"], events["after"]
    parts = {f"{name}": after["accuracy"][name] for name in skills.PARTS.get(r.task, ())}
    return {
        "task": r.task,
        "method": r.method,
        "config": r.config,
        "lr": f"{r.lr:g}",
        "seed": r.seed,
        "steps": settings["steps"],
        "trains": settings["trains"],
        "activated": settings["activated"],
        "target": after["accuracy"][r.task],
        **{part: parts.get(part, "") for part in skills.PARTS["three_new"]},
        "kept_before": before["kept"],
        "kept": after["kept"],
        "seconds": events["memory"].get("seconds", ""),
    }


def write_tables(runs: list[Run], work: Path, out: Path):
    rows, points = [], []
    for r in sorted(dict.fromkeys(runs)):
        folder = work / r.name
        if not finished(folder):
            continue
        row = row_of(r, folder)
        rows.append(row)
        label = {key: row[key] for key in ("task", "method", "config", "lr", "seed")}
        points += [label | point for point in curve(folder)]
    for path, table in ((out, rows), (out.with_name("curves.csv"), points)):
        lines = [",".join(table[0])]
        for row in table:
            values = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()]
            lines.append(",".join(values))
        run.write_text(path, "\n".join(lines) + "\n")
        print(f"wrote {path}: {len(table)} rows")


@run.command
def main():
    parser = run.Parser(description="The sweep behind the tables and pictures of results.")
    parser.add_argument("--quick", action="store_true", help="two seeds at the chosen rates")
    parser.add_argument("--task", default="three_new", choices=STEPS, help="(%(default)s)")
    parser.add_argument("--jobs", type=run.count, default=2, help="processes (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs with this in their name")
    parser.add_argument("--work", default="out/results", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--out", default="assets/results.csv", metavar="FILE", help="(%(default)s)")
    parser.add_argument("--list", action="store_true", help="what would be run, no more")
    args = parser.parse_args()
    work, all_runs = Path(args.work).resolve(), []
    for runs in [quick(args.task)] if args.quick else stages(args.task, work):
        runs = [r for r in runs if args.only in r.name]
        all_runs += runs
        if args.list:
            print(*(r.name for r in runs), sep="\n")
            continue
        work_off(runs, work, args.jobs)
    if not args.list:
        write_tables(all_runs, work, Path(args.out))
        for method in METHODS:
            if edge(args.task, method, work):
                print(f"{method.name} {method.config}: its best rate is at an end of its grid")


if __name__ == "__main__":
    main()
