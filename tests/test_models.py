"""Golden and unit tests of the backbones and heads."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models
from models import (
    BasicBlock,
    CosineClassifier,
    FSGLHeads,
    Net,
    NormalisedLinear,
    ProjectionHead,
    backbone,
    count_parameters,
    linear_head,
    shortcut_a,
)


def t(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def close(actual, expected, rtol=1e-9, atol=0.0):
    torch.testing.assert_close(actual, t(expected), rtol=rtol, atol=atol)


def close_to_largest(actual, expected, tolerance):
    """The largest difference is at most `tolerance` times the largest absolute reference value."""
    assert actual.shape == expected.shape
    assert (actual - t(expected)).abs().max() <= tolerance * np.abs(expected).max()


def fan_in(tensor) -> int:
    return tensor.numel() // tensor.shape[0]


def convolutions(module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def fill_(parameter, values):
    with torch.no_grad():
        parameter.copy_(values.reshape(parameter.shape))


def record(module) -> list[torch.Tensor]:
    """The list into which `module` will put its output at every call."""
    outputs = []
    module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


def exact_quotient(numerator: int, denominator: int) -> int:
    quotient, rest = divmod(numerator, denominator)
    assert rest == 0 and quotient > 0, "the parameter count fits no layer of this kind"
    return quotient


# Golden vectors


@pytest.mark.golden("unified_perspective_ssp_networks")
def test_slim_networks_parameters(golden):
    golden.waive(r"fwd_.*|blk_.*|norm_(x|w|out)", "numbers of a forward pass: next tests")
    depths, classes, counts = golden["depth"], golden["num_classes"], golden["param_count"]
    assert counts.shape == (len(depths), len(classes))
    with torch.device("meta"):
        for depth, row in zip(depths, counts, strict=True):
            net = backbone(f"resnet{depth}")
            assert [
                count_parameters(Net(net, linear_head(net.feature_dim, int(c)))) for c in classes
            ] == row.tolist()

        for found in golden.match(r"resnet(\d+)_param_shapes"):
            shapes = [
                tuple(size for size in row if size) for row in golden[found.group(0)].tolist()
            ]
            net = backbone(f"resnet{found.group(1)}")
            net = Net(net, linear_head(net.feature_dim, shapes[-1][0]))
            assert [tuple(parameter.shape) for parameter in net.parameters()] == shapes
            buffers = golden.scalar(f"resnet{found.group(1)}_buffer_numel")
            assert sum(buffer.numel() for buffer in net.buffers()) == buffers

        for found in golden.match(r"resnet(\d+)_norm_fc_shape"):
            shape = golden[found.group(0)].tolist()
            net = backbone(f"resnet{found.group(1)}")
            head = NormalisedLinear(net.feature_dim, shape[1])
            assert list(head.weight.shape) == shape
            assert count_parameters(Net(net, head)) == golden.scalar(
                f"resnet{found.group(1)}_norm_param_count"
            )

        for found in golden.match(r"(resnet\d+)_feature_params"):
            assert count_parameters(backbone(found.group(1))) == golden.scalar(found.group(0))
        for found in golden.match(r"moco_(resnet\d+)_query_params"):
            net = backbone(found.group(1))
            query = Net(net, ProjectionHead(net.feature_dim, net.feature_dim, 128))
            assert count_parameters(query) == golden.scalar(found.group(0))


@pytest.mark.golden("unified_perspective_ssp_networks")
def test_slim_network_forward(golden):
    golden.waive(r"(?!fwd_).*", "shapes, blocks and heads: other tests")
    body = backbone(f"resnet{golden.scalar('fwd_depth')}")
    net = Net(body, linear_head(body.feature_dim, golden.scalar("fwd_classes"))).double()
    a, b = golden.scalar("fwd_a"), golden.scalar("fwd_b")
    for i, (name, parameter) in enumerate(net.named_parameters()):
        j = torch.arange(parameter.numel(), dtype=torch.float64)
        if parameter.ndim >= 2:
            values = math.sqrt(4 / fan_in(parameter)) * torch.sin(a * j + b * (i + 1))
        elif name == "head.bias":
            values = 0.01 * torch.cos(j)
        else:
            values = (
                1 + 0.1 * torch.sin(j + i) if name.endswith("weight") else 0.1 * torch.cos(j + i)
            )
        fill_(parameter, values)

    x = t(golden["fwd_x"])
    features = record(net.backbone)
    with torch.no_grad():
        close_to_largest(net.train()(x), golden["fwd_train_logits"], 1e-8)
        close_to_largest(net.eval()(x), golden["fwd_eval_logits"], 1e-8)
        close_to_largest(features[0], golden["fwd_train_feature"], 1e-8)
        close_to_largest(features[1], golden["fwd_eval_feature"], 1e-8)
        close_to_largest(net.features(x), golden["fwd_eval_feature"], 1e-8)


@pytest.mark.golden("unified_perspective_ssp_networks")
def test_block_and_cosine_head(golden):
    golden.waive(r"(?!blk_|norm_).*", "whole networks: other tests")
    conv1, conv2, x = golden["blk_conv1"], golden["blk_conv2"], t(golden["blk_x"])
    expected = golden["blk_train_out"]
    stride = round(x.shape[-1] / expected.shape[-1])
    block = BasicBlock(conv1.shape[1], conv1.shape[0], stride).double().train()
    fill_(block.conv1.weight, t(conv1))
    fill_(block.conv2.weight, t(conv2))
    for i, bn in enumerate((block.bn1, block.bn2), start=1):
        fill_(bn.weight, t(golden[f"blk_bn{i}_w"]))
        fill_(bn.bias, t(golden[f"blk_bn{i}_b"]))
    assert torch.equal(shortcut_a(x, conv1.shape[0], stride), t(golden["blk_shortcut"]))
    close(block(x).detach(), expected, atol=1e-12)

    head = NormalisedLinear(*golden["norm_w"].shape, scale=1).double()
    fill_(head.weight, t(golden["norm_w"]))
    close(head(t(golden["norm_x"])).detach(), golden["norm_out"], atol=1e-14)


@pytest.mark.golden("tsc_net")
def test_contrastive_resnet32(golden):
    features = golden["feature"]
    width = exact_quotient(features.shape[1], 4)
    with torch.device("meta"):
        fits = [
            depth
            for depth in range(8, 120, 6)
            if f"resnet{depth}" not in models.WIDE
            and count_parameters(models.CifarResNet(depth, width))
            == golden.scalar("n_params_backbone")
        ]
    assert len(fits) == 1, "one depth has this many parameters"
    net = backbone(f"resnet{fits[0]}", width=width).double().eval()
    d = net.feature_dim
    out = exact_quotient(golden.scalar("n_params_head") - d * d - d, d + 1)
    assert count_parameters(ProjectionHead(d, d, out)) == golden.scalar("n_params_head")

    frequency = golden.scalar("weight_freq")
    for number, conv in enumerate(convolutions(net)):  # registered in the order of execution
        n = torch.arange(conv.weight.numel(), dtype=torch.float64)
        fill_(conv.weight, torch.cos(frequency * n + number) * math.sqrt(2 / fan_in(conv.weight)))
    stem = []
    net.layer1.register_forward_pre_hook(lambda _module, inputs: stem.append(inputs[0]))
    groups = {f"layer{i}": record(getattr(net, f"layer{i}")) for i in (1, 2, 3)}
    with torch.no_grad():
        actual = net(t(golden["x"]))
    close(actual, features, rtol=1e-8, atol=1e-8)
    for found in golden.match(r"(\w+)_mean_abs"):
        maps = stem if found.group(1) == "stem" else groups.pop(found.group(1))
        assert maps[0].abs().mean().item() == pytest.approx(golden.scalar(found.group(0)), rel=1e-9)
    assert not groups, "every stage was compared"

    x, expected = t(golden["shortcut_in"]), t(golden["shortcut_out"])
    stride = x.shape[-1] // expected.shape[-1]
    assert torch.equal(shortcut_a(x, golden.scalar("shortcut_channels"), stride), expected)


@pytest.mark.golden("bns_ipdpp_arch")
def test_wide_cifar_resnets_with_projector(golden):
    x = t(golden["x"])
    cases = golden.match(r"r(\d+)_feature")
    assert cases
    for found in cases:
        key = f"r{found.group(1)}"
        feature, projection = golden[found.group(0)], golden[f"{key}_projection"]
        whole, encoder, with_classifier = golden[f"{key}_num_params"].tolist()
        body, out = backbone(f"resnet{found.group(1)}"), projection.shape[1]
        d = body.feature_dim
        hidden = exact_quotient(whole - encoder - out, d + 1 + out)
        classes = exact_quotient(with_classifier - encoder, d + 1)
        net = Net(body, ProjectionHead(d, hidden, out)).double().eval()
        assert [count_parameters(net), count_parameters(body)] == [whole, encoder]
        assert count_parameters(Net(body, linear_head(d, classes))) == with_classifier

        decayed = [parameter.numel() for parameter in net.parameters() if parameter.ndim >= 2]
        rest = [parameter.numel() for parameter in net.parameters() if parameter.ndim < 2]
        assert [len(decayed), sum(decayed), len(rest), sum(rest)] == golden[
            f"{key}_decay_groups"
        ].tolist()

        for name, parameter in net.named_parameters():
            if parameter.ndim >= 2:
                i = torch.arange(1, parameter.numel() + 1, dtype=torch.float64)
                fill_(
                    parameter,
                    math.sqrt(2 / fan_in(parameter)) * math.sqrt(2) * torch.sin(12.9898 * i),
                )
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            close_to_largest(net.features(x), feature, 1e-9)
            close_to_largest(net(x), projection, 1e-9)


@pytest.mark.golden("tailcalibx_resnet32")
def test_two_branch_resnet32(golden):
    width = golden["s1"].shape[1]
    net = backbone("resnet32_bbn", width=width).double().eval()
    assert count_parameters(net) == golden.scalar("n_params")
    assert net.feature_dim == golden["out"].shape[1]
    for conv in convolutions(net):
        nn.init.constant_(conv.weight, 1 / (9 * conv.in_channels))
    stages = [record(getattr(net, f"layer{i}")) for i in (1, 2, 3)]
    with torch.no_grad():
        close(net(t(golden["x"])), golden["out"], rtol=1e-8)
    for i, maps in enumerate(stages, start=1):
        close(maps[0].mean(dim=(2, 3)), golden[f"s{i}"], rtol=1e-8)

    x, expected = t(golden["blk_x"]), golden["blk_out"]
    w1, w2 = t(golden["blk_w1"]), t(golden["blk_w2"])
    block = (
        BasicBlock(w1.shape[1], w1.shape[0], stride=x.shape[-1] // expected.shape[-1])
        .double()
        .eval()
    )
    fill_(block.conv1.weight, w1)
    fill_(block.conv2.weight, w2)
    for bn, key in ((block.bn1, "blk_bn1"), (block.bn2, "blk_bn2")):
        for tensor, row in zip(
            (bn.weight, bn.bias, bn.running_mean, bn.running_var), golden[key], strict=True
        ):
            fill_(tensor, t(row))
    with torch.no_grad():
        close(block(x), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.golden("tailcalibx_cosine_classifier")
def test_cosine_classifier(golden):
    golden.waive(r".*_ref", "the released code's norm over the classes: no cosine, not offered")
    raw, unit, labels, weight = (t(golden[key]) for key in ("feat", "feat_l2", "labels", "W"))
    head = CosineClassifier(weight.shape[1], weight.shape[0]).double()
    fill_(head.weight, weight)
    fill_(head.bias, t(golden["b"]))
    fill_(head.scale, t(golden["scale"]))
    close(head(unit).detach(), golden["logits_cos"])
    logits = head(raw)
    close(logits.detach(), golden["logits_cos"])
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    close(loss.detach(), golden["ce_cos"])
    close(head.weight.grad, golden["dW_cos"], atol=1e-14)
    close(head.bias.grad, golden["db_cos"], atol=1e-14)
    close(head.scale.grad.reshape(1), golden["dscale_cos"].reshape(1))


def check_fsgl(golden, name):
    """Architecture, evaluation and training outputs of the four-headed network."""
    classes, gamma, lam = (golden.scalar(key) for key in ("num_classes", "gamma", "lam"))
    body = backbone(name)
    net = Net(body, FSGLHeads(body.feature_dim, classes, golden["z"].shape[1])).double().eval()
    assert count_parameters(net) == golden.scalar("n_params_total")
    convs = convolutions(net)
    assert len(convs) == golden.scalar("n_conv")
    shapes = [(*conv.weight.shape, conv.stride[0]) for conv in convs]
    assert sorted(shapes) == sorted(map(tuple, golden["conv_shapes"].tolist()))

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            for parameter in module.parameters(recurse=False):
                j = torch.arange(parameter.numel(), dtype=torch.int64)
                values = torch.sin(((j * j + 31 * j + 7) % 10007).double())
                factor = 2 / math.sqrt(fan_in(parameter)) if parameter.ndim >= 2 else 0.1
                fill_(parameter, factor * (0.5 if module is net.head.fc_cb else 1.0) * values)

    soft = t(golden["labels_soft"])
    a, b = (F.one_hot(t(golden[f"label_{key}"]), classes).double() for key in "ab")
    close(lam * a + (1 - lam) * b, golden["labels_soft"])
    gains = torch.tensor(
        [round(1 + gamma - k * (gamma / classes), 2) for k in range(classes)], dtype=torch.float64
    )
    x, scale = t(golden["x"]), soft @ gains  # scale [B]
    with torch.no_grad():
        close_to_largest(net.features(x), golden["feature_eval"], 1e-8)
        close_to_largest(net(x), golden["test_logits"], 1e-8)
        for actual, key in zip(net(x, scale), ("out", "out_cb", "z", "p"), strict=True):
            close_to_largest(actual, golden[key], 1e-8)
        close_to_largest(net.train().features(x), golden["feature_batchstat"], 1e-6)
    close(body.bn1.running_mean, golden["stem_running_mean_after1"], rtol=1e-8, atol=1e-14)
    close(body.bn1.running_var, golden["stem_running_var_after1"], rtol=1e-8)


@pytest.mark.golden("fsgl_resnet34")
def test_fsgl_resnet34(golden):
    check_fsgl(golden, "resnet34")


@pytest.mark.golden("fsgl_resnext50")
def test_fsgl_resnext50(golden):
    check_fsgl(golden, "resnext50")


# Backbones

TABLE = [line.split("|")[1:-1] for line in models.__doc__.splitlines() if line.startswith("| res")]


def test_table_of_the_module_names_every_usual_backbone():
    assert {row[0].strip() for row in TABLE} == set(models.BACKBONES) - {"resnet101", "resnet152"}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].strip())
def test_table_of_the_module(row):
    name, _, feature_dim, parameters, init, _ = (cell.strip() for cell in row)
    with torch.device("meta"):
        net = backbone(name)
    assert net.feature_dim == int(feature_dim)
    assert count_parameters(net) == int(parameters.replace(",", ""))
    torch.manual_seed(5)
    default = backbone(name)
    torch.manual_seed(5)
    named = backbone(name, init=init)
    assert all(
        torch.equal(p, q) for p, q in zip(default.parameters(), named.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "name, stem",
    [(name, None) for name in models.SLIM]
    + [(name, stem) for name in models.WIDE for stem in models.STEMS],
)
def test_feature_dim_is_the_length_of_the_features(name, stem):
    with torch.device("meta"):
        net = backbone(name, stem=stem)
        for height, width in ((32, 32), (33, 47)):
            assert net(torch.empty(2, 3, height, width)).shape == (2, net.feature_dim)


def test_parameter_counts():
    """Published ones that no golden file and no table repeats."""
    with torch.device("meta"):
        assert count_parameters(backbone("resnet50", stem="cifar")) == 23_500_352
        net = Net(backbone("resnet32", width=64), FSGLHeads(256, 10, 128))
        assert count_parameters(net) == 7_438_164
        assert len(convolutions(backbone("resnet14"))) == 13, "a depth of no table"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(name="resnet33"), ["resnet33", *models.BACKBONES]),
        (dict(name="resnet2"), ["resnet32_bbn"]),
        (dict(name="vit"), ["vit", "resnext50"]),
        (dict(name="resnet20_bbn"), ["resnet32_bbn"]),
        (dict(name="resnet18", stem="big"), ["big", "cifar", "imagenet"]),
        (dict(name="resnet20", stem="imagenet"), ["CIFAR stem", "resnet50"]),
        (dict(name="resnet20", init="xavier"), ["xavier", "fan_in", "fan_out", "pytorch"]),
        (dict(name="resnet50", width=16), ["width 16"]),
    ],
)
def test_impossible_choices_name_the_possible_ones(arguments, words):
    with pytest.raises(ValueError) as caught:
        backbone(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_wide_networks_take_the_weights_of_torchvision():
    with torch.device("meta"):
        for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
            theirs = getattr(torchvision.models, name)().state_dict()
            ours = backbone(name, stem="imagenet").state_dict()
            assert {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")} == {
                k: v.shape for k, v in ours.items()
            }
    theirs = torchvision.models.resnext50_32x4d().double().eval()
    ours = backbone("resnext50").double().eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(theirs.fc(ours(x)), theirs(x), rtol=1e-12, atol=1e-12)


# Initialisation


def spread(tensor, std):
    """Assert mean 0 and standard deviation `std` within six standard errors of a normal sample."""
    n = tensor.numel()
    assert abs(tensor.mean().item()) < 6 * std / math.sqrt(n)
    assert abs(tensor.std().item() / std - 1) < 6 / math.sqrt(2 * n)


def is_normal(tensor):
    """A normal sample has values beyond 2 standard deviations, a uniform one none beyond 1.74."""
    return (tensor.abs().max() > 2 * tensor.std()).item()


@pytest.mark.parametrize("init", models.INITS)
@pytest.mark.parametrize("name", ["resnet20", "resnet32_bbn", "resnet18", "resnext50"])
def test_statistics_of_the_inits(name, init):
    torch.manual_seed(1)
    body = backbone(name, init=init)
    net = Net(body, linear_head(body.feature_dim, 50, init=init))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            n_in = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
            n_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            std = {
                "fan_in": (2 / n_in) ** 0.5,
                "fan_out": (2 / n_out) ** 0.5,
                "pytorch": (3 * n_in) ** -0.5,
            }[init]
            spread(layer.weight, std)
            assert is_normal(layer.weight) == (init != "pytorch")
        elif isinstance(layer, nn.Linear):
            n_in = layer.in_features
            spread(layer.weight, (2 / n_in) ** 0.5 if init == "fan_in" else (3 * n_in) ** -0.5)
            assert is_normal(layer.weight) == (init == "fan_in")
            assert 0.5 * n_in**-0.5 < layer.bias.abs().max() <= n_in**-0.5
        elif isinstance(layer, nn.BatchNorm2d):  # the last one of a block too
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
            assert (layer.running_mean == 0).all() and (layer.running_var == 1).all()
            assert layer.eps == 1e-5 and layer.momentum == 0.1


def test_stem_changes_the_default_init():
    torch.manual_seed(2)
    assert not is_normal(backbone("resnet18").layer4[1].conv2.weight)
    assert is_normal(backbone("resnet18", stem="imagenet").layer4[1].conv2.weight)
    assert is_normal(backbone("resnet50", stem="cifar").layer4[1].conv2.weight)


def test_small_linear_head():
    head = linear_head(400, 100, init="small")
    spread(head.weight, 0.01)
    assert is_normal(head.weight)
    assert (head.bias == 0).all()


# Heads


@pytest.mark.parametrize("head", [NormalisedLinear(64, 5), CosineClassifier(64, 5)], ids=type)
def test_cosine_heads_keep_their_precision_under_autocast(head):
    x = torch.randn(8, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = head(x)
        assert F.linear(x, x).dtype == torch.bfloat16, "autocast is on"
        assert head(x.bfloat16()).dtype == torch.float32
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, head(x).detach())
