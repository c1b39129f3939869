"""Golden and unit tests of the backbones and heads."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from models import Net, backbone, count_parameters, linear_head, shortcut_a


def t(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def close(actual, expected, rtol=1e-9, atol=0.0):
    torch.testing.assert_close(actual.detach(), t(expected), rtol=rtol, atol=atol)


def close_to_largest(actual, expected, tolerance):
    """The largest difference is at most `tolerance` times the largest absolute reference value."""
    assert actual.shape == expected.shape
    assert (actual - t(expected)).abs().max() <= tolerance * np.abs(expected).max()


def fan_in(weight) -> int:
    return weight.numel() // weight.shape[0]


def places(parameter) -> torch.Tensor:
    """0, 1, ... one for each number of it."""
    return torch.arange(parameter.numel(), dtype=torch.float64)


def fill_(parameter, values):
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(values).reshape(parameter.shape))


def convolutions(module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def record(module) -> list[torch.Tensor]:
    """The list into which `module` will put its output at every call."""
    outputs = []
    module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


# --- golden vectors -------------------------------------------------------------------------------


@pytest.mark.golden("unified_perspective_ssp_networks")
def test_slim_networks_parameters_forward_block_and_cosine_head(golden):
    with torch.device("meta"):
        check_parameters(golden)
    body = backbone(f"resnet{golden.scalar('fwd_depth')}")
    net = Net(body, linear_head(body.feature_dim, golden.scalar("fwd_classes"))).double()
    a, b = golden.scalar("fwd_a"), golden.scalar("fwd_b")
    for i, (name, parameter) in enumerate(net.named_parameters()):
        j = places(parameter)
        if parameter.ndim >= 2:
            fill_(parameter, math.sqrt(4 / fan_in(parameter)) * torch.sin(a * j + b * (i + 1)))
        elif name == "head.bias":
            fill_(parameter, 0.01 * torch.cos(j))
        else:
            weight = name.endswith("weight")
            fill_(parameter, 1 + 0.1 * torch.sin(j + i) if weight else 0.1 * torch.cos(j + i))
    x, features = t(golden["fwd_x"]), record(net.backbone)
    with torch.no_grad():
        close_to_largest(net.train()(x), golden["fwd_train_logits"], 1e-8)
        close_to_largest(net.eval()(x), golden["fwd_eval_logits"], 1e-8)
        close_to_largest(features[0], golden["fwd_train_feature"], 1e-8)
        close_to_largest(net.features(x), golden["fwd_eval_feature"], 1e-8)

    conv1, x, expected = golden["blk_conv1"], t(golden["blk_x"]), golden["blk_train_out"]
    stride = round(x.shape[-1] / expected.shape[-1])
    block = models.BasicBlock(conv1.shape[1], conv1.shape[0], stride).double().train()
    fill_(block.conv1.weight, conv1)
    fill_(block.conv2.weight, golden["blk_conv2"])
    for i, bn in enumerate((block.bn1, block.bn2), start=1):
        fill_(bn.weight, golden[f"blk_bn{i}_w"])
        fill_(bn.bias, golden[f"blk_bn{i}_b"])
    assert torch.equal(shortcut_a(x, conv1.shape[0], stride), t(golden["blk_shortcut"]))
    close(block(x), expected, atol=1e-12)

    head = models.NormalisedLinear(*golden["norm_w"].shape, scale=1).double()
    fill_(head.weight, golden["norm_w"])
    close(head(t(golden["norm_x"])), golden["norm_out"], atol=1e-14)


def check_parameters(golden):
    assert golden["param_count"].shape == (len(golden["depth"]), len(golden["num_classes"]))
    for depth, row in zip(golden["depth"], golden["param_count"], strict=True):
        net = backbone(f"resnet{depth}")
        heads = [linear_head(net.feature_dim, int(c)) for c in golden["num_classes"]]
        assert [count_parameters(Net(net, head)) for head in heads] == row.tolist()
    for found in golden.match(r"(resnet\d+)_param_shapes"):
        shapes = [tuple(filter(None, row)) for row in golden[found[0]].tolist()]
        net = backbone(found[1])
        net = Net(net, linear_head(net.feature_dim, shapes[-1][0]))
        assert [tuple(parameter.shape) for parameter in net.parameters()] == shapes
        buffers = golden.scalar(f"{found[1]}_buffer_numel")
        assert sum(buffer.numel() for buffer in net.buffers()) == buffers
    for found in golden.match(r"(resnet\d+)_norm_fc_shape"):
        net, shape = backbone(found[1]), golden[found[0]].tolist()
        head = models.NormalisedLinear(net.feature_dim, shape[1])
        assert list(head.weight.shape) == shape
        assert count_parameters(Net(net, head)) == golden.scalar(f"{found[1]}_norm_param_count")
    for found in golden.match(r"(moco_)?(resnet\d+)_(feature|query)_params"):
        net = backbone(found[2])
        if found[1]:
            net = Net(net, models.ProjectionHead(net.feature_dim, net.feature_dim, 128))
        assert count_parameters(net) == golden.scalar(found[0])


@pytest.mark.golden("tsc_net")
def test_contrastive_resnet32(golden):
    width, parameters = golden["feature"].shape[1] // 4, golden.scalar("n_params_backbone")
    with torch.device("meta"):
        nets = {depth: models.CifarResNet(depth, width) for depth in range(8, 120, 6)}
    (depth,) = [depth for depth, net in nets.items() if count_parameters(net) == parameters]
    net = backbone(f"resnet{depth}", width=width).double().eval()
    d, head = net.feature_dim, golden.scalar("n_params_head")
    out = (head - d * d - d) // (d + 1)
    assert count_parameters(models.ProjectionHead(d, d, out)) == head

    frequency = golden.scalar("weight_freq")
    for number, conv in enumerate(convolutions(net)):  # registered in the order of execution
        wave = torch.cos(frequency * places(conv.weight) + number)
        fill_(conv.weight, wave * math.sqrt(2 / fan_in(conv.weight)))
    maps = {f"layer{i}": record(getattr(net, f"layer{i}")) for i in (1, 2, 3)} | {"stem": []}
    net.layer1.register_forward_pre_hook(lambda _module, inputs: maps["stem"].append(inputs[0]))
    with torch.no_grad():
        close(net(t(golden["x"])), golden["feature"], rtol=1e-8, atol=1e-8)
    for name, (found,) in maps.items():
        expected = golden.scalar(f"{name}_mean_abs")
        assert found.abs().mean().item() == pytest.approx(expected, rel=1e-9)

    x, expected = t(golden["shortcut_in"]), t(golden["shortcut_out"])
    stride = x.shape[-1] // expected.shape[-1]
    assert torch.equal(shortcut_a(x, golden.scalar("shortcut_channels"), stride), expected)


@pytest.mark.golden("bns_ipdpp_arch")
def test_wide_cifar_resnets_with_projector(golden):
    x, cases = t(golden["x"]), golden.match(r"r(\d+)_feature")
    assert cases
    for found in cases:
        key, body = f"r{found[1]}", backbone(f"resnet{found[1]}")
        whole, encoder, with_classifier = golden[f"{key}_num_params"].tolist()
        d, out = body.feature_dim, golden[f"{key}_projection"].shape[1]
        hidden, classes = (
            (whole - encoder - out) // (d + 1 + out),
            (with_classifier - encoder) // (d + 1),
        )
        net = Net(body, models.ProjectionHead(d, hidden, out)).double().eval()
        assert [count_parameters(net), count_parameters(body)] == [whole, encoder]
        assert count_parameters(Net(body, linear_head(d, classes))) == with_classifier

        decayed = [parameter for parameter in net.parameters() if parameter.ndim >= 2]
        rest = [parameter.numel() for parameter in net.parameters() if parameter.ndim < 2]
        sizes = [
            len(decayed),
            sum(parameter.numel() for parameter in decayed),
            len(rest),
            sum(rest),
        ]
        assert sizes == golden[f"{key}_decay_groups"].tolist()
        for parameter in decayed:
            wave = torch.sin(12.9898 * (places(parameter) + 1))
            fill_(parameter, 2 / math.sqrt(fan_in(parameter)) * wave)
        for layer in (net.head[0], net.head[2]):
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            close_to_largest(net.features(x), golden[f"{key}_feature"], 1e-9)
            close_to_largest(net(x), golden[f"{key}_projection"], 1e-9)


@pytest.mark.golden("tailcalibx_resnet32")
def test_two_branch_resnet32(golden):
    net = backbone("resnet32_bbn", width=golden["s1"].shape[1]).double().eval()
    assert count_parameters(net) == golden.scalar("n_params")
    for conv in convolutions(net):
        nn.init.constant_(conv.weight, 1 / (9 * conv.in_channels))
    stages = [record(getattr(net, f"layer{i}")) for i in (1, 2, 3)]
    with torch.no_grad():
        close(net(t(golden["x"])), golden["out"], rtol=1e-8)
    for i, maps in enumerate(stages, start=1):
        close(maps[0].mean(dim=(2, 3)), golden[f"s{i}"], rtol=1e-8)

    x, w1, expected = t(golden["blk_x"]), golden["blk_w1"], golden["blk_out"]
    stride = x.shape[-1] // expected.shape[-1]
    block = models.BasicBlock(w1.shape[1], w1.shape[0], stride).double().eval()
    fill_(block.conv1.weight, w1)
    fill_(block.conv2.weight, golden["blk_w2"])
    for bn, key in ((block.bn1, "blk_bn1"), (block.bn2, "blk_bn2")):
        tensors = bn.weight, bn.bias, bn.running_mean, bn.running_var
        for tensor, row in zip(tensors, golden[key], strict=True):
            fill_(tensor, row)
    close(block(x), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.golden("tailcalibx_cosine_classifier")
def test_cosine_classifier(golden):
    golden.waive(r".*_ref", "the released code's norm over the classes: no cosine, not offered")
    head = models.CosineClassifier(*reversed(golden["W"].shape)).double()
    for parameter, key in ((head.weight, "W"), (head.bias, "b"), (head.scale, "scale")):
        fill_(parameter, golden[key])
    close(head(t(golden["feat_l2"])), golden["logits_cos"])
    logits = head(t(golden["feat"]))
    close(logits, golden["logits_cos"])
    loss = F.cross_entropy(logits, t(golden["labels"]))
    loss.backward()
    close(loss, golden["ce_cos"])
    close(head.weight.grad, golden["dW_cos"], atol=1e-14)
    close(head.bias.grad, golden["db_cos"], atol=1e-14)
    close(head.scale.grad.reshape(1), golden["dscale_cos"].reshape(1))


@pytest.mark.golden("fsgl_resnet34", "fsgl_resnext50")
def test_four_headed_networks(golden):
    classes, gamma, lam = (golden.scalar(key) for key in ("num_classes", "gamma", "lam"))
    body = backbone(golden.stem.removeprefix("fsgl_"))
    heads = models.FSGLHeads(body.feature_dim, classes, golden["z"].shape[1])
    net = Net(body, heads).double().eval()
    assert count_parameters(net) == golden.scalar("n_params_total")
    shapes = [(*conv.weight.shape, conv.stride[0]) for conv in convolutions(net)]
    assert len(shapes) == golden.scalar("n_conv")
    assert sorted(shapes) == sorted(map(tuple, golden["conv_shapes"].tolist()))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            for parameter in module.parameters():
                j = places(parameter)
                factor = 2 / math.sqrt(fan_in(parameter)) if parameter.ndim >= 2 else 0.1
                factor *= 0.5 if module is heads.fc_cb else 1
                fill_(parameter, factor * torch.sin((j * j + 31 * j + 7) % 10007))

    soft = t(golden["labels_soft"])
    a, b = (F.one_hot(t(golden[f"label_{key}"]), classes).double() for key in "ab")
    close(lam * a + (1 - lam) * b, golden["labels_soft"])
    gains = [round(1 + gamma - k * (gamma / classes), 2) for k in range(classes)]
    x, scale = t(golden["x"]), soft @ torch.tensor(gains, dtype=torch.float64)  # scale [B]
    with torch.no_grad():
        close_to_largest(net.features(x), golden["feature_eval"], 1e-8)
        close_to_largest(net(x), golden["test_logits"], 1e-8)
        for actual, key in zip(net(x, scale), ("out", "out_cb", "z", "p"), strict=True):
            close_to_largest(actual, golden[key], 1e-8)
        close_to_largest(net.train().features(x), golden["feature_batchstat"], 1e-6)
    close(body.bn1.running_mean, golden["stem_running_mean_after1"], rtol=1e-8, atol=1e-14)
    close(body.bn1.running_var, golden["stem_running_var_after1"], rtol=1e-8)


# --- backbones ------------------------------------------------------------------------------------

ROWS = [line.split("|")[1:-1] for line in models.__doc__.splitlines() if line.startswith("| res")]
ROWS = [[cell.strip() for cell in row] for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_table_of_the_module(row, monkeypatch):
    name, _, feature_dim, parameters, init, _ = row
    monkeypatch.setattr(models, "init_weights", lambda net, scheme: (net, scheme))
    with torch.device("meta"):
        net, drawn = backbone(name)
        assert count_parameters(net) == int(parameters.replace(",", "")) and drawn == init
        for stem in models.STEMS if name in models.WIDE else [None]:
            net, drawn = backbone(name, stem=stem)
            assert net(torch.empty(2, 3, 33, 47)).shape == (2, int(feature_dim))
            assert net.feature_dim == int(feature_dim)
            basic = stem == "cifar" and feature_dim == "512"
            assert drawn == ("fan_in" if stem is None else "pytorch" if basic else "fan_out")


def test_published_parameter_counts_that_no_golden_file_repeats():
    assert {row[0] for row in ROWS} == set(models.BACKBONES) - {"resnet101", "resnet152"}
    with torch.device("meta"):
        assert count_parameters(backbone("resnet101")) == 42_500_160
        assert count_parameters(backbone("resnet152")) == 58_143_808
        assert count_parameters(backbone("resnet50", stem="cifar")) == 23_500_352
        net = Net(backbone("resnet32", width=64), models.FSGLHeads(256, 10, 128))
        assert count_parameters(net) == 7_438_164
        assert len(convolutions(backbone("resnet14"))) == 13, "a depth of no table"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(name="resnet33"), ["resnet33", *models.BACKBONES]),
        (dict(name="resnet2"), ["resnet32_bbn"]),
        (dict(name="resnet20_bbn"), ["resnet32_bbn"]),
        (dict(name="resnet18", stem="big"), ["big", *models.STEMS]),
        (dict(name="resnet20", stem="imagenet"), ["CIFAR stem", "resnet50"]),
        (dict(name="resnet20", init="xavier"), ["xavier", *models.INITS]),
        (dict(name="resnet50", width=16), ["width 16"]),
    ],
)
def test_impossible_choices_name_the_possible_ones(arguments, words):
    with pytest.raises(ValueError) as caught:
        backbone(**arguments)
    assert all(word in str(caught.value) for word in words)


# --- initialisation and heads ---------------------------------------------------------------------


def spread(tensor, std, normal: bool):
    """Mean 0 and deviation `std` within six standard errors; uniform numbers end at 1.74 of it."""
    n = tensor.numel()
    assert abs(tensor.mean().item()) < 6 * std / math.sqrt(n)
    assert abs(tensor.std().item() / std - 1) < 6 / math.sqrt(2 * n)
    assert (tensor.abs().max() > 2 * tensor.std()).item() == normal


@pytest.mark.parametrize("init", models.INITS)
@pytest.mark.parametrize("name", ["resnet32_bbn", "resnext50"])
def test_statistics_of_the_inits(name, init):
    torch.manual_seed(1)
    body = backbone(name, init=init)
    net = Net(body, linear_head(body.feature_dim, 50, init=init))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            n_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            std = (2 / n_out) ** 0.5 if init == "fan_out" else (2 / fan_in(layer.weight)) ** 0.5
            std /= 6**0.5 if init == "pytorch" else 1
            spread(layer.weight, std, init != "pytorch")
        elif isinstance(layer, nn.Linear):
            n_in = layer.in_features
            std = (2 / n_in) ** 0.5 if init == "fan_in" else (3 * n_in) ** -0.5
            spread(layer.weight, std, init == "fan_in")
            assert 0.5 * n_in**-0.5 < layer.bias.abs().max() <= n_in**-0.5
        elif isinstance(layer, nn.BatchNorm2d):  # the last one of a block too
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
            assert (layer.running_mean == 0).all() and (layer.running_var == 1).all()
            assert layer.eps == 1e-5 and layer.momentum == 0.1


def test_small_linear_head():
    head = linear_head(400, 100, init="small")
    spread(head.weight, 0.01, normal=True)
    assert not head.bias.any()


@pytest.mark.parametrize("kind", [models.NormalisedLinear, models.CosineClassifier])
def test_cosine_heads_keep_their_precision_under_autocast(kind):
    head, x = kind(64, 5), torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = head(x)
        assert F.linear(x, x).dtype == torch.bfloat16, "autocast is on"
        assert head(x.bfloat16()).dtype == low.dtype == torch.float32
    torch.testing.assert_close(low, head(x))
