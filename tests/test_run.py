"""The run folder's promises, each broken on purpose.

Continuing equals not having stopped, checkpoints survive what happens to disks and processes, bad
input is one line.
"""

import errno
import json
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
from tools import prepare, report

ROOT = Path(common.__file__).resolve().parent
SMALL = (
    "--method kcl --epochs 2 --batch-size 20 --projection-dim 8 --classifier-epochs 2"
    " --classifier-batch-size 20 --device cpu --logger none"
).split()
TINY = []


@pytest.fixture(scope="module", autouse=True)
def tiny_set(tmp_path_factory):
    """Twenty letters of each kind to train on and ten to test: a whole run takes seconds."""
    TINY.append(commands.tiny_letters(tmp_path_factory.mktemp("tiny") / "tiny.npz"))


def command(*flags, out, base=SMALL):
    dataset = [] if "--dataset" in flags else ["--dataset", TINY[0]]
    return [sys.executable, str(ROOT / "tsc.py"), *base, *dataset, "--out", str(out), *flags]


def call(*flags, out, base=SMALL, **options):
    options |= {"capture_output": True, "text": True, "env": commands.environment(), "timeout": 300}
    return subprocess.run(command(*flags, out=out, base=base), **options)


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what is clocked."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


# --- a tiny run in this process -------------------------------------------------------------------


class FakeLoader:
    """Six batches of eight rows; a function of (epoch, step) like the real loader."""

    def __init__(self, steps=6):
        self.steps, self.global_batch = steps, 8

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for step in range(self.steps):
            draw = common.generator(5, "batch", self.epoch, step)
            x = torch.randn(8, 4, generator=draw, dtype=torch.float64)
            yield x, (x.sum(1) > 0).long(), torch.arange(8)


def make_args(out, **extra):
    words = ["--out", str(out), "--quiet", "--logger", "none", "--device", "cpu"]
    table = (("backbone", "resnet8", "network"), ("lr", 0.1, "rate"))
    args = common.parse("A test.", table, {"fit": ("fit",)}, {}, lambda *_: 16, words)
    args.precision = "fp32"
    vars(args).update(extra)
    return args


def train(out, stop_at=None, epochs=3, args=None, data="data"):
    """Train a linear layer; `stop_at` = (epoch, step) raises there as a crash would."""
    run = common.Run(args or make_args(out), "unit", data)
    try:
        return run, fit(run, stop_at, epochs)
    finally:
        run.lock.close()  # as the end of the process would


def fit(run, stop_at, epochs):
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
    ).double()
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
    return model


@pytest.mark.parametrize("bad", [[2], [5], [3, 4, 5]])
def test_a_gpu_is_asked_at_the_end_of_the_epoch_and_nothing_is_kept(tmp_path, monkeypatch, bad):
    """The device of the loss decides; `look` is what reads a number from it."""
    looked, look = [], common.Stage.look
    monkeypatch.setattr(
        common.Stage, "look", lambda stage: looked.append(stage.step) or look(stage)
    )
    run = common.Run(make_args(tmp_path), "unit", "data")
    weight = torch.nn.Parameter(torch.zeros(3))
    stage = run.stage("fit", 2, optimizer=common.sgd([weight], 0.1))

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            found = super().__torch_function__(function, types, args, kwargs or {})
            return found.as_subclass(cls) if isinstance(found, torch.Tensor) else found

    with pytest.raises(
        common.RunError, match=f"epoch 2 of 2, step {bad[0] + 1}, lr 0.1; what was saved"
    ):
        for epoch in stage.epochs():
            for _ in stage.batches(FakeLoader()):
                wrong = epoch == 1 and stage.step in bad
                stage.guard(torch.tensor(float("inf") if wrong else 1.0).as_subclass(OnGpu))
            stage.end_epoch()
    run.lock.close()
    assert looked == [6, 6], "once an epoch"
    assert common.load_checkpoint(run.folder / "last.pt")["epoch"] == 1
    assert not (run.folder / "fit.pt").exists() and len(rows(run.folder)) == 1


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_full_disk_is_named_with_what_is_free_and_what_was_saved_is_intact(
    tmp_path, monkeypatch, nth
):
    """Whichever write it is: args.json, then metrics.jsonl and last.pt of each epoch."""
    straight, _ = train(tmp_path / "a")
    real, calls = os.fsync, []

    def full(number):
        calls.append(1)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        common.RunError,
        match=r"cannot write .*seed0.*: the disk is full \([\d,.]+ MB free\).*intact",
    ):
        train(tmp_path / "b")
    monkeypatch.setattr(os, "fsync", real)
    (folder,) = (tmp_path / "b").glob("*/*/*/seed0")
    if nth == 5:
        assert common.load_checkpoint(folder / "last.pt")["epoch"] == 1
    assert not list(folder.glob(".*.tmp"))
    again, _ = train(tmp_path / "b")
    assert rows(again.folder) == rows(straight.folder)


def test_last_is_there_at_every_moment_of_a_save(tmp_path, monkeypatch):
    """A crash at any system call of a save leaves a loadable last.pt, and the run ends the same."""
    straight, _ = train(tmp_path / "a", epochs=2)
    for name in ("fsync", "replace"):
        for nth in range(1, 7):
            out, count, real = tmp_path / f"{name}{nth}", [0], getattr(os, name)

            def crash(*args, count=count, nth=nth, real=real, **kwargs):
                count[0] += 1
                if count[0] == nth:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            monkeypatch.setattr(os, name, crash)
            try:
                train(out, epochs=2)
            except KeyboardInterrupt:
                pass
            monkeypatch.setattr(os, name, real)
            for last in out.glob("**/last.pt"):
                common.load_checkpoint(last)
            again, _ = train(out, epochs=2)
            assert rows(again.folder) == rows(straight.folder)


def test_a_checkpoint_is_renamed_and_never_linked(tmp_path, monkeypatch):
    """Some file systems have no hard links."""

    def refuse(*_, **__):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    run, _ = train(tmp_path)
    assert sorted(path.name for path in run.folder.glob("*.pt")) == ["fit.pt", "last.pt"]


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


@pytest.mark.parametrize("change", [{"lr": 0.2}, {"backbone": "other"}, {"precision": "bf16"}])
def test_other_arguments_than_the_saved_ones_are_refused_by_name(tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=(2, 3))
    (name,) = change
    with pytest.raises(common.UserError, match=f"--{name}"):
        train(tmp_path, args=make_args(tmp_path, **change))


def test_other_data_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=(2, 3))
    with pytest.raises(common.UserError, match="other images than"):
        train(tmp_path, data="changed")


def test_a_moved_copied_or_linked_set_is_the_same_and_other_content_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.v2.npz").touch()
        (tmp_path / name / "pictures.v2").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a" / "pictures.v2")
    names = [common.dataset_name(str(path)) for path in sorted(tmp_path.glob("[ab]/*"))]
    assert names == ["mine.v2", "pictures.v2"] * 2
    assert common.dataset_name(str(tmp_path / "link")) == "pictures.v2"
    here, there = (str(tmp_path / name / "mine.v2.npz") for name in ("a", "b"))
    data = "images:1a labels:2b classes:3c"
    common.check_data("x.pt", "1a", data, here)  # of a checkpoint from before there were names
    run, _ = train(tmp_path, args=make_args(tmp_path, dataset=here), data=data)
    again = common.Run(make_args(tmp_path, dataset=there), "unit", data)
    assert again.folder == run.folder and again.result
    again.lock.close()
    for other, named in (
        ("images:1a labels:2b classes:ff", "other classes than"),
        ("images:00 labels:ff classes:3c", "other images and labels than"),
        ("0123abcd", "other images than"),
    ):
        with pytest.raises(common.UserError, match=f"{named} --dataset {there}"):
            common.Run(make_args(tmp_path, dataset=there), "unit", other)


def test_a_finished_run_from_another_checkpoint_of_that_name_is_not_shown(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kcl.pt").write_bytes(b"same")
    start, moved = (str(tmp_path / name / "kcl.pt") for name in ("a", "b"))
    changed = {"init_from": start}
    train(tmp_path, args=make_args(tmp_path, init_from=start, changed=changed))
    common.Run(make_args(tmp_path, init_from=moved, changed=changed), "unit", "data").lock.close()
    Path(moved).write_bytes(b"trained once more")
    common.file_identity.cache_clear()  # as in another process
    with pytest.raises(common.UserError, match="--init-from kcl-.*this has kcl-"):
        common.Run(make_args(tmp_path, init_from=moved, changed=changed), "unit", "data")
    for name in ("init_from", "eval"):
        with pytest.raises(SystemExit):
            args = make_args(tmp_path, **{name: str(tmp_path / "gone.pt")})
            common.launch(lambda args: pytest.fail("the old result would be shown"), args)
        assert "gone.pt does not exist" in capsys.readouterr().err


def test_a_backbone_comes_from_torchvision_or_another_data_set(tmp_path):
    theirs = torchvision.models.resnet18().state_dict()
    old = {key: value for key, value in theirs.items() if "batches_tracked" not in key}
    bare = {key: value for key, value in old.items() if not key.startswith("fc.")}
    for number, state in enumerate((theirs, old, bare)):
        torch.save(state, tmp_path / f"{number}.pth")
        net = models.backbone("resnet18", stem="imagenet")
        found = common.load_backbone(net, tmp_path / f"{number}.pth", make_args(tmp_path))
        assert {*found["state"]["model"]} == {f"backbone.{key}" for key in net.state_dict()}
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in bare.items())
    bare.pop("layer1.0.conv1.weight")
    torch.save(bare, tmp_path / "3.pth")
    with pytest.raises(common.UserError, match="Missing.*layer1.0.conv1.weight"):
        common.load_backbone(net, tmp_path / "3.pth", make_args(tmp_path))
    with pytest.raises(common.UserError, match="conv1.weight: .*7, 7.*3, 3"):
        common.load_backbone(models.backbone("resnet18"), tmp_path / "0.pth", make_args(tmp_path))
    run = common.Run(make_args(tmp_path, dataset="cifar10_lt"), "unit", "data")
    net = models.Net(models.backbone("resnet8"), models.linear_head(64, 10))
    stage = run.stage("fit", 1, model=net, optimizer=common.sgd(net.parameters(), 0.1))
    for _ in stage.epochs():
        list(stage.batches(FakeLoader()))
        stage.end_epoch()
    run.lock.close()
    other = models.backbone("resnet8")
    found = common.load_backbone(other, run.folder / "fit.pt", make_args(tmp_path))
    assert found["stage"] == "fit" and torch.equal(other.conv1.weight, net.backbone.conv1.weight)
    with pytest.raises(common.UserError, match="layer1.1.conv1.weight"):
        common.load_backbone(
            models.backbone("resnet14"), run.folder / "fit.pt", make_args(tmp_path)
        )
    same = make_args(tmp_path, dataset="cifar10_lt")
    with pytest.raises(common.UserError, match="other images than"):
        common.load_backbone(other, run.folder / "fit.pt", same, data="of another subset")


def cosines(tmp_path, pairs: list[tuple[float, float]], capsys) -> list[str]:
    """The warnings of a stage whose epochs have these mean cosines; begun again in the middle."""
    args = make_args(tmp_path)
    for stop in (len(pairs) // 2, len(pairs)):
        run = common.Run(args, "unit", "data")
        net = torch.nn.Linear(1, 1)
        stage = run.stage("kcl", len(pairs), optimizer=common.sgd(net.parameters(), 0.1))
        for epoch in stage.epochs():
            for _ in stage.batches(FakeLoader(1)):
                same, other = (torch.tensor(value) for value in pairs[epoch])
                stage.add(8, same_label=same, other_label=other)
            stage.end_epoch()
            if epoch + 1 == stop:
                break
        run.lock.close()
    return capsys.readouterr().err.splitlines()


def test_a_collapse_is_told_once_with_its_epoch(tmp_path, capsys):
    fine = [(0.97, 0.9699)] * 4 + [(0.95, 0.94), (0.9, 0.7), (0.9, 0.5), (0.9, 0.4)]
    assert cosines(tmp_path / "a", fine, capsys) == []
    (said,) = cosines(tmp_path / "b", [(0.9, 0.5), (1.0, 0.9995), (1.0, 1.0), (1.0, 1.0)], capsys)
    assert "stage kcl, epoch 2 of 4: all embeddings have collapsed" in said
    (said,) = cosines(tmp_path / "c", [(0.9, 0.9)] * 12, capsys)
    assert "epoch 6 of 12: images of one label are no closer" in said and "0.9000" in said


def test_a_finished_stage_brings_its_rows_when_last_is_gone(tmp_path):
    straight, _ = train(tmp_path / "a")
    run, _ = train(tmp_path / "b")
    for name in ("last.pt", "result.json"):
        (run.folder / name).unlink()
    again, _ = train(tmp_path / "b")
    assert rows(again.folder) == rows(straight.folder) and again.result is not None


def test_a_finished_run_needs_only_its_result(tmp_path):
    run, _ = train(tmp_path)
    (run.folder / "last.pt").write_bytes(b"damaged")
    assert common.Run(make_args(tmp_path), "unit", "data").result["headline"] == {"overall": 0.5}
    with pytest.raises(common.UserError, match="--lr"):
        common.Run(make_args(tmp_path, lr=0.5), "unit", "data")


def test_a_damaged_result_is_made_again_and_a_damaged_stage_names_the_remedy(tmp_path):
    run, _ = train(tmp_path)
    (run.folder / "result.json").write_text('{"headline": ')
    (run.folder / "fit.pt").write_bytes(b"damaged")
    with pytest.raises(common.UserError, match="fit.pt is damaged.*delete it"):
        train(tmp_path)
    (run.folder / "fit.pt").unlink()
    again, _ = train(tmp_path)
    assert again.result["headline"] == {"overall": 0.5}


@pytest.mark.parametrize("why", ["no such module", "no such call", "no locks here"])
def test_without_locks_a_run_goes_on_with_one_warning(tmp_path, monkeypatch, capsys, why):
    if why == "no such module":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:

        def refuse(*_):
            raise OSError(errno.ENOLCK, why)

        monkeypatch.setattr("fcntl.flock", refuse)
    train(tmp_path)
    assert capsys.readouterr().err.count("warning") == 1


def judged(tmp_path, select: str, test: list[float], val: list[float] | None):
    """Four epochs whose figures are told in advance; the weight is the epoch: chosen one, rows."""
    args = make_args(tmp_path / select, select=select, eval_every=2)
    run, net = common.Run(args, "unit", "data"), torch.nn.Linear(1, 1)
    stage = run.stage("fit", 4, model=net, optimizer=common.sgd(net.parameters(), 0.1))
    figure = {"per_class": [0.5] * 201, "confusion": []}
    judge = common.Judge(args, net, [1], "test", val and "val", {"plain": net})
    told = {"test": ("overall", test), "val": ("mean_class", val)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common, "figures", lambda *rest: figure | {told[rest[2]][0]: told[rest[2]][1][epoch]}
        )
        for epoch in stage.epochs():
            for _ in stage.batches(FakeLoader()):
                net.weight.data.fill_(epoch)
            stage.end_epoch(judge)
    judge.chosen(stage)
    run.lock.close()
    return net.weight.item(), rows(run.folder)


def test_the_judge_evaluates_where_due_and_chooses_as_told(tmp_path):
    test, val = [0.9, 0.8, 0.9, 0.5], [0.9, 0.3, 0.9, 0.4]
    for select, epoch in (("last", 3), ("test", 1), ("val", 3)):
        chosen, lines = judged(tmp_path, select, test, val if select == "val" else None)
        assert chosen == epoch
        assert [line["epoch"] for line in lines if "test" in line] == [1, 3], (
            "every second and the last"
        )
        assert ["val" in line for line in lines] == [False, select == "val"] * 2
        for line in lines:
            assert ("plain" in line) == ("test" in line)
            assert not {"confusion", "per_class"} & {*line.get("test", ()), *line.get("plain", ())}
        assert bool(list(tmp_path.glob(f"{select}/**/fit_best.pt"))) == (select != "last")


def test_fresh_starts_over_and_drops_what_was_there(tmp_path):
    run, _ = train(tmp_path)
    assert run.result is not None
    args = make_args(tmp_path, fresh=True)
    again = common.Run(args, "unit", "data")
    assert again.result is None and again.saved is None and not list(again.folder.glob("*.pt"))


def test_seeds_are_stable_and_distinct():
    assert common.derive_seed(0, "augment", 1, 2) == common.derive_seed(0, "augment", 1, 2)
    keys = [
        (s, name, e, b) for s in range(3) for name in ("a", "b") for e in range(4) for b in range(4)
    ]
    assert len({common.derive_seed(*key) for key in keys}) == len(keys)
    assert common.derive_seed(torch.tensor(3).item(), "x") == common.derive_seed(np.int64(3), "x")
    assert common.derive_seed(0, "x") == 7329383403727699100


# --- whole processes ------------------------------------------------------------------------------


BAD = [
    (["--dataset", "cifar11"], "cifar11"),
    (["--dataset", "cifar10_lt", "--data-root", "nowhere"], "cifar-10-batches-py"),
    (["--imb-ratio", "100000"], "with 0 of its"),
    (["--gpus", "4", "--device", "auto"], "GPU"),
    (["--out", "/proc/nothing"], "/proc/nothing"),
    (["--device", "tpu"], "tpu"),
    (["@flags.txt"], "@file"),
    (["--eval", "missing.pt"], "missing.pt"),
]


@pytest.mark.parametrize(("flags", "named"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(tmp_path, flags, named):
    (tmp_path / "flags.txt").write_text('--out "open quote')
    base = ["--device", "cpu"] if "--device" not in flags else []
    done = call(*flags, out=tmp_path / "o", base=base, cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "error" in lines[0] and named in lines[0], done.stderr


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)
def test_auto_takes_bf16_where_the_gpu_has_it(monkeypatch, capability, chosen):
    here = {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_capability": capability,
    }
    for name, value in here.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    args = Namespace(device="auto", gpus=1, precision="auto")
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        common._choose_device(args, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
    assert (args.device, args.precision) == ("cuda:0", chosen)


def test_a_closed_pipe_and_a_plain_terminal_end_without_a_traceback(tmp_path):
    for flags, codes in ((["--help"], (0, 141)), (["--data-seed", "1"], (141,))):
        line = shlex.join(command(*flags, out=tmp_path / "ö"))
        script = f"set -o pipefail; {line} | head -1"
        env = commands.environment() | {"PYTHONIOENCODING": "ascii"}
        options = {"capture_output": True, "text": True, "env": env, "timeout": 120}
        done = subprocess.run(["bash", "-c", script], **options)
        assert done.returncode in codes and not done.stderr and done.stdout.count("\n") == 1, done
    done = subprocess.run(command(out=tmp_path / "ö"), **options)
    assert done.returncode == 0 and "\\xf6" in done.stdout and not done.stderr, done
    script = f"{shlex.join(command(out=tmp_path / 'none'))} >&-"
    done = subprocess.run(["bash", "-c", script], **options)
    assert done.returncode == 0 and not done.stderr, done


@pytest.mark.parametrize("words", ["toys theory", "geometry targets --classes 9 --dim 16"])
def test_a_tool_whose_reader_has_gone_says_nothing(tmp_path, words):
    line = f"cd {tmp_path} && {sys.executable} -m tools.{words} | true; exit ${{PIPESTATUS[0]}}"
    options = {"capture_output": True, "text": True, "env": commands.environment()}
    done = subprocess.run(["bash", "-c", line], **options)
    assert done.returncode == 141 and not done.stderr, done


def test_ranks_without_an_address_or_number_are_one_line(tmp_path, monkeypatch, capsys):
    args = make_args(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    for rank, named, call in (
        ("0", "MASTER_ADDR", lambda: common.launch(lambda args: None, args)),
        ("x", "'x'", lambda: common.launch(lambda args: None, args)),
        ("x", "--epoch", lambda: common.parse("A test.", (), {"fit": ("fit",)}, {}, None, ["--epoch", "3"])),
    ):
        monkeypatch.setenv("RANK", rank)
        said = commands.refused(capsys, call)
        assert named in said and said.count("\n") == 1


def test_a_home_in_a_path_is_the_home(tmp_path, monkeypatch):
    """Quoted, or after an equals sign, the shell leaves `~` to the program."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--out=~/a", "--data-root=~/b", "--dataset=~/c", "--eval=~/d.pt"]
    args = common.parse("A test.", (), {"fit": ("fit",)}, {}, lambda *rest: 32, words)
    said = [args.out, args.data_root, args.dataset, args.eval]
    assert said == [f"{tmp_path}/{name}" for name in ("a", "b", "c", "d.pt")]
    args = prepare.make_parser().parse_args(["export", "--dataset=~/a", "--data-root=~/b", "--out=~/c"])
    assert [args.dataset, args.data_root] == said[:2] and args.out == tmp_path / "c"
    args = report.make_parser().parse_args(["export", "~/run", "--out=~/x.pt"])
    assert (args.run, args.out) == (tmp_path / "run", tmp_path / "x.pt")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_a_line_an_epoch_elsewhere(
    tmp_path, capsys, monkeypatch, terminal
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    train(tmp_path, args=make_args(tmp_path, quiet=False))
    printed = capsys.readouterr().out
    assert ("[" in printed and "\r" in printed) == terminal
    lines = [
        line
        for line in printed.replace("\r", "\n").splitlines()
        if "images/s" in line and "[" not in line
    ]
    assert len(lines) == 3 and all("s left" in line and "loss" in line for line in lines)


def test_quiet_prints_only_the_result(tmp_path, capsys):
    train(tmp_path, args=make_args(tmp_path, quiet=True))
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 2
        and lines[0].startswith("overall 50.0 %")
        and lines[1].startswith("result: ")
    )
