"""Backbones and heads of the six methods, and `Net(backbone, head)` that joins them.

    net = Net(backbone("resnet32"), linear_head(64, 10))
    net(x)              # x [B, 3, H, W] -> logits [B, 10]
    net.features(x)     # -> features [B, 64], the globally averaged last map

| name         | width, stem   | feature_dim | parameters | default init | where it comes from     |
|--------------|---------------|-------------|------------|--------------|-------------------------|
| resnet8      | 16, 3x3       | 64          | 74,640     | fan_in       | He et al. 2016, n = 1   |
| resnet20     | 16, 3x3       | 64          | 269,072    | fan_in       | n = 3                   |
| resnet32     | 16, 3x3       | 64          | 463,504    | fan_in       | n = 5                   |
| resnet44     | 16, 3x3       | 64          | 657,936    | fan_in       | n = 7                   |
| resnet56     | 16, 3x3       | 64          | 852,368    | fan_in       | n = 9                   |
| resnet110    | 16, 3x3       | 64          | 1,727,312  | fan_in       | n = 18                  |
| resnet32_bbn | 16, 3x3       | 128         | 537,488    | fan_in       | BBN: Zhou et al. 2020   |
| resnet18     | 64, 3x3       | 512         | 11,168,832 | pytorch      | He et al. 2016          |
| resnet34     | 64, 3x3       | 512         | 21,276,992 | pytorch      | the same                |
| resnet10     | 64, 7x7, pool | 512         | 4,905,792  | fan_out      | one block a stage       |
| resnet50     | 64, 7x7, pool | 2048        | 23,508,032 | fan_out      | stride on the 3x3       |
| resnext50    | 64, 7x7, pool | 2048        | 22,979,904 | fan_out      | 32x4d, Xie et al. 2017  |

Any other depth 6n + 2 works too (resnet14, resnet26, ...); resnet50, resnet101 and resnet152 are
the bottleneck ones of ImageNet. "ResNet-32" is a 16-wide network here and in most of the
literature; some of it means a 64-wide one (7,383,616 parameters, `width=64`).

Shapes: B images, H x W pixels, K channels of a map, D = feature_dim, C classes, P a projection.
"""

import argparse
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name -> block, blocks in each of four stages, usual stem, more arguments of torchvision's ResNet
WIDE = {
    "resnet10": ("BasicBlock", (1, 1, 1, 1), "imagenet", {}),
    "resnet18": ("BasicBlock", (2, 2, 2, 2), "cifar", {}),
    "resnet34": ("BasicBlock", (3, 4, 6, 3), "cifar", {}),
    "resnet50": ("Bottleneck", (3, 4, 6, 3), "imagenet", {}),
    "resnet101": ("Bottleneck", (3, 4, 23, 3), "imagenet", {}),
    "resnet152": ("Bottleneck", (3, 8, 36, 3), "imagenet", {}),
    "resnext50": ("Bottleneck", (3, 4, 6, 3), "imagenet", {"groups": 32, "width_per_group": 4}),
}
SLIM = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet32_bbn")
BACKBONES = SLIM + tuple(WIDE)
STEMS = ("cifar", "imagenet")
INITS = ("fan_in", "fan_out", "pytorch")


# --- initialisation and batch norm ----------------------------------------------------------------


def init_weights(module: nn.Module, scheme: str) -> nn.Module:
    """Draw all convolutions, linear layers and batch norms inside `module` afresh; returns it.

    fan_in   Kaiming-normal weights of convolutions AND linear layers (He et al. 2015, eq. 10)
    fan_out  Kaiming-normal convolutions, fan-out = k^2 * out channels also when grouped
    pytorch  what PyTorch does when nobody asks: U(-1/sqrt(fan-in), 1/sqrt(fan-in)), as all biases
    """
    if scheme not in INITS:
        raise ValueError(f"unknown init {scheme!r}; known: {', '.join(INITS)}")
    drawn = {"fan_in": (nn.Conv2d, nn.Linear), "fan_out": nn.Conv2d, "pytorch": ()}[scheme]
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            layer.reset_parameters()
        if isinstance(layer, drawn):
            nn.init.kaiming_normal_(layer.weight, mode=scheme, nonlinearity="relu")
    return module


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters, frozen ones included, running statistics not."""
    return sum(parameter.numel() for parameter in module.parameters())


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of consecutive parts of the batch, each as on a device of its own.

    Running statistics take the mean over the parts.
    """

    def forward(self, x: Tensor) -> Tensor:
        parts = [part for part in x.tensor_split(self.groups) if len(part)]
        if not self.training or len(parts) == 1:
            return super().forward(x)
        mean = self.running_mean.repeat(len(parts), 1)
        var = self.running_var.repeat(len(parts), 1)
        done = [
            F.batch_norm(part, *own, self.weight, self.bias, True, self.momentum, self.eps)
            for part, *own in zip(parts, mean, var, strict=True)
        ]
        self.running_mean.copy_(mean.mean(0))
        self.running_var.copy_(var.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(done)


def group_batch_norm(net: nn.Module, groups: int) -> nn.Module:
    """Turn every batch norm of a network into a grouped one, in place; its tensors stay."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and groups > 1:
            module.__class__, module.groups = GroupedBatchNorm2d, groups
    return net


# --- the slim CIFAR networks: depth 6n + 2, three stages, no parameter in a shortcut --------------


def shortcut_a(x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A of He et al. 2016, 3.3: every stride-th pixel between channels of zeros."""
    if stride == 1 and x.shape[1] == channels:
        return x
    extra = channels - x.shape[1]
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, extra // 2, extra - extra // 2))


class BasicBlock(nn.Module):
    """conv3x3 - BN - ReLU - conv3x3 - BN, add the shortcut, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.channels, self.stride = channels, stride
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + shortcut_a(x, self.channels, self.stride), inplace=True)


class TwoBranches(nn.Module):
    """Two parallel blocks on one map, side by side on the channels (BBN: cb, rb): K -> 2K."""

    def __init__(self, channels: int):
        super().__init__()
        self.cb = BasicBlock(channels, channels)
        self.rb = BasicBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cb(x), self.rb(x)), dim=1)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images (He et al. 2016, section 4.2), 3 stages of n blocks.

    two_branches: the last block of stage 3 is replaced by two parallel ones, so that D doubles.
    """

    def __init__(self, depth: int = 32, width: int = 16, two_branches: bool = False):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(blocks, width, width, stride=1)
        self.layer2 = self._stage(blocks, width, 2 * width, stride=2)
        self.layer3 = self._stage(blocks - two_branches, 2 * width, 4 * width, stride=2)
        self.branches = TwoBranches(4 * width) if two_branches else nn.Identity()
        self.feature_dim = 8 * width if two_branches else 4 * width

    @staticmethod
    def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:  # x [B, 3, H, W]; width w
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # [B, w, H, W]
        x = self.layer1(x)  # [B, w, H, W]
        x = self.layer2(x)  # [B, 2w, H/2, W/2]
        x = self.layer3(x)  # [B, 4w, H/4, W/4]
        x = self.branches(x)  # [B, 4w, H/4, W/4], or 8w channels with two branches
        return x.mean(dim=(2, 3))  # [B, D]


# --- the 64-wide networks -------------------------------------------------------------------------


def wide_resnet(name: str, stem: str | None = None) -> nn.Module:
    """torchvision's ResNet without its classifier, names of tensors included: -> [B, D]."""
    from torchvision.models import resnet  # here, because its import takes a second

    block, blocks, usual_stem, extra = WIDE[name]
    block = getattr(resnet, block)
    net = resnet.ResNet(block, blocks, num_classes=1, **extra)
    net.fc = nn.Identity()
    net.feature_dim = 512 * block.expansion
    if (stem or usual_stem) == "cifar":
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


def slim_depth(name: str) -> int:
    """Layers of a slim network by its name, 6n + 2; ValueError when there is none of that name."""
    found = re.fullmatch(r"resnet([1-9]\d*)", "resnet32" if name == "resnet32_bbn" else name)
    depth = int(found.group(1)) if found else 0
    if depth < 8 or depth % 6 != 2:
        known = f"known: {', '.join(BACKBONES)}, and any other resnet<6n+2>"
        raise ValueError(f"unknown backbone {name!r}; {known}")
    return depth


def backbone_name(text: str) -> str:
    """argparse type: the name of a network that there is."""
    try:
        return text if text in WIDE or slim_depth(text) else ""
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def backbone(name: str, *, width=None, stem: str | None = None, init="default") -> nn.Module:
    """The network called `name`, freshly initialised: x [B, 3, H, W] -> features [B, feature_dim].

    width  channels of the first stage, slim networks only (default 16)
    stem   "imagenet": 7x7 and max-pool, stride 2 each; "cifar": 3x3; None is that of the table
    init   of `init_weights`; "default" is that of the table, with another stem fan_out for
           bottlenecks, pytorch or fan_out for basic blocks behind a CIFAR or an ImageNet stem
    """
    if stem not in (None, *STEMS):
        raise ValueError(f"unknown stem {stem!r}; known: {', '.join(STEMS)}")
    if name in WIDE:
        if width not in (None, 64):
            raise ValueError(f"{name} is 64 wide, got width {width}")
        net = wide_resnet(name, stem)
        basic = WIDE[name][0] == "BasicBlock" and (stem or WIDE[name][2]) == "cifar"
        default = "pytorch" if basic else "fan_out"
    else:
        if stem == "imagenet":
            raise ValueError(f"{name} has the CIFAR stem only; big images: {', '.join(WIDE)}")
        net = CifarResNet(slim_depth(name), width or 16, name == "resnet32_bbn")
        default = "fan_in"
    return init_weights(net, default if init == "default" else init)


# --- heads on features [B, D] ---------------------------------------------------------------------


def linear_head(dim: int, classes: int, init: str = "pytorch") -> nn.Linear:
    """Linear classifier, [B, D] -> logits [B, C]; init "small": weight N(0, 0.01^2), bias 0."""
    head = nn.Linear(dim, classes)
    if init != "small":
        return init_weights(head, init)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class NormalisedLinear(nn.Module):
    """Scale s times the cosines of features and class weights: logits [B, C] in [-s, s]; no bias.

    Head of Cao et al. 2019 (LDAM). Without a scale a softmax over ten cosines never brings the
    cross-entropy below 0.79.
    """

    def __init__(self, dim: int, classes: int, scale: float = 30.0):
        super().__init__()
        weight = torch.empty(dim, classes).uniform_(-1, 1)  # a column a class
        self.weight, self.scale = nn.Parameter(F.normalize(weight, dim=0)), scale

    def forward(self, features: Tensor) -> Tensor:
        # outside autocast: bfloat16 cosines are off by 0.004, times s = 30 that is 0.1
        with torch.autocast(features.device.type, enabled=False):
            x = F.normalize(features.to(self.weight.dtype), dim=1, eps=1e-12)  # [B, D]
            return self.scale * (x @ F.normalize(self.weight, dim=0, eps=1e-12))  # [B, C]


class CosineClassifier(nn.Module):
    """softplus(s) * cos + b, scale s (10 at the start) and bias b learned: logits [B, C].

    Head of Vigneswaran et al. 2021 (TailCalibX). weight W [C, D] and bias start as in `nn.Linear`.
    The released code divides W[c, d] by ||W[:, d]||, the norm over the classes: no cosine.
    """

    def __init__(self, dim: int, classes: int):
        super().__init__()
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(classes, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            x = F.normalize(features.to(self.weight.dtype), dim=1, eps=1e-12)  # [B, D]
            w = F.normalize(self.weight, dim=1, eps=1e-12)  # [C, D]
            return F.softplus(self.scale) * (x @ w.T) + self.bias  # [B, C]


class ProjectionHead(nn.Sequential):
    """Linear - ReLU - Linear (SimCLR, MoCo v2), or one Linear (MoCo v1): [B, D] -> [B, P]."""

    def __init__(self, dim: int, hidden: int | None, out: int):
        if hidden is None:
            super().__init__(nn.Linear(dim, out))
        else:
            super().__init__(nn.Linear(dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))


class FSGLHeads(nn.Module):
    """Heads of FSGL and GLMC (Du et al. 2023): fc, the re-weighted fc_cb, projection, prediction.

    forward(features [B, D])             logits of fc_cb [B, C]: what is evaluated
    forward(features, scale [B] or [1])  (fc [B, C], fc_cb [B, C], z [B, P], p [B, P]) in training
    """

    def __init__(self, dim: int, classes: int, out: int = 256):
        super().__init__()
        self.projection = nn.Linear(dim, out)
        self.prediction = nn.Linear(out, out)
        self.fc = nn.Linear(dim, classes)
        self.fc_cb = nn.Linear(dim, classes)

    def forward(self, features: Tensor, scale: Tensor | None = None):
        if scale is None:
            return self.fc_cb(features)
        features = scale[:, None] * features  # [B, 1] * [B, D]
        z = self.projection(features)
        return self.fc(features), self.fc_cb(features), z, self.prediction(z)


class Net(nn.Module):
    """Backbone and head: x [B, 3, H, W] -> head(backbone(x)); more arguments go to the head."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def features(self, x: Tensor) -> Tensor:
        """Pooled features [B, D] of x [B, 3, H, W], in front of the head."""
        return self.backbone(x)

    def forward(self, x: Tensor, *head_arguments: Tensor):
        return self.head(self.backbone(x), *head_arguments)
