"""eval.py measures what greedy decoding would do, answers prompts, and finds again what train.py
reported; the embedded base is good. (The papers' test sets: test_eval_sets.py.)

The first half runs on a tiny model that learns for a few seconds, enough to be right on some rows
and wrong on others. The second half is about the model in data/tiny_olmoe itself, and is skipped
while that is not there.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_base
from test_train import failure, make_base, metrics, one_thread  # noqa: F401 (used by being here)

import eval
import train
from data import pictures, skills
from data.dataset import encode_rows
from data.tasks import TEMPLATES, chat_turns
from data.tokenizer import load_tokenizer
from eval import accuracies, is_right, load_trained

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny_olmoe"


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A tiny model folder that knows a little: made by train.py, in 120 steps."""
    out = tmp_path_factory.mktemp("learnt")
    flags = {
        "lr": 0.01,
        "steps": 120,
        "batch_size": 32,
        "warmup": 10,
        "eval_rows": 5,
        "log_every": 120,
        "threads": 1,
    }
    flags = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    train.main(
        ["--variant", "scratch", "--base", str(make_base(out / "base")), "--out", str(out), *flags]
    )
    shutil.copy(TINY / "tokenizer.json", out / "model")
    return out / "model"


@pytest.fixture(scope="module")
def model_and_tokenizer(learnt):
    return load_base(str(learnt))


@pytest.fixture(scope="module")
def rows():
    """Rows of every family, those that a small model learns first more often."""
    often = {"logic": 60, "kinship": 40, "day": 40, "quiz": 40}
    return [
        row for name in skills.FAMILIES for row in skills.sample(name, "test", often.get(name, 10))
    ]


def greedy_by_hand(model, ids, steps, end):
    """Greedy decoding without a cache, without a batch: the likeliest token is appended, until the
    end token."""
    ids, new = list(ids), []
    for _ in range(steps):
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == end:
            return new, True
        ids.append(token)
        new.append(token)
    return new, False


# What is right -----------------------------------------------------------------------------------


def test_a_row_is_right_if_and_only_if_greedy_decoding_gives_its_answer_and_ends(
    model_and_tokenizer, rows
):
    """Against model.generate: the text that comes out is the row's answer, and nothing follows."""
    model, tokenizer = model_and_tokenizer
    right = is_right(model, tokenizer, rows)
    answers = model.generate([tokenizer.encode(row.prompt) for row in rows], max_new_tokens=12)
    told = [
        len(ids) < 12 and tokenizer.decode(ids).strip() == row.answer.strip()
        for ids, row in zip(answers, rows)
    ]
    assert right == told
    assert 30 < sum(right) < len(rows) - 100, "all right, or all wrong, would compare nothing"


@torch.no_grad()
def test_a_row_is_right_if_decoding_token_by_token_by_hand_says_so(model_and_tokenizer, rows):
    """The same without model.generate: each token is the argmax of a fresh forward pass."""
    model, tokenizer = model_and_tokenizer
    some = rows[::4]
    for row, right in zip(some, is_right(model, tokenizer, some)):
        answer = tokenizer.encode(row.answer)
        new, ended = greedy_by_hand(
            model, tokenizer.encode(row.prompt), len(answer) + 1, tokenizer.eos_id
        )
        assert right == (ended and new == answer)


def test_batch_size_and_order_do_not_change_what_is_right(model_and_tokenizer, rows):
    model, tokenizer = model_and_tokenizer
    right = is_right(model, tokenizer, rows)
    for batch_size in (1, 7, 1000):
        assert is_right(model, tokenizer, rows, batch_size) == right
    order = random.Random(0).sample(range(len(rows)), len(rows))
    assert is_right(model, tokenizer, [rows[i] for i in order]) == [right[i] for i in order]
    assert is_right(model, tokenizer, []) == []


def test_accuracy_is_the_share_of_the_first_test_rows_a_fifth_of_them_for_other_skills(
    model_and_tokenizer,
):
    """Against the shares worked out from the rows; the model is left in the mode it was in."""
    model, tokenizer = model_and_tokenizer
    model.train()
    measured = accuracies(model, tokenizer, ["logic", "day", "quiz"], 50, "logic")
    assert model.training
    model.eval()
    assert list(measured) == ["logic", "day", "quiz"]
    for name, n in (("logic", 50), ("day", 10), ("quiz", 10)):
        right = is_right(model, tokenizer, skills.sample(name, "test", n))
        assert measured[name] == sum(right) / n


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in_also_if_it_fails(model_and_tokenizer, training):
    """Dropout that stays off would change the rest of a training run, in silence."""
    model, tokenizer = model_and_tokenizer
    model.train(training)
    too_long = skills.Row("sort", "see " * 70, "a")
    with pytest.raises(ValueError, match="64 positions"):
        is_right(model, tokenizer, [too_long])
    assert all(module.training == training for module in model.modules())
    model.eval()


# The script --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["perft_r", "--task", "logic", "--num_adapters", 3],
        ["perft_e", "--task", "day", "--dtype", "bfloat16", "--kind", "parallel"],
        ["lora_qv", "--task", "logic", "--rank", 3, "--dtype", "bfloat16"],
        ["router", "--task", "quiz"],
        ["perft_s", "--task", "kinship_new"],
        ["full", "--task", "logic"],
        ["esft_gate", "--task", "logic"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_eval_finds_exactly_the_accuracies_that_the_training_run_reported(
    learnt, tmp_path, capsys, flags
):
    """The run folder is all it is told: base, task, dtype and number of rows are the run's. Against
    metrics.jsonl."""
    run = {
        "lr": 0.02,
        "steps": 12,
        "batch_size": 16,
        "warmup": 2,
        "eval_rows": 100,
        "train_rows": 200,
        "threads": 1,
    }
    run = [text for flag, value in run.items() for text in (f"--{flag}", str(value))]
    train.main(
        ["--variant", *map(str, flags), "--base", str(learnt), "--out", str(tmp_path / "run"), *run]
    )
    (before,), (after,) = metrics(tmp_path / "run", "before"), metrics(tmp_path / "run", "after")
    assert before["accuracy"] != after["accuracy"], (
        "an adapter that changes nothing would compare nothing"
    )
    capsys.readouterr()
    eval.main(["--adapter", str(tmp_path / "run")])
    *lines, last = capsys.readouterr().out.splitlines()
    shares = [[name, f"{100 * value:.1f}", "%"] for name, value in after["accuracy"].items()]
    assert [line.split() for line in lines] == shares
    families = skills.CONTRADICTS.get(flags[2], ())
    without = f", without {', '.join(families)}" if families else ""
    assert last == f"pre-training families {100 * after['kept']:.1f} % (mean{without})"

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    model, tokenizer = load_base(config["base"], config["dtype"])
    load_trained(model, tmp_path / "run")
    assert (
        accuracies(model, tokenizer, list(after["accuracy"]), 100, config["task"])
        == after["accuracy"]
    )


def test_scratch_reports_the_accuracy_of_the_folder_that_it_wrote(learnt, capsys):
    """The weights are written as bfloat16; what is reported is what the file gives, not what the
    memory gave."""
    (after,) = metrics(learnt.parent, "after")
    capsys.readouterr()
    eval.main(["--base", str(learnt), "--eval_rows", "5"])
    *lines, last = capsys.readouterr().out.splitlines()
    shares = [[name, f"{100 * value:.1f}", "%"] for name, value in after["accuracy"].items()]
    assert [line.split() for line in lines] == shares
    assert last == f"pre-training families {100 * after['kept']:.1f} % (mean)"


@torch.no_grad()
def test_a_prompt_is_answered_as_greedy_decoding_by_hand_answers_it(
    learnt, model_and_tokenizer, capsys
):
    model, tokenizer = model_and_tokenizer
    for row in (*skills.sample("logic", "test", 3), *skills.sample("mod", "test", 3)):
        eval.main(["--base", str(learnt), "--prompt", row.prompt, "--max_new_tokens", "9"])
        new, _ = greedy_by_hand(model, tokenizer.encode(row.prompt), 9, tokenizer.eos_id)
        assert capsys.readouterr().out == row.prompt + tokenizer.decode(new) + "\n"


def test_drawing_depends_on_the_seed_and_beams_find_a_likelier_answer(
    learnt, model_and_tokenizer, capsys
):
    """Temperature: same seed, same text. Beams: log-probability of the answer at least that of the
    greedy one."""
    model, tokenizer = model_and_tokenizer
    row = skills.sample("mod", "test", 1)[0]

    def answer(*flags):
        eval.main(["--base", str(learnt), "--prompt", row.prompt, "--max_new_tokens", "6", *flags])
        return capsys.readouterr().out

    drawn = [answer("--temperature", "2", "--seed", seed) for seed in "3345"]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert answer("--temperature", "2", "--top_p", "0.0001") == answer(), (
        "the likeliest token alone is left to draw"
    )
    assert answer("--temperature", "1e-45") == answer(), "so cold that nothing is left to chance"
    prompt = tokenizer.encode(row.prompt)
    (beams,) = model.generate([prompt], 6, num_beams=4)
    assert answer("--num_beams", "4") == row.prompt + tokenizer.decode(beams) + "\n"


@pytest.fixture(scope="module")
def adapter(learnt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    short = [
        "--steps",
        "1",
        "--batch_size",
        "4",
        "--train_rows",
        "4",
        "--eval_rows",
        "1",
        "--threads",
        "1",
    ]
    train.main(["--variant", "perft_s", "--base", str(learnt), "--out", str(folder), *short])
    return folder


def test_an_adapter_is_refused_on_another_base_and_the_line_names_both_sides(adapter, tmp_path):
    """Another size is named with both values; another constant of the config is noticed by its
    hash."""
    wider = make_base(tmp_path / "wider", hidden_size=64)
    code, message = failure("--adapter", adapter, "--base", wider, main=eval.main)
    assert (
        code == 1
        and str(adapter) in message
        and "hidden_size 32 then, 64 now" in message
        and "\n" not in message
    )
    turned = make_base(tmp_path / "turned", rope_theta=500.0)
    code, message = failure("--adapter", adapter, "--base", turned, main=eval.main)
    assert code == 1 and "another base" in message and "\n" not in message


def test_every_mistake_is_one_line_with_cause_and_place(adapter, learnt, tmp_path, capsys):
    """Exit code 1 for what is found in files, 2 for what is wrong in the command itself."""

    def copy(name, *without):
        shutil.copytree(adapter, tmp_path / name)
        for file in without:
            (tmp_path / name / file).unlink()
        return tmp_path / name

    cut = copy("cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    short = make_base(tmp_path / "short", max_position_embeddings=16)
    unfinished = copy("unfinished", "adapter_config.json")
    (unfinished / "adapter_model.safetensors").rename(unfinished / "state.safetensors")
    cases = [
        (1, ["--adapter", unfinished], ["unfinished", "not finished", "--resume"]),
        (
            1,
            ["--adapter", copy("of_peft", "config.json")],
            ["of_peft", "no config.json", "give --base"],
        ),
        (1, ["--adapter", tmp_path / "nowhere"], ["nowhere", "is it a run?"]),
        (
            1,
            ["--adapter", copy("begun", "adapter_model.safetensors", "adapter_config.json")],
            ["adapter_config.json"],
        ),
        (
            1,
            ["--adapter", copy("half", "adapter_model.safetensors")],
            ["adapter_model.safetensors", "no such file"],
        ),
        (1, ["--adapter", cut], ["adapter_model.safetensors", "cut off"]),
        (1, ["--base", tmp_path / "nowhere"], ["nowhere", "no such folder"]),
        (1, ["--base", short], ["longer than the model's 16 positions"]),
        (
            1,
            ["--base", learnt, "--prompt", "sort : a", "--max_new_tokens", "500"],
            ["longer than the model's 64"],
        ),
        (1, ["--base", learnt, "--prompt", ""], ["prompt"]),
        (
            1,
            ["--base", learnt, "--tasks", "translate", "--eval_rows", "100000"],
            ["translate", "distinct test rows"],
        ),
        (
            1,
            ["--base", learnt, "--prompt", "x", "--num_beams", "2", "--temperature", "1"],
            ["temperature is 1.0; 2 beams draw nothing"],
        ),
        (2, ["--tasks", "juggle"], ["juggle", "kinship_new"]),
        (2, ["--eval_rows", "0"], ["--eval_rows: 0 is out of range", "at least 1"]),
        (2, ["--prompt", "x", "--num_beams", "99999999"], ["out of range", "at most 1000"]),
        (2, ["--prompt", "x", "--max_new_tokens", "2000000000"], ["out of range", "at most"]),
        (2, ["--dtype", "int8"], ["int8", "float32"]),
        (2, ["--no_such_flag"], ["--no_such_flag was not understood"]),
        (2, ["out/perft_s"], ["out/perft_s was not understood"]),
        (2, ["--adaptor", "out/perft_s"], ["--adaptor", "did you mean --adapter?"]),
        (2, ["commonsense"], ["did you mean --tasks commonsense?"]),
        (2, ["--routing", "x.svg"], ["--routing applies to --prompt and --chat only"]),
        (2, ["--prompt", "x", "--chat", "x"], ["--prompt", "--chat"]),
    ]
    for expected, flags, parts in cases:
        code, message = failure(*flags, main=eval.main)
        message = message or capsys.readouterr().err
        assert code == expected and message.strip().count("\n") == 0, (flags, message)
        assert not [part for part in parts if part not in message], message


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_new_tokens", "-3"],
        ["--num_beams", "0"],
        ["--temperature", "-1"],
        ["--device", "banana"],
        ["--temperature", "1", "--top_p", "0"],
        ["--temperature", "1e999"],
        ["--seed", "99999999999999999999"],
    ],
    ids=" ".join,
)
def test_a_value_that_cannot_be_is_told_in_one_line_that_names_it(learnt, capsys, flags):
    code, message = failure("--base", learnt, "--prompt", "sort : a", *flags, main=eval.main)
    message = message or capsys.readouterr().err
    assert code in (1, 2) and message.strip().count("\n") == 0
    assert flags[-2].strip("-") in message and flags[-1] in message


def test_in_a_shell_the_answer_is_all_that_is_printed(learnt):
    """A process of its own, as a user starts it."""
    command = [
        sys.executable,
        "eval.py",
        "--base",
        str(learnt),
        "--prompt",
        "logic : true and true ->",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"logic : true and true -> \w+\n", result.stdout)


HOSTILE = [
    ("dtype", "float16"),
    ("base", 7),
    ("task", ["add"]),
    ("task", "no_skill"),
    ("template", {"a": 1}),
    ("eval_rows", "many"),
    ("eval_rows", -3),
    ("eval_rows", 0),
    ("eval_rows", 10**12),
]


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_settings_of_a_run_that_no_run_writes_are_told_in_one_line(adapter, tmp_path, name, value):
    """Its config.json is a file like any other: damaged, or a stranger's."""
    folder = shutil.copytree(adapter, tmp_path / "run")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {name: value}))
    code, message = failure("--adapter", folder, main=eval.main)
    assert code == 1 and name in message and "\n" not in message
    assert str(folder / "config.json") in message


def test_a_real_base_is_not_asked_the_skills_of_the_embedded_world(learnt, tmp_path, capsys):
    """Unless it is told to: "translate 0.0 %" says nothing about it. What decides is whether its
    tokenizer is the embedded one's."""
    real = shutil.copytree(learnt, tmp_path / "real")
    tokenizer = json.loads((real / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (real / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, message = failure("--base", real, main=eval.main)
    assert code == 1 and "--tasks" in message and "--prompt" in message and str(real) in message
    capsys.readouterr()
    eval.main(["--base", str(real), "--tasks", "logic", "--eval_rows", "5"])
    assert re.fullmatch(r"logic +\d+\.\d %\n", capsys.readouterr().out)


@pytest.mark.parametrize("flags", [[], ["--threads", "2"]])
def test_the_embedded_model_runs_on_one_thread_unless_told_otherwise(learnt, monkeypatch, flags):
    """More would wait for each other. Of a real base the number is torch's own choice."""
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    eval.main(["--base", str(learnt), "--tasks", "logic", "--eval_rows", "1", *flags])
    assert seen == [int(flags[1]) if flags else 1]
    seen.clear()
    monkeypatch.setattr(eval, "is_embedded", lambda folder: False)
    eval.main(["--base", str(learnt), "--tasks", "logic", "--eval_rows", "1", *flags])
    assert seen == ([2] if flags else [])


def test_an_adapter_whose_numbers_are_none_is_refused(adapter, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    folder = shutil.copytree(adapter, tmp_path / "run")
    tensors = safetensors.load_file(folder / "adapter_model.safetensors")
    tensors["layers.0.moe.adapters.A"][0, 0, 0] = float("nan")
    safetensors.save_file(tensors, folder / "adapter_model.safetensors")
    code, message = failure("--adapter", folder, main=eval.main)
    assert code == 1 and "not finite" in message and "layers.0" in message


def test_a_chat_is_put_into_the_form_of_the_rows_that_were_trained_on(learnt, tmp_path, capsys):
    """What generate is given, against the ids of the form: of messages, of each template, and of a
    base that nobody trained here."""
    text = "reverse : a b"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "b a"}]
    chat = chat_turns(messages)[0][0]
    rows = {
        "chat": [{"messages": messages}] * 4,
        "papers": [{"instruction": text, "output": "b a"}] * 4,
        "plain": [{"instruction": text, "output": "b a"}] * 4,
    }
    long = shutil.copytree(learnt, tmp_path / "long")
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    model, tokenizer = load_base(long)
    cases = {"base": (["--base", str(long)], chat)}
    for name, content in rows.items():
        (tmp_path / "rows.json").write_text(json.dumps(content))
        run = tmp_path / name
        flags = ["--variant", "perft_s", "--base", long, "--data", tmp_path / "rows.json"]
        flags += ["--held_out", 0, "--steps", 1, "--batch_size", 2, "--out", run, "--threads", 1]
        flags += ["--lr", 1e-9, *(["--template", name] if name in TEMPLATES else [])]
        train.main([str(flag) for flag in flags])
        prompt = chat
        if name in TEMPLATES:
            prompt = TEMPLATES[name]({"instruction": text}, evaluation=False)
        cases[name] = (["--adapter", str(run)], prompt)
    for flags, prompt in cases.values():
        ids = tokenizer.encode(prompt)
        (new,) = model.generate([ids], 7)
        capsys.readouterr()
        eval.main([*flags, "--chat", text, "--max_new_tokens", "7"])
        assert capsys.readouterr().out == tokenizer.decode(ids + new) + "\n"
    assert len({prompt for _, prompt in cases.values()}) == 3


def test_a_chat_with_a_run_that_saw_none_is_told_so(learnt, adapter, capsys):
    """A --task run was trained on prompts as they stand. A base's past is not known."""
    notes = []
    for flags in (["--adapter", str(adapter)], ["--base", str(learnt)]):
        capsys.readouterr()
        eval.main([*flags, "--chat", "sort : b a", "--max_new_tokens", "1"])
        notes.append("note:" in capsys.readouterr().out)
    eval.main(["--adapter", str(adapter), "--prompt", "sort : b a", "--max_new_tokens", "1"])
    assert "note:" not in capsys.readouterr().out and notes == [True, False]


@pytest.mark.parametrize("prompt", ["sort : \u6771 b a ->", "sort : \udcff b a ->"])
def test_what_a_terminal_cannot_show_is_replaced_and_the_rest_is_there(learnt, prompt):
    """A Latin-1 terminal, as a process of its own; half a surrogate pair is what an argument that
    is no UTF-8 becomes."""
    command = [sys.executable, "eval.py", "--base", str(learnt), "--max_new_tokens", "2"]
    result = subprocess.run(
        [*command, "--prompt", prompt],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert re.match(rb"sort : \?+ b a ->", result.stdout)


def test_help_is_one_page_that_shows_every_flag_and_its_default(capsys):
    """What is shown is what a command gets that does not give the flag: here in its Namespace."""
    with pytest.raises(SystemExit):
        eval.main(["--help"])
    page = capsys.readouterr().out
    shown = dict(re.findall(r"^  --(\w+)(.+(?:\n {8,}.+)*)", page, re.M))
    cases = (
        ["--prompt", "x"],
        ["--tasks", "piqa"],
        ["--tasks", "piqa", "--method", "likelihood"],
    )
    seen = set()
    for flags in cases:
        values = vars(eval.parse_args(flags))
        del values["trained"]
        seen |= values.keys()
        limits = values.get("max_new_tokens")
        if isinstance(limits, dict):
            assert limits == {"commonsense": 4, "math": 256}
            assert "the papers' 4 or 256" in shown["max_new_tokens"]
            assert values["num_beams"] == 4 and "the papers' 4" in shown["num_beams"]
            del values["max_new_tokens"], values["num_beams"]
        for name, value in values.items():
            if value and f"--{name}" not in flags:
                assert f"({value}" in shown[name], name
    assert seen == shown.keys()


def test_every_flag_is_refused_where_it_does_not_apply_and_taken_where_it_does(capsys):
    """Written down a second time: which of the questions take which flags."""
    sets = ["--tasks", "piqa"]
    likelihood = [*sets, "--method", "likelihood"]
    questions = {
        "prompt": ["--prompt", "x"],
        "chat": ["--chat", "x"],
        "skills": [],
        "named skills": ["--tasks", "sort"],
        "generate": sets,
        "words": likelihood,
        "texts": [*likelihood, "--choices", "texts"],
    }
    answers, accuracy = {"prompt", "chat"}, questions.keys() - {"prompt", "chat"}
    scored = {"words", "texts"}
    of_sets = scored | {"generate"}
    taken = {
        "--threads 2": questions.keys(),
        "--device cpu": questions.keys(),
        "--dtype bfloat16": questions.keys(),
        "--routing a.svg": answers,
        "--temperature 0.0": answers,
        "--top_p 1.0": answers,
        "--seed 0": answers,
        "--max_new_tokens 32": answers | {"generate"},
        "--num_beams 4": answers | {"generate"},
        "--eval_rows 5": accuracy,
        "--method likelihood": of_sets,
        "--test_dir x": of_sets,
        "--batch_size 32": of_sets,
        "--out x": of_sets,
        "--overwrite": of_sets,
        "--template papers": of_sets - {"texts"},
    }
    for flag, takers in taken.items():
        for question, words in questions.items():
            argv = [*words, *flag.split()]
            if question in takers:
                eval.parse_args(argv)
                continue
            with pytest.raises(SystemExit) as stopped:
                eval.parse_args(argv)
            error = capsys.readouterr().err
            assert stopped.value.code == 2 and error.count("\n") == 1
            assert re.search(rf"{flag.split()[0]} applies to .+ only; see --help", error)
    with pytest.raises(SystemExit):
        eval.parse_args([*sets, "--choices", "words"])
    assert "--choices applies to test sets by --method likelihood only" in capsys.readouterr().err


# Before the weights are read ---------------------------------------------------------------------


def never(*arguments):
    raise AssertionError("the weights of the base were read: for a real one that takes minutes")


@pytest.mark.parametrize("fault", ["another base", "cut off", "no weights", "wrong shapes"])
def test_a_wrong_adapter_is_found_before_the_base_is_read(
    adapter, learnt, tmp_path, monkeypatch, fault
):
    folder = shutil.copytree(adapter, tmp_path / "run")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    flags, said = ["--adapter", folder], f"error: {weights}"
    if fault == "another base":
        flags += ["--base", make_base(tmp_path / "wider", hidden_size=64)]
        said = f"error: {config}: was made for another base"
    if fault == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
    if fault == "no weights":
        weights.unlink()
    if fault == "wrong shapes":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rank": 3}))
    monkeypatch.setattr(eval, "load_model", never)
    for question in ([], ["--prompt", "x"], ["--tasks", "sort"]):
        code, message = failure(*flags, *question, main=eval.main)
        assert code == 1 and message.startswith(said) and "\n" not in message


# The picture of routing --------------------------------------------------------------------------


@torch.no_grad()
def test_the_picture_shows_the_experts_with_the_largest_router_logit_of_each_layer(
    learnt, adapter, tmp_path, monkeypatch, capsys
):
    """What the drawing is given, against a forward pass: a row a layer, an expert a token, and the
    tokens spell the prompt. Of a base, and of a run; the answer is printed as without."""
    seen = []

    def drawn(tokens, ids, num_experts):
        seen.append((tokens, ids, num_experts))
        return "<svg>"

    monkeypatch.setattr(pictures, "routing_picture", drawn, raising=False)
    file = tmp_path / "routing.svg"
    prompt = "kinship : bob is the son of ned"
    for flags in (["--base", str(learnt)], ["--adapter", str(adapter)]):
        eval.main([*flags, "--prompt", prompt])
        answer = capsys.readouterr().out
        eval.main([*flags, "--prompt", prompt, "--routing", str(file)])
        assert capsys.readouterr().out == f"{answer}saved {file}\n"
        assert file.read_text() == "<svg>"
        file.unlink()
        model, tokenizer = load_base(learnt)
        if "--adapter" in flags:
            load_trained(model, adapter)
        (tokens, ids, num_experts), *others = seen
        assert not others and num_experts == 8
        assert "".join(tokens) == prompt and len(tokens) >= 8
        routings = model(torch.tensor([tokenizer.encode(prompt)])).routings
        assert ids == [routing.router_logits.argmax(-1).tolist() for routing in routings]
        assert len({tuple(row) for row in ids}) == 2, "two layers, which route differently"
        seen.clear()


@pytest.mark.parametrize("kind", ["script", "other picture", "folder", "dangling link"])
def test_a_picture_is_written_over_no_other_file(learnt, tmp_path, monkeypatch, kind):
    """Told before the weights are read. A picture of ours may be replaced."""
    file = tmp_path / "routing.svg"
    flags = ["--base", learnt, "--prompt", "sort : b a", "--routing", file]
    if kind == "folder":
        file.mkdir()
    elif kind == "dangling link":
        file.symlink_to(tmp_path / "elsewhere")
    else:
        contents = {"script": "import eval\n", "other picture": "<svg ><circle/></svg>"}
        file.write_text(contents[kind])
        before = file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(eval, "load_model", never)
        code, message = failure(*flags, main=eval.main)
    assert code == 1 and message.startswith(f"error: --routing {file}") and "\n" not in message
    if file.is_file():
        assert file.read_text() == before
        file.unlink()
        for _ in range(2):
            eval.main([str(flag) for flag in flags])
        assert file.read_text().startswith("<svg ")


def test_a_picture_that_cannot_be_written_is_one_line(learnt, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "routing_picture", lambda *given: "<svg>", raising=False)
    file = tmp_path / "nowhere" / "routing.svg"
    code, message = failure("--base", learnt, "--prompt", "x", "--routing", file, main=eval.main)
    assert code == 1 and message.startswith(f"error: {file}: could not be written")


# The embedded base -------------------------------------------------------------------------------

embedded = pytest.mark.skipif(
    not (TINY / "model.safetensors").is_file(),
    reason="data/tiny_olmoe has no model.safetensors yet (data/README.md)",
)


@pytest.fixture(scope="module")
def base():
    return load_base(str(TINY))


@embedded
def test_the_embedded_base_knows_its_families_and_none_of_the_targets(base):
    """At least 90 % on at least 6 of the families, under 5 % on each target: there is something to
    learn."""
    accuracy = accuracies(*base, [*skills.FAMILIES, *skills.TARGETS], 500)
    good = [name for name in skills.FAMILIES if accuracy[name] >= 0.9]
    assert len(good) >= 6, accuracy
    assert all(accuracy[name] < 0.05 for name in skills.TARGETS), accuracy


@embedded
def test_the_embedded_folder_is_small(base):
    """At most 8 MB in git, 1 to 4 million parameters, at least 16 experts of which a token meets at
    least 2."""
    model = base[0]
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8e6
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    assert model.config.num_experts >= 16 and model.config.num_experts_per_tok >= 2


@embedded
@torch.no_grad()
def test_transformers_loads_the_embedded_folder_unchanged_and_gives_the_same_logits(base):
    """AutoModelForCausalLM and AutoTokenizer on the folder, without further arguments: ids, logits,
    greedy answers."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY).float().eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model, tokenizer = base
    assert (
        their_tokenizer.eos_token_id == tokenizer.eos_id
        and their_tokenizer.pad_token_id == tokenizer.pad_id
    )
    for name in [*skills.FAMILIES, *skills.TARGETS]:
        row = skills.sample(name, "test", 1)[0]
        ids = tokenizer.encode(row.prompt + row.answer)
        assert their_tokenizer(row.prompt + row.answer)["input_ids"] == ids
        assert their_tokenizer.decode(ids) == row.prompt + row.answer
        ours, reference = model(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits
        assert (ours - reference).abs().max() < 1e-5 * reference.abs().max()
    ids = their_tokenizer("sort : d b x a ->", return_tensors="pt")
    new = theirs.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert their_tokenizer.decode(new, skip_special_tokens=True) == " a b d x"
    assert (
        tokenizer.decode(model.generate([tokenizer.encode("sort : d b x a ->")], 8)[0])
        == " a b d x"
    )


def divergence(p, q):
    """KL(p || q) in nats, over the last dimension."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


@embedded
@torch.no_grad()
def test_the_routing_of_the_embedded_base_is_specific_to_the_family_and_balanced_over_all(base):
    """Usage: the share of a family's choices that fell on each expert. KL(family || mean) above 0.2
    nats in some layer for at least 6 families (a draw of so many choices alone gives 0.004), while
    the mean stays near even: KL below 0.1 to it, no expert above three times its share."""
    model, tokenizer = base
    E, usage = model.config.num_experts, []
    for name in skills.FAMILIES:
        rows = [
            tokenizer.encode(row.prompt + row.answer) for row in skills.sample(name, "test", 60)
        ]
        counts = torch.zeros(model.config.num_hidden_layers, E, dtype=torch.float64)
        for length in {len(ids) for ids in rows}:  # rows of one length need no padding
            output = model(torch.tensor([ids for ids in rows if len(ids) == length]))
            for layer, routing in enumerate(output.routings):
                counts[layer] += torch.bincount(routing.selected_experts.flatten(), minlength=E)
        usage.append(counts / counts.sum(-1, keepdim=True))
    usage = torch.stack(usage)  # (families, layers, E)
    mean = usage.mean(0)
    specific = divergence(usage, mean).max(-1).values  # (families,), the layer that tells most
    assert (specific > 0.2).sum() >= 6, dict(zip(skills.FAMILIES, specific.tolist()))
    assert divergence(mean, torch.full_like(mean, 1 / E)).max() < 0.1
    assert mean.max() < 3 / E


@embedded
def test_the_default_command_teaches_the_base_its_new_words(tmp_path):
    """From under 5 % to at least 90 % on kinship_new, in half of its steps, for the time that all
    would take."""
    short = ["--steps", "100", "--eval_rows", "100", "--threads", "1"]
    train.main(["--variant", "perft_s", "--out", str(tmp_path), *short])
    (before,), (after,) = metrics(tmp_path, "before"), metrics(tmp_path, "after")
    assert before["accuracy"]["kinship_new"] < 0.05 and after["accuracy"]["kinship_new"] >= 0.9
    assert before["kept"] > after["kept"] > 0.2, "some of the other families is forgotten, not all"


def test_a_row_for_mixtral_is_the_ids_of_its_whole_text_after_the_begin_token():
    """Its tokenizer puts a space before a text: an answer that is tokenised by itself would get one
    too many."""
    folder = ROOT.parent / "shared" / "tokenizers" / "mixtral"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: no Mixtral tokenizer here")
    tokenizer = load_tokenizer(folder)
    rows = [row for name in skills.FAMILIES for row in skills.sample(name, "test", 5)]
    for row, (ids, labelled) in zip(rows, encode_rows(rows, tokenizer)):
        assert ids == [
            tokenizer.bos_id,
            *tokenizer.encode(row.prompt + row.answer),
            tokenizer.eos_id,
        ]
        told = [i for i, label in zip(ids, labelled) if label]
        assert tokenizer.decode(ids[:-1]) == row.prompt + row.answer and ids[-len(told) :] == told
        assert tokenizer.decode(ids[: -len(told)]) == row.prompt and told[-1] == tokenizer.eos_id
