"""bns_ipdpp.py: loss and k-DPP against golden vectors, loops and enumeration; stages end to end."""

import itertools
import math
import sys
import warnings

import commands
import fake_tree
import numpy as np
import oracles
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from scipy import stats

import bns_ipdpp as bns
import common
import data_lt
import models

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


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
        pos, neg = bns.bns_sums(unit(raw.detach()), y, tau)
        np.testing.assert_allclose(pos, golden[f"{case}_pos"], **CLOSE)
        np.testing.assert_allclose(neg, golden[f"{case}_neg"], **CLOSE)
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
        tau = golden.scalar(f"{case}_tau")
        for reduction in ("sum", "mean"):
            theirs = oracles.bns_loss_paper(q, v, y, tau, reduction)
            np.testing.assert_allclose(theirs, golden.scalar(f"{case}_loss_{reduction}"), **CLOSE)


def test_bns_loss_against_a_double_loop_and_known_values():
    rng, tau = common.generator(3), 0.4
    z = unit(torch.randn(14, 5, dtype=torch.float64, generator=rng))
    y = torch.tensor([0, 0, 0, 1, 1, 2, 0]).repeat(2)
    for a, loss in enumerate(bns.bns_loss(z, y, tau).tolist()):
        e = [math.exp(float(z[a] @ z[b]) / tau) for b in range(14)]
        positives = [e[b] for b in range(14) if b != a and y[b] == y[a]]
        pos = sum(positives) / len(positives)
        neg = sum(e[b] for b in range(14) if y[b] != y[a]) / 14
        expected = math.log1p(math.exp(-pos)) + math.log1p(math.exp(neg))
        assert loss == pytest.approx(expected, rel=1e-12)
    collapsed, y = torch.ones(12, 1).double(), torch.tensor([0, 0, 0, 1, 1, 2] * 2)
    share = torch.tensor([0.5, 0.5, 0.5, 2 / 3, 2 / 3, 5 / 6]).double().repeat(2) * math.exp(2)
    expected = share.exp().log1p() + math.log1p(math.exp(-math.exp(2)))
    torch.testing.assert_close(bns.bns_loss(collapsed, y, 0.5), expected)
    assert (bns.bns_loss(z, torch.zeros(14), 0.5) > math.log(2)).all(), "N = 0 leaves ln 2"
    alone = bns.bns_loss(torch.tensor([[1.0], [-1.0]]), torch.zeros(2), 0.5)  # P = exp(-2)
    expected = math.log1p(math.exp(-math.exp(-2))) + math.log(2)
    assert alone.tolist() == pytest.approx([expected] * 2)


def test_views_pass_one_by_one_and_embeddings_are_unit_rows_in_float32():
    torch.manual_seed(0)
    net = models.Net(models.backbone("resnet8"), models.ProjectionHead(64, 8, 4))
    args = common.argparse.Namespace(precision="bf16", device="cpu")
    views, expected = torch.randn(2, 6, 3, 16, 16), torch.zeros(16)
    views[1] += 3
    z = bns.Encoder(net, args)(views)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=2), torch.ones(2, 6))
    with torch.no_grad():
        for view in views:
            expected = 0.9 * expected + 0.1 * net.backbone.conv1(view).mean((0, 2, 3))
    torch.testing.assert_close(net.backbone.bn1.running_mean, expected, rtol=0.02, atol=0.02)


@pytest.mark.golden("bns_ipdpp_probs")
def test_true_label_probability(golden):
    ours = bns.true_log_p(t(golden["logits"]), t(golden["labels"]))
    np.testing.assert_allclose(ours, golden["logp"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.exp(), golden["p"], rtol=0, atol=1e-12)
    logits = torch.tensor([[0.0, 30.0], [200.0, 0.0], [0.0, 200.0]])
    saturated = bns.true_log_p(logits, torch.tensor([1, 0, 0]))
    assert saturated[0].item() == pytest.approx(-math.exp(-30), rel=1e-5), "not rounded to 0"
    assert saturated[1:].tolist() == [0, -200]


# --- the k-DPP ------------------------------------------------------------------------------------


def log_(p) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(p)


def many_draws(d: np.ndarray, u: np.ndarray, k: int, draws: int, tries: int = 4000) -> np.ndarray:
    """The first `draws` subsets that the script's sampler accepts, positions [draws, k]."""
    generator, found = common.generator(0, "many draws"), []
    while sum(map(len, found)) < draws:
        found.append(bns.kdpp_rows(t(d), t(u), k, tries, generator))
    return torch.cat(found)[:draws].nonzero()[:, 1].reshape(draws, k).numpy()


def counts_of(subsets: np.ndarray, drawn) -> np.ndarray:
    """How often each of the subsets is among the drawn ones."""
    place = {tuple(row): i for i, row in enumerate(np.sort(subsets, 1).tolist())}
    seen = np.zeros(len(subsets))
    for row in drawn:
        seen[place[tuple(sorted(row.tolist()))]] += 1
    return seen


def p_value(seen: np.ndarray, probability: np.ndarray) -> float:
    """Chi-square; cells of an expectation below 10 are put together."""
    expected = probability / probability.sum() * seen.sum()
    assert seen[expected == 0].sum() == 0
    small = expected < 10
    expected, seen = (np.append(x[~small], x[small].sum()) for x in (expected, seen))
    keep = expected > 0
    return stats.chisquare(seen[keep], expected[keep]).pvalue if keep.sum() > 1 else 1.0


def check_frequencies(drawn: np.ndarray, expected: np.ndarray) -> None:
    """How often each image was drawn, against its inclusion probability: each, and together."""
    draws, seen = len(drawn), np.bincount(drawn.ravel(), minlength=len(expected))
    random = np.abs(expected - 0.5) < 0.5 - 1e-9
    assert np.array_equal(seen[~random], draws * expected[~random].round()), "certain"
    inner = expected[random]
    z = (seen[random] - draws * inner) / np.sqrt(draws * inner * (1 - inner))
    assert not len(z) or np.abs(z).max() < 5 and stats.chi2.sf((z**2).sum(), len(z)) > 1e-6


@pytest.mark.golden("bns_ipdpp_smatrix")
def test_kernel_and_determinants(golden):
    for case, scale in itertools.product(case_names(golden, "p"), ("n", "n2")):
        d, u = oracles.kernel_parts(log_(golden[f"{case}_p"]), scale)
        dets = np.array([oracles.log_det(d, u, subset) for subset in golden[f"{case}_subsets"]])
        ours = {"S": oracles.kernel_matrix(d, u), "logdet": dets, "logratio": dets - dets[0]}
        for name, value in ours.items():
            np.testing.assert_allclose(value, golden[f"{case}_{name}_{scale}"], rtol=0, atol=1e-12)


@pytest.mark.golden("bns_ipdpp_kdpp_enum")
def test_kdpp_against_enumeration_and_50000_draws(golden):
    log_p, k, subsets = log_(golden["p"]), golden.scalar("k"), golden["subsets"]
    exact = {"rtol": 0, "atol": 1e-12}
    for scale in ("n", "n2"):
        d, u = oracles.kernel_parts(log_p, scale)
        tables, probability = oracles.kdpp_tables(d, u, k), golden[f"prob_{scale}"]
        ours = np.exp([oracles.log_prob(d, u, subset, tables) for subset in subsets])
        np.testing.assert_allclose(ours, probability, **exact)
        log_e, log_z = oracles.log_normalisers(tables)
        np.testing.assert_allclose(log_e, golden[f"log_ek_d_{scale}"], **exact)
        assert log_z[k] == pytest.approx(golden.scalar(f"logZ_{scale}"), abs=1e-12)
        inclusion = oracles.inclusion_probabilities(tables)
        np.testing.assert_allclose(inclusion, golden[f"inclusion_{scale}"], **exact)
        member = np.zeros((len(subsets), len(log_p)))
        np.put_along_axis(member, subsets, 1, 1)
        pairs = member.T @ (ours[:, None] * member)
        np.testing.assert_allclose(pairs, golden[f"pair_{scale}"], **exact)
        if 0 < k < len(d):
            assert p_value(counts_of(subsets, many_draws(d, u, k, 50_000)), probability) > 1e-4
        rng, generator = np.random.default_rng(7), common.generator(0, "one call a draw")
        table = (oracles.sample_table(tables, rng) for _ in range(5000))
        single = (bns.sample_kdpp(t(log_p), k, generator, scale) for _ in range(3000))
        for drawn in (table, single):
            assert p_value(counts_of(subsets, drawn), probability) > 1e-4, scale


@pytest.mark.golden("bns_ipdpp_kdpp_exact")
def test_kdpp_against_long_arithmetic_and_inclusion_frequencies(golden):
    tight = {"rtol": 1e-10, "atol": 1e-10}
    for case, scale in itertools.product(case_names(golden, "k"), ("n", "n2")):
        log_p, k = golden[f"{case}_logp"], golden.scalar(f"{case}_k")
        np.testing.assert_allclose(np.exp(log_p), golden[f"{case}_p"], rtol=1e-12)
        d, u = oracles.kernel_parts(log_p, scale)
        np.testing.assert_allclose(d, golden[f"{case}_d_{scale}"], rtol=1e-10)
        np.testing.assert_allclose(u, golden[f"{case}_u_{scale}"], rtol=1e-10)
        tables = oracles.kdpp_tables(d, u, k)
        log_e, log_z = oracles.log_normalisers(tables)
        np.testing.assert_allclose(log_e, golden[f"{case}_log_ek_d_{scale}"], **tight)
        np.testing.assert_allclose(log_z, golden[f"{case}_logZ_all_{scale}"], **tight)
        assert log_z[-1] == pytest.approx(golden.scalar(f"{case}_logZ_{scale}"), rel=1e-10)
        inclusion = oracles.inclusion_probabilities(tables)
        np.testing.assert_allclose(inclusion, golden[f"{case}_inclusion_{scale}"], atol=1e-10)
        if 0 < k < len(d):
            check_frequencies(many_draws(d, u, k, 20_000), inclusion)


PROFILES = {  # log p of the 200 images of a class
    "untrained": np.log(np.linspace(0.05, 0.15, 200)),
    "trained": np.log(np.append(np.linspace(0.9, 1, 170), np.linspace(0.01, 0.3, 30))),
    "almost equal to 1": -np.linspace(1e-38, 2e-38, 200),
    "one hard image": np.append(-np.geomspace(1e-9, 1e-7, 199), -4.0),
}


@pytest.mark.parametrize("scale", ["n", "n2"])
@pytest.mark.parametrize("name", PROFILES)
def test_inclusion_of_20000_draws_of_every_tenth_image(name, scale):
    d, u = oracles.kernel_parts(PROFILES[name], scale)
    expected = oracles.inclusion_probabilities(oracles.kdpp_tables(d, u, 20))
    drawn = many_draws(d, u, 20, 20_000)
    check_frequencies(drawn, expected)
    uneven = scale == "n" and name in ("trained", "one hard image")
    assert (expected.std() > 0.02) == uneven, "a profile that tells the k-DPP from uniform draws"
    if uneven:
        with pytest.raises(AssertionError):
            check_frequencies(drawn, np.full(len(d), 0.1))


def test_edges_of_the_sampler(monkeypatch):
    generator, log_p = common.generator(0), t(np.log([0.2, 0.5, 0.9, 0.7]))
    for k, expected in ((4, 4), (9, 4), (0, 0)):
        assert bns.sample_kdpp(log_p, k, generator).tolist() == list(range(expected))
    seeds = [*range(20), *range(20)]
    pairs = [bns.sample_kdpp(log_p.float(), 2, common.generator(s)).tolist() for s in seeds]
    assert pairs[:20] == pairs[20:] and all(a < b for a, b in pairs)
    assert len(set(map(tuple, pairs))) > 3
    with pytest.warns(UserWarning, match="all 40 images have p = 1"):
        every = [bns.sample_kdpp(torch.zeros(40), 10, generator) for _ in range(400)]
    check_frequencies(torch.stack(every).numpy(), np.full(40, 0.25))
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


@pytest.fixture(scope="module", autouse=True)
def tiny_set(tmp_path_factory):
    """Twenty letters of each kind to train on and ten to test; a narrow projection."""
    TINY[:] = [commands.tiny_letters(tmp_path_factory.mktemp("tiny") / "tiny.npz")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bns, "HIDDEN", dict.fromkeys(bns.HIDDEN, 16))
        patch.setattr(bns, "PROBE_IMAGES", dict.fromkeys(bns.PROBE_IMAGES, 6))
        yield


@pytest.fixture(autouse=True)
def as_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(commands.ROOT / "bns_ipdpp.py")])


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
    """Run the script in this process: its rows, its result and its folder."""
    torch.set_num_threads(1)
    args = parsed(*flags)
    args.out, runs, made = str(out), [], common.Run.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common.Run, "__init__", lambda run, *rest: (runs.append(run), made(run, *rest))[1]
        )
        try:
            common.launch(bns.main, args)
        finally:
            for run in runs:
                getattr(run, "lock", None) and run.lock.close()  # as the end of the process would
    found = {"rows": commands.rows(out), "result": commands.result(out)}
    return found | {"folder": commands.folder(out)}


def state_of(run: dict, stage: str) -> dict[str, torch.Tensor]:
    """All tensors of a stage's checkpoint, such as model.head.bias and optimizer.state.0.step."""
    found = {}

    def walk(value, path):
        if isinstance(value, torch.Tensor):
            found[".".join(path)] = value
        for key, part in value.items() if isinstance(value, dict) else ():
            walk(part, [*path, str(key)])

    walk(common.load_checkpoint(run["folder"] / f"{stage}.pt")["state"], [])
    return found


def assert_same_end(one: dict, other: dict, *stages: str) -> None:
    for ours, theirs in ((state_of(one, stage), state_of(other, stage)) for stage in stages):
        assert ours.keys() == theirs.keys() and len(ours) > 20
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> list:
    """Flags that start from a pre-trained encoder of the tiny set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bns_ipdpp.py"])
        run = call("--stages", "pretrain", out=tmp_path_factory.mktemp("encoder"))
    return ["--init-from", run["folder"] / "pretrain.pt"]


@pytest.mark.parametrize("method", ["bns_ipdpp", "bns"])
def test_stages_end_to_end_and_begun_again_in_each(tmp_path, monkeypatch, method):
    last = bns.METHODS[method][-1]
    flags = ["--method", method, "--select", "val", *(KDPP if method == "bns_ipdpp" else [])]
    straight, guard = call(*flags, out=tmp_path / "a"), common.Stage.guard
    for stop in (("pretrain", 1, 1), (last, 0, 1), (last, 1, 0)):

        def stopping(stage, loss, stop=stop):
            if (stage.name, stage.epoch, stage.step) == stop:
                raise KeyboardInterrupt
            guard(stage, loss)

        monkeypatch.setattr(common.Stage, "guard", stopping)
        with pytest.raises(KeyboardInterrupt):
            call(*flags, out=tmp_path / "b")
    monkeypatch.setattr(common.Stage, "guard", guard)
    again = call(*flags, out=tmp_path / "b")
    assert again["rows"] == straight["rows"] and again["result"] == straight["result"]
    assert_same_end(again, straight, "pretrain", last)
    rows, result = straight["rows"], straight["result"]
    assert {"loss", "same_label", "other_label"} <= set(rows[0]) and rows[0]["stage"] == "pretrain"
    assert result["headline"]["overall"] == pytest.approx(np.mean(result["per_class"]))
    assert rows[1]["passes"] == 2 * 2 * 16 * rows[0]["steps"], "two epochs of two views"
    assert (rows[-1]["passes"] == 0) == (last == "probe"), "frozen: nothing goes backward"
    start = ["--stages", last, "--init-from", again["folder"] / "pretrain.pt"]
    assert_same_end(call(*flags, *start, out=tmp_path / "c"), straight, last)


FLAGS = {
    "--stages pretrain": "--temperature 0.2, --projection-dim 4, --jitter 0.5, --grey 0.9, "
    "--lr 0.02, --weight-decay 0, --batch-size 32, --seed 1, --flip 1",
    "--method bns --stages probe": "--probe-epochs 3, --probe-batch-size 8, --probe-lr 0.02, "
    "--probe-jitter 0.1, --probe-grey 0.9, --frozen-bn train, --seed 3",
    "--stages finetune --num-samples 8": "--finetune-epochs 4, --finetune-batch-size 8, "
    "--finetune-lr 0.01, --finetune-jitter 0.3, --finetune-grey 0.9, --weight-decay 0, "
    "--subset-mode uniform, --subset-mode legacy, --num-samples 6",
}


@pytest.mark.parametrize("stage", FLAGS)
def test_every_flag_changes_what_it_says(tmp_path, encoder, stage):
    seen, start = set(), [] if "pretrain" in stage else encoder
    for flags in ("", *FLAGS[stage].split(", ")):
        run = call(*stage.split(), *flags.split(), *start, out=tmp_path / flags.replace(" ", ""))
        seen.add(tuple(row["loss"] for row in run["rows"]))
        assert len(seen) == len(list(tmp_path.iterdir())), f"{flags}: losses as with other flags"


@pytest.fixture
def draws(monkeypatch):
    """What is drawn: (epoch, positions), and the calls of the k-DPP."""
    found, calls, draw, sample = [], [], bns.Subset.draw, bns.sample_kdpp

    def noted(subset, net, epoch):
        logs = draw(subset, net, epoch)
        found.append((epoch, subset.positions.clone()))
        return logs

    monkeypatch.setattr(bns.Subset, "draw", noted)
    monkeypatch.setattr(bns, "sample_kdpp", lambda *rest: (calls.append(rest), sample(*rest))[1])
    return found, calls


@pytest.mark.parametrize("mode", ["kdpp n", "kdpp n2", "uniform", "legacy", "all"])
def test_subsets_of_every_mode_from_one_encoder(tmp_path, encoder, draws, mode):
    name, _, scale = mode.partition(" ")
    flags = {"all": [], "legacy": KDPP[:2]}.get(name, KDPP) + ["--subset-mode", name]
    flags += ["--dpp-scale", scale] if scale else []
    run = call("--stages", "finetune", *flags, *encoder, out=tmp_path)
    (epochs, subsets), calls = zip(*draws[0], strict=True), draws[1]
    labels, most = np.repeat(np.arange(10), COUNTS), 99 if name == "all" else 8
    for positions in subsets:
        assert np.bincount(labels[positions]).tolist() == [min(n, most) for n in COUNTS]
        assert len(set(positions.tolist())) == len(positions)
    again = name in ("kdpp", "uniform")
    assert epochs == ((0, 1) if again else (0,)), "before e with e + 1 = 2, not before the last"
    assert not again or not torch.equal(*subsets), "fresh randomness at each draw"
    if name == "legacy":
        first, within = np.cumsum([0, *COUNTS]), bns.legacy_subset(COUNTS, [8] * 10)
        assert subsets[0].tolist() == [first[c] + i for c in range(10) for i in within[c]]
    assert [call[3] for call in calls] == [scale] * 20 * (name == "kdpp")
    assert torch.equal(state_of(run, "finetune")["subset.positions"], subsets[-1])
    assert run["rows"][0]["passes"] == len(subsets[0]) and run["result"]["counts"] == COUNTS
    logged = ["p_kept" in row for row in run["rows"]]
    assert logged == ([True, True, False] if name == "kdpp" else [False] * 3)


def test_the_kdpp_sees_p_of_the_network_and_logs_what_it_kept(draws):
    args = parsed(*KDPP)
    data = data_lt.load(args)
    net = bns.build_classifier(args, "finetune", bns.build(args).backbone, 10)
    subset = bns.Subset(args, "finetune", data)
    logs = subset.draw(net.train(), 0)
    views, labels, _ = next(iter(data_lt.evaluation_loader(args, data.train)))
    with torch.no_grad():
        p = net.eval()(views[0]).softmax(1).gather(1, labels[:, None])[:, 0]
    ours = torch.cat([log_p for log_p, *_ in draws[1]]).exp()
    torch.testing.assert_close(ours, p, rtol=1e-4, atol=1e-6)
    uniform = sum(min(len(part), 8) * float(part.mean()) for part in p.split(COUNTS))
    assert logs["p_uniform"] == pytest.approx(uniform / len(subset.positions), rel=1e-4)
    assert logs["p_kept"] == pytest.approx(float(p[subset.positions].mean()), rel=1e-4)


def test_periods_are_shares_and_epochs_of_draws_are_the_published_ones():
    for words, expected in (
        ("--dataset cifar10_lt", range(9, 99, 10)), ("--dataset cifar100_lt", (19, 39, 59, 79)),
        ("--finetune-epochs 30", range(2, 29, 3)), ("--resample-every 0", ()),
        ("--subset-mode all", ()), ("--dataset cifar10_lt --resample-every 40", (39, 79)),
    ):  # fmt: skip
        args = commands.parse("bns_ipdpp", words.split())
        data = data_lt.load(commands.parse("bns_ipdpp", ["--dataset", TINY[0]]))
        subset = bns.Subset(args, "finetune", data)
        due = [epoch for epoch in range(args.finetune_epochs) if subset.due(epoch)]
        assert due == [0, *expected], words


def test_the_probe_leaves_the_encoder_alone_and_takes_few_of_a_class(tmp_path, encoder):
    start = common.load_checkpoint(encoder[1])["state"]["model"]
    for mode in ("eval", "train"):
        flags = ["--method", "bns", "--stages", "probe", "--frozen-bn", mode, *encoder]
        run = call(*flags, out=tmp_path / mode)
        state = state_of(run, "probe")
        for name in start.keys() - {key for key in start if key.startswith("head")}:
            drifts = name.endswith(("mean", "var", "tracked")) and mode == "train"
            assert torch.equal(state[f"model.{name}"], start[name]) != drifts, (mode, name)
        kept = np.bincount(np.repeat(np.arange(10), COUNTS)[state["subset.positions"]])
        assert kept.tolist() == [min(n, 6) for n in COUNTS]
        assert run["rows"][0]["steps"] == -(-sum(kept) // 16)


@pytest.mark.parametrize(("dataset", "probe"), [("cifar10_lt", 20), ("cifar100_lt", 5)])
def test_published_settings(dataset, probe):
    args = commands.parse("bns_ipdpp", ["--dataset", dataset, "--device", "cpu"])
    for stage, rise in (("pretrain", 20), ("finetune", 5), ("probe", probe)):
        peak = 1e-3 * bns.setting(args, stage, "batch_size") / 256
        rates = [bns.rate(args, stage, epoch) for epoch in (0, rise / 2, rise)]
        assert rates == pytest.approx([0, peak / 2, peak], abs=0), stage
    net = models.Net(models.backbone("resnet18"), models.ProjectionHead(512, 2048, 128))
    assert models.count_parameters(net) == 12_481_728
    decayed, plain = bns.adamw(args, net, "pretrain").param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0)
    assert {p.ndim for p in plain["params"]} == {1} and min(p.ndim for p in decayed["params"]) == 2
    data = data_lt.load(commands.parse("bns_ipdpp", ["--dataset", TINY[0]]))
    chain = data_lt.Augment(32, None, None, **bns.views_of(args, "pretrain", data))
    assert (chain.jitter, chain.jitter_p, chain.grey) == ((1.6, 1.6, 1.6, 0.4), 0.8, 0.2)
    assert (chain.blur_p, chain.blur_kernel, chain.blur_floor) == (1.0, 3, True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--stages finetune", "leaves out pretrain"), ("--temperature 0.01", "at least 0.0115"),
        ("--subset-mode uniform --dpp-scale n2", "--dpp-scale belongs to --subset-mode kdpp"),
        ("--subset-mode all --num-samples 5", "--num-samples belongs to --subset-mode"),
        ("--subset-mode legacy --resample-every 3", "--resample-every belongs to --subset-mode"),
        ("--frozen-bn train", "--frozen-bn belongs to --method bns"),
        ("--method bns --subset-mode all", "--subset-mode belongs to --method bns_ipdpp"),
        ("--stages finetune --init-from x.pt --jitter 1", "--jitter belongs to --stages pretrain"),
        ("--jitter 3", "at most 2.5"), ("--grey 1.1", "at most 1"),
        ("--init-from none.pt", "none.pt"), ("--eval none.pt", "none.pt"),
        ("--batch-size 200", "batch size 200"),
        ("--init-from ENCODER --data-seed 1", "--data-seed 0"),
        ("--init-from ENCODER --imb-ratio 2", "--imb-ratio 4.0"),
        ("--init-from ENCODER --backbone resnet14", "--backbone resnet8"),
        ("--init-from ENCODER --select val", "other images"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, encoder, flags, said):
    words = [encoder[1] if word == "ENCODER" else word for word in flags.split()]
    with pytest.raises(SystemExit) as stopped:
        call(*words, out=tmp_path)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and said in shown and shown.strip().count("\n") == 0, shown


def test_features_evaluation_own_groups_and_compile(tmp_path, capsys, monkeypatch, encoder):
    monkeypatch.setattr(bns, "GROUPS", {TINY[0]: {"many": 12, "few": 7}})
    flags = ["--method", "bns", "--stages", "probe", *encoder]
    run = call(*flags, "--save-features", "test", out=tmp_path / "a")
    with np.load(run["folder"] / "features_test.npz") as saved:
        assert saved["features"].shape == (100, 64) and saved["indices"][-1] == 99
    counts, recall = np.array(COUNTS), np.array(run["result"]["per_class"])
    chosen = {"many": counts > 12, "few": counts < 7, "medium": (counts >= 7) & (counts <= 12)}
    for name, inside in chosen.items():
        assert run["result"]["own_groups"][name] == pytest.approx(recall[inside].mean())
    capsys.readouterr()
    shown = f"overall {100 * run['result']['headline']['overall']:.2f}%"
    common.launch(bns.main, parsed("--method", "bns", "--eval", run["folder"] / "probe.pt"))
    assert shown in capsys.readouterr().out
    with pytest.raises(SystemExit):
        common.launch(bns.main, parsed("--eval", run["folder"] / "probe.pt"))
    assert "evaluates finetune.pt" in capsys.readouterr().err
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    call("--compile", *KDPP, "--save-features", "train", out=tmp_path / "c")
    assert len(compiled) == 2
    alone = call("--stages", "pretrain", "--save-features", "test", out=tmp_path / "d")
    assert alone["result"]["headline"] is None and (alone["folder"] / "features_test.npz").exists()


# --- ranks ----------------------------------------------------------------------------------------


class Double(bns.Encoder):
    def forward(self, views):
        return super().forward(views.double())


def two_stages(folder: str) -> dict:
    """Pre-training in float64, batch norm frozen, and the first draw: what they end with."""
    sys.argv, bns.Encoder, bns.HIDDEN = ["bns_ipdpp.py"], Double, {"small": 16}
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
    subset = bns.Subset(args, "finetune", data)
    rows = [subset.draw(net, 0)]
    rows += [{key: row[key] for key in ("loss", "same_label", "other_label")} for row in run.rows]
    return {"rows": rows, "kept": kept, "positions": subset.positions}


def rank_entry(rank: int, world: int, folder: str):
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        torch.save(two_stages(folder), f"{folder}/rank{rank}.pt")
        with pytest.raises(common.UserError, match="no multiple of 2 ranks"):
            args = parsed("--dataset", f"{folder}/tiny.npz", "--batch-size", 17)
            bns.check(args, data_lt.load(args))
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    """Loss over all pairs of the batch, weights, p(i) and the subset."""
    commands.tiny_letters(tmp_path / "tiny.npz")
    monkeypatch.setattr(bns, "Encoder", bns.Encoder)  # put back afterwards
    mp.spawn(rank_entry, (2, str(tmp_path)), nprocs=2)
    ours = two_stages(str(tmp_path))
    for rank in range(2):
        theirs = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert torch.equal(theirs["positions"], ours["positions"])
        for mine, row, close in zip(ours["rows"], theirs["rows"], (1e-5, 1e-7, 1e-7), strict=True):
            assert row == pytest.approx(mine, rel=close)
        for name, value in ours["kept"].items():
            torch.testing.assert_close(theirs["kept"][name], value, rtol=1e-6, atol=1e-8)


def test_fake_imagenet_lt_on_two_ranks(tmp_path):
    fake_tree.make_imagenet_lt(tmp_path)
    flags = "--dataset imagenet_lt --gpus 2 --backbone resnet10 --image-size 64 --batch-size 8"
    flags += " --epochs 1 --finetune-epochs 2 --finetune-batch-size 8 --num-samples 3 --workers 1"
    commands.run("bns_ipdpp.py", *flags.split(), "--data-root", tmp_path, out=tmp_path / "runs")
    result = commands.result(tmp_path / "runs")
    assert sum(map(sum, result["confusion"])) == 10 and result["args"]["num_samples"] == 3
    assert [row["stage"] for row in commands.rows(tmp_path / "runs")] == ["pretrain"] + [
        "finetune"
    ] * 2
