"""eval.py on the papers' test sets and train.py --data: what a user who repeats the papers'
experiments relies on.

Everything goes through eval.main and train.main, on tiny random models; the commands that a user
would type run in processes of their own. References: transformers, a forward pass for each choice,
numbers worked out by hand.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_base
from test_train import (  # noqa: F401 (one_thread is a fixture, used by being here)
    ctrl_c,
    failure,
    interrupted,
    make_base,
    metrics,
    one_thread,
    outcome,
)

import eval
import train
from data import dataset
from data.dataset import encode, read_rows, split
from data.tasks import GROUPS, TASKS, TEMPLATES, chat_turns
from data.tokenizer import load_tokenizer
from eval import encode_pair, load_trained, log_likelihoods
from model import Config, MoETransformer

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny_olmoe"
SHARED = Path(__file__).resolve().parents[2] / "shared"
why = "the real rows are not beside the repository (../shared/data)"
shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=why)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def model_and_tokenizer(base):
    return load_base(str(base))


@pytest.fixture(scope="module")
def theirs(base):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(base).float().eval()


def made_up(name, n):
    """Rows of a task in the shape of the real ones, of different lengths."""
    rows, task = [], TASKS[name]
    for i in range(n):
        question = f"the {i} " + "man did see the dog " * (i % 3) + "and ?"
        if task.group == "math":
            rows.append(
                {
                    "instruction": question,
                    "input": "",
                    "output": "",
                    "answer": "B" if task.words else f"{i}.0",
                }
            )
            continue
        words = {"social_i_qa": 3}.get(name, 4 if len(task.words) > 2 else len(task.words))
        words = task.words[:words]
        offered = " ".join(
            f"{w.capitalize()}: {'fox ' * (j + i % 2)}no{j}" for j, w in enumerate(words)
        )
        body = f"Please choose the correct answer to the question: {question}\n\n{offered}"
        if name == "boolq":
            asked = "Please answer the following question with true or false, question:"
            body = f"{asked} is it {i} {question}"
        if name == "winogrande":
            sentence = f"given sentence: fox {i} met cat so _ ran off."
            body = f"Please fill in: {sentence}\n\nOption1: fox Option2: big cat"
        instruction = f"{body}\n\nAnswer format: {'/'.join(words)}"
        word = words[i % len(words)]
        output = f"the correct answer is {word}"
        rows.append({"instruction": instruction, "input": "", "output": output, "answer": word})
    return rows


def write_sets(folder, sets):
    folder.mkdir(exist_ok=True)
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return {name: made_up(name, 7) for name in TASKS}


@pytest.fixture(scope="module")
def test_dir(tmp_path_factory, sets):
    return write_sets(tmp_path_factory.mktemp("tests"), sets)


@pytest.fixture
def ask(base, test_dir, tmp_path, capsys):
    """ask(*flags, out=name) -> (what the screen says, results.json, {(task, index): prediction})"""

    def ask(*flags, out="out", base=base, test_dir=test_dir):
        capsys.readouterr()
        folder = tmp_path / out
        eval.main(
            [
                "--base",
                str(base),
                "--test_dir",
                str(test_dir),
                "--out",
                str(folder),
                *map(str, flags),
            ]
        )
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        records = {(r["task"], r["index"]): r for r in map(json.loads, lines[:-1])}
        return capsys.readouterr().out, json.loads((folder / "results.json").read_text()), records

    return ask


# Likelihood --------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model, context, continuation):
    """log p(continuation | context): a forward pass over both, without cache or padding; a sum over
    its tokens."""
    output = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    return sum(output[len(context) + i - 1, token].item() for i, token in enumerate(continuation))


def random_requests(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(2, 600, (n,), generator=generator).tolist()

    contexts = [draw(n) for n in (1, 30, 7, 7, 12)]
    continued = [
        (0, 3),
        (1, 1),
        (1, 6),
        (2, 2),
        (3, 2),
        (1, 4),
        (4, 1),
        (0, 5),
        (2, 1),
    ]  # (context, tokens)
    return [(contexts[i], draw(n)) for i, n in continued]


@pytest.mark.parametrize("seed", range(3))
def test_log_likelihoods_are_those_of_a_forward_pass_for_each_request(
    model_and_tokenizer, theirs, seed
):
    """Contexts and continuations of different lengths, contexts shared and not; ours and
    transformers' logits."""
    model, requests = model_and_tokenizer[0], random_requests(seed)
    for some in (requests, [(a, b[:1]) for a, b in requests], requests[4:5]):
        scores = log_likelihoods(model, some)
        for reference in (model, theirs):
            assert scores == pytest.approx([by_hand(reference, a, b) for a, b in some], abs=2e-4)
    assert len(set(log_likelihoods(model, requests))) == len(requests)


@torch.no_grad()
def test_a_prompt_that_is_too_long_is_cut_for_its_own_choice_as_the_harness_does(tmp_path):
    """lm-evaluation-harness: (context + continuation)[-(positions + 1):], whose last token is not
    read. For each choice alone, whatever stands in its batch: 64 positions, prompts of 20 to 70
    words, continuations of 1 to 30."""
    short = make_base(tmp_path / "short", max_position_embeddings=64)
    model, tokenizer = load_base(short)
    words = "see hear help find call push pull like fear miss feed hit".split()
    rows, offered = [], "solution1/solution2"
    for i, (prompt, one, two) in enumerate([(36, 1, 2), (70, 28, 1), (50, 3, 12), (30, 20, 35)]):
        question = " ".join(words[(i + j) % 12] for j in range(prompt))
        texts = [" ".join(words[(3 * j + i) % 12] for j in range(n)) for n in (one, two)]
        text = f"the question: {question}\n\nSolution1: {texts[0]}\n\nSolution2: {texts[1]}"
        instruction = f"{text}\n\nAnswer format: {offered}"
        rows.append({"instruction": instruction, "input": "", "output": "", "answer": "solution1"})
    how = SimpleNamespace(choices="texts")
    task = TASKS["piqa"]
    expected, cut = [], []
    for row in rows:
        lengths = []
        for context, text in task.cloze(row):
            before, after = encode_pair(context, f" {text}", tokenizer)
            lengths.append(len(before + after))
            ids = (before + after)[-65:]
            n = len(after)
            logits = model(torch.tensor([ids[:-1]])).logits[0, -n:].double().log_softmax(-1)
            expected.append(logits.gather(-1, torch.tensor(after)[:, None]).sum().item())
        cut.append(max(lengths) > 65)
    together = eval.likelihood(model, tokenizer, how, task, rows)
    alone = [eval.likelihood(model, tokenizer, how, task, [row])[0] for row in rows]
    for records in (together, alone):
        scores = [score for record in records for score in record["scores"]]
        assert scores == pytest.approx(expected, abs=2e-4)
        assert [record["cut"] for record in records] == cut
    assert True in cut and False in cut


@pytest.mark.parametrize("choices", ["words", "texts"])
def test_scores_do_not_depend_on_the_batch_size(ask, tmp_path, choices):
    """So few positions that some prompts are too long for some choices."""
    positions = {"words": 64, "texts": 16}[choices]
    short = make_base(tmp_path / "short", max_position_embeddings=positions)
    flags = ("--tasks", "ARC-Easy", "piqa", "hellaswag", "--method", "likelihood")
    flags += ("--choices", choices)
    _, results, records = ask(*flags, "--batch_size", 32, base=short)
    _, _, alone = ask(*flags, "--batch_size", 1, base=short, out="alone")
    assert records.keys() == alone.keys() and any(record["cut"] for record in records.values())
    for key, record in records.items():
        assert record["scores"] == pytest.approx(alone[key]["scores"], abs=2e-4)
        assert record["cut"] == alone[key]["cut"]


def test_trailing_spaces_of_a_context_are_scored_with_the_continuation(model_and_tokenizer):
    """lm-evaluation-harness moves them: the pair reads the same, and no token of the whole is lost
    or cut in two."""
    tokenizer = model_and_tokenizer[1]
    pairs = ("who is it ?", " fox"), ("who is it ?  ", " fox"), ("a\n\n", " the cat"), ("a b ", "c")
    for context, continuation in pairs:
        before, after = encode_pair(context, continuation, tokenizer)
        assert before == tokenizer.encode(context.rstrip())
        assert before + after == tokenizer.encode(context + continuation)
        assert tokenizer.decode(after) == context[len(context.rstrip()) :] + continuation


@pytest.mark.parametrize("choices", ["words", "texts"])
def test_acc_and_acc_norm_follow_the_harness_on_every_row(ask, sets, model_and_tokenizer, choices):
    """argmax of the sum of log p(" " + choice | context), and of that sum / characters without the
    space."""
    model, tokenizer = model_and_tokenizer
    names, differ = GROUPS["commonsense"], 0
    _, results, records = ask(
        "--tasks", "commonsense", "--method", "likelihood", "--choices", choices
    )
    assert len(records) == 7 * 8
    for name in names:
        hits = [0, 0]
        for i, row in enumerate(sets[name]):
            record, task = records[name, i], TASKS[name]
            words = re.search(r"Answer format: (\S+)$", row["instruction"])[1].split("/")
            pairs = (
                [(task.render_eval(row), word) for word in words]
                if choices == "words"
                else task.cloze(row)
            )
            scores = []
            for context, text in pairs:
                whole = tokenizer.encode(f"{context} {text}")
                n = len(tokenizer.encode(context))
                scores.append(by_hand(model, whole[:n], whole[n:]))
            assert record["scores"] == pytest.approx(scores, abs=2e-4)
            normed = [score / len(text) for score, (_, text) in zip(scores, pairs)]
            best, best_norm = words[scores.index(max(scores))], words[normed.index(max(normed))]
            assert record["answer"] == best and record["gold"] == row["answer"]
            assert record["correct"] == (best == row["answer"])
            assert record["correct_norm"] == (best_norm == row["answer"])
            hits = [hits[0] + record["correct"], hits[1] + record["correct_norm"]]
            differ += best != best_norm
        table = results["tasks"][name]
        assert [table["acc"][0], table["acc_norm"][0]] == [hit / 7 for hit in hits] and table[
            "n"
        ] == 7
    assert differ > 3, "acc and acc_norm must be told apart somewhere"


def test_acc_norm_divides_by_characters_and_acc_does_not(ask, tmp_path, monkeypatch):
    """By hand: "aa" has -3, "aaaaaa" has -6. The sum prefers the first, -3 > -6; the mean the
    second, -1 > -1.5."""
    question = "the question: x?\n\nSolution1: aa\n\nSolution2: aaaaaa"
    instruction = f"{question}\n\nAnswer format: solution1/solution2"
    row = {"instruction": instruction, "input": "", "output": "", "answer": "solution2"}
    folder = write_sets(tmp_path / "sets", {"piqa": [row]})
    monkeypatch.setattr(eval, "log_likelihoods", lambda model, requests: [-3.0, -6.0])
    flags = ("--tasks", "piqa", "--method", "likelihood", "--choices", "texts")
    _, results, records = ask(*flags, test_dir=folder)
    expected = {
        "task": "piqa",
        "index": 0,
        "gold": "solution2",
        "scores": [-3.0, -6.0],
        "answer": "solution1",
        "correct": False,
        "correct_norm": True,
        "cut": False,
    }
    assert expected.items() <= records["piqa", 0].items()
    assert results["mean"] == {"acc": [0.0, 0.0], "acc_norm": [1.0, 0.0]}


@pytest.mark.parametrize("text", ["Solution1: Solution2: a", "Solution1: a Solution2:"])
def test_a_row_with_an_empty_choice_is_scored_or_told_in_one_line(base, tmp_path, text):
    row = {
        "instruction": f"the question: x?\n\n{text}\n\nAnswer format: solution1/solution2",
        "output": "",
        "answer": "solution1",
    }
    folder = write_sets(tmp_path / "sets", {"piqa": [row]})
    flags = [
        "--tasks",
        "piqa",
        "--method",
        "likelihood",
        "--choices",
        "texts",
        "--test_dir",
        folder,
    ]
    try:
        eval.main([*map(str, flags), "--base", str(base), "--out", str(tmp_path / "out")])
    except SystemExit as stopped:
        assert "piqa" in stopped.code and "\n" not in stopped.code


# Generation --------------------------------------------------------------------------------------


def transformers_answers(theirs, tokenizer, prompts, new, num_beams):
    """Left padding, as a batch; what follows the prompt, up to the end token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[1] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=1,
    )[:, longest:].tolist()
    return [
        tokenizer.decode(row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row)
        for row in out
    ]


@shared
@pytest.mark.parametrize("num_beams", [1, 4])
def test_real_rows_are_answered_as_transformers_answers_them(
    ask, model_and_tokenizer, theirs, num_beams
):
    """Four new tokens for prompts of different lengths; in batches of 3, one by one, and by
    transformers."""
    tokenizer, names = model_and_tokenizer[1], ["boolq", "social_i_qa", "ARC-Easy"]
    flags = ("--tasks", *names, "--eval_rows", 4, "--num_beams", num_beams)
    _, results, records = ask(*flags, "--batch_size", 3, test_dir=SHARED / "data" / "test")
    assert results["num_beams"] == num_beams
    _, _, alone = ask(*flags, "--batch_size", 1, out="alone", test_dir=SHARED / "data" / "test")
    assert alone == records and len({r["response"] for r in records.values()}) > 3
    for name in names:
        rows = json.loads((SHARED / "data" / "test" / f"{name}.json").read_text())[:4]
        prompts = [tokenizer.encode(TASKS[name].render_eval(row)) for row in rows]
        assert len(set(map(len, prompts))) > 2
        answers = transformers_answers(theirs, tokenizer, prompts, 4, num_beams)
        assert [records[name, i]["response"] for i in range(4)] == answers


def test_the_papers_settings_are_the_defaults(ask):
    """4 beams; 4 new tokens for commonsense; the papers' prompt. The same as when they are
    given."""
    _, results, records = ask("--tasks", "piqa", "boolq")
    given = (
        "--num_beams",
        4,
        "--max_new_tokens",
        4,
        "--template",
        "papers",
        "--method",
        "generate",
    )
    assert ask("--tasks", "boolq", "piqa", *given, out="given")[2] == records
    assert results["adapter"] is None, "of a base"
    assert (
        results["num_beams"] == 4
        and results["template"] == "papers"
        and results["method"] == "generate"
    )
    assert ask("--tasks", "boolq", "piqa", "--template", "plain", out="plain")[2] != records


def test_arithmetic_answers_have_256_new_tokens_unless_told_otherwise(ask, monkeypatch):
    seen = []

    def generate(self, prompts, max_new_tokens, **options):
        seen.append(max_new_tokens)
        return [[9]] * len(prompts)

    monkeypatch.setattr(MoETransformer, "generate", generate)
    ask("--tasks", "math", "commonsense")
    assert seen == [4] * 8 + [256] * 6
    seen.clear()
    ask("--tasks", "gsm8k", "--max_new_tokens", 7, out="seven")
    assert seen == [7]


# Stopping and going on ---------------------------------------------------------------------------

KEPT = "stopped: answers so far are kept: the same command, without --overwrite, continues\n"


def counting(monkeypatch, stop_at=None, method="generate"):
    """Record the rows that are answered; Ctrl-C at the batch `stop_at` (from 0)."""
    batches, real = [], getattr(eval, method)

    def answer(model, tokenizer, how, task, rows):
        if len(batches) == stop_at:
            raise KeyboardInterrupt
        batches.append(len(rows))
        return real(model, tokenizer, how, task, rows)

    monkeypatch.setattr(eval, method, answer)
    return batches


@pytest.mark.parametrize("method", ["generate", "likelihood"])
def test_a_stopped_evaluation_goes_on_where_it_was_and_ends_as_one_that_was_not(
    ask, monkeypatch, capsys, method
):
    flags = ("--tasks", "piqa", "boolq", "--method", method, "--batch_size", 3)
    _, results, records = ask(*flags, out="whole")
    with monkeypatch.context() as patch:
        counting(patch, 2, method)
        with pytest.raises(SystemExit) as stopped:
            ask(*flags)
        assert stopped.value.code == 130
        assert capsys.readouterr().err == KEPT
    with monkeypatch.context() as patch:
        batches = counting(patch, None, method)
        screen, again, now = ask(*flags)
    assert batches == [1, 3, 3, 1] and "boolq: 6 of 7 rows were answered before" in screen
    assert now == records and again == results
    with monkeypatch.context() as patch:
        batches = counting(patch, None, method)
        assert ask(*flags)[1] == results and batches == [], "nothing is left to do"


def test_a_prediction_whose_line_was_cut_off_is_made_again(ask, tmp_path, monkeypatch):
    _, results, records = ask("--tasks", "boolq")
    file = tmp_path / "out" / "predictions.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    batches = counting(monkeypatch)
    _, again, now = ask("--tasks", "boolq")
    assert batches == [1] and now == records and again == results


def test_more_rows_and_more_tasks_join_the_predictions_that_are_there(ask, monkeypatch):
    ask("--tasks", "boolq", "--eval_rows", 2)
    batches = counting(monkeypatch)
    _, results, _ = ask("--tasks", "boolq", "piqa", "--eval_rows", 5)
    assert batches == [3, 5] and [results["tasks"][name]["n"] for name in ("boolq", "piqa")] == [
        5,
        5,
    ]


def test_results_of_further_tasks_join_those_that_are_there_and_overwrite_begins_again(ask):
    """results.json holds every task that was evaluated; the mean says of which it is one. What was
    measured again is what it is now."""
    _, first, _ = ask("--tasks", "piqa", "--eval_rows", 2)
    _, second, _ = ask(
        "--tasks", "boolq", "gsm8k", "--max_new_tokens", 4, "--eval_rows", 1, out="o"
    )
    screen, second, _ = ask("--tasks", "boolq")
    assert list(second["tasks"]) == ["piqa", "boolq"]
    assert second["tasks"]["piqa"] == first["tasks"]["piqa"] and second["mean_of"] == ["boolq"]
    assert second["mean"]["acc"] == second["tasks"]["boolq"]["acc"]
    assert "piqa" not in screen
    _, third, _ = ask("--tasks", "piqa", "boolq")
    assert third["tasks"]["piqa"]["n"] == 7 and third["mean_of"] == ["boolq", "piqa"]
    _, fourth, _ = ask("--tasks", "boolq", "--eval_rows", 3, "--overwrite")
    assert list(fourth["tasks"]) == ["boolq"]


def test_results_without_a_prediction_behind_them_go(ask, tmp_path):
    """A stopped first batch leaves predictions.jsonl empty: results beside it are of another
    evaluation, here of other settings."""
    ask("--tasks", "piqa", "--eval_rows", 1, "--num_beams", 2)
    (tmp_path / "out" / "predictions.jsonl").write_text("")
    _, results, _ = ask("--tasks", "boolq", "--eval_rows", 1)
    assert list(results["tasks"]) == ["boolq"]


@pytest.mark.parametrize("mine", ["settings.json", "results.json"])
def test_a_folder_with_such_files_and_no_predictions_is_refused_and_stays(
    base, test_dir, tmp_path, mine
):
    """They are somebody else's, whatever the flags."""
    out = tmp_path / "out"
    out.mkdir()
    (out / mine).write_text("mine")
    flags = ["--base", base, "--test_dir", test_dir, "--out", out, "--tasks", "boolq"]
    for more in ([], ["--overwrite"]):
        code, message = failure(*flags, "--eval_rows", 1, *more, main=eval.main)
        assert code == 1 and str(out / mine) in message and "choose another --out" in message
    assert [path.name for path in out.iterdir()] == [mine] and (out / mine).read_text() == "mine"


STRANGERS = {
    "results": {"results.json": '{"tasks": {}}', "predictions.jsonl": ""},
    "settings": {"settings.json": '{"method": 1, "base": 2}', "predictions.jsonl": ""},
    "all": {"results.json": "[1]", "settings.json": "{}", "predictions.jsonl": ""},
    "predictions": {"predictions.jsonl": '{"id": 1, "text": "mine"}'},
    "lines of predictions": {"predictions.jsonl": '{"id": 1, "text": "mine"}\n'},
}


@pytest.mark.parametrize("name", STRANGERS)
def test_files_that_settings_do_not_prove_ours_stay(base, test_dir, tmp_path, name):
    """Such names are nobody's own. Beside a predictions.jsonl that is empty, or whose one line has
    no newline, there are no predictions that could be told from ours."""
    out = tmp_path / "out"
    out.mkdir()
    for file, content in STRANGERS[name].items():
        (out / file).write_text(content)
    flags = ["--base", base, "--test_dir", test_dir, "--out", out, "--tasks", "boolq"]
    for more in ([], ["--overwrite"]):
        code, message = failure(*flags, "--eval_rows", 1, *more, main=eval.main)
        assert code == 1 and f"{out}/" in message and "choose another --out" in message
        assert "\n" not in message
    assert {path.name: path.read_text() for path in out.iterdir()} == STRANGERS[name]


def test_a_folder_that_was_stopped_before_its_first_answer_is_taken_up(ask, tmp_path):
    """Nothing is lost with an empty predictions.jsonl, and with half a line beside our settings."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").touch()
    _, _, records = ask("--tasks", "boolq", "--eval_rows", 1)
    (tmp_path / "out" / "predictions.jsonl").write_text('{"task": "bo')
    assert ask("--tasks", "boolq", "--eval_rows", 1)[2] == records


@pytest.mark.parametrize("name", eval.EVAL_FILES)
@pytest.mark.parametrize("kind", ["dangling link", "pipe", "endless device", "folder"])
def test_what_is_no_regular_file_is_neither_read_nor_written(base, test_dir, tmp_path, name, kind):
    """A link that leads nowhere would be written where it points; a pipe waits; a device fills the
    memory."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.jsonl").touch()
    (out / name).unlink(missing_ok=True)
    if kind == "dangling link":
        (out / name).symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(out / name)
    elif kind == "endless device":
        (out / name).symlink_to("/dev/zero")
    else:
        (out / name).mkdir()
    flags = ["--base", base, "--test_dir", test_dir, "--out", out, "--tasks", "boolq"]
    for more in ([], ["--overwrite"]):
        code, message = failure(*flags, "--eval_rows", 1, *more, main=eval.main)
        assert code == 1 and f"{out / name} is not a regular file" in message
    assert not (tmp_path / "elsewhere").exists()


DAMAGE = {
    "zeros, as a power cut leaves them": "\0\0\0",
    "a number": "5",
    "half a line": '{"task": "boolq", "ind',
    "an empty line": "",
    "brackets without end": "[" * 100_000,
    "an object of something else": '{"a": 1}',
    "no verdict": '{"task": "boolq", "index": 1, "row": "", "correct": 1, "cut": false}',
    "no index": '{"task": "boolq", "index": [1], "row": "", "correct": true, "cut": true}',
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_of_predictions_is_told_with_its_place_and_remedy(
    ask, base, test_dir, tmp_path, damage
):
    """In the middle. The remedy works: without the line its row is answered again."""
    _, results, records = ask("--tasks", "boolq")
    file = tmp_path / "out" / "predictions.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")
    lines[2] = DAMAGE[damage]
    file.write_text("\n".join(lines), encoding="utf-8")
    flags = ["--base", base, "--test_dir", test_dir, "--out", tmp_path / "out", "--tasks", "boolq"]
    code, message = failure(*flags, main=eval.main)
    assert code == 1 and f"{file}:3: " in message and "remove the line" in message
    assert "\n" not in message and "\0" not in message and len(message) < 500
    del lines[2]
    file.write_text("\n".join(lines), encoding="utf-8")
    screen, again, now = ask("--tasks", "boolq")
    assert "6 of 7 rows were answered before" in screen
    assert now == records and again == results


def test_a_response_may_hold_any_character_and_is_read_back(ask, model_and_tokenizer, monkeypatch):
    r"""U+2028 and U+0085 end a line for str.splitlines, not for JSON lines; and models say such
    things."""
    strange = 'true \u2028 \x85 \x0b \x1c \r\n \ud7ff \U0001f600 " \\'
    monkeypatch.setattr(model_and_tokenizer[1].__class__, "decode", lambda self, ids, **kw: strange)
    _, results, records = ask("--tasks", "boolq")
    assert {r["response"] for r in records.values()} == {strange}
    batches = counting(monkeypatch)
    _, again, now = ask("--tasks", "boolq")
    assert batches == [] and now == records and again == results


def about_boolq(base, test_dir, out):
    return ["--base", base, "--test_dir", test_dir, "--out", out, "--tasks", "boolq"]


CHANGES = [
    (["--num_beams", 2], "num_beams 4 then, 2 now"),
    (
        ["--max_new_tokens", 3],
        '{"commonsense": 4, "math": 256} then, {"commonsense": 3, "math": 3} now',
    ),
    (["--template", "plain"], 'template "papers" then, "plain" now'),
    (["--dtype", "bfloat16"], 'dtype "float32" then, "bfloat16" now'),
]


def test_predictions_of_other_settings_are_refused_with_both_values_until_overwrite(
    ask, base, test_dir, tmp_path
):
    ask("--tasks", "boolq", "--eval_rows", 2)
    command = about_boolq(base, test_dir, tmp_path / "out")
    command += ["--eval_rows", 2]
    before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    for flags, said in CHANGES:
        code, message = failure(*command, *flags, main=eval.main)
        assert code == 1 and said in message and "--overwrite" in message and "--out" in message, (
            message
        )
        assert "\n" not in message and str(tmp_path / "out") in message
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == before
    _, results, records = ask("--tasks", "boolq", "--eval_rows", 2, "--num_beams", 2, "--overwrite")
    assert results["num_beams"] == 2 and len(records) == 2
    ask("--tasks", "boolq", "--eval_rows", 2, "--num_beams", 2)


def test_predictions_of_weights_that_were_replaced_are_refused(ask, base, tmp_path):
    mine = shutil.copytree(base, tmp_path / "base")
    ask("--tasks", "boolq", "--eval_rows", 2, base=mine)
    other = make_base(tmp_path / "other", max_position_embeddings=2048, initializer_range=0.3)
    shutil.copy(other / "model.safetensors", mine)
    with pytest.raises(SystemExit, match="weights .* then, .* now"):
        ask("--tasks", "boolq", "--eval_rows", 2, base=mine)


def test_predictions_of_another_test_set_are_not_taken_for_this_ones(ask, sets, tmp_path):
    """The same command after --test_dir, or the file in it, changed: refused, or every new row is
    answered."""
    ask("--tasks", "boolq")
    other = [
        dict(
            row,
            answer={"true": "false", "false": "true"}[row["answer"]],
            instruction=row["instruction"].replace("is it", "was it"),
        )
        for row in sets["boolq"]
    ]
    folder = write_sets(tmp_path / "sets", {"boolq": other})
    try:
        _, _, records = ask("--tasks", "boolq", test_dir=folder)
    except SystemExit as stopped:
        assert "--overwrite" in stopped.code and "\n" not in stopped.code
        return
    assert [records["boolq", i]["gold"] for i in range(7)] == [row["answer"] for row in other]


def short_run(base, data, out, *flags, variant="perft_s"):
    short = {"steps": 2, "batch_size": 4, "held_out": 3, "warmup": 1, "log_every": 1, "threads": 1}
    given = {str(flag).strip("-") for flag in flags}
    short = [
        text
        for flag, value in short.items()
        if flag not in given
        for text in (f"--{flag}", str(value))
    ]
    train.main(
        [
            "--variant",
            variant,
            "--base",
            str(base),
            "--data",
            str(data),
            "--out",
            str(out),
            *short,
            *map(str, flags),
        ]
    )
    return out


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory, sets):
    """A file of 28 alpaca records of different lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(
        json.dumps(
            [row for name in ("boolq", "piqa", "winogrande", "hellaswag") for row in sets[name]]
        )
    )
    return path


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    turns = [
        [
            ("user", f"day {i}"),
            ("assistant", "mon " * (i % 4 + 1)),
            ("user", "and ?"),
            ("assistant", f"sat {i}"),
        ]
        for i in range(20)
    ]
    chats = [
        {"messages": [{"role": role, "content": content} for role, content in t]} for t in turns
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def test_predictions_of_an_adapter_whose_base_was_replaced_are_refused(
    ask, base, alpaca, test_dir, tmp_path
):
    """The adapter's file is the same, what it is attached to is not."""
    mine = shutil.copytree(base, tmp_path / "base")
    run = short_run(mine, alpaca, tmp_path / "run")
    command = ["--adapter", run, "--test_dir", test_dir, "--tasks", "boolq", "--eval_rows", 2]
    eval.main([*map(str, command)])
    assert (run / "eval_generate" / "results.json").is_file()
    other = make_base(tmp_path / "other", max_position_embeddings=2048)
    model = MoETransformer.from_pretrained(other)
    model.lm_head.weight.data.mul_(-1)
    model.save_pretrained(other)
    shutil.copy(other / "model.safetensors", mine)
    code, message = failure(*command, main=eval.main)
    assert code == 1 and "weights" in message and "then" in message


def test_the_line_after_ctrl_c_is_true_also_with_overwrite(
    base, test_dir, tmp_path, monkeypatch, capsys
):
    """With --overwrite the same command would delete the answers so far: the line may not promise
    that it goes on."""
    counting(monkeypatch, 1)
    command = about_boolq(base, test_dir, tmp_path / "out")
    failure(*command, "--batch_size", 3, "--overwrite", main=eval.main)
    assert capsys.readouterr().err == KEPT


OUT_OF_MEMORY = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "CPU": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
}


def test_more_texts_than_main_memory_holds_are_refused_and_not_killed(
    base, test_dir, tmp_path, monkeypatch
):
    """Linux gives more than there is: of the embedded base 1000 beams of 2000 tokens are 16 GB."""
    monkeypatch.setattr(eval.run, "free_memory", lambda: 5e6)
    sets = about_boolq(base, test_dir, tmp_path / "out")
    answer = ["--base", base, "--prompt", "the dog", "--max_new_tokens", 50]
    for command in (sets, answer):
        code, message = failure(*command, "--num_beams", 200, main=eval.main)
        assert code == 1 and "\n" not in message
        assert "GB of memory are needed; try" in message and "lower --num_beams" in message


@pytest.mark.parametrize("where", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line_that_names_batch_size_and_keeps_the_answers(
    ask, base, test_dir, tmp_path, monkeypatch, where
):
    """The second batch takes too much. A smaller one goes on behind the first."""
    real, calls = eval.generate, []

    def answer(model, tokenizer, how, task, rows):
        calls.append(len(rows))
        if calls == [3, 3]:
            raise OUT_OF_MEMORY[where]
        return real(model, tokenizer, how, task, rows)

    monkeypatch.setattr(eval, "generate", answer)
    command = about_boolq(base, test_dir, tmp_path / "out")
    code, message = failure(*command, "--batch_size", 3, main=eval.main)
    assert code == 1 and "out of memory" in message and "--batch_size" in message
    screen, _, _ = ask("--tasks", "boolq", "--batch_size", 1)
    assert "3 of 7 rows were answered before" in screen and calls == [3, 3, 1, 1, 1, 1]


def test_a_defect_of_ours_while_answering_keeps_its_traceback(
    base, test_dir, tmp_path, monkeypatch
):
    """It is no lack of memory, and must not be called one."""

    def answer(*given):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(eval, "generate", answer)
    command = about_boolq(base, test_dir, tmp_path / "out")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        eval.main([*map(str, command)])


@pytest.mark.parametrize("fault", ["a file above it", "a file", "read-only", "other settings"])
def test_a_folder_that_cannot_take_the_results_is_found_before_the_weights_are_read(
    ask, base, test_dir, tmp_path, monkeypatch, fault
):
    """After an hour of answers, or minutes of loading, would be late. (/proc is read-only also for
    the superuser.)"""
    out = tmp_path / "out"
    if fault == "a file above it":
        out.write_text("mine")
        out = out / "deeper"
    if fault == "a file":
        out.write_text("mine")
    if fault == "read-only":
        out = Path("/proc/out")
    flags = []
    if fault == "other settings":
        ask("--tasks", "boolq")
        flags = ["--num_beams", 2]

    def never(*arguments):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(eval, "load_model", never)
    code, message = failure(*about_boolq(base, test_dir, out), *flags, main=eval.main)
    assert code == 1 and str(out) in message and "\n" not in message


# What is reported --------------------------------------------------------------------------------


def answered(monkeypatch, right, method="generate"):
    """Let the rows of each task be right as told: {task: [bool, ...]}, and AQuA's stated letter
    always right."""

    def answer(model, tokenizer, how, task, rows):
        records = []
        for row in rows:
            n = int(re.search(r"(?:the|fox|is it) (\d+)", row["instruction"])[1])
            records.append(
                {"response": "", "answer": "", "correct": right[task.name][n], "cut": n == 0}
            )
            if task.other_rule:
                records[-1]["correct_stated"] = True
        return records

    monkeypatch.setattr(eval, method, answer)


def test_the_mean_is_unweighted_and_standard_errors_are_those_of_a_sample(
    ask, sets, tmp_path, monkeypatch
):
    """By hand: 3 of 4 right is 75 %, sqrt(.75 * .25 / 3) = 25 %; 1 of 7 is 14.3 %, sqrt(6/49 / 6) =
    14.3 %."""
    some = {"piqa": sets["piqa"][:4], "SVAMP": sets["SVAMP"], "AddSub": sets["AddSub"][:1]}
    folder = write_sets(tmp_path / "sets", some)
    answered(
        monkeypatch,
        {"piqa": [True, True, False, True], "SVAMP": [True] + 6 * [False], "AddSub": [True]},
    )
    screen, results, _ = ask("--tasks", "piqa", "SVAMP", "AddSub", test_dir=folder)
    table = results["tasks"]
    assert table["piqa"] == {"n": 4, "cut": 1, "rule": "word", "acc": [0.75, pytest.approx(0.25)]}
    assert (
        table["SVAMP"]["acc"] == pytest.approx([1 / 7, 1 / 7])
        and table["SVAMP"]["rule"] == "number"
    )
    assert table["AddSub"]["acc"] == [1.0, 0.0]
    mean, error = (0.75 + 1 / 7 + 1) / 3, math.sqrt(0.25**2 + (1 / 7) ** 2) / 3
    assert results["mean"] == {"acc": [pytest.approx(mean), pytest.approx(error)]}
    lines = [line.split() for line in screen.splitlines()]
    for line in (
        ["piqa", "4", "75.0", "25.0"],
        ["SVAMP", "7", "14.3", "14.3"],
        ["AddSub", "1", "100.0", "0.0"],
        ["mean,", "unweighted", f"{100 * mean:.1f}", f"{100 * error:.1f}"],
    ):
        assert line in lines, screen
    assert "3 prompts were longer than the model's positions and lost their beginning" in screen


def test_the_standard_error_is_that_of_torch(ask, monkeypatch):
    right = [True, False, False, True, True, False, True]
    answered(monkeypatch, {"piqa": right})
    share, error = ask("--tasks", "piqa")[1]["tasks"]["piqa"]["acc"]
    values = torch.tensor(right, dtype=torch.float64)
    assert share == pytest.approx(values.mean().item()) and error == pytest.approx(
        (values.std() / 7**0.5).item()
    )


def test_both_rules_of_aqua_are_reported_and_named_and_the_mean_takes_the_papers(ask, monkeypatch):
    answered(monkeypatch, {"AQuA": [True] * 2 + [False] * 5, "gsm8k": [False] * 7})
    screen, results, _ = ask("--tasks", "AQuA", "gsm8k")
    assert re.search(r"^AQuA \(first capital A-E\) +7 +28\.6 +18\.4$", screen, re.M)
    assert re.search(r"^mean, .+\nnot in it: AQuA, as stated +100\.0 +0\.0$", screen, re.M)
    assert (
        results["tasks"]["AQuA"]["acc_stated"] == [1.0, 0.0]
        and results["tasks"]["AQuA"]["rule"] == "letter"
    )
    assert results["mean"]["acc"][0] == pytest.approx(1 / 7)
    assert "AQuA" not in ask("--tasks", "gsm8k", out="alone")[0]


def test_real_responses_go_through_both_rules(ask, monkeypatch):
    monkeypatch.setattr(eval, "encode_prompt", lambda text, tokenizer: [5])
    monkeypatch.setattr(
        MoETransformer, "generate", lambda self, prompts, new, **kw: [[9]] * len(prompts)
    )
    cls = type(load_tokenizer(TINY))
    monkeypatch.setattr(cls, "decode", lambda self, ids, **kw: "Answer: B")
    _, results, records = ask("--tasks", "AQuA")
    one = {
        "response": "Answer: B",
        "answer": "A",
        "correct": False,
        "correct_stated": True,
        "cut": False,
    }
    assert (one | {"task": "AQuA", "index": 3, "gold": "B"}).items() <= records["AQuA", 3].items()
    assert results["tasks"]["AQuA"]["acc"] == [0.0, 0.0] and results["tasks"]["AQuA"][
        "acc_stated"
    ] == [1.0, 0.0]


@pytest.mark.parametrize("method", ["generate", "likelihood"])
def test_a_prompt_that_is_too_long_keeps_its_end_and_is_counted(ask, tmp_path, sets, method):
    """64 positions: the last 60 ids and 4 new ones. The screen, the record and results.json say how
    many."""
    short = make_base(tmp_path / "short", max_position_embeddings=64)
    screen, results, records = ask("--tasks", "boolq", "--method", method, base=short)
    assert "7 prompts were longer than the model's positions and lost their beginning" in screen
    assert results["tasks"]["boolq"]["cut"] == 7 and all(r["cut"] for r in records.values())
    if method == "generate":
        model, tokenizer = load_base(str(short))
        ids = [tokenizer.encode(TASKS["boolq"].render_eval(row))[-60:] for row in sets["boolq"]]
        assert [records["boolq", i]["response"] for i in range(7)] == [
            tokenizer.decode(new) for new in model.generate(ids, 4, num_beams=4)
        ]


def test_eval_rows_takes_the_first_rows_and_a_set_of_another_size_is_noted(ask, sets):
    screen, results, records = ask("--tasks", "boolq", "--eval_rows", 3)
    assert sorted(records) == [("boolq", i) for i in range(3)] and "note:" not in screen
    assert [records["boolq", i]["gold"] for i in range(3)] == [
        row["answer"] for row in sets["boolq"][:3]
    ]
    screen, results, _ = ask("--tasks", "boolq")
    assert re.search(r"note: \S+boolq.json has 7 rows, the papers' set 3270", screen)
    assert ask("--tasks", "boolq", "commonsense", "boolq", "--eval_rows", 1, out="o")[1][
        "tasks"
    ].keys() == {*GROUPS["commonsense"]}, "a task named twice is measured once"


def test_skills_and_test_sets_are_measured_in_one_command(ask, base, capsys):
    screen, results, _ = ask("--tasks", "sort", "piqa", "--eval_rows", 2)
    assert re.search(r"^sort +\S+ %$", screen, re.M) and list(results["tasks"]) == ["piqa"]


# Mistakes ----------------------------------------------------------------------------------------


def test_every_mistake_with_a_test_set_is_one_line(base, test_dir, tmp_path, capsys):
    rows = made_up("piqa", 2)
    said = {"role": "user", "content": "hi"}
    bad = write_sets(
        tmp_path / "bad",
        {
            "piqa": [{k: v for k, v in row.items() if k != "answer"} for row in rows],
            "boolq": [{"text": 1}],
            "winogrande": [],
            "hellaswag": [dict(made_up("hellaswag", 1)[0], instruction="no choices")],
            "openbookqa": [{"messages": [said, said | {"role": "assistant"}], "answer": "answer1"}],
        },
    )
    (bad / "social_i_qa.json").write_text("<html>")
    adapter_like = tmp_path / "run"
    (adapter_like / "model").mkdir(parents=True)
    (adapter_like / "config.json").write_text('{"variant": "scratch"}')
    cases = [
        (
            1,
            ["--tasks", "ARC-Easy", "--test_dir", bad],
            [f"{bad}/ARC-Easy.json: no such file", "data/prepare.py", "--test_dir"],
        ),
        (1, ["--tasks", "piqa", "--test_dir", bad], [f"{bad}/piqa.json", '"answer"']),
        (1, ["--tasks", "boolq", "--test_dir", bad], [f"{bad}/boolq.json:1: ", "expected"]),
        (1, ["--tasks", "winogrande", "--test_dir", bad], [f"{bad}/winogrande.json", "no records"]),
        (
            1,
            ["--tasks", "social_i_qa", "--test_dir", bad],
            [f"{bad}/social_i_qa.json:1: not valid JSON"],
        ),
        (
            1,
            ["--tasks", "hellaswag", "--test_dir", bad, "--method", "likelihood"],
            [f"{bad}/hellaswag.json: record 1: hellaswag has no choices"],
        ),
        (1, ["--tasks", "openbookqa", "--test_dir", bad], [f"{bad}/openbookqa.json: record 1: "]),
        (
            1,
            ["--tasks", "math", "--method", "likelihood"],
            ["likelihood", "MultiArith", "--method generate"],
        ),
        (
            1,
            ["--tasks", "piqa", "AQuA", "--method", "likelihood"],
            ["likelihood", "AQuA", "--method generate"],
        ),
        (1, ["--tasks", "piqa", "--adapter", adapter_like], ["whole model", "--base"]),
        (2, ["--tasks", "piqua"], ["piqua", "piqa"]),
        (2, ["--tasks", "sort", "--method", "likelihood"], ["--method", "test sets"]),
        (2, ["--method", "generate"], ["--method", "test sets"]),
        (2, ["--tasks", "piqa", "--choices", "texts"], ["--choices", "--method likelihood"]),
        (
            2,
            ["--tasks", "piqa", "--method", "likelihood", "--num_beams", 4],
            ["--num_beams", "generation"],
        ),
        (
            2,
            ["--tasks", "piqa", "--method", "likelihood", "--max_new_tokens", 4],
            ["--max_new_tokens", "generation"],
        ),
        (
            2,
            [
                "--tasks",
                "piqa",
                "--method",
                "likelihood",
                "--choices",
                "texts",
                "--template",
                "plain",
            ],
            ["--template"],
        ),
        (2, ["--tasks", "piqa", "--temperature", 1], ["--temperature", "--prompt"]),
        (2, ["--tasks", "piqa", "--seed", 1], ["--seed", "--prompt"]),
        (2, ["--prompt", "x", "--batch_size", 4], ["--batch_size", "test sets"]),
        (2, ["--prompt", "x", "--tasks", "piqa"], ["--tasks", "skills and test sets only"]),
        (2, ["--prompt", "x", "--overwrite"], ["--overwrite", "test sets"]),
        (2, ["--out", "x"], ["--out", "test sets"]),
        (2, ["--num_beams", 4], ["--num_beams", "--prompt"]),
        (2, ["--tasks", "piqa", "--batch_size", 0], ["--batch_size", "0"]),
        (2, ["--tasks", "piqa", "--method", "guess"], ["guess", "generate"]),
    ]
    for expected, flags, parts in cases:
        out = (
            [] if expected == 2 else ["--out", tmp_path / "out" / str(len(capsys.readouterr().out))]
        )
        where = [] if "--test_dir" in flags or expected == 2 else ["--test_dir", test_dir]
        code, message = failure("--base", base, *flags, *where, *out, main=eval.main)
        message = message or capsys.readouterr().err
        assert code == expected and message.strip().count("\n") == 0, (flags, message)
        assert not [part for part in parts if part not in message], (flags, message)


def test_a_gold_answer_that_is_no_number_is_told_with_its_file(ask, tmp_path, monkeypatch):
    """It is found before an hour of generation, or at least said where it stands."""
    folder = write_sets(tmp_path / "sets", {"gsm8k": [dict(made_up("gsm8k", 1)[0], answer="none")]})
    cls = type(load_tokenizer(TINY))
    monkeypatch.setattr(cls, "decode", lambda self, ids, **options: "7")
    with pytest.raises(SystemExit) as stopped:
        ask("--tasks", "gsm8k", "--max_new_tokens", 2, test_dir=folder)
    assert "gsm8k" in stopped.value.code and "none" in stopped.value.code


TRAIN_MISTAKES = {
    ("--recipe", "perft_paper"): ["--recipe applies to --data only"],
    ("--data", "ROWS", "--task", "add"): ["--task does not apply to --data"],
    ("--data", "ROWS", "--train_rows", "5"): ["--train_rows does not apply to --data"],
    ("--data", "ROWS", "--steps", "3", "--epochs", "2"): ["--epochs does not apply to --steps"],
    ("--data", "ROWS", "--recipe", "perft_paper", "--steps", "3", "--epochs", "2"): [
        "--epochs does not apply to --steps"
    ],
    ("--max_length", "5"): ["--max_length applies to --data only"],
    ("--epochs", "5"): ["--epochs applies to --data only"],
    ("--held_out", "0"): ["--held_out applies to --data only"],
    ("--template", "plain"): ["--template applies to --data only"],
    ("--data", "ROWS", "--template", "chat"): ["chat", "papers"],
    ("--data", "ROWS", "--held_out", "-1"): ["--held_out", "-1"],
    ("--data", "ROWS", "--max_length", "0"): ["--max_length", "0"],
    ("--data", "ROWS", "--recipe", "perft"): ["perft_paper"],
    ("--data", "ROWS", "--recipe", "perft_paper", "--base", "no/such"): ["no/such"],
}


@pytest.mark.parametrize("flags", TRAIN_MISTAKES, ids=" ".join)
def test_flags_of_train_that_clash_are_told_in_one_line_with_exit_code_2(
    flags, base, alpaca, tmp_path, capsys
):
    parts = TRAIN_MISTAKES[flags]
    flags = [str(alpaca) if flag == "ROWS" else flag for flag in flags]
    where = ["--base", base] if "--base" not in flags else []
    code, _ = failure("--variant", "perft_s", *where, "--out", tmp_path / "run", *flags)
    error = capsys.readouterr().err
    assert (
        code == 2 and error.count("\n") == 1 and not [part for part in parts if part not in error]
    ), error
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_refused_for_variants_that_are_not_the_papers(base, alpaca, capsys):
    for variant in ("esft_token", "esft_gate"):
        flags = ("--variant", variant, "--base", base, "--data", alpaca)
        assert failure(*flags, "--recipe", "perft_paper")[0] == 2
        error = capsys.readouterr().err
        said = (
            f"--recipe perft_paper does not apply to --variant {variant}; it applies to perft_s, "
        )
        assert said in error


def test_a_data_file_that_cannot_be_used_is_one_line_with_exit_code_1(base, tmp_path):
    cases = [
        ("a", "<html>", ":1: not valid JSON"),
        ("b", "[]", "no records"),
        ("c", None, "no such file"),
        ("d", '{"instruction": 1, "output": ""}', ":1: instruction is 1"),
    ]
    for name, text, part in cases:
        path = tmp_path / f"{name}.json"
        if text is not None:
            path.write_text(text)
        code, message = failure(
            "--variant", "perft_s", "--base", base, "--data", path, "--out", tmp_path / "run"
        )
        assert (
            code == 1
            and message.startswith(f"error: {path}")
            and part in message
            and "\n" not in message
        )
    assert not (tmp_path / "run").exists()


def test_a_named_data_set_that_is_not_downloaded_is_told_with_the_command(
    base, tmp_path, monkeypatch
):
    monkeypatch.setitem(dataset.NAMED, "math", tmp_path / "math.json")
    code, message = failure(
        "--variant", "perft_s", "--base", base, "--data", "math", "--out", tmp_path / "run"
    )
    assert code == 1 and "python data/prepare.py math" in message and "\n" not in message


def test_a_template_given_for_messages_is_refused_and_not_ignored(base, messages, tmp_path, capsys):
    """A flag that does not apply is an error; chats have their own form."""
    code, message = failure(
        "--variant",
        "perft_s",
        "--base",
        base,
        "--data",
        messages,
        "--out",
        tmp_path / "run",
        "--template",
        "plain",
        "--steps",
        1,
        "--held_out",
        0,
    )
    assert code in (1, 2) and "--template" in (message or capsys.readouterr().err)


# Training on a file ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A tiny Mixtral folder; its tokenizer is the real one where that is there."""
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    MoETransformer(
        Config(
            vocab_size=32000,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            model_type="mixtral",
            num_key_value_heads=1,
            norm_topk_prob=True,
            max_position_embeddings=2048,
            router_aux_loss_coef=0.5,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
    source = SHARED / "tokenizers" / "mixtral" / "tokenizer.json"
    if not source.is_file():
        pytest.skip(f"the real tokenizer is not here: {source}")
    (folder / "tokenizer.json").symlink_to(source)
    return folder


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return make_base(
        tmp_path_factory.mktemp("olmoe"), max_position_embeddings=2048, router_aux_loss_coef=0.5
    )


RECIPE = {
    "batch_size": 16,
    "epochs": 3,
    "max_length": 256,
    "held_out": 120,
    "warmup": 100,
    "train_on_inputs": True,
    "weight_decay": 0.0,
    "beta2": 0.999,
    "clip": 1.0,
    "dropout": 0.05,
    "rank": 16,
    "alpha": 32.0,
    "kind": "lora",
    "init": "paper",
}


def recipe(base, *flags, variant="perft_s", data="rows.json"):
    """The settings in force, without those that follow from the rows."""
    argv = ["--variant", variant, "--base", base, "--out", "nowhere", "--data", data]
    args = train.parse_args([str(word) for word in (*argv, "--recipe", "perft_paper", *flags)])
    settings = vars(train.settings_of(args, Config.from_folder(base), dataset.Data(None)))
    asked = {name: vars(args)[name] for name in ("steps", "max_length", "template")}
    return settings | asked


def differences(settings, expected):
    return {k: (settings[k], v) for k, v in expected.items() if settings[k] != v}


def test_the_recipe_is_the_papers_table_for_both_bases(olmoe, mixtral):
    """The table of the papers, written down a second time, whatever the base's own config.json
    says. Their balance loss is K times ours: c is 0.01 and 0.02, K is 2 in both bases here."""
    by_base = {olmoe: {"lr": 1e-5, "balance": 0.02}, mixtral: {"lr": 2e-5, "balance": 0.04}}
    for base, values in by_base.items():
        assert not differences(recipe(base), RECIPE | values)
        assert not differences(
            recipe(base, "--rank", 4), RECIPE | values | {"rank": 4, "alpha": 8.0}
        )
    for data, rate in (("commonsense", 2e-5), ("math", 1e-5), ("rows.json", 1e-5)):
        assert recipe(olmoe, variant="lora_qv", data=data)["lr"] == rate
        assert recipe(olmoe, variant="perft_e", data=data)["lr"] == 1e-5
        assert recipe(mixtral, variant="lora_qv", data=data)["lr"] == 2e-5


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("batch_size", 8),
        ("epochs", 1),
        ("max_length", 99),
        ("held_out", 0),
        ("template", "plain"),
        ("warmup", 5),
        ("weight_decay", 0.1),
        ("beta2", 0.9),
        ("clip", 2.0),
        ("dropout", 0.0),
        ("rank", 4),
        ("alpha", 3.0),
        ("lr", 0.5),
        ("kind", "parallel"),
        ("init", "lora"),
        ("balance", 0.0),
    ],
)
def test_each_value_of_the_recipe_gives_way_to_its_flag(olmoe, flag, value):
    expected = RECIPE | {"lr": 1e-5, "balance": 0.02, flag: value}
    if flag == "rank":
        expected["alpha"] = 8.0
    if flag == "kind":
        del expected["alpha"]  # a parallel adapter has no scale
    assert not differences(recipe(olmoe, f"--{flag}", value), expected)


def test_the_recipes_labels_on_the_prompt_and_its_epochs_give_way_too(olmoe):
    assert recipe(olmoe, "--no-train_on_inputs")["train_on_inputs"] is False
    settings = recipe(olmoe, "--steps", 7)
    assert settings["steps"] == 7 and settings["epochs"] is None
    assert recipe(olmoe)["steps"] is None, "known when the rows are"


@pytest.mark.parametrize("kind", ["olmoe", "mixtral"])
def test_the_configuration_line_shows_the_recipe_in_force_for_perft_r(
    request, alpaca, tmp_path, capsys, kind
):
    """c_adapter is the recipe's too: 0.01 or 0.02, times the two adapters of a token, although this
    base's config.json says 0.5."""
    flags = ["--recipe", "perft_paper", "--steps", 2, "--held_out", 4, "--batch_size", 16]
    base = request.getfixturevalue(kind)
    short_run(base, alpaca, tmp_path / "run", *flags, "--warmup", 100, variant="perft_r")
    shown = dict(re.findall(r"(\w+)=(\S+)", capsys.readouterr().out.split("\ndata:")[0]))
    c, rate = {"olmoe": (0.02, 1e-5), "mixtral": (0.04, 2e-5)}[kind]
    expected = RECIPE | {"held_out": 4, "balance": c, "lr": rate}
    del expected["epochs"]
    assert not {k: (shown.get(k), v) for k, v in expected.items() if shown.get(k) != str(v)}
    assert shown["recipe"] == "perft_paper" and shown["adapter_balance"] == str(c)


def examples_by_hand(path, tokenizer, **options):
    kind, rows = read_rows(path)
    if kind == "messages":
        return [encode(chat_turns(row["messages"]), tokenizer, **options) for row in rows]
    return [
        encode([(TEMPLATES["papers"](row, False), row["output"])], tokenizer, **options)
        for row in rows
    ]


@torch.no_grad()
def mean_loss(model, examples):
    """Cross-entropy of every label, one row at a time."""
    terms = []
    for ids, labelled in examples:
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        terms += [-log_probs[t - 1, ids[t]].item() for t in range(1, len(ids)) if labelled[t]]
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("file", "flags"),
    [("alpaca", []), ("alpaca", ["--train_on_inputs", "--max_length", 90]), ("messages", [])],
)
def test_the_held_out_loss_is_the_mean_over_the_held_out_labels(
    request, base, tmp_path, capsys, file, flags
):
    """Before, on the base (B = 0 at the start), and after, on what was saved: by hand, row by
    row."""
    path = request.getfixturevalue(file)
    run = short_run(
        base, path, tmp_path / "run", "--held_out", 6, "--init", "lora", "--lr", 0.01, *flags
    )
    model, tokenizer = load_base(str(base))
    options = {"train_on_inputs": True, "max_length": 90} if flags else {}
    examples = examples_by_hand(path, tokenizer, **options)
    held_out = [examples[i] for i in split(len(examples), 6, 42)[1]]
    (before,), (after,) = metrics(run, "before"), metrics(run, "after")
    assert before["held_out"] == pytest.approx(mean_loss(model, held_out), abs=1e-4)
    load_trained(model, run)
    assert after["held_out"] == pytest.approx(mean_loss(model, held_out), abs=1e-4)
    assert abs(before["held_out"] - after["held_out"]) > 1e-3, (
        "nothing learnt would compare nothing"
    )
    screen = capsys.readouterr().out
    for when, line in (("before", before), ("after", after)):
        assert f"cross-entropy of 6 held-out rows {when}: {line['held_out']:.4f}" in screen


def test_the_held_out_loss_is_told_after_each_epoch(base, alpaca, tmp_path):
    train.main(
        [
            "--variant",
            "perft_s",
            "--base",
            str(base),
            "--data",
            str(alpaca),
            "--out",
            str(tmp_path / "run"),
            "--batch_size",
            "8",
            "--epochs",
            "3",
            "--held_out",
            "4",
            "--threads",
            "1",
        ]
    )
    run = tmp_path / "run"
    assert [line["step"] for line in metrics(run, "epoch")] == [3, 6], (
        "24 rows are 3 steps; the last one is `after`"
    )
    assert json.loads((run / "config.json").read_text())["steps"] == 9
    assert len({line["held_out"] for line in metrics(run) if "held_out" in line}) == 4


@pytest.mark.parametrize(("variant", "file"), [("perft_r", "alpaca"), ("esft_token", "messages")])
def test_a_run_on_a_file_that_was_stopped_and_resumed_is_the_run_that_was_not(
    request, base, tmp_path, monkeypatch, capsys, variant, file
):
    """Across the border of an epoch, with dropout."""
    path = request.getfixturevalue(file)
    flags = [
        "--steps",
        9,
        "--save_every",
        3,
        "--lr",
        0.01,
        *(["--dropout", 0.3] if variant == "perft_r" else []),
    ]
    whole = short_run(base, path, tmp_path / "whole", *flags, variant=variant)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupted(patch, 7, ctrl_c)
        short_run(base, path, tmp_path / "stopped", *flags, variant=variant)
    assert stopped.value.code == 130 and "--resume" in capsys.readouterr().err
    resumed = short_run(base, path, tmp_path / "stopped", *flags, "--resume", variant=variant)
    assert outcome(resumed) == outcome(whole)


def test_a_run_is_not_resumed_on_rows_that_changed(base, alpaca, tmp_path, monkeypatch):
    """The same file name, another content, as many rows."""
    path = Path(shutil.copy(alpaca, tmp_path / "rows.json"))
    flags = ["--steps", 9, "--save_every", 3]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, 7, ctrl_c)
        short_run(base, path, tmp_path / "run", *flags)
    path.write_text(path.read_text().replace("fox", "dog"))
    with pytest.raises(SystemExit) as stopped:
        short_run(base, path, tmp_path / "run", *flags, "--resume")
    assert isinstance(stopped.value.code, str) and "changed" in stopped.value.code


@pytest.mark.parametrize("variant", ["perft_s", "esft_token", "lora_qv"])
def test_what_was_trained_on_a_file_needs_only_its_run_folder(
    base, alpaca, test_dir, tmp_path, capsys, variant
):
    """Base and template are the run's; results stand in the run folder and name the variant."""
    run = short_run(
        base, alpaca, tmp_path / "run", "--template", "plain", "--lr", 0.01, variant=variant
    )
    capsys.readouterr()
    eval.main(
        [
            "--adapter",
            str(run),
            "--tasks",
            "boolq",
            "--test_dir",
            str(test_dir),
            "--method",
            "likelihood",
        ]
    )
    results = json.loads((run / "eval_likelihood" / "results.json").read_text())
    assert results["template"] == "plain" and "template=plain" in capsys.readouterr().out
    assert results["variant"] == variant
    assert results["base"] == str(base) and results["adapter"] == str(run)


def test_what_was_trained_on_messages_is_evaluated_on_the_test_sets_too(
    base, messages, test_dir, tmp_path
):
    """Its template was the chat form, which test rows lack: they are asked in one that they have,
    or refused."""
    run = short_run(base, messages, tmp_path / "run", variant="esft_token")
    flags = [
        "--adapter",
        str(run),
        "--tasks",
        "boolq",
        "--eval_rows",
        "2",
        "--test_dir",
        str(test_dir),
    ]
    try:
        eval.main(flags)
    except SystemExit as stopped:
        assert "template" in stopped.code and "\n" not in stopped.code
        eval.main([*flags, "--template", "plain"])
    assert (run / "eval_generate" / "results.json").is_file()


# As a user types it ------------------------------------------------------------------------------


def command(*words):
    """-> stdout of a process of its own, without traceback or warning on stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@shared
@pytest.mark.skipif(
    not (TINY / "model.safetensors").is_file(),
    reason="data/tiny_olmoe has no model.safetensors yet",
)
def test_the_papers_experiment_in_small_on_the_embedded_base(tmp_path):
    """Train two steps on real rows by the recipe, then every set by beams, and commonsense by
    likelihood."""
    run, tests = tmp_path / "run", ("--test_dir", SHARED / "data" / "test", "--eval_rows", 2)
    rows = SHARED / "data" / "commonsense_sample.json"
    screen = command(
        "train.py",
        "--variant",
        "perft_r",
        "--data",
        rows,
        "--recipe",
        "perft_paper",
        "--steps",
        2,
        "--lr",
        1e-3,
        "--batch_size",
        2,
        "--held_out",
        8,
        "--out",
        run,
    )
    assert "4,000 alpaca rows: 3,992 train, 8 are held out (drawn by seed 42)" in screen
    assert "train_on_inputs=True" in screen and re.search(
        r"held-out rows after: \d+\.\d{4}", screen
    )
    screen = command(
        "eval.py", "--adapter", run, "--tasks", "commonsense", "math", "--max_new_tokens", 4, *tests
    )
    assert "template=papers" in screen and re.search(
        r"^mean, unweighted +\d+\.\d +\d+\.\d$", screen, re.M
    )
    shown = [
        name for name in TASKS if re.search(rf"^{name}( \(first capital A-E\))? +2 ", screen, re.M)
    ]
    assert shown == list(TASKS) and "not in it: AQuA, as stated" in screen
    screen = command(
        "eval.py",
        "--adapter",
        run,
        "--tasks",
        "commonsense",
        "--method",
        "likelihood",
        "--choices",
        "texts",
        *tests,
    )
    assert re.search(r"^task +n +acc % +s\.e\. +acc_norm % +s\.e\.$", screen, re.M)
    results = json.loads((run / "eval_likelihood" / "results.json").read_text())
    assert (
        results["tasks"].keys() == {*GROUPS["commonsense"]}
        and 0 <= results["mean"]["acc_norm"][0] <= 1
    )


def test_chats_train_chosen_experts_in_a_shell(base, messages, tmp_path):
    screen = command(
        "train.py",
        "--variant",
        "esft_token",
        "--base",
        base,
        "--data",
        messages,
        "--steps",
        2,
        "--held_out",
        3,
        "--batch_size",
        4,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    )
    assert "20 messages rows: 17 train, 3 are held out" in screen and "template=chat" in screen
    assert (tmp_path / "run" / "expert_weights.safetensors").is_file()
