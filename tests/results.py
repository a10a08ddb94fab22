"""The sweep behind every table and picture of results: python tests/results.py

    python tests/results.py --quick        two seeds of each method at the rate of the pages, and
                                           whether they give the same digits
    python tests/results.py                all of three_new, for hours; it stops and continues
    python tests/results.py --task kinship_new
                                           the same of another task
    python tests/results.py --only perft   runs whose name has this in it
    python tests/results.py --list         what would be run, as far as it is known
    python tests/results.py --tables       no run: tables and pictures of what is finished

    python tests/results.py --experts RUN RUN2 FILE.svg
                                           which experts ESFT chose in two runs, side by side

Each run is one command of train.py, with a folder of its own in --work; from the folders come
results.csv, a row a run, and curves.csv, a row an evaluation along a run; from these two files the
pictures beside them, frontier.svg and parameters.svg. All four go to --work unless --out names
another results.csv: those of the pages are in assets/. A run whose folder is finished is not
repeated, one that was killed is continued, and any row can be had again with the same digits: its
columns are the flags.

What is chosen, and on which rows. A method's rate is chosen from its part of GRID with seed 0 and
on validation rows alone: of the rates at which it learns enough (ENOUGH of the target) the one that
keeps most of the families; where none does, the one that learns most. The chosen rate is then run
with the other seeds. `target` and `kept` in results.csv are measured on test rows, which nobody
looked at for a choice; curves.csv has validation rows, at each of which a run could have been
stopped. So what a method keeps where it has learnt enough (in the table that is printed) is the
best `kept` of those evaluations whose target is ENOUGH: of each seed at the chosen rate.

Columns: trains and activated count parameters that train, and those of them that one token meets.
target: share of right answers (of three_new: the mean of its parts, which stand beside it). kept:
mean of the families that the target does not contradict. seconds: of the whole command, beside
whatever else the machine did; empty where it was not noted.
"""

import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import pictures, run, skills  # noqa: E402

RESULTS = ROOT / "assets" / "results.csv"  # of the pages
ENOUGH = 0.95
SEEDS = range(5)
STEPS = {"three_new": 300, "kinship_new": 200, "cipher_new": 200, "order_new": 200}
EVAL_EVERY = {300: 30, 200: 25}
GRID = (6e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 1e-2, 2e-2, 3e-2, 6e-2)


class Method(NamedTuple):
    name: str  # of the tables
    config: str  # rank and the like
    flags: str  # of train.py
    three: tuple[float, float]  # rates to try on three_new: of GRID from the first to the second
    one: tuple[float, float] | None = None  # and on a task by itself, which wants lower ones


# fmt: off
# Each method at sizes at which it can learn three tasks, if it ever does.
METHODS = [
    Method("perft_s", "r16", "--variant perft_s --rank 16", (1e-3, 1e-2), (3e-4, 2e-3)),
    Method("perft_s", "r64", "--variant perft_s --rank 64", (6e-4, 4e-3), (1e-4, 1e-3)),
    Method("perft_d", "4 x r16", "--variant perft_d --rank 16", (3e-4, 3e-3), (6e-5, 3e-4)),
    Method("perft_r", "Top2/4 r16", "--variant perft_r --rank 16", (1e-3, 6e-3), (3e-4, 2e-3)),
    Method("perft_e", "r4", "--variant perft_e --rank 4", (1e-3, 6e-3), (3e-4, 3e-3)),
    Method("perft_e", "r16", "--variant perft_e --rank 16", (3e-4, 3e-3), (2e-4, 1e-3)),
    Method("lora_qv", "r32", "--variant lora_qv --rank 32", (1e-3, 6e-3), (6e-4, 3e-3)),
    Method("lora_experts", "r4", "--variant lora_experts --rank 4", (6e-4, 1e-2), (6e-4, 4e-3)),
    Method("lora_experts", "shared r8", "--variant lora_experts --rank 8 --shared_outer",
           (6e-4, 1e-2), (6e-4, 4e-3)),
    Method("esft_token", "p 0.2", "--variant esft_token", (1e-3, 1e-2), (6e-4, 3e-3)),
    Method("esft_gate", "p 0.1", "--variant esft_gate", (1e-3, 1e-2), (6e-4, 3e-3)),
    Method("esft_token", "random", "--variant esft_token --experts random",
           (1e-3, 1e-2), (1e-3, 1e-2)),
    Method("full", "all", "--variant full", (1e-4, 1e-3), (6e-5, 3e-4)),
    Method("frozen_experts", "all but", "--variant frozen_experts", (1e-4, 2e-3), (6e-5, 3e-4)),
    Method("router", "all", "--variant router", (1e-3, 2e-2), (4e-3, 2e-2)),
]
# More sizes of these, each with a grid of its own.
SIZES = [
    Method("perft_s", "r4", "--variant perft_s --rank 4", (4e-3, 2e-2)),
    Method("perft_d", "4 x r4", "--variant perft_d --rank 4", (6e-4, 4e-3)),
    Method("perft_r", "Top2/4 r4", "--variant perft_r --rank 4", (2e-3, 1e-2)),
    Method("perft_r", "Top2/8 r16", "--variant perft_r --rank 16 --num_adapters 8", (6e-4, 3e-3)),
    Method("perft_r", "Top1/8 r16", "--variant perft_r --rank 16 --num_adapters 8 --top_k 1",
           (1e-3, 4e-3)),
    Method("perft_e", "r2", "--variant perft_e --rank 2", (1e-3, 6e-3)),
    Method("lora_qv", "r8", "--variant lora_qv --rank 8", (3e-3, 3e-2)),
    Method("lora_qv", "r128", "--variant lora_qv --rank 128", (6e-4, 4e-3)),
    Method("lora_experts", "r2", "--variant lora_experts --rank 2", (2e-3, 1e-2)),
    Method("lora_experts", "r16", "--variant lora_experts --rank 16", (6e-4, 4e-3)),
    Method("esft_token", "groups of 2", "--variant esft_token --bind_groups 2", (6e-4, 3e-3)),
    Method("esft_token", "groups of 4", "--variant esft_token --bind_groups 4", (6e-4, 3e-3)),
    Method("esft_token", "groups of 8", "--variant esft_token --bind_groups 8", (6e-4, 3e-3)),
    Method("esft_gate", "share", "--variant esft_gate --gate_share", (1e-3, 3e-3)),
]
# fmt: on


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


def grid(task: str, method: Method) -> list[float]:
    """The rates to try; none where a method is not run on a task."""
    ends = method.three if task == "three_new" else method.one
    return [rate for rate in GRID if ends and ends[0] <= rate <= ends[1]]


def best_rate(task: str, method: Method, work: Path) -> float | None:
    """None while a run of the grid is missing."""
    ends = {}
    for rate in grid(task, method):
        points = curve(work / Run(task, method.name, method.config, "", rate, 0).name)
        if not points:
            return None
        ends[rate] = points[-1]
    return choose(ends) if ends else None


def choose(ends: dict[float, dict]) -> float:
    """By the rule of the first page, of {rate: the last evaluation}."""
    learnt = [rate for rate in ends if ends[rate]["target"] >= ENOUGH]
    if learnt:
        return max(learnt, key=lambda rate: ends[rate]["kept"])
    return max(ends, key=lambda rate: ends[rate]["target"])


def edge(task: str, method: Method, work: Path) -> bool:
    """Is the best rate at an end of the grid, so that a better one may lie outside?"""
    rates = grid(task, method)
    return len(rates) > 1 and best_rate(task, method, work) in (rates[0], rates[-1])


def stages(task: str, work: Path):
    """Lists of runs, each list after the ones before it are finished. A method whose rate is not
    known then (--only left its grid out) goes no further."""
    for methods in (METHODS, SIZES):
        runs = []
        for m in methods:
            for rate in grid(task, m):
                runs.append(Run(task, m.name, m.config, m.flags, rate, 0))
        yield runs

        chosen = {m: best_rate(task, m, work) for m in methods}
        known = [m for m in methods if chosen[m]]
        for seed in SEEDS[1:]:
            yield [Run(task, m.name, m.config, m.flags, chosen[m], seed) for m in known]


def possible():
    """Every run that this file could make."""
    for task in STEPS:
        for m in METHODS + SIZES:
            for rate in GRID:
                for seed in SEEDS:
                    yield Run(task, m.name, m.config, m.flags, rate, seed)


def quick(task: str) -> list[Run]:
    """Two seeds of each method at the rate that the whole sweep chose."""
    found = Results(RESULTS, task)
    known = [m for m in METHODS if found.rate(m)]
    return [
        Run(task, m.name, m.config, m.flags, found.rate(m), seed) for seed in (0, 1) for m in known
    ]


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
    parts = {name: after["accuracy"][name] for name in skills.PARTS.get(r.task, ())}
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


def write_tables(work: Path, out: Path):
    """Of all runs that are finished, to `out` and to curves.csv beside it. What these files have of
    tasks that `work` has not stays."""
    rows, points = [], []
    for r in sorted(possible()):
        folder = work / r.name
        if not finished(folder):
            continue
        row = row_of(r, folder)
        rows.append(row)
        label = {key: row[key] for key in ("task", "method", "config", "lr", "seed")}
        points += [label | point for point in curve(folder)]
    if not rows:
        raise ValueError(f"{work}: no run is finished there; start with python tests/results.py")
    tasks = {row["task"] for row in rows}
    for path, table in ((out, rows), (out.with_name("curves.csv"), points)):
        others = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
        lines = [line for line in others if line.partition(",")[0] not in tasks]
        for row in table:
            lines.append(",".join(map(as_text, row.values())))
        lines = [",".join(table[0]), *lines]
        run.write_text(path, "\n".join(lines) + "\n")
        print(f"wrote {path}: {len(table)} rows")


def compare(runs: list[Run], work: Path):
    """Say whether runs gave the digits of the pages."""
    columns = ("task", "method", "config", "lr", "seed", "target", "kept")
    with open(RESULTS, encoding="utf-8") as file:
        known = {tuple(row[name] for name in columns) for row in csv.DictReader(file)}
    same = 0
    for r in runs:
        row = row_of(r, work / r.name)
        same += tuple(as_text(row[name]) for name in columns) in known
    print(f"{same} of {len(runs)} runs gave the digits of {RESULTS}")


def as_text(value) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


# From tables to pictures --------------------------------------------------------------------------


def read_table(path: Path, task: str) -> list[dict]:
    """A task's rows, with numbers where there are some."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["task"] == task:
                rows.append({name: number(text) for name, text in row.items()})
    return rows


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def mean_and_error(values) -> tuple[float, float]:
    """The mean, and its standard error: 0 where one value tells none."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), error


class Results:
    """A task's rows of results.csv and curves.csv, finished or not."""

    def __init__(self, out: Path, task: str):
        self.task = task
        self.rows = read_table(out, task)
        self.curves = read_table(out.with_name("curves.csv"), task)

    def of(self, m: Method, table=None) -> list[dict]:
        rows = self.rows if table is None else table
        return [row for row in rows if (row["method"], row["config"]) == (m.name, m.config)]

    def rate(self, m: Method) -> float | None:
        """The chosen one; None while a rate of its grid is missing, since one alone tells nothing
        of a method."""
        ends = self.ends(m)
        return choose(ends) if ends and ends.keys() >= {*grid(self.task, m)} else None

    def ends(self, m: Method) -> dict[float, dict]:
        """Of each rate with seed 0 the last evaluation."""
        return {row["lr"]: row for row in self.of(m, self.curves) if row["seed"] == 0}

    def seeds(self, m: Method) -> list[dict]:
        """Its rows at the chosen rate, one a seed."""
        return [row for row in self.of(m) if row["lr"] == self.rate(m)]

    def kept(self, m: Method, rate: float) -> list[float]:
        """What each seed keeps where ENOUGH is learnt: its best evaluation along the run at this
        rate. A seed that never learns ENOUGH is not in the list."""
        best = {}
        for row in self.of(m, self.curves):
            asked = row["lr"] == rate
            if asked and row["target"] >= ENOUGH:
                best[row["seed"]] = max(row["kept"], best.get(row["seed"], 0))
        return list(best.values())


def percent(values) -> str:
    """In %, the mean and its standard error."""
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if len(values) > 1 else "")


def table(results: Results, methods: list[Method]) -> list[str]:
    """A row a method, at its rate; of those whose grid is finished."""
    lines = [
        "| method | size | rate | trains | a token meets at most | learns, % | keeps, % "
        f"| keeps where {ENOUGH:.0%} is learnt | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in methods:
        rate = results.rate(m)
        if rate is None:
            continue
        rows = results.seeds(m)
        enough = results.kept(m, rate)
        where = percent(enough) if enough else "not learnt"
        if 0 < len(enough) < len(rows):
            where += f" ({len(enough)} of {len(rows)})"
        learns = percent([row["target"] for row in rows])
        keeps = percent([row["kept"] for row in rows])
        sizes = f"{rows[0]['trains']:,.0f} | {rows[0]['activated']:,.0f}"
        lines.append(
            f"| {m.name} | {m.config} | {rate:g} | {sizes} | {learns} | {keeps} | {where} "
            f"| {len(rows)} |"
        )
    return lines


class Claim(NamedTuple):
    text: str
    paper: str  # the paper's number
    ours: tuple[str, ...]  # methods and sizes that tell
    verdict: str  # written from the numbers of assets/results.csv


CLAIMS = [
    Claim(
        "PERFT is better than q,v LoRA at about equal trained parameters (68, 66 thousand)",
        "by up to 17.2 % (commonsense)",
        ("perft_r Top2/4 r16", "lora_qv r32"),
        "keeps three times as much: shown; learns more: within error",
    ),
    Claim(
        "and at equal activated ones (66 thousand)",
        "the same",
        ("perft_e r16", "lora_qv r32"),
        "keeps four times as much: shown; learns more: within error",
    ),
    Claim(
        "A router of their own (R) is better than all adapters at once (D)",
        "Mixtral: 84.2, 79.1",
        ("perft_r Top2/4 r16", "perft_d 4 x r16"),
        "shown: learns a little more, keeps 22 points more",
    ),
    Claim(
        "S gets worse with rank",
        "OLMoE: r 8 63.1, r 64 53.3",
        ("perft_s r16", "perft_s r64"),
        "not seen from r16 to r64, with a rate for each: it learns the same and keeps 16 more",
    ),
    Claim(
        "E needs few parameters: more do not help",
        "OLMoE: r 4 71.0, r 16 70.0",
        ("perft_e r4", "perft_e r16"),
        "not seen: four times as many learn 2 points more and keep 5 more",
    ),
    Claim(
        "More adapters to choose from are better, a token still picking two",
        "in its grid",
        ("perft_r Top2/4 r16", "perft_r Top2/8 r16"),
        "shown: keeps 9 points more, with twice the parameters",
    ),
    Claim(
        "An adapter beside each expert (E), or LoRA on its matrices",
        "not compared",
        ("perft_e r4", "lora_experts r4", "lora_experts shared r8"),
        "E keeps 10 to 19 more with fewer parameters, and learns 1 less; LoRA can be merged",
    ),
    Claim(
        "ESFT learns as much as full fine-tuning, more than LoRA, and keeps more than both",
        "learns 49.4, 50.2; 51.0; 44.9, keeps 61.5, 60.6; 58.8; 59.1",
        ("esft_token p 0.2", "esft_gate p 0.1", "full all", "lora_qv r32"),
        "keeps more than LoRA: shown; learns more than LoRA: within error; learns 1 to 2 less than "
        "full, which keeps as much (theirs kept as little as LoRA)",
    ),
    Claim(
        "The experts of the task are better than random ones",
        "by 2.8 (token), 4.4 (gate)",
        ("esft_token p 0.2", "esft_token random"),
        "shown for token, on both axes (random ones at three times the rate; at one rate they keep "
        "22 less)",
    ),
    Claim(
        "A finer grain is better (experts bound in groups are chosen together)",
        "worse when bound",
        ("esft_token p 0.2", *(f"esft_token groups of {n}" for n in (2, 4, 8))),
        "mixed: pairs keep as much, fours 9 points less, eights 3 less",
    ),
]


def claims(results: Results) -> list[str]:
    """A row a claim, with what each of its methods learns / keeps at its rate, on test rows."""
    lines = [
        "| claim | paper | here: learns / keeps, % | verdict |",
        "|---|---|---|---|",
    ]
    by_name = {f"{m.name} {m.config}": m for m in METHODS + SIZES}
    for claim in CLAIMS:
        told = []
        for name in claim.ours:
            rows = results.seeds(by_name[name])
            if rows:
                learns = percent([row["target"] for row in rows])
                keeps = percent([row["kept"] for row in rows])
                told.append(f"{name}: {learns} / {keeps}")
        lines.append(f"| {claim.text} | {claim.paper} | {'; '.join(told)} | {claim.verdict} |")
    return lines


def undominated(points) -> list[tuple]:
    """Points (target, kept) than which no other has more of both, in the order of the target."""
    best = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


# Classes of colour in pictures.py: lines that come near one another have unlike ones.
COLOURS = {
    "perft_s": 8,
    "perft_d": 7,
    "perft_r": 5,
    "perft_e": 3,
    "lora_qv": 9,
    "lora_experts": 4,
    "esft_token": 0,
    "esft_gate": 2,
    "full": 6,
    "frozen_experts": 1,
    "router": 10,
}
GREY = 11
LEARNT = "learnt: right answers on new tasks, %"
LEAST, MOST = 50, 99.9  # the ends of its axis


def stretched(right: float) -> float:
    """The unit of an axis of right answers, in %: where few are wrong the methods differ, and there
    it has room. MOST or more is its end."""
    return -math.log10(100 - min(right, MOST))


def learnt_axis(label):
    return pictures.Axis(label, (LEAST, 80, 90, 95, 97, 98, 99, 99.5, MOST), stretched)


def learnt_and_kept(row: dict) -> tuple[float, float]:
    """In %."""
    return 100 * row["target"], 100 * row["kept"]


def mean_of(seeds: list[dict]):
    """What they learn and keep, and the standard errors of both."""
    (x, dx), (y, dy) = map(mean_and_error, zip(*map(learnt_and_kept, seeds)))
    return (x, y), (dx, dy)


def frontier(results: Results) -> str | None:
    """Kept against learnt, on test rows: a line for each method, at the size of METHODS that keeps
    most. Left out: what learns less than LEAST. None: nothing is left."""
    best, lines = {}, []
    for m in METHODS:
        if seeds := results.seeds(m):
            (learnt, kept), _ = mean_of(seeds)
            if learnt >= LEAST:
                best.setdefault(m.name, []).append((kept, m))
    for name, sizes in best.items():
        _, m = max(sizes, key=lambda size: size[0])
        alone = sum(other.name == name for other in METHODS) == 1
        lines += through_rates(results, m, name if alone else f"{name} {m.config}")
    if not lines:
        return None
    before = 100 * results.rows[0]["kept_before"]
    level = [(LEAST, before), (MOST, before)]
    lines.append(pictures.Line("before", level, GREY, "bar", label="before fine-tuning"))
    highest = max(kept for line in lines for _, kept in line.points)
    ticks = [0, 25, 50, 60, 70, 80, 85, *(tick for tick in (90, 95, 98) if tick < highest + 5)]
    kept = "↑ kept: right answers on earlier skills, % (both scales stretch towards 100)"
    heads = [
        "What each method learns and what it keeps: a line through its learning rates.",
        "Ring: the rate that keeps most where 95 % is learnt, mean of 5 seeds ± standard error.",
        "Dot: another rate, one seed.",
    ]
    plot = pictures.plot(
        heads,
        lines,
        learnt_axis(f"{LEARNT} ({MOST}: or more) →"),
        pictures.Axis(kept, ticks, stretched),
        height=560,
        labelled=around,
    )
    return pictures.picture([plot])


def through_rates(results: Results, m: Method, label: str) -> list[pictures.Line]:
    """A method's rates: the mean over seeds at the chosen one, a ring with its standard errors as
    bars, and seed 0 at the others. Left out: rates that another one beats in both, which nobody
    would choose."""
    (x, y), (dx, dy) = mean_of(results.seeds(m))
    points = [(x, y)]
    for row in results.of(m):
        learnt, kept = learnt_and_kept(row)
        if row["seed"] == 0 and row["lr"] != results.rate(m) and learnt >= LEAST:
            points.append((min(learnt, MOST), kept))
    across = [(max(x - dx, LEAST), y), (x + dx, y)]
    upwards = [(x, y - dy), (x, y + dy)]
    name, colour = f"{m.name} {m.config}", COLOURS[m.name]
    return [
        pictures.Line(name, across, colour, "bar"),
        pictures.Line(name, upwards, colour, "bar"),
        pictures.Line(name, [(x, y)], colour, "ring"),
        pictures.Line(name, undominated(points), colour, label=label),
    ]


def parameters(results: Results) -> str | None:
    """Learnt, on test rows, against what trains, each size at its rate, means over seeds: a line
    through a method's ranks, whose ends have its name. Left out: as above, and a size that
    is the same as another one."""
    ranks = {}
    for m in METHODS + SIZES:
        if seeds := results.seeds(m):
            (learnt, _), _ = mean_of(seeds)
            place = seeds[0]["trains"] / 1000, learnt
            kind, _, rank = m.config.rpartition("r")
            sizes = ranks.setdefault((m.name, kind if rank.isdigit() else place), {})
            if learnt >= LEAST:
                sizes.setdefault(place, m)
    lines = []
    for (name, _), sizes in ranks.items():
        colour, places = COLOURS[name], sorted(sizes)
        if places:
            lines.append(pictures.Line("", places, colour, "bar"))
        for place in places:
            config = sizes[place].config
            whole = name if config.startswith("all") else f"{name} {config}"
            label = whole if place in (places[0], places[-1]) else config.split()[-1]
            lines.append(pictures.Line(f"{name} {config}", [place], colour, label=label))
    if not lines:
        return None
    thousands = "parameters that train, in thousands →"
    heads = [
        "How much is learnt with how many trained parameters: each dot the mean of 5 seeds.",
        "Lines join the ranks (r4, r16, ...) of one method; all else is a single dot.",
    ]
    plot = pictures.plot(
        heads,
        lines,
        pictures.Axis(thousands, (3, 10, 30, 100, 300, 1000, 3000), math.log10),
        learnt_axis(f"↑ {LEARNT} ({MOST}: or more; the scale stretches towards 100)"),
        height=640,
        right=560,
        labelled=around,
    )
    return pictures.picture([plot])


# Where labels stand -------------------------------------------------------------------------------


class Box(NamedTuple):
    left: float
    right: float
    middle: float  # of its height

    def near(self, other: "Box", apart) -> bool:
        beside = self.left < other.right and other.left < self.right
        return beside and abs(self.middle - other.middle) < apart


def around(labels, paths, heights):
    """Labels (x, y, colour, words) to the right of their places, to the left, or over or under
    them, as near as leaves room: none stands on a line or on another one, and what ties a label to
    its place rather goes 30 pixels further than through another. The shortest come first."""
    shapes, placed = [], []
    lines = boxes_on(paths)
    for x, y, colour, words in sorted(labels, key=lambda label: len(label[-1])):
        width = pictures.LETTER * len(words)
        found = []
        for anchor, tie, left in (
            ("start", x + 9, x + 9),
            ("end", x - 9, x - 9 - width),
            ("middle", x, x - width / 2),
        ):
            inside = 60 <= left and left + width <= pictures.WIDTH
            for height in heights[::2] if inside else ():
                box = Box(left, left + width, height)
                if any(box.near(other, 10) for other in lines):
                    continue
                if any(box.near(other, 12) for other in placed):
                    continue
                way = boxes_on([[(x, y), (tie, height)]])
                crossed = sum(any(other.near(step, 7) for step in way) for other in placed)
                found.append((abs(height - y) + 30 * crossed, anchor, tie, box, way))
        no_room = (0, "start", x + 9, Box(x + 9, x + 9 + width, y), [])
        _, anchor, tie, box, way = min(found, key=lambda one: one[0], default=no_room)
        placed.append(box)
        lines += way
        base = box.middle + 4
        shapes.append(pictures.LABEL.format(colour, x, y, tie, box.middle, base, anchor, words))
    return shapes


def boxes_on(paths) -> list[Box]:
    """Small ones along paths, so close that no word fits between two."""
    boxes = []
    for path in paths:
        for (x, y), (to_x, to_y) in zip(path, path[1:] or path):
            steps = 1 + int(math.dist((x, y), (to_x, to_y)) / pictures.LETTER)
            for i in range(steps + 1):
                across = x + (to_x - x) * i / steps
                boxes.append(Box(across - 4, across + 4, y + (to_y - y) * i / steps))
    return boxes


# Which experts ------------------------------------------------------------------------------------


SHARED = {"token": "choices", "gate": "routing weight", "gate_share": "weight of the chosen"}


def experts(folders: list[Path]) -> str:
    """Which experts ESFT chose in some runs, by one rule, from their scores.json: a layer's rows
    under each other."""
    by_layer, chosen, counts, rules = {}, {}, [], set()
    trained = []  # of each run {(layer, expert)}
    for folder in folders:
        task = run.read_json(folder / "config.json", task=str)["task"] or folder.name
        content = run.read_json(folder / "scores.json", scores=list, chosen=list, kind=str, p=float)
        for i, (scores, ids) in enumerate(zip(content["scores"], content["chosen"])):
            by_layer.setdefault(i, {})[f"layer {i}, {task[:16]}"] = scores
            chosen[f"layer {i}, {task[:16]}"] = ids
        trained.append({(i, e) for i, ids in enumerate(content["chosen"]) for e in ids})
        counts.append(f"{len(trained[-1])} for {task}")
        rules.add((SHARED[content["kind"]], content["p"]))
    if len(rules) > 1:
        raise ValueError(f"the runs chose by different rules, {rules}: take runs of one kind and p")
    ((shared, p),) = rules
    if len(trained) > 1:
        counts.append(f"{len(set.intersection(*trained))} for both")
    heads = [
        "The experts that a task uses, layer by layer. Outlined: those that ESFT trains for it,",
        f"the most used, until they have {p:.0%} of a layer's {shared}: {', '.join(counts)}",
    ]
    rows = {name: row for layer in by_layer.values() for name, row in layer.items()}
    return pictures.picture([pictures.heat(heads, f"share of a layer's {shared}", rows, chosen)])


def draw(out: Path, task: str):
    """The tables of the pages, and the two pictures beside `out`."""
    results = Results(out, task)
    for lines in (table(results, METHODS), table(results, SIZES), claims(results)):
        print(*lines, "", sep="\n")
    for m in METHODS + SIZES:
        done, rates = len(results.ends(m)), grid(task, m)
        if done < len(rates):
            print(f"{m.name} {m.config}: left out, {done} of {len(rates)} rates are finished")
    for make in (frontier, parameters):
        path, svg = out.with_name(f"{make.__name__}.svg"), make(results)
        if svg is None:
            print(f"no {path}: there is nothing to draw yet")
            continue
        run.write_text(path, svg)
        print(f"wrote {path}")


@run.command
def main(argv=None):
    parser = run.Parser(description="The sweep behind the tables and pictures of results.")
    add = parser.add_argument
    add("--quick", action="store_true", help="two seeds at the chosen rates, and no tables")
    add("--tables", action="store_true", help="no run: tables and pictures of what is finished")
    add("--list", action="store_true", help="what would be run, no more")
    add("--task", default="three_new", choices=STEPS, help="(%(default)s)")
    add("--jobs", type=run.count, default=2, help="processes (%(default)s)")
    add("--only", default="", metavar="TEXT", help="runs with this in their name")
    add("--work", default="out/results", metavar="DIR", help="(%(default)s)")
    add("--out", metavar="FILE", type=Path, help="(results.csv in --work)")
    about = "draw which experts ESFT chose in two runs, no more"
    add("--experts", nargs=3, metavar=("RUN", "RUN2", "FILE.svg"), type=Path, help=about)
    args = parser.parse_args(argv)
    if args.experts:
        *folders, path = args.experts
        run.write_text(path, experts(folders))
        print(f"wrote {path}")
        return
    work = Path(args.work).resolve()
    all_runs = []
    for runs in [quick(args.task)] if args.quick else stages(args.task, work):
        runs = [r for r in runs if args.only in r.name]
        all_runs += runs
        if args.list:
            print(*(r.name for r in runs), sep="\n")
        elif not args.tables:
            work_off(runs, work, args.jobs)
    if args.list:
        return
    if args.quick:
        return compare(all_runs, work)
    out = args.out or work / RESULTS.name
    write_tables(work, out)
    draw(out, args.task)
    for method in METHODS + SIZES:
        if edge(args.task, method, work):
            print(f"{method.name} {method.config}: its best rate is at an end of its grid")


if __name__ == "__main__":
    main()
