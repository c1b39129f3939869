"""Every script trains, continues and evaluates on a GPU that is none (see pretend_gpu.py), and does not wait for it."""

import atexit
import collections
import importlib
import json
import re

import commands
import pretend_gpu
import pytest
import torch
from test_choices import SCRIPTS, choices, line, rows_of
from test_faults import LARGE, SMALL, Desk, on_tree, same_end, stopped_late, tiny, tree  # noqa: F401 (fixtures)

import common

IN_STEPS = {  # how often the steps of an epoch may make the host wait for the GPU; elsewhere once
    "tsc.py:solve": 4,  # has each class a nearest target of its own? Rank 0 asks at each of the four steps of tsc
    "tsc.py:best_matching": 4,  # where not, the matching is solved on the host
    "tailcalibx.py:modals": 40,  # deviations of each class
}
AT_ENDS = {"common.py:means_over_ranks": 1, "common.py:look": 1, "common.py:evaluate": 2}  # of it
HELD = []  # the open context: it would close when nobody knows it any more


def with_a_gpu() -> None:
    """In the process of a run: a GPU; at its end what made the host wait for it is told, in steps and in all."""
    HELD.append(pretend_gpu.pretend_gpu())
    gpu, batches = HELD[0].__enter__(), common.Stage.batches
    in_steps = collections.Counter()

    def watched(stage, *args, **kwargs):
        before = collections.Counter(gpu.syncs)
        yield from batches(stage, *args, **kwargs)
        in_steps.update(gpu.syncs - before)

    common.Stage.batches = watched
    told = ("waits", gpu.syncs, "in steps", in_steps, "operations")
    atexit.register(lambda: print(*(w if isinstance(w, str) else json.dumps(w) for w in told), gpu.operations))


def stopped_with_a_gpu() -> None:
    with_a_gpu()
    stopped_late()


def cases() -> list[tuple[str, str, str]]:
    """(script, flag, value): every method, the default first, and every choice of a script's own flags."""
    found = []
    for script in SCRIPTS:
        rows = rows_of(script)
        own = {"method", *(row[0] for row in importlib.import_module(script).FLAGS)}
        pairs = [(name, value) for name, value in choices(rows) if name in own]
        found += [(script, *pair) for pair in sorted(pairs, key=lambda pair: pair[0] != "method")]
    return found


CASES = cases()


@pytest.fixture
def slow(pytestconfig):
    if not pytestconfig.getoption("--slow"):
        pytest.skip("with --slow")


@pytest.mark.parametrize(("script", "flag", "value"), CASES)
def test_a_gpu_gives_the_rows_of_the_cpu_and_no_step_waits_for_it(
    script, flag, value, tiny, tmp_path, pytestconfig  # noqa: F811
):
    first = next(case for case in CASES if case[0] == script)
    if (script, flag, value) != first and not pytestconfig.getoption("--slow"):
        pytest.skip("with --slow")
    words = line(script, flag, value, tiny)
    gpu, cpu = (Desk(script, tmp_path / name, *words) for name in ("gpu", "cpu"))
    said = gpu.run("--device", "cuda", "--precision", "fp32", prepare=with_a_gpu)
    cpu.run("--precision", "fp32")
    ours, theirs = commands.rows(gpu.out), commands.rows(cpu.out)
    assert len(ours) == len(theirs)
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        if row["epoch"] == 0:  # later ones drift apart: fused optimisers round otherwise
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    every, in_steps, operations = re.search(r"waits (.*) in steps (.*) operations (\d+)", said).groups()
    assert int(operations) > 500
    assert sum(row["steps"] for row in ours) > 2 * len(ours), "a wait in every step would be seen"
    for place, count in json.loads(in_steps).items():
        most = IN_STEPS.get(place.rpartition(": ")[0], 1) * len(ours)
        assert count <= most, (place, count, len(ours))
    for place, count in json.loads(every).items():
        most = AT_ENDS.get(place.rpartition(": ")[0], count) * len(ours) + 2
        assert count <= most, (place, count, len(ours))


@pytest.mark.parametrize("script", SMALL)
def test_stopped_on_a_gpu_it_continues_to_the_same(script, slow, tiny, tmp_path):  # noqa: F811
    """In bfloat16, what a GPU that has it takes."""
    whole, desk = (
        Desk(script, tmp_path / name, "--dataset", tiny, "--backbone", "resnet8", *SMALL[script].split())
        for name in ("whole", "desk")
    )
    whole.run("--device", "cuda", prepare=with_a_gpu)
    assert json.loads((whole.folder / "args.json").read_text())["precision"] == "bf16"
    ends = []
    while 0 not in ends:
        process = desk.start("--device", "cuda", prepare=stopped_with_a_gpu)
        process.join(200)
        ends.append(process.exitcode)
        assert ends[-1] in (0, 143) and len(ends) < 20, process.said.read_text()
    assert ends.count(143) >= 1 and same_end(desk, whole)


@pytest.mark.parametrize("script", LARGE)
def test_a_tree_of_jpegs_on_a_gpu(script, slow, tree, tmp_path):  # noqa: F811
    desk = on_tree(script, tree, tmp_path, "--workers", 0)
    desk.run("--device", "cuda", prepare=with_a_gpu)
    assert desk.result()["headline"] or script == "bns_ipdpp"


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
        before = sum(gpu.syncs.values())
        for waits in (lambda: float(x[0]), lambda: x.tolist(), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.cpu()):
            waits()
            assert sum(gpu.syncs.values()) == before + 1
            before += 1
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert sum(gpu.syncs.values()) == before
    assert torch.Generator().device.type == "cpu" and not torch.cuda.is_available()
