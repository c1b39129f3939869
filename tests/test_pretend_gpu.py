"""Every script trains, continues and evaluates on a GPU that is none, and does not wait for it."""

import atexit
import collections
import importlib
import json
import re

import commands
import pretend_gpu
import pytest
import test_faults as faults
import torch
from test_choices import SCRIPTS, choices, line, rows_of
from test_run import FakeLoader, Opened

import common

IN_STEPS = {  # how often the steps of an epoch may make the host wait for the GPU; elsewhere once
    # has each class a nearest target of its own? Rank 0 asks at each of the four steps of tsc
    "tsc.py:solve": 4,
    "tsc.py:best_matching": 4,  # where not, the matching is solved on the host
    "tailcalibx.py:modals": 40,  # deviations of each class
}
AT_ENDS = {"common.py:means_over_ranks": 1, "common.py:look": 1, "common.py:evaluate": 2}  # of it
HELD = []  # the open context: it would close when nobody knows it any more


def with_a_gpu() -> None:
    """In the process of a run: a GPU; at its end what made the host wait for it is told."""
    HELD.append(pretend_gpu.pretend_gpu())
    gpu, batches = HELD[0].__enter__(), common.Stage.batches
    in_steps = collections.Counter()

    def watched(stage, *args, **kwargs):
        before = collections.Counter(gpu.syncs)
        yield from batches(stage, *args, **kwargs)
        in_steps.update(gpu.syncs - before)

    common.Stage.batches = watched
    atexit.register(lambda: print("told", json.dumps([gpu.syncs, in_steps, gpu.operations])))


def stopped_with_a_gpu() -> None:
    with_a_gpu()
    faults.stopped_late()


def cases() -> list[tuple]:
    """(script, flag, value, slow): every method, the default first, every choice of own flags."""
    found = []
    for script in SCRIPTS:
        own = {"method", *(row[0] for row in importlib.import_module(script).FLAGS)}
        pairs = [pair for pair in choices(rows_of(script)) if pair[0] in own]
        pairs.sort(key=lambda pair: pair[0] != "method")
        found += [(script, *pair, pair is not pairs[0]) for pair in pairs]
    return found


def skip_unless(slow: bool, pytestconfig) -> None:
    if slow and not pytestconfig.getoption("--slow"):
        pytest.skip("with --slow")


@pytest.mark.parametrize(("script", "flag", "value", "slow"), cases())
def test_a_gpu_gives_the_rows_of_the_cpu_and_no_step_waits_for_it(
    script, flag, value, slow, tiny, tmp_path, pytestconfig
):
    skip_unless(slow, pytestconfig)
    words = line(script, flag, value, tiny)
    gpu, cpu = (faults.Desk(script, tmp_path / name, *words) for name in ("gpu", "cpu"))
    said = gpu.run("--device", "cuda", "--precision", "fp32", prepare=with_a_gpu)
    cpu.run("--precision", "fp32")
    ours, theirs = commands.rows(gpu.out), commands.rows(cpu.out)
    assert len(ours) == len(theirs)
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        if row["epoch"] == 0:  # later ones drift apart: fused optimisers round otherwise
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    every, in_steps, operations = json.loads(re.search(r"told (.*)", said)[1])
    assert operations > 500
    assert sum(row["steps"] for row in ours) > 2 * len(ours), "a wait in every step would be seen"
    for place, count in in_steps.items():
        assert count <= IN_STEPS.get(place.rpartition(": ")[0], 1) * len(ours), place
    for place, count in every.items():
        assert count <= AT_ENDS.get(place.rpartition(": ")[0], count) * len(ours) + 2, place


@pytest.mark.parametrize("script", faults.SMALL)
def test_stopped_on_a_gpu_it_continues_to_the_same(script, tiny, tmp_path, pytestconfig):
    """In bfloat16, what a GPU that has it takes."""
    skip_unless(True, pytestconfig)
    whole, desk = (faults.on_letters(script, tiny, tmp_path / name) for name in ("whole", "desk"))
    whole.run("--device", "cuda", prepare=with_a_gpu)
    assert json.loads((whole.folder / "args.json").read_text())["precision"] == "bf16"
    ends = []
    while 0 not in ends:
        process = desk.start("--device", "cuda", prepare=stopped_with_a_gpu)
        process.join(200)
        ends.append(process.exitcode)
        assert ends[-1] in (0, 143) and len(ends) < 20, process.said.read_text()
    assert 143 in ends and faults.same_end(desk, whole)


@pytest.mark.parametrize("script", faults.LARGE)
def test_a_tree_of_jpegs_on_a_gpu(script, tree, tmp_path, pytestconfig):
    skip_unless(True, pytestconfig)
    desk = faults.on_tree(script, tree, tmp_path, "--workers", 0)
    desk.run("--device", "cuda", prepare=with_a_gpu)
    assert commands.result(desk.out)["headline"] or script == "bns_ipdpp"


def test_a_loss_that_is_not_finite_is_seen_at_the_end_of_the_epoch_and_nothing_is_kept(tmp_path):
    said = "epoch 2 of 2, step 4, lr 0; what was saved"
    with pretend_gpu.pretend_gpu() as gpu, Opened(tmp_path, device="cuda:0") as run:
        stage = run.stage("fit", 2)
        with pytest.raises(common.RunError, match=said):
            for epoch in stage.epochs():
                for _ in stage.batches(FakeLoader()):
                    wrong = epoch == 1 and stage.step in (3, 5)
                    stage.guard(torch.tensor(float("inf") if wrong else 1.0, device="cuda"))
                stage.end_epoch()
    assert sum(gpu.syncs.values()) == 2, "once an epoch"
    assert (
        common.load_checkpoint(run.folder / "last.pt")["epoch"] == len(commands.rows(tmp_path)) == 1
    )
    assert not (run.folder / "fit.pt").exists()


def test_the_rules_of_a_gpu():
    with pretend_gpu.pretend_gpu() as gpu:
        x, own = torch.ones(4, device="cuda"), torch.Generator(device="cuda").manual_seed(1)
        assert x.is_cuda and x.device.type == "cuda" and (x + 1).is_cuda and not x.cpu().is_cuda
        assert torch.rand(2, generator=own, device="cuda").is_cuda
        assert torch.rand(2, generator=torch.Generator().manual_seed(1)).shape == (2,)
        for wrong in (
            lambda: x + torch.ones(4), lambda: torch.ones(4)[x.long()], lambda: x.numpy(),
            lambda: torch.rand(2, generator=own),
            lambda: torch.rand(2, generator=torch.Generator().manual_seed(1), device="cuda"),
        ):  # fmt: skip
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        for waits in (
            lambda: float(x[0]), lambda: x.tolist(), lambda: x.nonzero(),
            lambda: x[x > 0], lambda: x.cpu(),
        ):  # fmt: skip
            before = sum(gpu.syncs.values())
            waits()
            assert sum(gpu.syncs.values()) == before + 1
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert sum(gpu.syncs.values()) == before + 1
    assert torch.Generator().device.type == "cpu" and not torch.cuda.is_available()
