"""Every value of every flag with choices, and every switch, of every script trains (`--slow`)."""

import commands
import pytest
from test_faults import SMALL, Desk, tiny  # noqa: F401 (a fixture)

import common

ALONG = {  # what a value needs beside it; flags later on the line win
    "--imb-type step": "--imb-ratio 2",
    "--imb-type exp": "--imb-ratio 2",
    "--val-from train": "--select val",
    "--val-from test": "--select val",
    "--select val": "--val-from train",
    "--save-features val": "--select val --val-from train",
    "ssp_pretrain --ssp moco": "--queue 40 --bn-groups 2",
    "ssp_pretrain --select val": "",
    "ssp_pretrain --save-features val": "--select val",
    **dict.fromkeys(
        (
            f"ssp_pretrain {flag}"
            for flag in (
                "--classifier-rule none",
                "--classifier-rule resample",
                "--classifier-rule reweight",
                "--frozen-bn eval",
                "--frozen-bn train",
            )
        ),
        "--stages pretrain,train,classifier",
    ),
    "toy_similarity --experiment sweep1": "--points 4 --tail-count 2",
    **dict.fromkeys(
        (f"toy_similarity {flag}" for flag in ("--imb-type step", "--imb-type exp")),
        "--experiment verification --points 0.5 --imb-ratio 2",
    ),
    "toy_similarity --experiment verification": "--points 0.5",
    "toy_similarity --control": "--experiment verification --points 0.5",
    "tsc --contrast queue": "--queue 40",
    "tsc --select val": "",
    "tsc --save-features val": "--select val",
    "bns_ipdpp --bns-neg-reduction sum": "--bns-form paper",
    "bns_ipdpp --bns-neg-reduction mean": "--bns-form paper",
    "bns_ipdpp --probe-data balanced": "--stages pretrain,probe,finetune",
    "bns_ipdpp --probe-data all": "--stages pretrain,probe,finetune",
    "bns_ipdpp --probe-bn eval": "--stages pretrain,probe,finetune",
    "bns_ipdpp --probe-bn train": "--stages pretrain,probe,finetune",
    "fsgl --lr-timing legacy": "--schedule warmup",
    "fsgl --stem imagenet": "--backbone resnet10",
    "tailcalibx --cbd-schedule cosine": "--pipeline cbd_tailcalibx",
    "tailcalibx --cbd-schedule constant": "--pipeline cbd_tailcalibx",
    "tailcalibx --frozen-bn-train": "--pipeline crt",
    "fsgl --concat-views": "--variant glmc",
}
DROPPED = {  # flags of the micro settings that the value has no use for
    "ssp_pretrain --ssp none": ("--epochs", "--batch-size"),
    "tailcalibx --pipeline ce": ("--clf-epochs",),
    "tailcalibx --pipeline cosine_ce": ("--clf-epochs",),
    "tailcalibx --pipeline cbd": ("--clf-epochs",),
    "fsgl --variant ce": ("--projection-dim",),
    **dict.fromkeys(
        (
            f"toy_similarity {flag}"
            for flag in (
                "--experiment sweep1",
                "--experiment verification",
                "--control",
                "--imb-type step",
                "--imb-type exp",
            )
        ),
        ("--experiment", "--points"),
    ),
    "bns_ipdpp --recipe released": ("--resample-every",),
    "bns_ipdpp --subset-mode legacy": ("--resample-every",),
    "bns_ipdpp --subset-mode all": ("--resample-every", "--num-samples"),
}
ELSEWHERE = {
    "--fresh": "test_run.py",
    "--compile": "takes minutes on a CPU; the scripts' own tests stand in for torch.compile",
    "--quiet": "on every line here",
    "--logger tensorboard": "test_run.py",
    "tailcalibx --stage": "test_tailcalibx.py",
    "fsgl --acsl": "test_fsgl.py",
    "fsgl --recipe": "of CIFAR alone: test_fsgl.py",
}


def actions(script: str, monkeypatch) -> list:
    """The flags of a script's parser."""
    parsers, make = [], common.Parser
    monkeypatch.setattr(common, "Parser", lambda **kind: parsers.append(make(**kind)) or parsers[-1])
    commands.parse(script, ["--device", "cpu"])
    return parsers[0]._actions


def values(script: str, monkeypatch) -> list[str]:
    found = []
    for action in actions(script, monkeypatch):
        names = [text for text in action.option_strings if text.startswith("--")]  # not the --no-... of a switch
        found += [f"{names[0]} {value}" for value in action.choices or ()] if names else []
        found += names if action.nargs == 0 and "--help" not in names else []
    return found


@pytest.mark.parametrize("script", SMALL)
def test_every_value_of_every_flag_trains(script, tiny, tmp_path, monkeypatch, pytestconfig):  # noqa: F811
    if not pytestconfig.getoption("--slow"):
        pytest.skip("with --slow")
    failed, ran = [], 0
    for value in values(script, monkeypatch):
        known = [f"{script} {value}", f"{script} {value.split()[0]}", value, value.split()[0]]
        if any(name in ELSEWHERE for name in known):
            continue
        micro = ["--backbone", "resnet8", *SMALL[script].split()]
        micro = [word for pair in zip(micro[::2], micro[1::2], strict=True)
                 if pair[0] not in DROPPED.get(f"{script} {value}", ()) for word in pair]  # fmt: skip
        along = ALONG.get(f"{script} {value}", ALONG.get(value, "")).split()
        desk = Desk(script, tmp_path / str(ran), "--dataset", tiny, *micro, *value.split(), *along)
        process = desk.start()
        process.join(200)
        ran += 1
        if process.exitcode != 0 or desk.rows() < 1:
            failed.append(f"{value}: {process.exitcode} {process.said.read_text().strip()[-300:]}")
    assert not failed, "\n".join(failed)
    assert ran > 12
