"""What the README says is so: its commands run, its numbers are those of the code, its links lead
somewhere."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import results
import torch
from test_model import QWEN3_30B_A3B

import perft
import train
from data import run, skills
from data.hub import make_config
from model import Config, MoETransformer, active_parameters

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "data/README.md", "tests/README.md")
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
QUICK = {
    "train.py": "--steps 2 --eval_rows 5 --threads 1 --overwrite".split()
}  # what a command is given on top


def commands(text):
    """The python commands of a page's code blocks, in order, without those about folders that the
    reader has or what is downloaded, and without the benchmark, which takes minutes."""
    lines = [line.split("#")[0] for _, block in BLOCK.findall(text) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    elsewhere = "path/to/", "downloads", "prepare.py", "bench", "commonsense"
    return [
        part
        for part in parts
        if part.startswith("python ") and not any(word in part for word in elsewhere)
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository to run in. While the base has no weights yet, with random ones."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("data", "assets", *(path.name for path in ROOT.glob("*.py"))):
        path = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "downloads")
        shutil.copytree(path, folder / name, ignore=ignored) if path.is_dir() else shutil.copy(
            path, folder / name
        )
    tiny = folder / "data" / "tiny_olmoe"
    if not (tiny / "model.safetensors").is_file():
        MoETransformer(Config.from_folder(tiny)).save_pretrained(tiny)
    return folder


def in_shell(command: list[str], folder: Path):
    one_thread = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # as quick for these sizes, and kind to whatever else runs
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=one_thread, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


RUN_ALL = """
import runpy, sys
for command in COMMANDS:
    print("$", *command, flush=True)
    sys.argv, sys.path[0] = command, command[0].rpartition("/")[0] or "."
    runpy.run_path(command[0], run_name="__main__")
"""


@pytest.mark.parametrize("page", ["README.md", "data/README.md"])
def test_every_command_runs_in_the_order_of_the_page(page, checkout):
    """With few steps and rows; a later command finds what an earlier one wrote. In one process,
    which imports torch once: that each works in a process of its own is for test_train.py and
    test_eval.py."""
    found = [shlex.split(command)[1:] for command in commands(PAGES[page])]
    assert len(found) >= 2
    tokenizer = (checkout / "data" / "tiny_olmoe" / "tokenizer.json").read_bytes()
    quick = [[script, *flags, *QUICK.get(script, [])] for script, *flags in found]
    printed = in_shell(["-c", f"COMMANDS = {quick}{RUN_ALL}"], checkout)
    assert printed.count("\n$ ") + 1 == len(found) and printed.count("\nsaved ") == str(
        found
    ).count("'train.py'")
    assert (checkout / "data" / "tiny_olmoe" / "tokenizer.json").read_bytes() == tokenizer, (
        "made again, the same bytes"
    )


def test_the_first_command_is_the_one_of_the_first_screen():
    """All the set-up there is, in one line; and the tests in another."""
    blocks = [block.strip() for _, block in BLOCK.findall(README)]
    assert blocks[0] == "pip install -r requirements.txt && python train.py --variant perft_s"
    assert "pip install -r requirements-dev.txt && pytest" in blocks


def test_the_python_block_runs(checkout):
    """As a script in the repository root; it prints an answer, a table of what trains, and
    shapes."""
    (block,) = [block for language, block in BLOCK.findall(README) if language == "python"]
    printed = in_shell(["-c", block], checkout)
    assert "all that trains" in printed and "torch.Size([1, " in printed
    assert (checkout / "out" / "untrained" / "adapter_model.safetensors").is_file()


def test_the_reading_order_has_every_file_of_the_top_level():
    rows = re.findall(r"^\| \[(\S+?\.py)\]\((\S+?)\) \|", README, re.M)
    assert {name for name, _ in rows} == {path.name for path in ROOT.glob("*.py")}
    assert all(name == link for name, link in rows)


def test_the_page_of_data_has_every_file_of_data():
    told = re.findall(r"^\| \[(\S+?\.py)\]", PAGES["data/README.md"], re.M)
    assert sorted(told) == sorted(path.name for path in (ROOT / "data").glob("*.py"))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", PAGES[page])
    missing = [
        link for link in links if "://" not in link and not ((ROOT / page).parent / link).exists()
    ]
    assert links and not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    """Words in backquotes that look like a path of the repository (what a run writes begins with
    out/)."""
    names = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.\w+|[\w-]+\.(?:py|md))`", PAGES[page])
    assert not [
        name
        for name in names
        if not name.startswith(("out/", "path/to/")) and not (ROOT / name).exists()
    ]


@pytest.mark.parametrize("page", PAGES)
def test_no_number_is_left_to_be_filled_in(page):
    assert not re.findall(r"@@\S*", PAGES[page])


def test_the_size_of_the_embedded_model_is_as_told():
    """In millions and experts on the first page, exactly on the page about it."""
    config = Config.from_folder(ROOT / "data" / "tiny_olmoe")
    with torch.device("meta"):
        model = MoETransformer(config)
    total = sum(p.numel() for p in model.parameters())
    layers = f"{config.num_hidden_layers} layers of {config.num_experts} experts"
    assert f"{total / 1e6:.1f} M parameters, {layers}" in " ".join(README.split())
    assert (
        f"{total:,} parameters ({active_parameters(config):,} active for a token)"
        in PAGES["data/README.md"]
    )


def test_parameter_counts_are_those_that_perft_prints(capsys):
    """Every variant and base: each number of the README's table in perft.py's output for that
    variant, and in the README every count of trainable parameters that perft.py prints."""
    perft.main([])
    lines = re.findall(r"^  (\w+) +([\d,]+ parameters.*)$", capsys.readouterr().out, re.M)
    printed = {}
    for variant, numbers in lines:
        printed.setdefault(variant, []).append(
            re.findall(r"\d[\d,]*\d", re.sub(r"\(.*?\)", "", numbers))
        )
    assert list(printed) == [*perft.PERFT, "lora_qv"] and all(
        len(bases) == 3 for bases in printed.values()
    )

    section = (
        PAGES["data/README.md"].split("| rank 16 |")[1].split("Parameters: `python perft.py`")[0]
    )
    for variant, bases in printed.items():
        lines = "\n".join(
            line for line in section.splitlines() if re.search(rf"\b{variant}\b", line)
        )
        told = re.findall(r"\d{1,3}(?:,\d{3})+", lines)
        known = [number for numbers in bases for number in numbers]
        assert set(told) <= set(known), (
            f"{variant}: the README has numbers that perft.py does not print"
        )
        assert {numbers[0] for numbers in bases} <= set(told), (
            f"{variant}: trainable parameters are missing"
        )


def test_a_table_of_what_trains_in_the_readme_is_the_one_that_the_default_run_prints():
    """Its lines need no training: they are compared with perft.report on the embedded base's
    shapes."""
    with torch.device("meta"):
        model = MoETransformer(Config.from_folder(ROOT / "data" / "tiny_olmoe"))
        printed = perft.report(perft.apply_perft(model, "perft_s")).splitlines()
    lines = [line for _, block in BLOCK.findall(README) for line in block.splitlines()]
    told = [
        line for line in lines if re.match(r"module  |layers\.|all that trains|base model:", line)
    ]
    assert len(told) >= 3 and not [line for line in told if line not in printed]


def test_the_options_of_each_variant_are_those_it_takes():
    """The README's table against each variant's parser, less what all but scratch have; "also" and
    "as" mean the options of perft_s too."""
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*?) ?\|$", README, re.M)
    told = {variant: set(re.findall(r"--\w+", cell)) for variant, cell in rows}
    for variant, cell in rows:
        if cell.startswith("also") or "perft_s" in cell:
            told[variant] |= told["perft_s"]
    every = {f"--{name}" for _, flags in train.FLAGS for name in flags}
    flags = {}
    for variant in train.VARIANTS:
        flags[variant] = every - {f"--{name}" for name in train.absent(variant, {})}
    common = flags["router"]  # which has none of its own
    assert told == {name: flags[name] - common for name in train.VARIANTS}


def test_the_tests_that_hold_a_row_are_there():
    """By file and the beginning of their names."""
    rows = re.findall(r"\| `(tests/test_\w+\.py)`(?:: ([\w, ]+))? \|$", README, re.M)
    assert len(rows) == 8
    for path, names in rows:
        code = (ROOT / path).read_text(encoding="utf-8")
        assert all(f"def {name}" in code for name in names.split(", ") if name)


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 250


def test_the_tables_of_results_and_claims_are_those_that_the_sweep_prints():
    """Every line, from assets/results.csv and curves.csv."""
    found = results.Results(ROOT / "assets" / "results.csv", "three_new")
    alone = results.Results(ROOT / "assets" / "results.csv", skills.DEFAULT_TARGET)
    for page, lines in (
        (PAGES["data/README.md"], results.table(alone, results.METHODS)),
        (README, results.table(found, results.METHODS)),
        (README, results.claims(found)),
        (PAGES["tests/README.md"], results.table(found, results.SIZES)),
    ):
        assert len(lines) > 10 and not set(lines) - set(page.splitlines())


def mean(found, name, column):
    """Of a method's seeds at its rate, in %."""
    (method,) = [m for m in results.METHODS + results.SIZES if f"{m.name} {m.config}" == name]
    values = [100 * row[column] for row in found.seeds(method)]
    return sum(values) / len(values)


def test_what_is_said_of_routing_follows_from_the_table():
    """Differences in whole points; the size of 18 thousand keeps more than the others near it."""
    found = results.Results(ROOT / "assets" / "results.csv", "three_new")
    words = " ".join(README.split())

    def more(name, other, column):
        return round(mean(found, name, column) - mean(found, other, column))

    routed, eight = "perft_r Top2/4 r16", "perft_r Top2/8 r16"
    assert f"keep {more(routed, 'perft_d 4 x r16', 'kept')} points more under a router" in words
    kept, learnt = more("perft_e r4", eight, "kept"), more(eight, "perft_e r4", "target")
    assert f"keeps {kept} more and learns {learnt} less" in words
    larger = ("perft_e r16", "esft_token p 0.2", "esft_gate p 0.1")
    ahead = [more(name, eight, "kept") for name in larger]
    assert f"keep {min(ahead)} to {max(ahead)} more" in words
    small = mean(found, "perft_r Top2/4 r4", "kept")
    assert small > max(mean(found, name, "kept") for name in ("perft_s r16", "perft_d 4 x r4"))


def test_why_esft_forgets_less_is_two_rows_of_the_sweep():
    """The chosen experts and as many random ones, of one rate and seed; and full keeps as much."""
    found = results.Results(ROOT / "assets" / "results.csv", "three_new")
    rows = {
        row["config"]: row
        for row in found.rows
        if (row["method"], row["lr"], row["seed"]) == ("esft_token", 0.002, 0)
    }
    chosen, random = rows["p 0.2"], rows["random"]
    assert chosen["trains"] == random["trains"]
    said = (
        f"At one rate and seed (0.002, 0) the chosen learn {chosen['target']:.1%} and keep "
        f"{chosen['kept']:.1%}, as many random ones {random['target']:.1%} and "
        f"{random['kept']:.1%}."
    )
    assert said in " ".join(README.split()).replace(" %", "%")
    full, ours = mean(found, "full all", "kept"), mean(found, "esft_token p 0.2", "kept")
    assert abs(full - ours) < 2 < full - mean(found, "esft_token random", "kept")


def test_the_memory_of_real_models_is_what_a_run_says_first(monkeypatch, capsys):
    """PERFT-R in bfloat16: what its line of memory adds up to."""
    monkeypatch.setattr(run, "free_memory", lambda: float("inf"))
    models = {"OLMoE-1B-7B": perft.OLMOE_1B_7B, "Qwen3-30B-A3B": QWEN3_30B_A3B}
    for name, sizes in models.items():
        args = SimpleNamespace(dtype="bfloat16", device="cpu")
        edit = partial(perft.apply_perft, variant="perft_r")
        train.check_memory(args, make_config(sizes, Config), edit)
        line = capsys.readouterr().out
        total = sum(float(number) for number in re.findall(r"\d+\.\d+", line))
        assert f"{total:.1f} GB for {name}" in " ".join(README.split())


def test_an_adapter_goes_to_peft_and_back_as_told(tmp_path):
    """Both calls, as they stand in the page."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    there, back = re.findall(
        r"`(PeftModel\.from_pretrained\(.+?\)|perft\.load_adapter\(.+?\))`", README
    )
    folder = ROOT / "data" / "tiny_olmoe"
    ids = torch.tensor([[5, 9, 2, 60, 33]])
    adapted = perft.apply_perft(MoETransformer.from_pretrained(folder), "lora_qv")
    torch.manual_seed(0)
    for p in adapted.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    perft.save_adapter(adapted.eval(), tmp_path / "run")
    names = {"PeftModel": peft.PeftModel, "perft": perft, "RUN": tmp_path / "run"}
    names["base"] = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = eval(there, names).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    names |= {"model": MoETransformer.from_pretrained(folder), "FOLDER": tmp_path / "theirs"}
    again = eval(back, names)
    with torch.no_grad():
        expected = adapted(ids).logits
        assert torch.allclose(theirs(input_ids=ids).logits, expected, atol=1e-4)
        assert torch.allclose(again(ids).logits, expected, atol=1e-4)


def test_the_tables_of_speed_are_what_was_measured():
    """Against assets/bench.csv: times and kept memory of one layer, tokens a second of a step, what
    adapters add."""
    with open(ROOT / "assets" / "bench.csv", encoding="utf-8") as file:
        rows = [
            row for row in csv.DictReader(file) if row["group"] != "block" or row["threads"] == "2"
        ]
    page = PAGES["tests/README.md"]
    found = {
        (row["group"], re.sub(r" \(grouped_mm\)", "", row["case"]), row["metric"]): row["value"]
        for row in rows
    }
    assert len(found) == len(rows), "a number stands there twice"

    def cells(name):
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", page, re.M)
        return row.split(" | ")

    def value(*key):
        return float(found[key])

    block = {
        "ours, the loop of the text book": "ours, loop",
        "ours, grouped": "ours, grouped",
        "ours, grouped and compiled": "ours, compiled",
        "transformers, default (grouped)": "transformers, default",
        "transformers, compiled": "transformers, compiled",
    }
    for name, case in block.items():
        frozen, kept, trainable = cells(name)
        assert frozen == f"{value('block', f'frozen: {case}', 'ms'):.0f} ms"
        assert kept.split()[0] == f"{value('block', f'frozen: {case}', 'kept_kib_per_token'):.1f}"
        assert trainable == f"{value('block', f'trainable: {case}', 'ms'):.0f} ms"

    step = {
        "PERFT-S": ("perft_s, eager", "perft_s, compiled"),
        "PERFT-R (Top2/4)": ("perft_r, eager",),
        "PERFT-E": ("perft_e, eager", "perft_e, compiled"),
        "ESFT": ("esft, eager",),
        "LoRA on the experts": ("lora_experts, eager", "lora_experts, compiled"),
        "full": ("full, eager",),
        "transformers + peft, q,v LoRA": ("peft_qv, default", "peft_qv, compiled"),
        "transformers + peft, LoRA on the experts": ("peft_experts, default",),
        "transformers, full": ("transformers_full, default",),
    }
    table = page.split("| tokens a second |")[1].split("\n\n")[0]
    for name, cases in step.items():
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", table, re.M)
        told = [cell.strip() for cell in row.split("|")]
        speeds = [value("step", case, "tokens_per_second") for case in cases]
        assert told == [*(f"{round(speed, -2):,.0f}" for speed in speeds), ""][:2], name

    names = "OLMoE layer: lora_experts, eager", "OLMoE layer: peft_experts, default"
    (ours, kept), (theirs, theirs_kept) = (
        [value("step", name, metric) for metric in ("tokens_per_second", "kept_kib_per_token")]
        for name in names
    )
    assert f"ours does {ours:.0f} tokens a second and keeps {kept:.0f} KiB a token" in page
    assert f"peft's `target_parameters` {theirs:.0f} and {theirs_kept:.0f}." in page

    full = {"ours, PERFT-R": "perft_r", "transformers + peft, q,v LoRA": "peft_qv"}
    table = page.split("| | loads | tokens a second | peak memory |")[1].split("\n\n")[0]
    means = []
    for name, case in full.items():
        told, of_case = [], []
        for metric, unit in (("load_s", " s"), ("tokens_per_second", ""), ("peak_gb", " GB")):
            rounds = [value("full", f"{case}, round {i}", metric) for i in (1, 2)]
            told.append(", ".join(f"{number:.1f}{unit}" for number in rounds))
            of_case.append(sum(rounds) / 2)
        assert f"| {name} | {' | '.join(told)} |" in table
        means.append(of_case)
    (load, speed, peak), (their_load, their_speed, their_peak) = means
    words = " ".join(README.split())
    assert f"loaded in {load:.0f} s, {speed:.0f} tokens a second, {peak:.1f} GB" in words
    assert f"{their_load:.0f} s, {their_speed:.0f} tokens a second, {their_peak:.1f} GB" in words

    adapters = {
        "one OLMoE-sized layer, 2,048 tokens": "OLMoE layer, bfloat16",
        "the embedded model": "embedded model",
    }
    for name, case in adapters.items():
        for told, variant in zip(
            cells(name), ("perft_s", "perft_d", "perft_r", "perft_e"), strict=True
        ):
            keys = [
                ("adapters", f"{case}: {variant}, {mode}", "added_percent")
                for mode in ("eager", "compiled")
            ]
            added = [f"{value(*key):+.1f} %" for key in keys if key in found]
            assert added and told == ", compiled ".join(added), (case, variant)

    times = [
        value("esft", case, "ratio")
        for group, case, metric in found
        if (group, metric) == ("esft", "ratio")
    ]
    small, short, long = (
        f"{ratio:.2f}" for ratio in times
    )  # the embedded model, a layer with 512 and 2,048 tokens
    assert f"takes {small} times the time on the embedded\nmodel, {long} on one" in page
    assert f"2,048 tokens and {short} with 512" in page
