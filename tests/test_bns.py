"""bns_ipdpp.py: loss and k-DPP against golden vectors, loops and enumeration; stages end to end."""

import collections
import itertools
import math
import warnings

import commands
import fake_tree
import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.special import logsumexp
from test_ranks import on_ranks

import bns_ipdpp as bns
import common
import data_lt
import models

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
EXACT = {"rtol": 0, "atol": 1e-12}


def t(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=-1, eps=1e-12)


def case_names(golden, key: str) -> list[str]:
    cases = [found[1] for found in golden.match(rf"(c\d+)_{key}")]
    assert cases
    return cases


# --- balanced negative sampling -------------------------------------------------------------------


@pytest.mark.golden("bns_ipdpp_bns_loss")
def test_bns_loss_of_the_released_code(golden):
    for case in case_names(golden, "loss"):
        raw = torch.cat([t(golden[f"{case}_emb_{view}"]) for view in "ij"]).requires_grad_()
        y = torch.cat([t(golden[f"{case}_labels_{view}"]) for view in "ij"])
        tau = golden.scalar(f"{case}_tau")
        loss = bns.bns_loss(unit(raw), y, tau).mean()
        np.testing.assert_allclose(loss.item(), golden.scalar(f"{case}_loss"), **CLOSE)
        for name, sums in zip(
            ("pos", "neg"), bns.bns_sums(unit(raw.detach()), y, tau), strict=True
        ):
            np.testing.assert_allclose(sums, golden[f"{case}_{name}"], **CLOSE)
        single = bns.bns_loss(unit(raw.detach().float()), y, tau).mean()
        assert float(single) == pytest.approx(loss.item(), rel=1e-4)
        if f"{case}_grad_i" not in golden:
            assert (raw == 0).all(1).any(), "only zero rows have no reference gradient"
            continue
        loss.backward()
        expected = np.concatenate([golden[f"{case}_grad_{view}"] for view in "ij"])
        np.testing.assert_allclose(raw.grad, expected, **CLOSE)


@pytest.mark.golden("bns_ipdpp_bns_paper")
def test_the_loss_of_the_paper(golden):
    for case in case_names(golden, "labels"):
        q, v, y = (t(golden[f"{case}_{name}"]) for name in ("emb_q", "emb_v", "labels"))
        for reduction in ("sum", "mean"):
            ours = oracles.bns_loss_paper(q, v, y, golden.scalar(f"{case}_tau"), reduction)
            np.testing.assert_allclose(ours, golden.scalar(f"{case}_loss_{reduction}"), **CLOSE)


def test_bns_loss_against_a_double_loop():
    """Embeddings at random, all in one point, of one label (N = 0), opposite ones."""
    random = unit(torch.randn(14, 5, dtype=torch.float64, generator=common.generator(3)))
    point, opposite = torch.ones(14, 1).double(), torch.tensor([[1.0], [-1.0]]).double()
    several = [0, 0, 0, 1, 1, 2, 0] * 2
    for z, y in ((random, several), (point, several), (random, [0] * 14), (opposite, [0, 0])):
        for a, loss in enumerate(bns.bns_loss(z, torch.tensor(y), 0.4).tolist()):
            e = [math.exp(float(z[a] @ row) / 0.4) for row in z]
            positives = [e[b] for b in range(len(z)) if b != a and y[b] == y[a]]
            pos = sum(positives) / len(positives)
            neg = sum(e[b] for b in range(len(z)) if y[b] != y[a]) / len(z)
            expected = math.log1p(math.exp(-pos)) + math.log1p(math.exp(neg))
            assert loss == pytest.approx(expected, rel=1e-12)


def test_views_pass_one_by_one_and_embeddings_are_unit_rows_in_float32():
    net = models.Net(models.backbone("resnet8"), models.ProjectionHead(64, 8, 4))
    args = common.argparse.Namespace(precision="bf16", device="cpu")
    views, mean = torch.randn(2, 6, 3, 16, 16, generator=common.generator(0)), torch.zeros(16)
    views[1] += 3
    z = bns.Encoder(net, args)(views)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=2), torch.ones(2, 6))
    for view in views:
        mean = 0.9 * mean + 0.1 * net.backbone.conv1(view).detach().mean((0, 2, 3))
    torch.testing.assert_close(net.backbone.bn1.running_mean, mean, rtol=0.02, atol=0.02)


@pytest.mark.golden("bns_ipdpp_probs")
def test_true_label_probability(golden):
    ours = bns.true_log_p(t(golden["logits"]), t(golden["labels"]))
    np.testing.assert_allclose(ours, golden["logp"], **EXACT)
    np.testing.assert_allclose(ours.exp(), golden["p"], **EXACT)
    logits = torch.tensor([[0.0, 30.0], [200.0, 0.0], [0.0, 200.0]])
    saturated = bns.true_log_p(logits, torch.tensor([1, 0, 0]))
    assert saturated[0].item() == pytest.approx(-math.exp(-30), rel=1e-5), "not rounded to 0"
    assert saturated[1:].tolist() == [0, -200]


# --- the k-DPP ------------------------------------------------------------------------------------


def many_draws(log_p: torch.Tensor, k: int, scale: str, draws: int) -> torch.Tensor:
    """Positions [draws, k] of the first subsets that the script's sampler accepts, 0 < k < N."""
    parts, generator, found = bns.kernel_parts(log_p, scale), common.generator(0), []
    while sum(map(len, found)) < draws:
        found.append(bns.kdpp_rows(*parts, k, 4000, generator))
    return torch.cat(found)[:draws].nonzero()[:, 1].reshape(draws, k)


def check_subsets(drawn, subsets: np.ndarray, probability: np.ndarray) -> None:
    """Chi-square of how often each was drawn; those expected less than ten times are one cell."""
    often = collections.Counter(map(tuple, drawn.tolist()))
    seen = np.array([often[tuple(subset)] for subset in np.sort(subsets, 1).tolist()])
    expected = probability / probability.sum() * len(drawn)
    assert seen.sum() == len(drawn) and not seen[expected == 0].any()
    rare = expected < 10
    expected, seen = (np.append(x[~rare], x[rare].sum()) for x in (expected, seen))
    keep = expected > 0
    assert keep.sum() == 1 or stats.chisquare(seen[keep], expected[keep]).pvalue > 1e-4


def check_images(drawn: torch.Tensor, expected: np.ndarray) -> None:
    """How often each image was drawn, against its inclusion probability: each, and together."""
    draws, seen = len(drawn), np.bincount(drawn.flatten(), minlength=len(expected))
    random = np.abs(expected - 0.5) < 0.5 - 1e-9
    assert np.array_equal(seen[~random], draws * expected[~random].round()), "certain"
    inner = expected[random]
    z = (seen[random] - draws * inner) / np.sqrt(draws * inner * (1 - inner))
    assert not len(z) or np.abs(z).max() < 5 and stats.chi2.sf((z**2).sum(), len(z)) > 1e-6


@pytest.mark.golden("bns_ipdpp_smatrix")
def test_kernel_and_determinants(golden):
    for case, scale in itertools.product(case_names(golden, "p"), ("n", "n2")):
        d, u = oracles.kernel_parts(t(golden[f"{case}_p"]).log(), scale)
        dets = np.array([oracles.log_det(d, u, subset) for subset in golden[f"{case}_subsets"]])
        ours = {"S": oracles.kernel_matrix(d, u), "logdet": dets, "logratio": dets - dets[0]}
        for name, value in ours.items():
            np.testing.assert_allclose(value, golden[f"{case}_{name}_{scale}"], **EXACT)


@pytest.mark.golden("bns_ipdpp_kdpp_enum")
def test_kdpp_against_enumeration_and_50000_draws(golden):
    golden.waive("log_ek_d_.*", "the sampler has no such sums")
    log_p, k, subsets = t(golden["p"]).log(), golden.scalar("k"), golden["subsets"]
    member = np.zeros((len(subsets), len(log_p)))
    np.put_along_axis(member, subsets, 1, 1)
    for scale in ("n", "n2"):
        d, u = oracles.kernel_parts(log_p, scale)
        dets = np.array([oracles.log_det(d, u, subset) for subset in subsets])
        prob = np.exp(dets - logsumexp(dets))
        ours = {"logZ": logsumexp(dets), "prob": prob, "inclusion": prob @ member}
        ours["pair"] = member.T @ (prob[:, None] * member)
        for name, value in ours.items():
            np.testing.assert_allclose(value, golden[f"{name}_{scale}"], **EXACT)
        if 0 < k < len(d):
            check_subsets(many_draws(log_p, k, scale, 50_000), subsets, prob)


@pytest.mark.golden("bns_ipdpp_kdpp_exact")
def test_kdpp_against_long_arithmetic_and_inclusion_frequencies(golden):
    golden.waive(".*_log(Z|_ek)_.*", "the sampler has no such sums")
    for case, scale in itertools.product(case_names(golden, "k"), ("n", "n2")):
        log_p, k = golden[f"{case}_logp"], golden.scalar(f"{case}_k")
        np.testing.assert_allclose(np.exp(log_p), golden[f"{case}_p"], rtol=1e-12)
        d, u = oracles.kernel_parts(log_p, scale)
        np.testing.assert_allclose(d, golden[f"{case}_d_{scale}"], rtol=1e-10)
        np.testing.assert_allclose(u, golden[f"{case}_u_{scale}"], rtol=1e-10)
        inclusion = golden[f"{case}_inclusion_{scale}"]
        if 0 < k < len(d):
            check_images(many_draws(t(log_p), k, scale, 20_000), inclusion)


def test_edges_of_the_sampler(monkeypatch):
    generator, log_p = common.generator(0), t(np.log([0.2, 0.5, 0.9, 0.7]))
    for k, expected in ((4, 4), (9, 4), (0, 0)):
        assert bns.sample_kdpp(log_p, k, generator).tolist() == list(range(expected))
    for scale in ("n", "n2"):
        rows = bns.kdpp_rows(*bns.kernel_parts(log_p, scale), 2, 32, common.generator(1))
        ours = bns.sample_kdpp(log_p, 2, common.generator(1), scale)
        assert torch.equal(ours, rows[0].nonzero()[:, 0]), "the first that is accepted"
    with pytest.warns(UserWarning, match="all 40 images have p = 1"):
        every = [bns.sample_kdpp(torch.zeros(40), 10, generator) for _ in range(400)]
    check_images(torch.stack(every), np.full(40, 0.25))
    for least, scale in ((0.0, "n2"), (-1e-45, "n")):  # the least number of float32 above 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            p = torch.tensor([*[0.0] * 39, least])
            assert len(bns.sample_kdpp(p, 10, generator, scale)) == 10
    for bad in (0.1, math.nan):
        with pytest.raises(common.RunError, match="diverged"):
            bns.sample_kdpp(torch.tensor([bad, -1.0, -1.0]), 1, generator)
    large = t(np.log(np.random.default_rng(4).beta(6, 1.2, 1200)))  # C(1200, 600) > 1e308
    for k in (1, 600, 1199):
        assert len(set(bns.sample_kdpp(large, k, generator).tolist())) == k
    asked, none = [], torch.zeros(0, 4)
    monkeypatch.setattr(bns, "kdpp_rows", lambda d, u, k, tries, rng: asked.append(tries) or none)
    with pytest.raises(common.RunError, match="2 of 4 images .* in 100 tries"):
        bns.sample_kdpp(log_p, 2, generator, tries=100)
    assert 100 <= sum(asked) < 200, "as many tries as the error says, never another law"


@pytest.mark.golden("bns_ipdpp_legacy_subset")
def test_legacy_subset(golden):
    for case in case_names(golden, "counts"):
        counts, sizes = golden[f"{case}_counts"].tolist(), golden[f"{case}_k_list"].tolist()[::-1]
        kept = bns.legacy_subset(counts, sizes)
        assert [len(part) for part in kept] == golden[f"{case}_sizes"].tolist()
        assert np.array_equal(np.concatenate(kept), golden[f"{case}_index"])


# --- the command line -----------------------------------------------------------------------------

TINY = []
FAST = {
    "": "--backbone resnet8 --device cpu --logger none --quiet --imb-ratio 4 --workers 0",
    "pretrain": "--epochs 2 --batch-size 16 --lr 0.01 --projection-dim 8",
    "probe": "--probe-epochs 2 --probe-batch-size 16 --probe-lr 0.01",
    "finetune": "--finetune-epochs 3 --finetune-batch-size 16 --finetune-lr 0.003",
}
KDPP = "--num-samples 8 --resample-every 2".split()
COUNTS = [20, 17, 14, 12, 10, 9, 7, 6, 5, 5]  # of the set below at ratio 4
LABELS = np.repeat(np.arange(10), COUNTS)


@pytest.fixture(scope="module", autouse=True)
def tiny_set(tmp_path_factory):
    """Twenty letters of each kind to train on and ten to test; a narrow projection."""
    TINY[:] = [commands.tiny_letters(tmp_path_factory.mktemp("tiny") / "tiny.npz")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bns, "HIDDEN", dict.fromkeys(bns.HIDDEN, 16))
        patch.setattr(bns, "PROBE_IMAGES", dict.fromkeys(bns.PROBE_IMAGES, 6))
        yield


def parsed(*flags):
    """The arguments of a short run: the sizes of the stages that it has, then these flags."""
    words = list(map(str, flags))
    chain = ["pretrain", "probe" if "bns" in words else "finetune"]
    if "--stages" in words:
        chain = words[words.index("--stages") + 1].split(",")
    sizes = " ".join(FAST[name] for name in ("", *chain) if "--eval" not in words or not name)
    dataset = [] if "--dataset" in words else ["--dataset", TINY[0]]
    return commands.parse("bns_ipdpp", [*sizes.split(), *dataset, *words])


def call(*flags, out) -> dict:
    return commands.launch(bns, parsed(*flags), out)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> dict:
    """A run of the first stage alone."""
    out = tmp_path_factory.mktemp("encoder")
    run = call("--stages", "pretrain", "--save-features", "test", out=out)
    assert run["result"]["headline"] is None and (run["folder"] / "features_test.npz").exists()
    return run


@pytest.mark.parametrize("method", bns.METHODS)
def test_stages_end_to_end_and_begun_again_in_each(tmp_path, method):
    last = bns.METHODS[method][-1]
    flags = ["--method", method, "--select", "val", *(KDPP if last == "finetune" else [])]
    straight = call(*flags, out=tmp_path / "a")
    for stop in (("pretrain", 1, 1), (last, 0, 1), (last, 1, 0)):
        with commands.stopped(*stop):
            call(*flags, out=tmp_path / "b")
    again = call(*flags, out=tmp_path / "b")
    rows, result = straight["rows"], straight["result"]
    assert again["rows"] == rows and again["result"] == result
    start = ["--stages", last, "--init-from", again["folder"] / "pretrain.pt"]
    alone = call(*flags, *start, out=tmp_path / "c")
    for run, stage in ((again, "pretrain"), (again, last), (alone, last)):
        one, other = (commands.state(which["folder"], stage) for which in (run, straight))
        assert commands.same(one, other) and len(one) > 20
    assert {"loss", "same_label", "other_label"} <= set(rows[0]) and rows[0]["stage"] == "pretrain"
    assert result["headline"]["overall"] == pytest.approx(np.mean(result["per_class"]))
    assert rows[1]["passes"] == 2 * 2 * 16 * rows[0]["steps"], "two epochs of two views"
    kept = sum(min(n, 8 if last == "finetune" else 6) for n in result["counts"])
    assert kept == len(one["subset/positions"]) and rows[2]["steps"] == -(-kept // 16)
    assert rows[2]["passes"] == kept * (last == "finetune"), "frozen: nothing goes backward"
    drawn = [last == "finetune"] * 2 + [False]  # before e with e + 1 = 2, not before the last
    assert ["p_kept" in row for row in rows[2:]] == drawn[: len(rows) - 2]


FLAGS = {
    "--stages pretrain --epochs 1": "--temperature 0.2, --projection-dim 4, --jitter 0.5, "
    "--grey 0.9, --lr 0.02, --weight-decay 0, --batch-size 32, --seed 1, --flip 1",
    "--method bns --stages probe --probe-epochs 1": "--probe-epochs 2, --probe-batch-size 8, "
    "--probe-lr 0.02, --probe-jitter 0.1, --probe-grey 0.9, --frozen-bn train, --seed 3",
    "--stages finetune --num-samples 8 --finetune-epochs 1": "--finetune-epochs 2, "
    "--finetune-batch-size 8, --finetune-lr 0.01, --finetune-jitter 0.3, --finetune-grey 0.9, "
    "--weight-decay 0, --subset-mode uniform, --subset-mode legacy, --num-samples 6",
}


@pytest.mark.parametrize("stage", FLAGS)
def test_every_flag_changes_what_it_says(tmp_path, encoder, stage):
    start = [] if "pretrain" in stage else ["--init-from", encoder["folder"] / "pretrain.pt"]
    seen = set()
    for k, flags in enumerate(("", *FLAGS[stage].split(", "))):
        run = call(*stage.split(), *flags.split(), *start, out=tmp_path / str(k))
        seen.add(tuple(row["loss"] for row in run["rows"]))
        assert len(seen) == k + 1, f"{flags}: losses as with other flags"


def test_subsets_of_every_mode(monkeypatch):
    """Who is kept, when it is drawn; the k-DPP sees p(i) of the network and logs what it kept."""
    calls, sample = [], bns.sample_kdpp
    monkeypatch.setattr(bns, "sample_kdpp", lambda *rest: calls.append(rest) or sample(*rest))
    data = data_lt.load(parsed())
    views, labels, _ = next(iter(data_lt.evaluation_loader(parsed(), data.train)))
    modes = {
        "kdpp": KDPP,
        "kdpp --dpp-scale n2": KDPP,
        "uniform": KDPP,
        "legacy": KDPP[:2],
        "all": [],
    }
    for words, flags in modes.items():
        args = parsed("--subset-mode", *words.split(), *flags)
        net = bns.build_classifier(args, "finetune", bns.build(args).backbone, 10).train()
        subset, kept, logs = bns.Subset(args, "finetune", data), [], {}
        for epoch in filter(subset.due, range(args.finetune_epochs)):
            logs = subset.draw(net, epoch)
            kept.append(subset.positions.clone())
            most = 99 if words == "all" else 8
            assert np.bincount(LABELS[kept[-1]]).tolist() == [min(n, most) for n in COUNTS]
            assert len(kept[-1].unique()) == len(kept[-1])
        again = words not in ("legacy", "all")
        assert len(kept) == 1 + again and not (again and torch.equal(*kept)), "drawn anew"
        if words == "legacy":
            first, within = np.cumsum([0, *COUNTS]), bns.legacy_subset(COUNTS, [8] * 10)
            assert kept[0].tolist() == [first[c] + i for c in range(10) for i in within[c]]
        with torch.no_grad():
            p = net.eval()(views[0]).softmax(1).gather(1, labels[:, None])[:, 0]
        scales = [call[3] for call in calls]
        assert scales == [args.dpp_scale] * 20 * ("kdpp" in words) and bool(logs) == bool(scales)
        if scales:
            seen = torch.cat([log_p for log_p, *_ in calls[10:]]).exp()
            torch.testing.assert_close(seen, p, rtol=1e-4, atol=1e-6)
            uniform = sum(min(len(part), 8) * float(part.mean()) for part in p.split(COUNTS))
            assert logs["p_uniform"] == pytest.approx(uniform / len(kept[1]), rel=1e-4)
            assert logs["p_kept"] == pytest.approx(float(p[kept[1]].mean()), rel=1e-4)
        calls.clear()


def test_periods_are_shares_and_epochs_of_draws_are_the_published_ones():
    data = data_lt.load(parsed())
    for words, expected in (
        ("--dataset cifar10_lt", range(9, 99, 10)), ("--dataset cifar100_lt", (19, 39, 59, 79)),
        ("--finetune-epochs 30", range(2, 29, 3)), ("--resample-every 0", ()),
        ("--subset-mode all", ()), ("--dataset cifar10_lt --resample-every 40", (39, 79)),
    ):  # fmt: skip
        args = commands.parse("bns_ipdpp", words.split())
        subset = bns.Subset(args, "finetune", data)
        due = [epoch for epoch in range(args.finetune_epochs) if subset.due(epoch)]
        assert due == [0, *expected], words


@pytest.mark.parametrize(("dataset", "probe"), [("cifar10_lt", 20), ("cifar100_lt", 5)])
def test_published_settings(dataset, probe):
    args = commands.parse("bns_ipdpp", ["--dataset", dataset, "--device", "cpu"])
    for stage, rise in (("pretrain", 20), ("finetune", 5), ("probe", probe)):
        peak = 1e-3 * bns.setting(args, stage, "batch_size") / 256
        rates = [bns.rate(args, stage, epoch) for epoch in (0, rise / 2, rise)]
        assert rates == pytest.approx([0, peak / 2, peak], abs=0), stage
    decayed, plain = bns.adamw(args, bns.build(parsed()), "pretrain").param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0)
    assert {p.ndim for p in plain["params"]} == {1} and min(p.ndim for p in decayed["params"]) == 2
    chain = data_lt.Augment(
        32, None, None, **bns.views_of(args, "pretrain", data_lt.load(parsed()))
    )
    assert (chain.jitter, chain.jitter_p, chain.grey) == ((1.6, 1.6, 1.6, 0.4), 0.8, 0.2)
    assert (chain.blur_p, chain.blur_kernel, chain.blur_floor) == (1.0, 3, True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--temperature 0.01", "at least 0.0115"), ("--jitter 3", "at most 2.5"),
        ("--batch-size 200", "batch size 200"),
        ("--init-from ENCODER --data-seed 1", "--data-seed 0"),
        ("--init-from ENCODER --imb-ratio 2", "--imb-ratio 4.0"),
        ("--init-from ENCODER --select val", "other images"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, encoder, flags, said):
    words = flags.replace("ENCODER", str(encoder["folder"] / "pretrain.pt")).split()
    assert said in commands.refused(capsys, call, *words, out=tmp_path)


def test_a_probe_its_features_groups_evaluation_and_compilation(tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    monkeypatch.setattr(bns, "GROUPS", {TINY[0]: {"many": 12, "few": 7}})
    flags = "--method bns --compile --frozen-bn train --save-features test".split()
    run = call(*flags, out=tmp_path)
    assert len(compiled) == 2
    before, after = (commands.state(run["folder"], stage) for stage in ("pretrain", "probe"))
    for name in (name for name in before if name.startswith("model/backbone.")):
        drifts = name.endswith(("mean", "var", "tracked"))
        assert torch.equal(after[name], before[name]) != drifts, name
    kept = np.bincount(LABELS[after["subset/positions"]]).tolist()
    assert kept == [min(n, 6) for n in COUNTS]
    with np.load(run["folder"] / "features_test.npz") as saved:
        assert saved["features"].shape == (100, 64) and saved["indices"][-1] == 99
    counts, recall = np.array(COUNTS), np.array(run["result"]["per_class"])
    chosen = {"many": counts > 12, "few": counts < 7, "medium": (counts >= 7) & (counts <= 12)}
    for name, inside in chosen.items():
        assert run["result"]["own_groups"][name] == pytest.approx(recall[inside].mean())
    capsys.readouterr()
    words = "--eval", run["folder"] / "probe.pt"
    call("--method", "bns", *words, out=tmp_path)
    assert f"overall {100 * run['result']['headline']['overall']:.2f}%" in capsys.readouterr().out
    assert "evaluates its own finetune.pt" in commands.refused(capsys, call, *words, out=tmp_path)


# --- ranks ----------------------------------------------------------------------------------------


class Double(bns.Encoder):
    def forward(self, views):
        return super().forward(views.double())


def two_stages(folder: str) -> dict:
    """Pre-training in float64, batch norm frozen, and the first draw: what they end with."""
    bns.Encoder, bns.HIDDEN = Double, {"small": 16}
    torch.set_num_threads(1)
    args = parsed("--dataset", f"{folder}/tiny.npz", "--out", f"{folder}/{common.world_size()}")
    args.device, args.precision, args.num_samples = "cpu", "fp32", 8
    data, run = data_lt.load(args), common.Run(args, "bns_ipdpp", "data")
    net = bns.build(args).double().eval()
    net.train = lambda *mode: net
    bns.pretrain(run, args, data, net)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    net = bns.build_classifier(args, "finetune", net.backbone.float(), 10)
    if common.rank():
        net.backbone.bn1.running_mean.add_(1)  # those of rank 0 count
        args.batch_size = 17
        with pytest.raises(common.UserError, match="no multiple of 2 ranks"):
            bns.check(args, data)
    subset = bns.Subset(args, "finetune", data)
    rows = [subset.draw(net, 0)]
    rows += [{key: row[key] for key in ("loss", "same_label", "other_label")} for row in run.rows]
    return {"rows": rows, "kept": kept, "positions": subset.positions}


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    """Loss over all pairs of the batch, weights, p(i) and the subset."""
    commands.tiny_letters(tmp_path / "tiny.npz")
    monkeypatch.setattr(bns, "Encoder", bns.Encoder)  # put back afterwards
    ours = two_stages(str(tmp_path))
    for theirs in on_ranks(two_stages, (str(tmp_path),), 2, tmp_path):
        assert torch.equal(theirs["positions"], ours["positions"])
        for mine, row, close in zip(ours["rows"], theirs["rows"], (1e-5, 1e-7, 1e-7), strict=True):
            assert row == pytest.approx(mine, rel=close)
        for name, value in ours["kept"].items():
            torch.testing.assert_close(theirs["kept"][name], value, rtol=1e-6, atol=1e-8)


def test_fake_imagenet_lt_on_two_ranks(tmp_path):
    fake_tree.make_imagenet_lt(tmp_path)
    flags = "--dataset imagenet_lt --gpus 2 --backbone resnet10 --image-size 64 --batch-size 8"
    flags += " --epochs 1 --finetune-epochs 1 --finetune-batch-size 8 --num-samples 3 --workers 1"
    commands.run("bns_ipdpp.py", *flags.split(), "--data-root", tmp_path, out=tmp_path / "runs")
    assert sum(map(sum, commands.result(tmp_path / "runs")["confusion"])) == 10
    assert [row["stage"] for row in commands.rows(tmp_path / "runs")] == ["pretrain", "finetune"]
