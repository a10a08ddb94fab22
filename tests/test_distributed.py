"""Two processes that share a model train it as one process does: the same log, the same files.

This file is also the script, `python test_distributed.py` alone or behind `torchrun
--nproc_per_node=2`: it runs train.main for each case below, in the working folder. Two processes
are stopped after two steps and resume for the rest, one process goes through: what is compared at
the end has passed through a saved state as well. All cases share two starts, hence one test.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from data import shard as processes
from data.hub import SafetensorsFile
from data.shard import RANK, WORLD
from model import Config, MoETransformer
from train import learning_rate

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
MIXTRAL = {"model_type": "mixtral", "norm_topk_prob": True, "tie_word_embeddings": True}
BASES = {
    "olmoe": Config(**SIZES, num_experts=8),
    "mixtral": Config(**SIZES, **MIXTRAL, num_experts=5),
}
RUN = "--batch_size 4 --warmup 1 --lr 1e-2 --weight_decay 0.1 --clip 0.5 --balance 0.1"
RUN += " --log_every 1 --save_every 2 --threads 1"
STEPS = "--steps 3 --eval_rows 1"
TASK = f"{STEPS} --train_rows 9"  # batches of 4, 4, 1: one row is none for a process
FILE = "--data rows.json --epochs 2"
LORA, R = "--dropout 0", "--dropout 0 --adapter_balance 0.2"
ESFT, BF16 = "--score_rows 6", "--dtype bfloat16"
# the rows are those of one process
MICRO = f"--micro_batch {2 // WORLD} --checkpoint_activations"
CASES = {  # variant, base (None: the embedded one), flags
    "perft_s": ("perft_s", "olmoe", TASK, LORA),
    "perft_d": ("perft_d", "olmoe", TASK, LORA),
    "perft_r": ("perft_r", "olmoe", TASK, R),
    "perft_e": ("perft_e", "olmoe", TASK, LORA),
    "perft_e of some experts": ("perft_e", "olmoe", TASK, LORA, "--experts experts.json"),
    "lora_qv": ("lora_qv", "olmoe", TASK, LORA),
    "lora_experts": ("lora_experts", "olmoe", TASK, LORA),
    "lora_experts of some, shared": (
        *("lora_experts", "olmoe", TASK, LORA),
        "--experts experts.json --shared_outer",
    ),
    "lora_experts, 5 experts, tied, bfloat16": ("lora_experts", "mixtral", TASK, LORA, BF16),
    "router": ("router", "olmoe", TASK),
    "frozen_experts": ("frozen_experts", "olmoe", TASK),
    "full": ("full", "olmoe", TASK),
    "esft_token": ("esft_token", "olmoe", TASK, ESFT),
    "scratch": ("scratch", "olmoe", STEPS),
    "perft_r, bfloat16, routers too": ("perft_r", "olmoe", TASK, R, BF16, "--train_router"),
    "esft_token, bfloat16": ("esft_token", "olmoe", TASK, ESFT, BF16),
    "full, 5 experts, tied": ("full", "mixtral", TASK),
    "esft_token, 5 experts, tied": ("esft_token", "mixtral", TASK, ESFT),
    "perft_r, micro-batches, checkpointed": ("perft_r", "olmoe", TASK, R, MICRO),
    "full, micro-batches, checkpointed": ("full", "mixtral", TASK, MICRO),
    "perft_s, file, prompts too": (
        *("perft_s", "olmoe", FILE, LORA),
        "--held_out 3 --train_on_inputs",
    ),
    "perft_s, file, nothing held out": ("perft_s", "olmoe", FILE, LORA, "--held_out 0"),
    "perft_s, embedded base": ("perft_s", None, TASK, LORA, "--eval_rows 20 --lr 1e-3"),
}


# The script --------------------------------------------------------------------------------------


def run(case):
    variant, base, *flags = CASES[case]
    argv = ["--variant", variant, "--out", f"{WORLD}/{case}"]
    argv += " ".join([RUN, *flags]).split()
    if base:
        argv += ["--base", base]
    if WORLD > 1:
        train.learning_rate = stopping
        try:
            train.main(argv)
        except SystemExit as ctrl_c:
            assert ctrl_c.code == 130, ctrl_c
        train.learning_rate = learning_rate
        argv.append("--resume")
        processes.meet()  # the saved state is complete
    train.main(argv)


def stopping(step, steps, args):
    """train.learning_rate, of the third step: Ctrl-C on all processes."""
    if step == 2:
        raise KeyboardInterrupt
    return learning_rate(step, steps, args)


def script():
    """All cases -> WORLD.json: of each process and case, the share of the model held, and the
    choices counted."""
    build, counts, fsync, seen = train.build, train.expert_counts, os.fsync, {}

    def watched_build(*args):
        model = build(*args)
        parameters = list(model.parameters())
        held = sum(processes.held(p.detach())[0].nbytes for p in parameters)
        seen[case]["held"] = held / sum(p.nbytes for p in parameters)
        return model

    def watched_counts(routing, mask):
        seen[case]["counts"].append(counts(routing, mask).tolist())
        return counts(routing, mask)

    def slow_disk(file):  # the first process writes; a second one that does not wait finds no file
        time.sleep(0.01)
        fsync(file)

    stop = processes.stop
    processes.start("cpu")  # once; a run of train.py by itself does so each time
    processes.start, processes.stop = lambda device: device, processes.meet
    train.build, train.expert_counts = watched_build, watched_counts
    os.fsync = slow_disk if WORLD > 1 else fsync
    for case in CASES:
        seen[case] = {"counts": []}
        try:
            run(case)
        except BaseException:
            print(f"in case {case!r}, process {RANK}:", file=sys.stderr, flush=True)
            raise
    everywhere = [seen]
    if WORLD > 1:
        everywhere = [None] * WORLD
        torch.distributed.all_gather_object(everywhere, seen)
    if RANK == 0:
        Path(f"{WORLD}.json").write_text(json.dumps(everywhere))
    stop()


# The test ----------------------------------------------------------------------------------------


def make_inputs(folder):
    """The bases, with decided routers, so that no choice hangs on a rounding; rows of unlike
    lengths; experts."""
    for name, config in BASES.items():
        torch.manual_seed(0)
        model = MoETransformer(config)
        for key, p in model.named_parameters():
            if "norm" in key:
                p.data.normal_(1, 0.3)
            else:
                p.data.normal_(0, p.shape[-1] ** -0.5)
            if "router" in key:
                p.data.mul_(4)
        model.save_pretrained(folder / name)
        shutil.copy(ROOT / "data" / "tiny_olmoe" / "tokenizer.json", folder / name)
    rows = []
    for n in (1, 9, 2, 7, 3, 5, 4, 6):
        answer = "a b" if n % 2 else "a b c d e"
        question = {"role": "user", "content": f"copy {'a b ' * n}"}
        rows.append({"messages": [question, {"role": "assistant", "content": answer}]})
    (folder / "rows.json").write_text(json.dumps(rows))
    # an odd number of experts, and more of them on one process than on the other
    (folder / "experts.json").write_text(json.dumps({"experts": {"0": [6, 1, 3], "1": [2, 0, 5]}}))


def spawn(folder, *prefix):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *prefix, __file__]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    # the case comes first, torchrun's own words last
    assert done.returncode == 0, done.stderr[:4000]


CLOCKED = ("tokens_per_second", "memory", "file")
EXACT = {"event", "step", "lr", "accuracy", "kept", "bytes"}


def log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] not in ("memory", "resumed")]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]


def far(a, b):
    """Largest difference, as a share of the largest number."""
    a, b = (torch.as_tensor(t, dtype=torch.float64) for t in (a, b))
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def unlike_logs(one, two, limit):
    """What differs. AdamW makes much of gradients that are rounding: the norm is allowed ten times
    the limit."""
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            bound = 0 if key in EXACT else limit
            if key == "grad_norm":
                bound = 10 * limit
            if a[key] != b[key] and (not bound or far(b[key], a[key]) > bound):
                yield f"{a['event']} {a.get('step', '')}: {key} {a[key]} alone, {b[key]} of two"


def unlike_files(one, two, limit):
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*.*"))
    theirs = sorted(str(path.relative_to(two)) for path in two.rglob("*.*"))
    if names != theirs:
        yield f"files {names} alone, {theirs} of two"
        return
    for name in names:
        a, b = one / name, two / name
        if name.endswith(".safetensors"):
            a, b = SafetensorsFile(a), SafetensorsFile(b)
            assert list(a) == list(b)
            yield from (f"{name}: {key}" for key in a if unlike(a[key], b[key], limit))
        elif (
            name not in ("metrics.jsonl", "config.json", "run.svg")
            and a.read_bytes() != b.read_bytes()
        ):
            yield name


def unlike(a, b, limit):
    same = a.dtype == b.dtype and a.shape == b.shape
    return not same or (a.double() - b.double()).norm() > limit * a.double().norm() + 1e-9


def test_two_processes_train_as_one(tmp_path):
    """Of every case: cross-entropy, balance losses and gradient norm of each step, what is measured
    before and after, and all that is saved; of ESFT also the scores, and so the choice. Each of two
    holds about half of the model. The cases in which a loop that skips experts without tokens would
    go wrong do come up."""
    make_inputs(tmp_path)
    spawn(tmp_path)
    spawn(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    alone, pair = (json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 2))
    wrong = []
    for case in CASES:
        rounds = "bfloat16" in case  # a choice of experts may flip
        one, two = (tmp_path / world / case for world in "12")
        logs = log(one), log(two)
        wrong += [f"{case}: {text}" for text in unlike_logs(*logs, 0.03 if rounds else 1e-5)]
        limit = 5e-2 if rounds else 1e-4
        if case == "scratch":
            limit = 5e-3  # its file is in bfloat16
        wrong += [f"{case}: {text}" for text in unlike_files(one, two, limit)]
        steps = [line["cross_entropy"] for line in logs[0] if line["event"] == "step"]
        if len(set(steps)) < 3:
            wrong.append(f"{case}: it does not learn")
        held = [process[case]["held"] for process in (*alone, *pair)]
        if held[0] != 1 or max(held[1:]) > 0.65:
            wrong.append(f"{case}: held {held}")
    assert not wrong, "\n".join(wrong)

    kept = log(tmp_path / "2" / "perft_s, embedded base")[0]["kept"]
    assert kept > 0.5, "there are accuracies above 0 to be compared"
    different = unused = no_row = False
    # of a layer and step, by expert
    for x, y in zip(pair[0]["full"]["counts"], pair[1]["full"]["counts"]):
        different |= [n > 0 for n in x] != [n > 0 for n in y]
        unused |= 0 in [m + n for m, n in zip(x, y)]
        no_row |= sum(x) > 0 and sum(y) == 0
    assert different, "they use different experts"
    assert unused, "some expert gets no token at all"
    assert no_row, "a process gets no row"


if __name__ == "__main__":
    script()
