"""tools.figures: the pictures of RESULTS.md, those of one run, and what they are made of."""

import json
import sys

import numpy as np
import pytest
from test_report import put, result

from tools import figures, report

pytest.importorskip("matplotlib")
BINS = {key: [1, 0.5, 0] * 5 for key in ("count", "confidence", "accuracy")}


def test_pictures_of_results_are_the_same_bytes_every_time(tmp_path):
    many = {"counts": list(range(1, 61)), "per_class": [0.5] * 60}
    plain = {"dataset": "cifar100_lt_ir100", "tables": []}
    for name, more in (("kcl", {}), ("tsc", many), ("tsc_k2", {"reliability": BINS})):
        paths = put(tmp_path, *(result(seed, variant=name, **plain, **more) for seed in (0, 1)))
    row = {"stage": "kcl", "epoch": 0, "loss": 0.5}
    paths[0].with_name("metrics.jsonl").write_text(json.dumps(row) + "\n")
    put(tmp_path, result(0))
    c100 = "tsc.py --dataset cifar100_lt"
    (tmp_path / "cells").write_text(f"""
        claim KCL, few: it | {c100} --method kcl | 0,1
        claim KCL, few: TSC | {c100} | 0,1
        claim alone: KCL | {c100} --method kcl | 0,1
        league, all: KCL | {c100} --method kcl | 0,1
        league, all: TSC | {c100} | 0,1
        league, all: two | {c100} --k 2 | 0,1""")
    drawn = []
    for out in (tmp_path / "a", tmp_path / "b"):
        words = [str(tmp_path), "--out", str(out), "--cells", str(tmp_path / "cells")]
        assert report.main(["figures", *words]) == 0
        drawn.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert drawn[0] == drawn[1] and all(data.startswith(b"\x89PNG") for data in drawn[0].values())
    assert sorted(drawn[0]) == [
        "claim-KCL-cifar100_lt_ir100.png",
        "league-all-cifar100_lt_ir100-reliability.png",
        "league-all-cifar100_lt_ir100.png",
        "tsc-cifar100_lt_ir100-learning.png",
        "tsc-cifar10_lt_ir100-kcl-class.png",
    ]


def test_without_matplotlib_figures_stop_and_tables_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "runs", result(0))
    (tmp_path / "cells").touch()
    assert report.main(["figures", "runs", "--cells", "cells"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install matplotlib" in error
    assert report.main(["tables", "runs", "--cells", "cells"]) == 0
    assert report.main(["run", "cells"]) == 0 and "no figures" in capsys.readouterr().out


def test_pictures_of_a_run_go_into_its_folder(tmp_path, capsys):
    names = ["$a^_%", "caf\udce9", "new\nline"]  # that of a folder need not be text
    (path,) = put(tmp_path / "runs", result(0, reliability=BINS, classes=names))
    row = {"stage": "train", "epoch": 0, "loss": 0.0, "test": {"overall": 0.5}}
    path.with_name("metrics.jsonl").write_text(json.dumps(row) + "\n")
    features = np.random.RandomState(0).randn(60, 5).astype(np.float32)
    np.savez(
        path.with_name("features_test.npz"), features=features, labels=np.repeat([0, 1, 2], 20)
    )
    assert figures.main([str(tmp_path / "runs")]) == 0
    stems = {picture.stem for picture in path.parent.glob("*.png")}
    assert stems == {"A-B", "confusion", "features_test", "learning", "recall", "reliability"}
    assert capsys.readouterr().out.count("wrote ") == 6
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text("{}")
    for name, words in (("nothing", "no result.json"), ("bad", "not one of ours")):
        assert figures.main([str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_principal_plane_is_that_of_an_svd():
    x = np.random.RandomState(0).randn(50, 6)
    left, scale, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    ours, expected = figures.principal_plane(x), left[:, :2] * scale[:2]
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-10)
