"""common.parse: defaults, help, types, refusals, the run's name follow from one table."""

import math
import shlex

import commands
import pytest

import common

METHODS = {"two": ("first", "second", "probe"), "one": ("first", "probe")}
FLAGS = (
    ("backbone", "resnet8", "resnet32", "resnet50", "network"),
    ("epochs", 10, 100, 1000, "of first"),
    ("lr", 0.1, "rate"),
    ("kind_of_pairs", ("all", "queue"), ("all", "queue"), ("queue", "all"), "who is compared"),
    ("queue", 8, 64, 512, "keys", {"kind_of_pairs": "queue"}),
    ("weight", 0.5, "of second, in percent of 100 %", {"stages": "second", "range": (0, 1)}),
    ("decay", 1e-4, "may be 0", {"range": (0, math.inf)}),
    ("table", str, "a file"),
)
OTHER = {
    "cifar100_lt": {"lr": 0.3},
    "inat18": {"method": "one"},
    "one": {"decay": 1e-3},
    ("one", "small"): {"decay": 1e-2, "stages": "first"},
    ("one", "cifar100_lt"): {"lr": 0.4},
    ("small", 50): {"weight": 0.25},
}


def side(dataset, root, size):
    """A file holds small images; what is nowhere cannot be looked at."""
    if dataset == "nowhere":
        raise common.UserError("nothing there")
    return size or {"large.npz": 200}.get(dataset, 48)


def parsed(line: str = "", named: str = "method"):
    words = shlex.split(line)
    return common.parse("What it does.\n\nMore.", FLAGS, METHODS, OTHER, side, words, named)


LETTERS = {
    "kind": "letters",
    "backbone": "resnet8",
    "lr": 0.1,
    "kind_of_pairs": "all",
    "epochs": 10,
}
LETTERS |= {"imb_ratio": 100, "decay": 1e-4, "stages": METHODS["two"], "changed": {}}
SMALL = LETTERS | {"kind": "small", "backbone": "resnet32", "epochs": 100, "weight": 0.5}
LARGE = {"kind": "large", "backbone": "resnet50", "kind_of_pairs": "queue", "epochs": 1000}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", LETTERS),
        ("--dataset cifar10_lt", SMALL),
        ("--dataset cifar100_lt", SMALL | {"lr": 0.3}),
        ("--dataset imagenet_lt", LARGE | {"imb_ratio": None}),
        ("--dataset mine.npz", SMALL | {"imb_ratio": None}),
        ("--dataset large.npz", LARGE),
        ("--dataset cifar10_lt --image-size 96", LARGE | {"changed": {"image_size": 96}}),
        ("--dataset inat18", {"method": "one"}),
        ("--method one", LETTERS | {"decay": 1e-3, "stages": METHODS["one"]}),
        ("--method one --dataset cifar10_lt", SMALL | {"decay": 1e-2, "stages": ("first",)}),
        ("--method one --dataset cifar100_lt --stages first,probe",
         {"lr": 0.4, "stages": METHODS["one"], "changed": {"stages": "first-probe"}}),
        ("--dataset cifar10_lt --imb-ratio 50", {"weight": 0.25, "changed": {}}),
        ("--dataset cifar10_lt --imb-ratio 10", {"weight": 0.5, "changed": {}}),
        ("--imb-ratio 50", {"weight": 0.5}),
        # what is as it would be, or changes no figure, is no change
        ("--lr 0.2 --epochs 10 --decay 0 --method one --quiet --seed 3",
         {"quiet": True, "fresh": False, "changed": {"lr": 0.2, "decay": 0}}),
        ("--stages first,probe",
         {"stages": ("first", "probe"), "changed": {"stages": "first-probe"}}),
        ("--stages probe --init-from x.pt", {"stages": ("probe",)}),
        ("--weight 1", {"weight": 1}),
    ],
)  # fmt: skip
def test_defaults_follow_set_kind_ratio_and_method_and_what_is_said_wins(line, expected):
    args = parsed(line)
    assert {name: getattr(args, name) for name in expected} == expected


def test_the_method_may_be_chosen_by_another_flag(capsys):
    assert parsed("--ssp one", named="ssp").method == "one"
    said = commands.refused(capsys, parsed, "--ssp one --stages second", named="ssp")
    assert "--ssp one has first, probe" in said


def test_flags_come_from_a_file(tmp_path, capsys):
    path = tmp_path / "flags"
    path.write_text("--lr 0.2 # slower\n--epochs 7\n")
    args = parsed(f"@{path} --epochs 8")
    assert (args.lr, args.epochs) == (0.2, 8)
    for content, said in ((b'--out "open quote', "cannot be read"), (b"\xff", "not text in UTF-8")):
        path.write_bytes(content)
        assert said in commands.refused(capsys, parsed, f"@{path}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--queue 4", "--queue belongs to --kind-of-pairs queue"),
        ("--method one --weight 0.5", "--weight belongs to --stages second"),
        ("--stages first,probe --weight 1", "--weight belongs to --stages second"),
        ("--stages second,probe", "leaves out first"),
        ("--stages probe,first", "has first, second, probe, in this order"),
        ("--stages third", "has first, second, probe, in this order"),
        ("--stages first,first", "has first, second, probe, in this order"),
        ("--epochs 0", "at least 1"), ("--epochs 1.5", "an integer"), ("--lr 0", "above 0"),
        ("--lr nan", "must be"), ("--lr inf", "must be"), ("--weight 1.5", "at most 1"),
        ("--imb-ratio 0.5", "at least 1"), ("--kind-of-pairs some", "invalid choice"),
        ("--precision fp16", "invalid choice"), ("--method three", "invalid choice"),
        ("--unknown 1", "--unknown"), ("--epoch 3", "--epoch"), ("@nowhere", "nowhere"),
        ("--eval a.pt --fresh", "--fresh and --eval contradict"),
        ("--predict x", "belongs to --eval"),
        ("--eval a.pt --init-from b.pt", "contradict"), ("--save-features val", "--select val"),
        ("--dataset nowhere", "nothing there"),
        ("--seed -1", "at most 4294967295"),
        ("--init-from ''", "--init-from is empty"), ("--dataset ''", "--dataset is empty"),
    ],
)  # fmt: skip
def test_refusals(capsys, line, said):
    assert said in commands.refused(capsys, parsed, line)


def test_help_shows_the_three_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "More." not in shown
    for text in (
        "What it does. Three defaults", "of first (default: 10 / 100 / 1000)",
        "rate (default: 0.1)", "(default: all / all / queue)",
        "in percent of 100 % (default: 0.5)", "a file (default: -)",
        "--method {two,one}", "--select {last,val,test}", "--logger {tensorboard,none}",
    ):  # fmt: skip
        assert text in shown, text
