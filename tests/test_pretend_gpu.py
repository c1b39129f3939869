"""Every script trains, continues and evaluates on a GPU that is none (see pretend_gpu.py), and does not wait for it."""

import atexit
import json
import re

import commands
import pretend_gpu
import pytest
import torch
from test_faults import LARGE, SMALL, Desk, on_tree, same_end, stopped_late, tiny, tree  # noqa: F401 (fixtures)

CASES = {
    "toy_similarity": [""],
    "ssp_pretrain": ["", "--ssp moco --queue 40 --bn-groups 2",
                     "--stages pretrain,train,classifier --loss ldam --rule drw --classifier-epochs 2",
                     "--ssp none --stages train,pseudo,semi --imb-ratio 2 --rule resample --loss balanced"],
    "tsc": ["", "--contrast queue --queue 40", "--method kcl --classifier linear"],
    "bns_ipdpp": ["", "--stages pretrain,probe,finetune --probe-epochs 2 --bns-form paper --p-view augmented"],
    "fsgl": ["", "--variant ce", "--variant glmc_sam --sam-bn first"],
    "tailcalibx": ["", "--pipeline tailcalib", "--pipeline cbd_tailcalibx", "--pipeline modals", "--pipeline crt"],
}  # fmt: skip
WAITS = {  # where the host may wait for the GPU, and how often in an epoch (a row of metrics.jsonl)
    "common.py:means_over_ranks": 1,
    "common.py:look": 1,
    "common.py:evaluate": 2,
    "ssp_pretrain.py:turned": 1,  # a batch of the rotation test
    "tsc.py:solve": 1,  # has each class a nearest target of its own? Rank 0 asks at each of the four steps of tsc
    "tsc.py:best_matching": 1,  # where not, the matching is solved on the host
    "bns_ipdpp.py:collect": 1,  # p(i) of all images
    "tailcalibx.py:generate": 1,
    "tailcalibx.py:generate_lowrank": 2,
    "tailcalibx.py:balanced": 2,
    "tailcalibx.py:lenders": 1,
    "tailcalibx.py:modals_noise": 1,
    "tailcalibx.py:<listcomp>": 10,  # deviations of each class
    "tailcalibx.py:<genexpr>": 2,
}
HELD = []  # the open context: it would close when nobody knows it any more


def with_a_gpu() -> None:
    """In the process of a run: a GPU; at its end what made the host wait for it is told."""
    HELD.append(pretend_gpu.pretend_gpu())
    gpu = HELD[0].__enter__()
    atexit.register(lambda: print("waits", json.dumps(gpu.syncs), "operations", gpu.operations))


def stopped_with_a_gpu() -> None:
    with_a_gpu()
    stopped_late()


def words_of(script: str, flags: str) -> list[str]:
    left_out = {"--variant ce": "--projection-dim", "--ssp none": "--epochs --batch-size"}
    drop = {word for key, words in left_out.items() if key in flags for word in words.split()}
    micro = SMALL[script].split()
    pairs = [pair for pair in zip(micro[::2], micro[1::2], strict=True) if pair[0] not in drop]
    return [*(word for pair in pairs for word in pair), *flags.split()]


@pytest.fixture
def slow(pytestconfig):
    if not pytestconfig.getoption("--slow"):
        pytest.skip("with --slow")


@pytest.mark.parametrize(("script", "flags"), [(script, flags) for script in SMALL for flags in CASES[script]])
def test_a_gpu_gives_the_rows_of_the_cpu_and_no_step_waits_for_it(script, flags, tiny, tmp_path, pytestconfig):  # noqa: F811
    if flags and not pytestconfig.getoption("--slow"):
        pytest.skip("with --slow")
    gpu, cpu = (
        Desk(script, tmp_path / name, "--dataset", tiny, "--backbone", "resnet8", *words_of(script, flags))
        for name in ("gpu", "cpu")
    )
    said = gpu.run("--device", "cuda", "--precision", "fp32", prepare=with_a_gpu)
    cpu.run("--precision", "fp32")
    ours, theirs = commands.rows(gpu.out), commands.rows(cpu.out)
    assert len(ours) == len(theirs)
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        if row["epoch"] == 0:  # later ones drift apart: fused optimisers round otherwise
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    waits, operations = re.search(r"waits (.*) operations (\d+)", said).groups()
    assert int(operations) > 500
    for place, count in json.loads(waits).items():
        assert count <= WAITS[place.rpartition(": ")[0]] * len(ours) + 2, (place, count, len(ours))


@pytest.mark.parametrize("script", SMALL)
def test_stopped_on_a_gpu_it_continues_to_the_same(script, slow, tiny, tmp_path):  # noqa: F811
    """In bfloat16, what a GPU that has it takes."""
    whole, desk = (
        Desk(script, tmp_path / name, "--dataset", tiny, "--backbone", "resnet8", *words_of(script, ""))
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
