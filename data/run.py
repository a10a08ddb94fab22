"""What surrounds the steps of a run: its folder, its log, the state to resume from, and the check for inert parts.

A run folder holds config.json (every setting), metrics.jsonl (a JSON object a line), what was trained, and while the
run is unfinished state.safetensors: the trained parameters and AdamW's moments.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data.checkpoint import write_text
from data.shard import RANK, whole


def check_run_folder(parser, out: Path, resume: bool, overwrite: bool, written: tuple[str, ...]):
    """Nothing that a user has is lost: parser.error unless the folder is free of what a run writes there (`written`),
    or holds a run and the flags say what to do with it."""
    unfinished = (out / "state.safetensors").exists()
    if out.exists() and not out.is_dir():
        parser.error(f"--out {out} is not a folder; choose another")
    if resume and overwrite:
        parser.error("--resume and --overwrite: choose one")
    if resume and not unfinished:
        parser.error(f"{out} holds no unfinished run to resume (no state.safetensors); drop --resume")
    others = [name for name in ("config.json", *written) if (out / name).exists()]
    if others and not (out / "metrics.jsonl").exists():
        parser.error(f"{out} holds {others[0]}, but no run (a model folder, an adapter?); choose another --out")
    if (out / "metrics.jsonl").exists() and not (resume or overwrite):
        go_on = "continue it with --resume, " if unfinished else ""
        parser.error(f"{out} already holds a run: {go_on}replace it with --overwrite, or choose another --out")


def check_same_run(then: dict, now: dict):
    """A run is continued with the flags it was begun with."""
    free = {"resume", "overwrite", "out", "log_every", "save_every", "threads", "torch", "world", "device"}
    if changed := changes(then, {k: v for k, v in now.items() if k not in free}):
        raise ValueError(f"--resume continues a run as it was begun; changed: {changed}")


def changes(then: dict, now: dict) -> str:
    """What differs in the settings of a continued work, "" if nothing does."""
    return "; ".join(f"{k} {then.get(k)!r} then, {v!r} now" for k, v in now.items() if then.get(k) != v)


def whole_lines(path: Path) -> list[str]:
    """Of JSON lines that are written as the work goes on: all but a last one that was cut off."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]  # not splitlines: a text may hold U+2028


class Log:
    """metrics.jsonl: one JSON object a line; and the same on the screen, above the progress bar. Of several processes
    the first writes."""

    def __init__(self, path: Path, keep_until: int | None):
        kept = []
        if keep_until is not None:  # resuming: lines after the saved state will be written again
            kept = [line for line in whole_lines(path) if json.loads(line).get("step", 0) <= keep_until]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self.file = open(path if RANK == 0 else os.devnull, "a", encoding="utf-8")  # noqa: SIM115 (until the end)

    def write(self, text: str, **record):
        tqdm.write(text)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def state_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """Everything that a step changes, by name: the trained parameters and AdamW's moments and step count."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors[f"param.{name}"] = p.data
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return tensors


def steps_done(optimizer) -> int:
    return int(next(iter(optimizer.state.values()))["step"])


def check_finite(model):
    """ValueError if training made a number that is none. Of several processes all find out together."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bad = [name for name, p in trained if not whole(p.detach()).isfinite().all()]
    if bad:
        raise ValueError(f"{len(bad)} trained tensors are not finite, {bad[0]} is one: training diverged; lower --lr")


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0  # its Python has no way to ask
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class InertCheck:
    """Attached, listed, stepped, and inert is the commonest silent failure: every trainable tensor must get a gradient.

    Two steps are watched, since A has none at the first one if B starts at 0. A layer whose chosen experts no token
    reached in them is excused.
    """

    def __init__(self, model):
        self.silent = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.chosen = getattr(getattr(model, "adapter_config", None), "experts", None) or []
        self.reached = [False] * len(self.chosen)

    def watch(self, counts: torch.Tensor):
        """After a backward pass; counts (L, E): how often the step's tokens chose each expert."""
        self.silent = {n: p for n, p in self.silent.items() if p.grad is None or not whole(p.grad).any()}
        for i, ids in enumerate(self.chosen):
            self.reached[i] |= counts[i][ids].sum().item() > 0

    def verdict(self, expected: str | None):
        """ValueError naming the tensors still without one; names that contain `expected` were warned about before."""
        excused = [f"layers.{i}." for i, reached in enumerate(self.reached) if not reached]
        excused += [expected] if expected else []
        silent = [name for name in self.silent if not any(part in name for part in excused)]
        if silent:
            raise ValueError(f"{len(silent)} trainable tensors had no gradient in two steps: {', '.join(silent[:3])}; "
                             "attached but inert. Is their output detached, or does no token reach them?")
