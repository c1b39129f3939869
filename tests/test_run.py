"""The run folder's promises, each broken on purpose.

Continuing equals not having stopped, checkpoints survive what happens to disks and processes, bad
input is one line.
"""

import errno
import os
import pickle
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import common
import models
import tsc
from tools import prepare, report

# --- a tiny run in this process -------------------------------------------------------------------


class FakeLoader:
    """Six batches of eight rows; a function of (epoch, step) like the real loader."""

    global_batch = 8

    def __len__(self):
        return 6

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for step in range(6):
            draw = common.generator(5, "batch", self.epoch, step)
            x = torch.randn(8, 4, generator=draw, dtype=torch.float64)
            yield x, (x.sum(1) > 0).long(), torch.arange(8)


def make_args(out, **extra):
    words = ["--out", str(out), "--quiet", "--logger", "none", "--device", "cpu"]
    table = (("backbone", "resnet8", "network"), ("lr", 0.1, "rate"))
    args = common.parse("A test.", table, {"fit": ("fit",)}, {}, lambda *_: 16, words)
    vars(args).update({"precision": "fp32"} | extra)
    return args


class Opened:
    """A run whose lock is left at the end, as at that of a process."""

    def __init__(self, out, data="data", **extra):
        self.run = common.Run(make_args(out, **extra), "unit", data)

    def __enter__(self):
        return self.run

    def __exit__(self, *_):
        self.run.lock.close()


def train(out, stop_at=None, epochs=3, **options) -> Path:
    """Train a linear layer; `stop_at` = (epoch, step) raises there as a crash would. The folder."""
    with Opened(out, **options) as run:
        layers = torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
        model = torch.nn.Sequential(*layers).double()
        optimizer = common.sgd(model.parameters(), 0.1)
        stage = run.stage("fit", epochs, model=model, optimizer=optimizer)
        for epoch in stage.epochs():
            for x, y, _ in stage.batches(FakeLoader()):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                if stop_at == (epoch, stage.step):
                    raise KeyboardInterrupt
                stage.guard(loss)
                optimizer.step()
                stage.add(len(y), loss=loss)
            stage.end_epoch()
        run.finish(headline={"overall": 0.5})
        return run.folder


FULL = r"cannot write .*seed0.*: the disk is full \([\d,.]+ MB free\).*intact"
FAULTS = {
    "crash": (KeyboardInterrupt, KeyboardInterrupt, None),
    "full disk": (lambda: OSError(errno.ENOSPC, "No space left"), common.RunError, FULL),
}


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize(("fault", "kind", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_at_any_moment_of_a_save_costs_nothing(tmp_path, name, fault, kind, said):
    """Of args.json, metrics.jsonl and last.pt of each epoch, fit.pt, result.json."""
    train(tmp_path / "straight", epochs=2)
    expected, real = commands.rows(tmp_path / "straight"), getattr(os, name)
    for nth in range(1, 8):
        out, calls = tmp_path / str(nth), []

        def broken(*args, nth=nth, calls=calls):
            calls.append(args)
            if len(calls) == nth:
                raise fault()
            return real(*args)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(kind, match=said):
            patch.setattr(os, name, broken)
            train(out, epochs=2)
        (folder,) = out.glob("*/*/*/seed0")
        assert not list(folder.glob(".*.tmp"))
        if nth > 3:  # the third write is the first last.pt
            assert common.load_checkpoint(folder / "last.pt")["epoch"] == (1 if nth < 7 else 2)
        assert train(out, epochs=2) == folder and commands.rows(out) == expected


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"kind": "long-tail-run", "state": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "c.pt").write_bytes(os.urandom(3000))
    torch.save({"kind": "other"}, tmp_path / "d.pt")
    for name in "abcd":
        with pytest.raises(common.UserError, match="checkpoint"):
            common.load_checkpoint(tmp_path / f"{name}.pt")
    assert not (tmp_path / "owned").exists()


HERE = "images:1a labels:2b classes:3c"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.2}, "--lr 0.1, this has 0.2"),
        ({"backbone": "other"}, "--backbone"),
        ({"precision": "bf16"}, "--precision"),
        (
            {"data": "images:1a labels:2b classes:ff"},
            "other classes than --dataset .*moved/mine.npz",
        ),
        ({"data": "images:00 labels:ff classes:3c"}, "other images and labels than"),
        ({"data": "0123abcd"}, "other images than"),  # of a checkpoint from before there were names
    ],
)
def test_a_moved_set_is_the_same_and_other_arguments_or_content_are_refused_by_name(
    tmp_path, change, said
):
    first = {"data": HERE, "dataset": str(tmp_path / "mine.npz")}
    moved = first | {"dataset": str(tmp_path / "moved" / "mine.npz")}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=(2, 3), **first)
    with pytest.raises(common.UserError, match=said):
        train(tmp_path, **moved | change)
    train(tmp_path, **moved)
    assert len(commands.rows(tmp_path)) == 3
    with pytest.raises(common.UserError, match=said):
        Opened(tmp_path, **moved | change)


def test_a_finished_run_from_another_checkpoint_of_that_name_is_not_shown(tmp_path, capsys):
    start = tmp_path / "kcl.pt"
    start.write_bytes(b"same")
    options = {"init_from": str(start), "changed": {"init_from": str(start)}}
    train(tmp_path, **options)
    start.write_bytes(b"trained once more")
    common.file_identity.cache_clear()  # as in another process
    with pytest.raises(common.UserError, match="--init-from kcl-.*this has kcl-"):
        Opened(tmp_path, **options)
    start.unlink()
    for name in ("init_from", "eval"):
        args = make_args(tmp_path, **{name: str(start)})
        assert "kcl.pt does not exist" in commands.refused(capsys, common.launch, pytest.fail, args)


def test_a_backbone_comes_from_torchvision_or_another_data_set(tmp_path):
    def load(net, path, dataset="glyphs_lt", **more):
        return common.load_backbone(net, path, make_args(tmp_path, dataset=dataset), **more)

    theirs, path = torchvision.models.resnet18().state_dict(), tmp_path / "theirs.pth"
    bare = {key: value for key, value in theirs.items() if not key.startswith("fc.")}
    old = {key: value for key, value in theirs.items() if "batches_tracked" not in key}
    for state in (theirs, old, bare):
        torch.save(state, path)
        net = models.backbone("resnet18", stem="imagenet")
        found = load(net, path)["state"]["model"]
        assert found.keys() == {f"backbone.{key}" for key in net.state_dict()}
        assert all(torch.equal(value, found[f"backbone.{key}"]) for key, value in bare.items())
    with pytest.raises(common.UserError, match="conv1.weight: .*7, 7.*3, 3"):
        load(models.backbone("resnet18"), path)
    bare.pop("layer1.0.conv1.weight")
    torch.save(bare, path)
    with pytest.raises(common.UserError, match="Missing.*layer1.0.conv1.weight"):
        load(net, path)

    net = models.Net(models.backbone("resnet8"), models.linear_head(64, 10))
    with Opened(tmp_path, dataset="cifar10_lt") as run:
        stage = run.stage("fit", 1, model=net)
        for _ in stage.epochs():
            stage.end_epoch()
    path, other = run.folder / "fit.pt", models.backbone("resnet8")
    assert load(other, path)["stage"] == "fit"
    assert torch.equal(other.conv1.weight, net.backbone.conv1.weight)
    with pytest.raises(common.UserError, match="layer1.1.conv1.weight"):
        load(models.backbone("resnet14"), path)
    with pytest.raises(common.UserError, match="other images than"):
        load(other, path, dataset="cifar10_lt", data="of another subset")


def cosines(tmp_path, pairs: list[tuple[float, float]], capsys) -> list[str]:
    """The warnings of a stage whose epochs have these mean cosines; begun again in the middle."""
    for stop in (len(pairs) // 2, len(pairs)):
        with Opened(tmp_path) as run:
            stage = run.stage("kcl", len(pairs))
            for epoch in stage.epochs():
                same, other = map(torch.tensor, pairs[epoch])
                stage.add(8, same_label=same, other_label=other)
                stage.end_epoch()
                if epoch + 1 == stop:
                    break
    return capsys.readouterr().err.splitlines()


def test_a_collapse_is_told_once_with_its_epoch(tmp_path, capsys):
    fine = [(0.97, 0.9699)] * 4 + [(0.95, 0.94), (0.9, 0.7), (0.9, 0.5), (0.9, 0.4)]
    assert cosines(tmp_path / "a", fine, capsys) == []
    (said,) = cosines(tmp_path / "b", [(0.9, 0.5), (1.0, 0.9995), (1.0, 1.0), (1.0, 1.0)], capsys)
    assert "stage kcl, epoch 2 of 4: all embeddings have collapsed" in said
    (said,) = cosines(tmp_path / "c", [(0.9, 0.9)] * 12, capsys)
    assert "epoch 6 of 12: images of one label are no closer" in said and "0.9000" in said


def test_what_a_finished_run_loses_is_made_again_and_what_is_damaged_named(tmp_path, recwarn):
    folder = train(tmp_path)
    expected, result = commands.rows(tmp_path), commands.result(tmp_path)
    (folder / "last.pt").write_bytes(b"damaged")
    with Opened(tmp_path) as run:
        assert run.result["headline"] == {"overall": 0.5}, "nothing else is looked at"
    (folder / "last.pt").unlink()
    (folder / "result.json").write_text('{"headline": ')
    train(tmp_path)
    assert commands.rows(tmp_path) == expected and commands.result(tmp_path) == result
    (folder / "result.json").unlink()
    (folder / "fit.pt").write_bytes(b"\x80damaged")  # of which torch itself warns
    with pytest.raises(common.UserError, match="fit.pt is damaged.*delete it"):
        train(tmp_path)
    assert not list(recwarn), "one line"
    (folder / "fit.pt").unlink()
    train(tmp_path)
    assert commands.rows(tmp_path) == expected and commands.result(tmp_path) == result


def test_a_warning_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(common.warnings, "formatwarning", None)
    common.launch(lambda args: None, make_args(tmp_path))
    assert common.warnings.formatwarning("odd", UserWarning, "here.py", 7) == "warning: odd\n"


def test_fresh_starts_over_and_drops_what_was_there(tmp_path):
    folder = train(tmp_path)
    with Opened(tmp_path, fresh=True) as run:
        assert run.result is None and run.saved is None and not list(folder.glob("*.pt"))


@pytest.mark.parametrize("module", [True, False])
def test_without_locks_a_run_goes_on_with_one_warning(tmp_path, monkeypatch, capsys, module):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    if module:
        monkeypatch.setattr("fcntl.flock", refuse)
    else:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    train(tmp_path)
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize(("select", "best"), [("last", 3), ("test", 2), ("val", 3)])
def test_the_judge_evaluates_every_third_epoch_and_the_last_and_chooses_as_told(
    tmp_path, monkeypatch, select, best
):
    """Figures are told in advance; the weight is the epoch."""
    net, val = torch.nn.Linear(1, 1), "val" if select == "val" else None
    figures = {"per_class": [0.5] * 201, "confusion": []}
    test, mean_class = [0.9, 0.9, 0.8, 0.5], [0.9, 0.9, 0.3, 0.4]
    told = {"overall": lambda: test[stage.epoch], "mean_class": lambda: mean_class[stage.epoch]}
    monkeypatch.setattr(
        common, "figures", lambda *_: figures | {key: f() for key, f in told.items()}
    )
    with Opened(tmp_path, select=select, eval_every=3) as run:
        stage = run.stage("fit", 4, model=net)
        judge = common.Judge(run.args, net, [1], "test", val, {"plain": net})
        for epoch in stage.epochs():
            net.weight.data.fill_(epoch)
            stage.end_epoch(judge)
    judge.chosen(stage)
    lines = commands.rows(tmp_path)
    assert net.weight.item() == best
    assert ["test" in line for line in lines] == [False, False, True, True]
    assert ["val" in line for line in lines] == [False, False] + [select == "val"] * 2
    for line in lines[2:]:
        assert not {"confusion", "per_class"} & {*line["test"], *line["plain"]}
    assert (run.folder / "fit_best.pt").exists() == (select != "last")


def test_seeds_are_stable_and_distinct():
    keys = [(s, name, e, b) for s in range(3) for name in "ab" for e in range(4) for b in range(4)]
    assert len({common.derive_seed(*key) for key in keys}) == len(keys)
    assert common.derive_seed(3, "x") == common.derive_seed(np.int64(3), "x")
    assert common.derive_seed(0, "x") == 7329383403727699100


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("quiet", [True, False])
def test_progress_is_a_bar_on_a_terminal_a_line_an_epoch_elsewhere_nothing_if_quiet(
    tmp_path, capsys, monkeypatch, terminal, quiet
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    train(tmp_path, quiet=quiet)
    printed = capsys.readouterr().out
    assert ("[" in printed and "\r" in printed) == (terminal and not quiet)
    *lines, headline, result = printed.replace("\r", "\n").splitlines()
    assert headline.startswith("overall 50.0 %") and result.startswith("result: ")
    lines = [line for line in lines if "images/s" in line and "[" not in line]
    assert len(lines) == (0 if quiet else 3)
    assert all("s left" in line and "loss" in line for line in lines)


# --- command lines --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--dataset cifar11", "cifar11"),
        ("--dataset cifar10_lt --data-root nowhere", "cifar-10-batches-py"),
        ("--imb-ratio 100000", "with 0 of its"),
        ("--gpus 4 --device auto", "GPU"),
        ("--device tpu", "tpu"),
        ("--out /proc/nothing", "/proc/nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, line, said):
    def start():
        monkeypatch.chdir(tmp_path)
        words = ["--device", "cpu", "--logger", "none", *line.split()]
        common.launch(tsc.main, commands.parse("tsc", words))

    told = commands.refused(capsys, start)
    assert "error: " in told and said in told


def test_ranks_without_an_address_or_number_are_one_line(tmp_path, monkeypatch, capsys):
    args = make_args(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    for rank, named, call in (
        ("0", "MASTER_ADDR", lambda: common.launch(lambda args: None, args)),
        ("1", "no rank of so many", lambda: common.launch(lambda args: None, args)),
        ("x", "'x'", lambda: common.launch(lambda args: None, args)),
        (
            "x",
            "--epoch",
            lambda: common.parse("A test.", (), {"fit": ("fit",)}, {}, None, ["--epoch", "3"]),
        ),
    ):
        monkeypatch.setenv("RANK", rank)
        assert named in commands.refused(capsys, call)


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)
def test_auto_takes_bf16_where_the_gpu_has_it(monkeypatch, capability, chosen):
    here = {"is_available": True, "device_count": 1, "set_device": None}
    for name, value in (here | {"get_device_capability": capability}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    args = Namespace(device="auto", gpus=1, precision="auto")
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    common._choose_device(args, False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
    assert (args.device, args.precision) == ("cuda:0", chosen)


def shell(line: str, *codes: int) -> str:
    """What a shell line prints whose terminal knows ASCII; nothing on stderr."""
    env = commands.environment() | {"PYTHONIOENCODING": "ascii"}
    words = ["bash", "-c", f"set -o pipefail; {line}"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode in codes and not done.stderr, done
    return done.stdout


def test_a_closed_pipe_a_plain_terminal_and_no_stdout_end_without_a_traceback(tmp_path):
    dataset = commands.tiny_letters(tmp_path / "tiny.npz", [3] * 10, [2] * 10)
    short = "--epochs 1 --batch-size 10 --classifier-epochs 1 --classifier-batch-size 10".split()
    start = commands.command("tsc.py", "--method", "kcl", "--dataset", dataset, *short)
    run = f"{shlex.join(start)} --out {tmp_path}/"
    assert shell(f"{run}ö --help | head -1", 0, 141).count("\n") == 1
    assert shell(f"{run}ö | head -1", 141).count("\n") == 1
    assert "\\xf6" in shell(f"{run}ö", 0)
    assert shell(f"{run}none >&-", 0) == ""
    tool = f"cd {tmp_path} && {sys.executable} -m tools"
    for words in ("toys theory", "geometry targets --classes 9 --dim 16"):
        assert shell(f"{tool}.{words} | true", 141) == ""


def test_a_home_in_a_path_is_the_home(tmp_path, monkeypatch):
    """Quoted, or after an equals sign, the shell leaves `~` to the program."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--out=~/a", "--data-root=~/b", "--dataset=~/c", "--eval=~/d.pt"]
    args = common.parse("A test.", (), {"fit": ("fit",)}, {}, lambda *rest: 32, words)
    said = [args.out, args.data_root, args.dataset, args.eval]
    assert said == [f"{tmp_path}/{name}" for name in ("a", "b", "c", "d.pt")]
    args = prepare.make_parser().parse_args(
        ["export", "--dataset=~/a", "--data-root=~/b", "--out=~/c"]
    )
    assert [args.dataset, args.data_root] == said[:2] and args.out == tmp_path / "c"
    args = report.make_parser().parse_args(["export", "~/run", "--out=~/x.pt"])
    assert (args.run, args.out) == (tmp_path / "run", tmp_path / "x.pt")
