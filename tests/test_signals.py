"""It keeps working: a run that is asked to stop, that meets another run in its folder, or numbers
that are not finite, says so in one line, loses nothing, and can go on.

Signals are real ones. Where they are sent to this process, the handlers are the commands' own; a
process of its own gets the shell's default first, since in the background SIGINT is ignored.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from data import hub
from model import Config, MoETransformer

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
SIZES = {
    "vocab_size": 640,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
SHORT = "--steps 6 --batch_size 2 --train_rows 6 --eval_rows 1 --warmup 1 --log_every 1 --threads 1"


@pytest.fixture(autouse=True)
def default_signals():
    """As a terminal gives them to a command."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    MoETransformer(Config(**SIZES)).save_pretrained(folder)
    shutil.copy(ROOT / "data" / "tiny_olmoe" / "tokenizer.json", folder)
    return folder


@pytest.fixture
def argv(base, tmp_path):
    """argv(*flags) of a run in the folder `out`."""

    def argv(*flags, variant="perft_s"):
        places = ["--base", base, "--out", tmp_path / "out"]
        words = ["--variant", variant, *places, *SHORT.split(), *flags]
        return [str(word) for word in words]

    return argv


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def ended(argv, capsys) -> tuple[int, str]:
    """How train.py ends: its exit code, and what it says last."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    if isinstance(stop.value.code, str):
        return 1, stop.value.code
    said = capsys.readouterr().err.splitlines()
    return stop.value.code, said[-1]


def at_step(monkeypatch, step, action):
    """Do something in the middle of a step, counted from 1."""
    real = train.forward_backward
    steps = []

    def forward_backward(model, *others):
        steps.append(1)
        losses = real(model, *others)
        if len(steps) == step:
            action(model)
        return losses

    monkeypatch.setattr(train, "forward_backward", forward_backward)


def send(number, times=1):
    def action(model=None):
        for _ in range(times):
            os.kill(os.getpid(), number)

    return action


def events(out, event):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def weights(out):
    return (out / "adapter_model.safetensors").read_bytes()


def start(*words, **options):
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=env, preexec_fn=heard, **pipes, **options)


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Stops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train.py", "eval.py", "model.py", "perft.py", "esft.py"])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_stop_while_torch_is_imported_is_one_line(script, number, code):
    """The library is in the process's memory, and the import is not over."""
    process = start(script, *(["--variant", "perft_s"] if script == "train.py" else []))
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("no /proc to see what a process has loaded")
    wait_for(lambda: "libtorch" in maps.read_text(), process)
    process.send_signal(number)
    assert process.communicate(timeout=300) == ("", "stopped\n")
    assert process.returncode == code


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_stop_is_one_line_from_the_first_imports_on(number, code):
    """Sent when data/run.py asks for argparse, as the first file that a script imports."""
    program = (
        "import os, runpy, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *others):\n"
        f"        if name == 'argparse': os.kill(os.getpid(), {int(number)})\n"
        "sys.modules.pop('argparse', None)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "sys.argv = ['train.py']\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    process = start("-c", program)
    assert process.communicate(timeout=300) == ("", "stopped\n")
    assert process.returncode == code


def test_who_imports_the_modules_keeps_his_own_answers_to_signals():
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import data.run, train, eval\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_stop_finishes_its_step_and_the_run_goes_on_as_if_nothing_had_been(
    argv, out, monkeypatch, capsys, number, code
):
    """No state was due yet: the stop makes one."""
    train.main(argv())
    whole = weights(out)
    with monkeypatch.context() as patch:
        at_step(patch, 3, send(number))
        said = f"stopped: step 3 of 6 is saved in {out}, go on with --resume"
        assert ended(argv("--overwrite"), capsys) == (code, said)
    state = hub.SafetensorsFile(out / "state.safetensors")
    assert int(state["done"]) == 3 and len(events(out, "step")) == 3
    train.main(argv("--resume"))
    assert weights(out) == whole
    assert [line["step"] for line in events(out, "step")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ("100", "nothing was saved, begin again with --overwrite"),
        ("1", "an earlier step is saved in {out}, go on with --resume"),
    ],
)
def test_a_second_stop_is_at_once_and_says_what_there_is(
    argv, out, monkeypatch, capsys, saved, said
):
    at_step(monkeypatch, 3, send(signal.SIGINT, times=2))
    end = ended(argv("--save_every", saved), capsys)
    assert end == (130, f"stopped: {said.format(out=out)}")
    assert len(events(out, "step")) == 2


@pytest.mark.parametrize("place", ["in the last step", "while it measures"])
def test_a_stop_when_training_is_done_says_where_the_weights_are(
    argv, out, monkeypatch, capsys, place
):
    real = train.measure

    def measure(*words):
        if words[-1] == "after":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*words)

    if place == "in the last step":
        at_step(monkeypatch, 6, send(signal.SIGTERM))
    else:
        monkeypatch.setattr(train, "measure", measure)
    file = out / "adapter_model.safetensors"
    said = f"stopped: training is done, {file} is saved; accuracies: eval.py --adapter {out}"
    assert ended(argv(), capsys) == (143, said)
    assert file.exists() and not events(out, "after")


def test_a_stop_when_a_new_base_is_done_says_how_to_measure_it(argv, out, monkeypatch, capsys):
    """It is a model folder, and no adapter."""
    flags = argv(variant="scratch")
    i = flags.index("--train_rows")  # it takes none
    del flags[i : i + 2]
    at_step(monkeypatch, 6, send(signal.SIGTERM))
    model = out / "model"
    said = f"stopped: training is done, {model / 'model.safetensors'} is saved; accuracies: "
    assert ended(flags, capsys) == (143, f"{said}eval.py --base {model}")


def test_a_stop_before_the_first_step_leaves_the_folder_as_it_was(argv, out, monkeypatch, capsys):
    """Nothing, or the run that would have been replaced."""
    monkeypatch.setattr(train, "measure", lambda *words: os.kill(os.getpid(), signal.SIGINT))
    said = "stopped: nothing was written, the same command begins again"
    assert ended(argv(), capsys) == (130, said)
    assert not out.exists()
    monkeypatch.undo()
    train.main(argv())
    files = {path: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(train, "measure", lambda *words: os.kill(os.getpid(), signal.SIGINT))
    assert ended(argv("--overwrite", "--seed", 1), capsys) == (130, said)
    assert {path: path.read_bytes() for path in out.iterdir()} == files


def test_a_run_that_is_stopped_in_a_shell_goes_on(argv, out):
    """The process's own exit code and streams."""
    flags = argv("--steps", 100_000, "--save_every", 100_000)
    process = start("train.py", *flags)
    log = out / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"step": 3' in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    line = r"stopped: step (\d+) of 100000 is saved in .+, go on with --resume"
    found = re.fullmatch(line, said.splitlines()[-1])
    assert process.returncode == 130 and found and "Traceback" not in said
    state = hub.SafetensorsFile(out / "state.safetensors")
    assert int(state["done"]) == int(found[1]) == len(events(out, "step"))
    assert not list(out.glob("lock.*"))


def test_two_processes_stop_after_the_same_step_and_go_on(argv, out):
    """The signal reaches torchrun, which passes it on to each when it likes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start(*torchrun, "train.py", *argv("--steps", 100_000, "--save_every", 100_000))
    log = out / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"step": 2' in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    (step,) = re.findall(r"^stopped: step (\d+) of 100000 is saved in ", said, re.M)
    assert int(hub.SafetensorsFile(out / "state.safetensors")["done"]) == int(step)
    assert len(events(out, "step")) == int(step) and not list(out.glob("*.tmp"))


def test_the_log_of_a_run_that_was_cut_off_at_its_end_has_each_line_once(argv, out, monkeypatch):
    """The last accuracies were there, and the state still."""
    train.main(argv())
    whole = weights(out)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.pictures, "draw", send(signal.SIGTERM))
        train.main(argv("--overwrite", "--save_every", 4))
    assert events(out, "after") and (out / "state.safetensors").exists()
    train.main(argv("--resume", "--save_every", 4))
    for event in ("before", "resumed", "after", "memory", "saved"):
        assert len(events(out, event)) == 1, event
    assert len(events(out, "step")) == 6 and weights(out) == whole


def test_the_log_is_on_the_disk_before_the_state_that_goes_with_it(argv, monkeypatch):
    order = []
    fsync, write = os.fsync, hub.write_tensors

    def synced(number):
        order.append(os.readlink(f"/proc/self/fd/{number}").rpartition("/")[2])
        fsync(number)

    def written(path, *others):
        if Path(path).name == "state.safetensors":
            order.append("state")
        write(path, *others)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to see which file is meant")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(hub, "write_tensors", written)
    train.main(argv("--save_every", 2))
    places = [i for i, name in enumerate(order) if name == "state"]
    assert len(places) == 2 and all(order[i - 1] == "metrics.jsonl" for i in places)


# Standard output ---------------------------------------------------------------------------------


def ends_without_output(way, *words):
    """Exit code and stderr of a command whose standard output takes nothing."""
    env = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    heard = {"cwd": ROOT, "env": env, "stderr": subprocess.PIPE, "text": True}
    if way == "full disk":
        if not Path("/dev/full").exists():
            pytest.skip("the system has no /dev/full")
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, *words], stdout=full, **heard)
        return done.returncode, done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *words], stdout=writer, **heard)
    os.close(writer)
    return done.returncode, done.stderr


WAYS = {"full disk": "No space left on device", "no reader": "Broken pipe"}


@pytest.mark.parametrize("way", WAYS)
def test_an_output_that_takes_no_more_is_one_line(way, argv):
    """`| head -1`, and a full disk behind >; with a buffer that is written at the end, or none."""
    end = ends_without_output(way, "train.py", *argv())
    said = f"error: standard output: {WAYS[way]}; is its disk full, or its reader gone?\n"
    assert end == (1, said)
    for words in (["model.py"], ["-u", "model.py"]):
        assert ends_without_output(way, *words) == end


def test_a_stop_is_told_also_where_the_output_is_gone():
    """Ctrl-C reaches both ends of a pipe."""
    program = (
        "from data import run\n"
        "def main():\n    print('step 3')\n    raise run.Stopped('step 3 is saved')\n"
        "run.command(main)()\n"
    )
    assert ends_without_output("no reader", "-c", program) == (130, "stopped: step 3 is saved\n")


# Two runs in one folder --------------------------------------------------------------------------


@pytest.fixture
def living():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_run_is_refused_in_one_line_and_touches_nothing(argv, out, living, capsys):
    out.mkdir()
    lock = out / f"lock.{platform.node()}.{living}"
    (out / "metrics.jsonl").write_text("")
    lock.write_text("")
    for flags in ([], ["--overwrite"], ["--resume"]):
        code, said = ended(argv(*flags), capsys)
        assert code == 2 and f"process {living} on {platform.node()} is at work in it" in said
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", lock.name}


def test_a_run_that_appears_while_another_measures_is_not_lost(argv, out, monkeypatch, capsys):
    """Its folder was empty when the other one looked."""
    real = train.measure

    def measure(*words):
        (out / "metrics.jsonl").write_text("of somebody else")
        return real(*words)

    monkeypatch.setattr(train, "measure", measure)
    code, said = ended(argv(), capsys)
    assert code == 2 and "already holds a run" in said
    assert (out / "metrics.jsonl").read_text() == "of somebody else"


def test_files_of_strangers_that_look_unfinished_stay(argv, out, capsys):
    (out / "model").mkdir(parents=True)
    names = ["backup.2023.20231125.tmp", "....tmp", "a...tmp", "model/x.y.99999999.tmp"]
    for name in names:
        (out / name).write_text("mine")
    (out / "config.json").write_text("{}")
    code, said = ended(argv(), capsys)
    assert code == 2 and "holds config.json, but no run" in said
    assert all((out / name).read_text() == "mine" for name in names)


def test_a_tokenizer_that_is_there_is_not_overwritten_by_scratch(argv, out, capsys):
    (out / "model").mkdir(parents=True)
    (out / "model" / "tokenizer.json").write_text("mine")
    code, said = ended(["--variant", "scratch", "--steps", "2", "--out", str(out)], capsys)
    assert code == 2 and "holds model/tokenizer.json, but no run" in said


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_no_memory_is_one_line(error, argv, out, monkeypatch, capsys):
    def step(*words):
        raise error

    monkeypatch.setattr(train, "take_step", step)
    code, said = ended(argv(), capsys)
    assert code == 1 and said.startswith(
        "error: out of memory; lower --micro_batch or --batch_size"
    )
    assert "begin again with --overwrite" in said


def test_a_process_of_another_machine_is_believed_to_live(argv, out, capsys):
    out.mkdir()
    (out / f"lock.elsewhere.{dead_process()}").write_text("")
    code, said = ended(argv(), capsys)
    assert code == 2 and "on elsewhere is at work in it" in said and "remove lock." in said


def test_the_lock_of_a_dead_process_and_what_it_was_writing_go(argv, out, living):
    pid, host = dead_process(), platform.node()
    dead = [f"lock.{host}.{pid}", f"lock.{host}.{os.getpid()}", f"state.safetensors.{pid}.tmp"]
    dead.append(f"model/model.safetensors.{pid}.tmp")
    kept = [f"metrics.jsonl.{living}.tmp", f"notes.{pid}.tmp", "a.b.c.tmp", "lock", "poetry.lock"]
    (out / "model").mkdir(parents=True)
    for name in (*dead, *kept):
        (out / name).write_text("")
    train.main(argv())
    assert not any((out / name).exists() for name in dead)
    assert all((out / name).exists() for name in kept)


def test_of_processes_that_start_at_once_no_two_are_in_a_folder(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom data import run\n"
        "sys.stdin.readline()\n"
        "with run.locked(Path(sys.argv[1]) / 'out'):\n"
        "    print('in', time.time_ns())\n    time.sleep(0.2)\n    print('out', time.time_ns())\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(6)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    spans = []
    for process in processes:
        said, refused = process.communicate(timeout=300)
        assert process.returncode in (0, 2) and refused.count("\n") == (process.returncode == 2)
        if said:
            spans.append([int(number) for number in re.findall(r"\d+", said)])
    spans.sort()
    assert all(first[1] < second[0] for first, second in zip(spans, spans[1:]))
    # the one that made the folder removes it, unless another was just looking into it
    assert not any((tmp_path / "out").glob("*"))


def test_a_run_that_has_ended_since_the_flags_were_read_is_not_replaced(
    argv, out, monkeypatch, capsys
):
    real = train.parse_args

    def parse_args(words):
        args = real(words)
        out.mkdir()
        for name in ("metrics.jsonl", "config.json", "adapter_model.safetensors"):
            (out / name).write_text("theirs")
        return args

    monkeypatch.setattr(train, "parse_args", parse_args)
    code, said = ended(argv(), capsys)
    assert code == 2 and "already holds a run" in said
    assert {path.read_text() for path in out.iterdir()} == {"theirs"} and len(
        list(out.iterdir())
    ) == 3


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_read(
    argv, out, monkeypatch, capsys
):
    out.write_text("")
    monkeypatch.setattr(train.eval, "load_config", lambda *words: pytest.fail("the base was read"))
    assert ended([*argv(), "--out", str(out / "in" / "it")], capsys) == (
        1,
        f"error: {out / 'in' / 'it'}: Not a directory; is there room, and may it be written?",
    )


# Numbers that are not finite ---------------------------------------------------------------------


def break_gradient(name):
    def action(model):
        dict(model.named_parameters())[name].grad[..., 0, 0] = float("nan")

    return action


def test_a_step_that_is_not_finite_changes_nothing_and_is_named_at_the_next_line(
    argv, out, monkeypatch, capsys
):
    """Weights and both moments before and after the step, bit for bit; its number and its tensor in
    the line of a later step."""
    name = "layers.1.moe.adapters.B"
    at_step(monkeypatch, 3, break_gradient(name))
    real = train.take_step
    changed = []

    def take_step(args, model, optimizer, guard, batch, step):
        def state():
            places = train.state_places(model, optimizer)
            return {key: place.parameter.detach().clone() for key, place in places.items()}

        before = state()
        taken = real(args, model, optimizer, guard, batch, step)
        after = state()
        changed.append(any(not torch.equal(before[key], after[key]) for key in before))
        return taken

    monkeypatch.setattr(train, "take_step", take_step)
    train.main(argv("--log_every", 5, "--init", "lora"))
    assert changed == [True, True, False, True, True, True]
    what = f"the gradient of {name} was not finite in step 3"
    assert f"\nwarning: {what}, which changed nothing\n" in capsys.readouterr().out
    assert [line["what"] for line in events(out, "not_finite")] == [what]
    assert [line["step"] for line in events(out, "step")] == [5, 6]


def test_of_a_forward_pass_the_first_layer_is_named(argv, out, monkeypatch):
    real = train.forward_backward
    steps = []

    def forward_backward(model, *others):
        steps.append(1)
        router = model.layers[1].moe.router.weight
        kept = router.detach().clone()
        if len(steps) == 2:
            router.data[0] = float("inf")
        losses = real(model, *others)
        router.data.copy_(kept)
        return losses

    monkeypatch.setattr(train, "forward_backward", forward_backward)
    train.main(argv())
    (line,) = events(out, "not_finite")
    assert line["what"] == "the router of layers.1 was not finite in step 2"
    assert [line["step"] for line in events(out, "step")] == [1, 3, 4, 5, 6]


def test_ten_steps_in_a_row_end_the_run_whose_last_good_state_goes_on_with_a_lower_rate(
    argv, out, monkeypatch, capsys
):
    real = train.forward_backward
    steps = []

    def forward_backward(model, *others):
        losses = real(model, *others)
        steps.append(1)
        if len(steps) > 5:
            break_gradient("layers.2.moe.adapters.A")(model)
        return losses

    flags = ("--steps", 30, "--save_every", 2)
    with monkeypatch.context() as patch:
        patch.setattr(train, "forward_backward", forward_backward)
        code, said = ended(argv(*flags), capsys)
    assert (code, len(steps)) == (1, 15)
    assert said == (
        "error: the gradient of layers.2.moe.adapters.A was not finite in step 6, nor was any step "
        f"since; lower --lr (it is 0.001): an earlier step is saved in {out}, go on with --resume"
    )
    assert int(hub.SafetensorsFile(out / "state.safetensors")["done"]) == 4
    capsys.readouterr()
    train.main(argv(*flags, "--lr", "1e-4", "--resume"))
    assert "\ngoes on after step 4, with --lr 0.0001\n" in capsys.readouterr().out
    (line,) = events(out, "resumed")
    assert (line["step"], line["lr"]) == (4, 1e-4)
    assert not events(out, "not_finite")  # step 6 is done again, and is well
    rates = [line["lr"] for line in events(out, "step")]
    assert len(rates) == 30 and max(rates[:4]) > 9e-4 and max(rates[4:]) < 1e-4
    assert json.loads((out / "config.json").read_text())["lr"] == 1e-4


def test_a_rate_and_a_scale_that_cannot_be_meant_are_said_for_what_they_are(argv, capsys):
    train.main(argv("--lr", 100))
    said = capsys.readouterr().out
    assert "warning: --lr 100.0 is far above what perft_s was found to bear, 0.001" in said
    code, said = ended(argv("--overwrite", "--alpha", 0), capsys)
    assert code == 2 and "--alpha: 0 is out of range, it must be more than 0" in said


def test_lines_say_the_time_that_remains_where_no_bar_does(argv, capsys):
    train.main(argv())
    lines = re.findall(r"^ +\d+ .* GB .*$", capsys.readouterr().out, re.M)
    assert len(lines) == 6 and all(re.search(r"   \d\d:\d\d left$", line) for line in lines[:-1])
    assert "left" not in lines[-1]
