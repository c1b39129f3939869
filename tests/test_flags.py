"""common.parse: defaults, help, types, refusals, the run's name follow from one table."""

import math

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


def parsed(*flags, side=lambda dataset, root, size: size or 48, **more):
    words = [*map(str, flags)]
    return common.parse("What it does.\n\nMore.", FLAGS, METHODS, OTHER, side, words, **more)


def test_methods_and_kinds_may_have_defaults_of_their_own():
    assert parsed("--method", "one").decay == 1e-3 and parsed().decay == 1e-4
    args = parsed("--method", "one", "--dataset", "cifar10_lt")
    assert (args.decay, args.lr, args.stages, args.changed) == (1e-2, 0.1, ("first",), {})
    args = parsed("--method", "one", "--dataset", "cifar100_lt", "--stages", "first,probe")
    assert args.lr == 0.4 and args.changed == {"stages": "first-probe"}
    assert parsed("--dataset", "inat18").method == "one"


def test_ratios_may_have_defaults_of_their_own():
    for flags, weight in ((("--imb-ratio", 50), 0.25), (("--imb-ratio", 10), 0.5), ((), 0.5)):
        args = parsed("--dataset", "cifar10_lt", *flags)
        assert args.weight == weight and args.changed == {}
    assert parsed("--imb-ratio", 50).weight == 0.5, "of small images alone"


def test_the_method_may_be_chosen_by_another_flag(capsys):
    assert parsed("--ssp", "one", named="ssp").method == "one"
    assert "--ssp one has first, probe" in refused(
        capsys, "--ssp", "one", "--stages", "second", named="ssp"
    )


def refused(capsys, *flags, **options) -> str:
    with pytest.raises(SystemExit) as stopped:
        parsed(*flags, **options)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.strip().count("\n") == 0, shown
    return shown


def test_defaults_follow_the_kind_of_set():
    for flags, kind, backbone, lr, pairs in (
        ((), "letters", "resnet8", 0.1, "all"),
        (("--dataset", "cifar10_lt"), "small", "resnet32", 0.1, "all"),
        (("--dataset", "cifar100_lt"), "small", "resnet32", 0.3, "all"),
        (("--dataset", "imagenet_lt"), "large", "resnet50", 0.1, "queue"),
        (("--dataset", "mine.npz"), "small", "resnet32", 0.1, "all"),
        (("--dataset", "cifar10_lt", "--image-size", 96), "large", "resnet50", 0.1, "queue"),
    ):
        args = parsed(*flags)
        assert (args.kind, args.backbone, args.lr, args.kind_of_pairs) == (
            kind,
            backbone,
            lr,
            pairs,
        ), flags
        assert args.stages == METHODS["two"] and not args.changed.keys() - {"image_size"}
    assert parsed("--dataset", "mine.npz", side=lambda *rest: 200).kind == "large"
    assert parsed("--dataset", "mine.npz").imb_ratio is None, "a user's own images stay as they are"
    assert parsed().imb_ratio == 100 and parsed("--dataset", "imagenet_lt").imb_ratio is None


def test_said_values_win_and_name_the_run():
    args = parsed(
        "--lr", 0.2, "--epochs", 10, "--decay", 0, "--method", "one", "--quiet", "--seed", 3
    )
    assert (args.lr, args.epochs, args.decay, args.method) == (0.2, 10, 0.0, "one")
    assert args.changed == {"lr": 0.2, "decay": 0.0}, (
        "what is as it would be, or changes no figure, is no change"
    )
    assert args.stages == ("first", "probe") and args.quiet and not args.fresh


def test_flags_come_from_a_file(tmp_path):
    (tmp_path / "flags").write_text("--lr 0.2 # slower\n--epochs 7\n")
    args = parsed(f"@{tmp_path / 'flags'}", "--epochs", 8)
    assert (args.lr, args.epochs) == (0.2, 8)


def test_stages_are_a_part_of_the_chain(capsys):
    args = parsed("--stages", "first,probe")
    assert args.stages == ("first", "probe") and args.changed == {"stages": "first-probe"}
    assert parsed("--stages", "probe", "--init-from", "x.pt").stages == ("probe",)
    assert "leaves out first" in refused(capsys, "--stages", "second,probe")
    for wrong in ("probe,first", "third", "first,first"):
        assert "has first, second, probe, in this order" in refused(capsys, "--stages", wrong)
    assert "--weight belongs to --stages second" in refused(
        capsys, "--stages", "first,probe", "--weight", 1
    )
    assert parsed("--weight", 1).weight == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--queue 4", "--queue belongs to --kind-of-pairs queue"),
        ("--method one --weight 0.5", "--weight belongs to --stages second"),
        ("--epochs 0", "at least 1"), ("--epochs 1.5", "an integer"), ("--lr 0", "above 0"),
        ("--lr nan", "must be"), ("--lr inf", "must be"), ("--weight 1.5", "at most 1"),
        ("--imb-ratio 0.5", "at least 1"),
        ("--kind-of-pairs some", "invalid choice"), ("--precision fp16", "invalid choice"),
        ("--unknown 1", "--unknown"),
        ("--epoch 3", "--epoch"), ("--eval a.pt --fresh", "--fresh and --eval contradict"),
        ("--eval a.pt --init-from b.pt", "contradict"), ("--save-features val", "--select val"),
        ("--method three", "invalid choice"), ("@nowhere", "nowhere"),
    ],
)  # fmt: skip
def test_refusals(capsys, flags, said):
    assert said in refused(capsys, *flags.split())


def test_a_path_that_cannot_be_read_ends_the_parsing(capsys):
    def side(*rest):
        raise common.UserError("nothing there")

    assert "nothing there" in refused(capsys, "--dataset", "x", side=side)


def test_help_shows_the_three_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        stopped.value.code == 0
        and shown.count("What it does. Three defaults") == 1
        and "More." not in shown
    )
    for text in (
        "of first (default: 10 / 100 / 1000)", "rate (default: 0.1)",
        "(default: all / all / queue)", "in percent of 100 % (default: 0.5)", "a file (default: -)",
    ):  # fmt: skip
        assert text in shown, text
    for text in ("--method {two,one}", "--select {last,val,test}", "--logger {tensorboard,none}"):
        assert text in shown, text
