"""tools.report and tools.results: tables, recorded runs, two runs, weights, published figures."""

import csv
import json
import re
from pathlib import Path

import commands
import pytest
import torch

import common
from tools import cells, figures, report, results

ROOT = commands.ROOT
RUN_ALL = ROOT / "run_all.sh"


# --- tables ---------------------------------------------------------------------------------------


def result(seed: int, values=((10.0, 20.0), (30.0, 40.0)), **more) -> dict:
    """A result with one table of two columns and the rows `R (tail)` and `few`."""
    rows = [
        {"name": name, "values": row} for name, row in zip(("R (tail)", "few"), values, strict=True)
    ]
    plot = {"x": [100, 5000], "xlabel": "images", "ylabel": "recall (%)", "rows": ["R (tail)"]}
    table = {"title": "A | B", "note": "a note", "row_header": "class", "columns": [100, 5000]}
    head = {"overall": (70 + seed) / 100, "many": 0.9, "medium": 0.5, "few": None}
    return {
        "script": "tsc",
        "dataset": "cifar10_lt_ir100",
        "variant": "kcl",
        "method": "kcl",
        "seed": seed,
        "args": {"select": "last"},
        "changed": {},
        "headline": head | {"ece": 0.1, "macro_f1": 0.6},
        "best_on_test": {"overall": 0.75, "epoch": 180 + seed},
        "per_class": [0.9, 0.5, None],
        "counts": [500, 50, 5],
        "confusion": [[9, 1, 0], [5, 5, 0], [0, 0, 0]],
        "image_passes": 12345,
        "epochs": 200,
        "parameters": 7,
        "tables": [table | {"rows": rows, "plot": plot}],
        "machine": {"device": "toaster", "threads": 1},
        "timing": {"seconds": 100.0 + seed},
    } | more


def put(folder: Path, *made: dict) -> list[Path]:
    """Write results where runs leave them."""
    paths = []
    for one in made:
        place = folder / one["script"] / one["dataset"] / one["variant"] / f"seed{one['seed']}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "result.json").write_text(json.dumps(one))
        paths.append(place / "result.json")
    return paths


def make_tables(*places: Path, lines: str = "") -> str:
    folder = places[0] if places[0].is_dir() else places[0].parent
    (folder / "cells").write_text(lines)
    words = ["tables", *map(str, places), "--out", str(folder / "R.md")]
    assert report.main([*words, "--cells", str(folder / "cells")]) == 0
    return (folder / "R.md").read_text()


def test_headline_and_tables_are_averaged_over_seeds(tmp_path):
    some, fewer = ((14.0, None), (30.0, None)), ((18.0, 30.0), (30.0, None))
    other = result(3, script="fsgl")
    other["tables"][0] |= {"columns": [100, 600]}
    put(tmp_path, result(0), result(1, some), result(2, fewer), other, other | {"script": "toy"})
    text = make_tables(tmp_path)
    assert (
        "| cifar10_lt_ir100: --method kcl | 71.0 ± 1.0 (3 seeds) | - | - | 90.0 ± 0.0 | 50.0 ± 0.0 "
        "| n/a | 60.0 ± 0.0 | 10.0 ± 0.0 | 75.0 ± 0.0 (epoch 180, 181, 182) | 200 | 12,345 "
        "| 101 ± 1 |\n"
    ) in text
    title = "### A | B: cifar10_lt_ir100, --method kcl\n\na note; 3 seeds (0, 1, 2).\n"
    rows = (
        "| R (tail) | 14.0 ± 4.0 | 25.0 ± 7.1 (2 seeds) |\n| few | 30.0 ± 0.0 | 40.0 (1 seed) |\n"
    )
    assert f"{title}\n| class | 100 | 5000 |\n| --- | ---: | ---: |\n{rows}" in text
    assert text.count("### A | B") == 3 and "| class | 100 | 600 |" in text, "runs stay apart"
    assert "Measured on: device toaster, threads 1." in text


def test_missing_is_a_dash_and_an_empty_group_is_na(tmp_path):
    assert "No finished run yet" in make_tables(tmp_path)
    empty = ((float("nan"), 1.0), (None, float("inf")))
    plain = {"plain": {"overall": 0.25, "many": 0.5}, "headline": {"overall": 0.5, "many": None}}
    none = {"headline": None, "tables": [], "epochs": None, "timing": {}, "machine": None}
    put(tmp_path, result(0, empty, best_on_test=None, **plain), result(0, variant="none", **none))
    text = make_tables(tmp_path)
    for row in (
        "kcl | 50.0 (1 seed) | - | - | n/a | - | - | - | - | - | 200 |",
        "| - | - | - | - | - | - | - | - | 75.0 (epoch 180) | - | 12,345 | - |",
        "| R (tail) | - | 1.0 |\n| few | n/a | n/a |",
        "| plain | 25.0 | 50.0 | n/a | n/a | - |",  # a head beside the headline
    ):
        assert row in text


def test_a_foreign_result_is_named_and_the_others_are_used(tmp_path, capsys):
    put(tmp_path, result(0))
    wrong = json.dumps(result(0) | {"seed": None})
    for k, text in enumerate(["{", "[]", "null", '{"hello": 1}', "[" * 100_000, wrong]):
        (tmp_path / f"other{k}").mkdir()
        (tmp_path / f"other{k}" / "result.json").write_text(text)
    assert "70.0 (1 seed)" in make_tables(tmp_path)
    for k, line in enumerate(capsys.readouterr().err.splitlines(keepends=True)):
        assert line.startswith(f"skipped {tmp_path / f'other{k}' / 'result.json'}")
    assert k == 5 and line.endswith("\n")


def test_recorded_runs_are_read_as_live_ones(tmp_path, capsys):
    live, recorded = tmp_path / "live", tmp_path / "runs.jsonl"
    moved = result(1, changed={"init_from": "/home/me/a.pt"})
    paths = put(live, result(0), moved, result(0, dataset="glyphs_lt_ir100"))
    row = {"stage": "train", "epoch": 0, "loss": 1.23456789, "test": {"overall": 0.5}}
    for path in paths:
        path.with_name("metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert report.main(["add", str(live), "--out", str(recorded)]) == 0
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    names = [(line["dataset"][:6], line["seed"]) for line in lines]
    assert names == [("cifar1", 0), ("cifar1", 1), ("glyphs", 0)]
    curve = {"train": {"accuracy": [0.5, 0.5], "loss": [1.23457, 1.23457]}}
    assert lines[0]["curve"] == curve and "curve" not in lines[2] and "confusion" not in lines[0]
    assert lines[1]["changed"] == {"init_from": "a.pt"}, "not where a file lay"
    assert make_tables(live) == make_tables(recorded)
    text = make_tables(live, recorded)
    assert "read already" in capsys.readouterr().err and "70.5 ± 0.7 (2 seeds)" in text
    put(live, result(1, headline={"overall": 0.9}))
    assert report.main(["add", str(live), "--out", str(recorded)]) == 0, "replaced, not doubled"
    assert len(recorded.read_text().splitlines()) == 3
    assert "80.0 ± 14.1 (2 seeds)" in make_tables(recorded)


def test_the_recorded_tables_are_made_of_the_recorded_runs(tmp_path, monkeypatch):
    for name in ("figures", "NOTES.md"):
        (tmp_path / name).symlink_to(ROOT / "results" / name)
    out = tmp_path / "RESULTS.md"
    assert report.main(["tables", str(results.RECORDED), "--out", str(out)]) == 0
    assert out.read_text() == (ROOT / "results" / "RESULTS.md").read_text()
    recorded = results.read_results([results.RECORDED])
    every = cells.read_cells(cells.read_lines(RUN_ALL), 9)
    short = {results.name_of(run) for run in recorded} - {cell.name for cell in every}
    assert all("epochs" in variant or "points" in variant for *_, variant in short), short
    pytest.importorskip("matplotlib")
    close = lambda figure, path: figures.pyplot().close(figure) or path  # noqa: E731
    monkeypatch.setattr(figures, "save_figure", close)
    written = {path.name for path in figures.write_figures(recorded, every, tmp_path / "none")}
    assert written == {path.name for path in (ROOT / "results" / "figures").iterdir()}
    assert len(written) < 25


# --- compare, export, weights ---------------------------------------------------------------------


def test_two_runs_are_compared_seed_by_seed(tmp_path, capsys):
    def run(folder: str, seeds: dict, variant: str) -> str:
        for seed, overall in seeds.items():
            head = {"overall": overall, "few": None}
            put(tmp_path / folder, result(seed, variant=variant, headline=head))
        return str(tmp_path / folder)

    a, b = run("a", {0: 0.5, 1: 0.6, 2: 0.7}, "kcl"), run("b", {0: 0.52, 1: 0.61, 3: 0.9}, "tsc")
    assert report.main(["compare", a, b]) == 0
    text = capsys.readouterr().out
    assert (
        "| overall | 55.0 ± 7.1 | 56.5 ± 6.4 | +1.50 | 0.50 |" in text and "| mean_class |" in text
    )
    assert "| few | - | - | - | - |" in text and "| image passes | 12,345 | 12,345 |" in text
    assert "seeds 0, 1\n" in text and "note: A has seed(s) 2 alone" in text
    run("b", {0: 0.4}, "kcl")
    run("c", {7: 0.4}, "kcl")
    (tmp_path / "d").mkdir()
    wrong = {"b": "holds 2 runs", "c": "no seed in common: 0, 1, 2", "d": "holds 0 runs"}
    for other, words in (wrong | {"e": "neither a folder"}).items():
        assert report.main(["compare", a, str(tmp_path / other)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_a_run_is_exported_in_half_precision(tmp_path, capsys):
    """test_readme.py evaluates such a file."""
    data, moved, out = tmp_path / "letters.npz", tmp_path / "moved.npz", tmp_path / "ce.pt"
    flags = ["--method", "ce", "--backbone", "resnet8", "--epochs", "1", "--seed", "3"]
    flags += ["--dataset", commands.tiny_letters(data)]
    commands.run("fsgl.py", *flags, out=tmp_path)
    folder = commands.folder(tmp_path)
    data.rename(moved)
    assert report.main(["export", str(folder), "--out", str(out)]) == 2 and not out.exists()
    assert "letters.npz" in capsys.readouterr().err
    assert report.main(["export", str(folder), "--out", str(out), "--dataset", str(moved)]) == 0
    saved = common.load_checkpoint(out)
    kinds = {value.dtype for value in saved["state"]["model"].values()}
    assert kinds == {torch.float16, torch.int64} and list(saved["state"]) == ["model"]
    exported, command = saved["exported"], ["fsgl.py", *flags, "--dataset", str(moved)]
    assert (
        exported["full"] == json.loads((folder / "result.json").read_text())["headline"]["overall"]
    )
    assert abs(exported["half"] - exported["full"]) <= 0.02 and exported["command"] == command
    assert capsys.readouterr().out.splitlines()[-1].split()[1:] == [*command, "--eval", str(out)]
    for run, file in (folder, out), (tmp_path, tmp_path / "x.pt"):
        assert report.main(["export", str(run), "--out", str(file)]) == 2
    said = capsys.readouterr().err
    assert "exists" in said and "is no folder of a finished run" in said
    assert not (tmp_path / "x.pt").exists()


def test_recorded_weights_give_their_figure_again(pytestconfig, real_data_root, tmp_path):
    """To a tenth of a point: other kernels may decide otherwise on a few images."""
    files = sorted((ROOT / "results" / "weights").glob("*.pt"))
    assert {path.name.split("-")[0] for path in files} == {"cifar10", "letters"}
    for path in files:
        assert path.stat().st_size < 1e6
        exported = common.load_checkpoint(path)["exported"]
        assert exported["half"] == pytest.approx(exported["full"], abs=2e-3), path
        if path == files[0] or pytestconfig.getoption("--slow"):
            words = [*exported["command"], "--eval", path, "--data-root", real_data_root]
            said = commands.run(*words, out=tmp_path, timeout=900).stdout
            found = float(re.search(r"overall (\d+\.\d+)", said)[1])
            assert found / 100 == pytest.approx(exported["half"], abs=1e-3), path


# --- published figures ----------------------------------------------------------------------------

SETS = {"C10": "cifar10_lt", "C100": "cifar100_lt", "IMAGENET": "imagenet_lt"}
PUBLISHED = """
    89.3    -  fsgl C10 --precision fp32 --gpus 2
    92.2    -  fsgl C10 --imb-ratio 50 --fcc 0.5
    87.8 88.5  fsgl C10 --method glmc
       -    -  fsgl glyphs_lt
       -    -  fsgl C10 --imb-ratio 10
       -    -  fsgl C10 --epochs 3
    76.4    -  bns_ipdpp C10
    68.2    -  bns_ipdpp C10 --method bns
       -    -  bns_ipdpp C10 --imb-ratio 20
    73.8    -  ssp_pretrain C10 --eval-every 5
    71.3 70.4  ssp_pretrain C10 --ssp none
    43.4    -  ssp_pretrain C100 --loss ldam --rule drw
    76.2    -  ssp_pretrain C10 --backbone resnet110 --imb-ratio 20 --loss ldam --ssp none
    45.6    -  ssp_pretrain IMAGENET
    51.3    -  ssp_pretrain IMAGENET --stages pretrain,train,classifier
    65.9    -  ssp_pretrain inat18 --rule resample
       -    -  ssp_pretrain C10 --ssp moco
    81.6    -  SEMI a.npz
    80.1    -  SEMI a.npz --imb-ratio-unlabeled 100
       -    -  SEMI leftover
    79.7    -  tsc C10
    77.6    -  tsc C10 --method kcl
    79.5    -  tsc C10 --target-weight 0.5
    77.5    -  tsc C10 --projection-dim 3
    51.3    -  tsc IMAGENET --warmup 0
    52.3    -  tsc IMAGENET --epochs 200
    51.5 51.4  tsc IMAGENET --method kcl --epochs 200
    46.6    -  tailcalibx C100 --method cbd_tailcalibx --seed 3
       -    -  tailcalibx C100
    44.7    -  tailcalibx mini_imagenet_lt
"""
SEMI = "ssp_pretrain C10 --ssp none --imb-ratio 50 --stages train,pseudo,semi --unlabeled"
ROWS = {  # of tables
    "toy_similarity C10 --method sweep2 --points 5000,100": {
        "truck (tail)": [94.2, 43.7],
        "rank-1": [92.6, 89.3],
    },
    "toy_similarity C10": {"truck (tail)": [32.8, 19.8]},
    "ssp_pretrain C10": {"rotation accuracy, test set (%)": [83.8]},
    "toy_similarity C10 --method control": {},
    "toy_similarity glyphs_lt": {},
}


def run_of(line: str, dataset: str) -> dict:
    """The result of a run of this command line, with tables beside which figures are published."""
    script, name, *words = line.replace("SEMI", SEMI).split()
    words += ["--dataset", SETS.get(name, name), "--data-root", "x"]
    args = commands.parse(script, words)
    columns = {"p": [0, 0.5], "images of the tail": [5000, 100], "": ["last epoch"]}
    names = "truck (tail)", "rank-1", "rotation accuracy, test set (%)"
    tables = []
    for head, own in columns.items():
        rows = [{"name": row, "values": [1.0] * len(own)} for row in names]
        tables.append({"title": "T", "row_header": head, "columns": own, "rows": rows})
    more = {"args": common.result_args(args), "changed": args.changed, "method": args.method}
    return result(0, script=script, dataset=dataset, tables=tables, **more)


def test_published_figures_stand_only_beside_the_published_settings(tmp_path):
    told = [line.split(maxsplit=2) for line in PUBLISHED.strip().splitlines()]
    lines = [*(line for *_, line in told), *ROWS]
    put(tmp_path, *(run_of(line, f"set{k:02}") for k, line in enumerate(lines)))
    text = make_tables(tmp_path)
    found = dict(
        re.findall(r"^\| set(\d+): .*? \| 70.0 \(1 seed\) \| (\S+ \| \S+) \|", text, re.MULTILINE)
    )
    shown = [[*found[f"{k:02}"].split(" | "), line] for k, line in enumerate(lines)]
    assert shown[: len(told)] == told
    for k, line in enumerate(ROWS, len(told)):
        own = "".join(part for part in text.split("### T") if part.startswith(f": set{k:02}, "))
        rows = dict(re.findall(r"^\| (.*), paper \| (.*) \|", own, re.MULTILINE))
        assert {name: [*map(float, row.split(" | "))] for name, row in rows.items()} == ROWS[
            line
        ], line
    assert "Column paper: supplement, table 10; epoch: unknown" in text


def test_every_published_figure_has_a_source_and_an_epoch_rule():
    with open(ROOT / "results" / "published.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 700 and all(row["source"] for row in rows)
    assert {row["epoch_rule"] for row in rows} == {"best on test", "best on validation", "unknown"}
    assert all(0 <= float(row["value"]) <= 100 for row in rows if row["metric"] != "reasonability")
    key = ("script", "dataset", "ratio", "method", "flags", "metric", "source")
    assert len({tuple(row[name] for name in key) for row in rows}) == len(rows)
    scripts = "toy_similarity ssp_pretrain tsc bns_ipdpp fsgl tailcalibx".split()
    assert {row["script"] for row in rows} == {*scripts, "toys"}
    shots = {}
    for row in rows:  # a figure's groups recombine to its overall: 5, 2 and 3 classes of CIFAR-10
        if row["source"].startswith("Figure 1a"):
            shots.setdefault(row["method"], {})[row["metric"]] = float(row["value"])
    assert len(shots) == 4
    for own in shots.values():
        whole = (5 * own["many"] + 2 * own["medium"] + 3 * own["few"]) / 10
        assert own["overall"] == pytest.approx(whole, abs=0.1)
