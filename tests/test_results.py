"""A row of the sweep can be had again with the same digits; what is chosen, kept and drawn follows
its rule; and half a sweep has tables and pictures, too."""

import json
import re
import shutil
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest
import results

SVG = "{http://www.w3.org/2000/svg}"
SHORT = "--variant perft_e --rank 2 --eval_rows 20 --train_rows 100 --batch_size 8"
METHOD, OTHER = (
    next(m for m in results.METHODS if (m.name, m.config) == (name, "r16"))
    for name in ("perft_e", "perft_s")
)


def sweep(folder):
    """One run of two steps, made by the sweep itself -> its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "STEPS", {"three_new": 2})
        patch.setattr(results, "EVAL_EVERY", {2: 2})
        one = results.Run("three_new", "perft_e", "r16", SHORT, 1e-3, 0)
        results.work_off([one], folder, 1)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("work"))


def tables(work, out):
    results.write_tables(work, out)
    return out.read_text(), out.with_name("curves.csv").read_text()


def test_a_row_that_is_run_again_has_the_same_digits(work, tmp_path):
    found = []
    for folder in (work, sweep(tmp_path / "again")):
        rows, curves = tables(folder, tmp_path / "results.csv")
        assert rows.count("\n") == curves.count("\n") == 2  # a head, and what was run
        (weights,) = folder.glob("*/adapter_model.safetensors")
        without_seconds = rows.rpartition(",")[0]
        found.append((without_seconds, curves, weights.read_bytes()))
    assert found[0] == found[1]


def test_what_is_finished_is_not_run_again(work, monkeypatch):
    monkeypatch.setattr(results.subprocess, "Popen", lambda *given, **options: pytest.fail())
    one = results.Run("three_new", "perft_e", "r16", SHORT, 1e-3, 0)
    results.work_off([one], work, 1)


def test_a_folder_that_is_not_finished_is_in_no_table(work, tmp_path, capsys):
    (run,) = work.glob("*_0")
    for seed in (0, 1):
        shutil.copytree(run, tmp_path / "work" / f"{run.name[:-1]}{seed}")
    log = tmp_path / "work" / f"{run.name[:-1]}1" / "metrics.jsonl"
    log.write_text(log.read_text()[:-30])  # as a kill leaves it
    (tmp_path / "work" / f"{run.name[:-1]}2").mkdir()
    rows, curves = tables(tmp_path / "work", tmp_path / "results.csv")
    assert (rows, curves) == tables(work, tmp_path / "expected.csv")

    results.main(["--tables", f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'results.csv'}"])
    out = capsys.readouterr().out
    assert "perft_e r16: left out, 1 of 5 rates are finished" in out
    assert out.count("there is nothing to draw yet") == len(("frontier", "parameters"))


def test_without_a_finished_run_one_line_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"no run is finished there; start with"):
        results.main(["--tables", f"--work={tmp_path}", f"--out={tmp_path / 'results.csv'}"])


def test_before_anything_is_run_the_list_has_every_rate_of_every_method(tmp_path, capsys):
    results.main(["--list", f"--work={tmp_path}"])
    names = capsys.readouterr().out.split()
    assert (
        len(names)
        == len(set(names))
        == sum(len(results.grid("three_new", m)) for m in results.METHODS + results.SIZES)
    )
    assert "three_new_perft_r_Top2of4_r16_0.002_0" in names


# The rules, on tables made by hand ----------------------------------------------------------------


def write(folder, rows, curves):
    """Tables of (method, rate, seed, target, kept), and of the same with a step before target."""
    head = "task,method,config,lr,seed,trains,activated,target,kept_before,kept\n"
    lines = [
        f"three_new,{m.name},{m.config},{lr:g},{seed},1024,64,{target:.4f},0.8889,{kept:.4f}\n"
        for m, lr, seed, target, kept in rows
    ]
    (folder / "results.csv").write_text(head + "".join(lines))
    head = "task,method,config,lr,seed,step,target,kept\n"
    lines = [
        f"three_new,{m.name},{m.config},{lr:g},{seed},{step},{target:.4f},{kept:.4f}\n"
        for m, lr, seed, step, target, kept in curves
    ]
    (folder / "curves.csv").write_text(head + "".join(lines))
    return results.Results(folder / "results.csv", "three_new")


@pytest.fixture
def by_hand(tmp_path):
    rows = [
        (METHOD, 6e-4, 0, 0.70, 0.88),
        (METHOD, 1e-3, 0, 0.96, 0.86),
        (METHOD, 1e-3, 1, 0.97, 0.84),
        (METHOD, 1e-3, 2, 0.92, 0.80),
        (METHOD, 2e-3, 0, 0.99, 0.81),
        (METHOD, 3e-3, 0, 0.98, 0.40),
        (OTHER, 1e-3, 0, 0.40, 0.70),
        (OTHER, 2e-3, 0, 0.45, 0.60),
    ]
    curves = [
        (METHOD, 3e-4, 0, 300, 0.10, 0.89),
        (METHOD, 6e-4, 0, 300, 0.72, 0.88),
        (METHOD, 1e-3, 0, 240, 0.95, 0.87),  # it might have been stopped here
        (METHOD, 1e-3, 0, 270, 0.94, 0.89),
        (METHOD, 1e-3, 0, 300, 0.96, 0.86),
        (METHOD, 1e-3, 1, 300, 0.97, 0.83),
        (METHOD, 1e-3, 2, 300, 0.92, 0.80),  # never learns enough
        (METHOD, 2e-3, 0, 60, 0.96, 0.88),
        (METHOD, 2e-3, 0, 300, 0.99, 0.81),
        (METHOD, 3e-3, 0, 300, 0.98, 0.40),
    ]
    curves += [
        (OTHER, rate, 0, 300, 0.40, 0.70)
        for rate in results.grid("three_new", OTHER)
        if rate != 2e-3
    ]
    curves.append((OTHER, 2e-3, 0, 300, 0.45, 0.60))
    return write(tmp_path, rows, curves)


def test_the_rate_is_that_which_keeps_most_of_those_that_learn_or_else_learns_most(by_hand):
    assert by_hand.rate(METHOD) == 1e-3 and by_hand.rate(OTHER) == 2e-3
    assert by_hand.rate(results.SIZES[0]) is None


def test_a_method_is_left_out_while_a_rate_is_missing(by_hand):
    by_hand.curves = [row for row in by_hand.curves if row["lr"] != 3e-4]
    assert by_hand.rate(METHOD) is None and by_hand.rate(OTHER) == 2e-3
    lines = results.table(by_hand, results.METHODS)
    assert [line.split()[1] for line in lines[2:]] == ["perft_s"]
    assert results.parameters(by_hand) is results.frontier(by_hand) is None


def test_what_is_kept_is_counted_where_enough_is_learnt_along_the_run(by_hand):
    assert by_hand.kept(METHOD, 1e-3) == [0.87, 0.83]
    assert by_hand.kept(OTHER, 2e-3) == []
    table = results.table(by_hand, results.METHODS)
    learns, keeps, enough = ([96, 97, 92], [86, 84, 80], [87, 83])
    texts = [
        f"{statistics.mean(v):.1f} ± {statistics.stdev(v) / len(v) ** 0.5:.1f}"
        for v in (learns, keeps, enough)
    ]
    sizes = "1,024 | 64"
    assert f"| perft_e | r16 | 0.001 | {sizes} | {' | '.join(texts)} (2 of 3) | 3 |" in table
    assert f"| perft_s | r16 | 0.002 | {sizes} | 45.0 | 60.0 | not learnt | 1 |" in table


def test_a_claim_is_told_by_what_its_methods_learn_and_keep(by_hand, monkeypatch):
    ours = ("perft_e r16", "perft_s r16", "perft_s r4")  # the last one was not run
    monkeypatch.setattr(results, "CLAIMS", [results.Claim("E above S", "71 and 63", ours, "shown")])
    (row,) = results.claims(by_hand)[2:]
    assert re.fullmatch(
        r"\| E above S \| 71 and 63 \| perft_e r16: 95.0 ± \S+ / 83.3 ± \S+; "
        r"perft_s r16: 45.0 / 60.0 \| shown \|",
        row,
    )


def test_the_frontier_has_the_rates_that_somebody_would_choose_and_the_mean(by_hand):
    svg = ElementTree.fromstring(results.frontier(by_hand))
    told = [circle[0].text for circle in svg.iter(f"{SVG}circle")]
    # the ring, then the line through it, without 3e-3, which 2e-3 beats in both; nor the one that
    # is at 45 %
    mean = f"perft_e r16: {100 * (0.96 + 0.97 + 0.92) / 3:.7g}, {(86 + 84 + 80) / 3:.7g}"
    assert told == [mean, "perft_e r16: 70, 88", mean, "perft_e r16: 99, 81"]
    ring, _, on_the_line, _ = svg.iter(f"{SVG}circle")
    assert [ring.get(key) for key in ("cx", "cy")] == [on_the_line.get(key) for key in ("cx", "cy")]
    assert ring.get("class").split()[0] == on_the_line.get("class").split()[0]
    looks = [path.get("class").split()[-1] for path in svg.iter(f"{SVG}path")]
    assert [look for look in looks if look in ("bar", "line")] == ["bar", "bar", "line", "bar"]
    assert "before fine-tuning" in [text.text for text in svg.iter(f"{SVG}text")]  # the last bar


def test_of_a_methods_sizes_the_frontier_has_the_one_that_keeps_most(by_hand, monkeypatch):
    monkeypatch.setattr(results, "METHODS", [METHOD, METHOD._replace(config="r4")])
    known = [row for row in by_hand.rows if row["method"] == METHOD.name]
    by_hand.rows += [row | {"config": "r4", "kept": row["kept"] + 0.01} for row in known]
    by_hand.curves += [row | {"config": "r4"} for row in by_hand.curves]
    svg = ElementTree.fromstring(results.frontier(by_hand))
    told = [circle[0].text for circle in svg.iter(f"{SVG}circle")]
    assert {words.split(":")[0] for words in told} == {"perft_e r4"}
    assert "perft_e r4" in [text.text for text in svg.iter(f"{SVG}text")]


def test_a_size_stands_at_its_number_of_parameters_and_the_mean_of_its_seeds(by_hand):
    for row in by_hand.rows:
        row["trains"] = 65_536.0
        if row["method"] == OTHER.name:
            row["target"] = 0.55
    svg = ElementTree.fromstring(results.parameters(by_hand))
    told = {circle[0].text for circle in svg.iter(f"{SVG}circle")}
    assert told == {"perft_e r16: 65.536, 95", "perft_s r16: 65.536, 55"}
    places = {c[0].text: (float(c.get("cx")), float(c.get("cy"))) for c in svg.iter(f"{SVG}circle")}
    (x, more), (same, less) = (places[name] for name in sorted(told))
    assert x == same and more < less  # downwards


def test_what_learns_less_than_half_is_in_no_picture(by_hand):
    assert "perft_e" in results.parameters(by_hand) and "perft_e" in results.frontier(by_hand)
    assert "perft_s" not in results.parameters(by_hand) + results.frontier(by_hand)


def test_a_line_joins_the_ranks_of_a_method_and_each_of_them_is_named(tmp_path, monkeypatch):
    """What has no rank is a dot, and sizes that are one point are named once."""
    ranks = [METHOD._replace(config=f"r{n}", three=(1e-3, 1e-3)) for n in (2, 4, 8)]
    others = [OTHER._replace(config=name, three=(1e-3, 1e-3)) for name in ("p", "share", "groups")]
    monkeypatch.setattr(results, "METHODS", ranks + others)
    monkeypatch.setattr(results, "SIZES", [])
    rows = [(m, 1e-3, 0, 0.7 + 0.1 * i, 0.8) for i, m in enumerate(ranks)]
    rows += [(m, 1e-3, 0, 0.6, 0.8) for m in others]
    curves = [(m, 1e-3, 0, 300, target, kept) for m, _, _, target, kept in rows]
    found = write(tmp_path, rows, curves)
    for row in found.rows:
        number = {"p": 16, "share": 16, "groups": 64}.get(row["config"]) or int(row["config"][1:])
        row["trains"] = 1024.0 * number
    svg = ElementTree.fromstring(results.parameters(found))
    words = [text.text for text in svg.iter(f"{SVG}text") if text.get("class")]
    assert sorted(words) == ["perft_e r2", "perft_e r8", "perft_s groups", "perft_s p", "r4"]
    bars = [
        path.get("d").count(",") for path in svg.iter(f"{SVG}path") if "bar" in path.get("class")
    ]
    assert sorted(bars) == [1, 1, 3]


def test_the_pictures_of_the_pages_are_drawn_from_their_tables():
    found = results.Results(results.RESULTS, "three_new")
    for make in (results.frontier, results.parameters):
        path = results.RESULTS.with_name(f"{make.__name__}.svg")
        assert path.read_text(encoding="utf-8") == make(found), path.name


def test_the_experts_of_two_tasks_stand_in_one_grid_that_says_how_they_were_chosen(tmp_path):
    chosen = {"kinship_new": [[2, 0], [1]], "cipher_new": [[2], [0, 1]]}
    for task, ids in chosen.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "config.json").write_text(json.dumps({"task": task}))
        content = {"scores": [[0.1, 0.2, 0.7], [0.3, 0.4, 0.3]], "chosen": ids}
        content |= {"kind": "token", "p": 0.2}
        (tmp_path / task / "scores.json").write_text(json.dumps(content))
    folders = [str(tmp_path / task) for task in chosen]
    results.main(["--experts", *folders, str(tmp_path / "esft.svg")])
    svg = ElementTree.parse(tmp_path / "esft.svg")
    words = [text.text for text in svg.iter(f"{SVG}text")]
    rows = [word for word in words[2:] if word.endswith("_new")]
    assert rows == ["layer 0, kinship_new", "cipher_new", "layer 1, kinship_new", "cipher_new"]
    assert "Outlined: those that ESFT trains" in words[0]
    assert words[1].startswith("the most used, until they have 20% of a layer's choices: ")
    assert words[1].endswith(": 3 for kinship_new, 3 for cipher_new, 2 for both")
    assert words[-2:] == ["0%", "70.00%, the largest share of a layer's choices"]
    outlined = [
        r[0].text.split(":")[0] for r in svg.iter(f"{SVG}rect") if r.get("class") == "chosen"
    ]
    expected = [
        f"layer {i}, {task}, column {e}"
        for i in range(2)
        for task in chosen
        for e in sorted(chosen[task][i])
    ]
    assert outlined == expected

    content = json.loads((tmp_path / "cipher_new" / "scores.json").read_text()) | {"p": 0.3}
    (tmp_path / "cipher_new" / "scores.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="the runs chose by different rules"):
        results.main(["--experts", *folders, str(tmp_path / "esft.svg")])


def test_the_rows_of_the_sweep_have_names_of_their_own():
    """A folder a run: no two runs share one, or the second would be taken for finished."""
    names = [r.name for r in results.possible()]
    assert len(names) == len(set(names))
    assert all(Path(name).name == name for name in names)
