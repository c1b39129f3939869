"""Batched augmentation on any device, every sample with its own parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Augmentation. n samples, H x W pixels in, S x S out; images are uint8 0..255 up to the crop, then float32 in [0, 1].
# Every parameter is a tensor [n] on the device of the images, one value per sample. No function waits for the device or
# loops over samples; each agrees with its namesake in torchvision.transforms.v2.functional on float32 tensors.

GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue in the grey of a pixel
BRIGHTNESS, CONTRAST, SATURATION = range(3)  # the colour operations that are blends; the fourth one is hue
CPU_CHUNK = 65536  # output pixels augmented at a time on a CPU: what is being worked on stays in its cache


def per_sample(values: Tensor) -> Tensor:
    """[n] -> [n, 1, 1, 1], to be broadcast over images."""
    return values.view(-1, 1, 1, 1)


def crop_pad(
    x: Tensor, top: Tensor, left: Tensor, pad: int, size: tuple[int, int] | None = None, flip: Tensor | None = None
) -> Tensor:
    """Put `pad` zeros around the images, then cut windows of `size` (rows, columns; default H, W) whose corners in the
    padded images are (top, left). Where `flip` is true the window is mirrored left to right."""
    n, channels, height, width = x.shape
    rows, columns = size or (height, width)
    row = top.long()[:, None] + torch.arange(rows, device=x.device)  # [n, rows]
    column = torch.arange(columns, device=x.device)
    if flip is not None:
        column = torch.where(flip.bool()[:, None], columns - 1 - column, column)
    column = left.long()[:, None] + column  # [n, columns]
    index = row[:, :, None] * (width + 2 * pad) + column[:, None, :]  # [n, rows, columns] into a flattened plane
    padded = F.pad(x, (pad,) * 4).flatten(2)
    return padded.gather(2, index.view(n, 1, -1).expand(-1, channels, -1)).view(n, channels, rows, columns)


def flip(x: Tensor, mask: Tensor) -> Tensor:
    """Mirror the images left to right where `mask` is true."""
    corner = torch.zeros_like(mask, dtype=torch.long)
    return crop_pad(x, corner, corner, 0, flip=mask)


def interpolation(start: Tensor, length: Tensor, extent: int, size: int, flip: Tensor | None = None) -> Tensor:
    """Matrices [n, size, extent] that resize pixels start..start + length - 1 of an axis of `extent` pixels to `size`.

    Bilinear with antialias: output i stands at (i + 1/2) r, r = length / size, and weighs pixel j, at j + 1/2, by
    max(0, 1 - distance / max(1, r)), or 0 outside of the window; then every row is made to sum to 1.
    """
    ratio = (length.float() / size).view(-1, 1, 1)
    reach = ratio.clamp(min=1)
    output = torch.arange(size, device=start.device) + 0.5
    if flip is not None:
        output = torch.where(flip.bool()[:, None], size - output, output)
    pixel = (torch.arange(extent, device=start.device) - start[:, None])[:, None] + 0.5  # [n, 1, extent]
    inside = ((pixel > 0) & (pixel < length.view(-1, 1, 1))).float()
    weight = pixel / reach - output.view(-1, size, 1) * (ratio / reach)  # [n, size, extent]
    weight.abs_().neg_().add_(1).clamp_(min=0).mul_(inside)
    return weight.div_(weight.sum(2, keepdim=True))


def resized_crop(
    x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: int, flip: Tensor | None = None
) -> Tensor:
    """Cut the windows height x width at (top, left) and resize them to S x S = V X U', with a small V and U per sample.
    Where `flip` is true the window is mirrored left to right."""
    n, channels, rows, columns = x.shape
    down = interpolation(top, height, rows, size)  # V [n, S, H]
    across = interpolation(left, width, columns, size, flip)  # U [n, S, W]
    x = torch.bmm(x.reshape(n, channels * rows, columns), across.transpose(1, 2))  # [n, 3H, S]
    return torch.matmul(down[:, None], x.view(n, channels, rows, size))  # [n, 3, S, S]


def blend_(x: Tensor, own: Tensor, grey: Tensor, mean: Tensor) -> Tensor:
    """x <- clamp(own * x + grey * grey of the pixel + mean * mean grey of the image), in place.

    For a factor f the weights are (f, 0, 0) for brightness, (f, 0, 1 - f) for contrast, (f, 1 - f, 0) for saturation;
    (0, 1, 0) makes an image grey. So one call serves a batch in which every sample has its own operation.
    """
    if len(x) == 0:
        return x
    red, green, blue = x.split(1, dim=1)
    luma = (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])  # [n, 1, H, W]
    average = luma.mean((1, 2, 3), keepdim=True)
    luma.mul_(per_sample(grey)).add_(average.mul_(per_sample(mean)))
    return torch.addcmul(luma, x, per_sample(own), out=x).clamp_(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """clamp(f x)."""
    return blend_(x.clone(), factor, 0 * factor, 0 * factor)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """clamp(f x + (1 - f) mean grey of the image)."""
    return blend_(x.clone(), factor, 0 * factor, 1 - factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """clamp(f x + (1 - f) grey of the pixel)."""
    return blend_(x.clone(), factor, 1 - factor, 0 * factor)


def to_grey(x: Tensor, mask: Tensor) -> Tensor:
    """Give the images where `mask` is true three equal channels, the grey of each pixel."""
    mask = mask.float()
    return blend_(x.clone(), 1 - mask, mask, 0 * mask)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Add `shift` (in turns, -1/2..1/2) to the hue of the HSV model; value and saturation stay.

    Let m = min(r, g, b) and C = max(r, g, b) - m. In sixths of a turn the hue is +-(1 + (g + b - r - m) / C) with the
    sign of g - b; a channel is m + C clamp(2 - 6 d, 0, 1), d = distance in turns between the hue and its own.
    """
    red, green, blue = x.unbind(1)  # [n, H, W]
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-9)).add_(1).copysign_(green - blue)
    hue.div_(6).add_(shift.view(-1, 1, 1))
    own = torch.arange(3, dtype=x.dtype, device=x.device).view(3, 1, 1) / 3
    distance = hue[:, None] - own  # [n, 3, H, W], modulo 1
    wave = distance.sub_(distance.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(low[:, None], chroma[:, None], wave, out=wave)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int = 3) -> Tensor:
    """Separable blur: weights exp(-t^2 / 2 sigma^2), |t| <= kernel // 2, made to sum to 1; the border is reflected.
    sigma > 0 in pixels; `kernel` is odd and kernel // 2 < min(H, W)."""
    radius = kernel // 2
    offset = torch.arange(-radius, radius + 1, device=x.device)
    weight = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, dim=1)  # [n, kernel]
    for axis, border in (3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius)):
        length, padded = x.shape[axis], F.pad(x, border, mode="reflect")
        x = padded.narrow(axis, 0, length) * per_sample(weight[:, 0])
        for tap in range(1, kernel):
            x.addcmul_(padded.narrow(axis, tap, length), per_sample(weight[:, tap]))
    return x


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std; mean and std [3], one for each channel, on the device of x."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return (x - mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
    rows = x.permute(0, 2, 3, 1).flatten(2)  # [n, H, 3 W]: a broadcast over a last axis of 3 is five times slower
    rows = (rows - mean.repeat(x.shape[3])).div_(std.repeat(x.shape[3]))
    return rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


def cutout(x: Tensor, row: Tensor, column: Tensor, length: int) -> Tensor:
    """Zero the square of `length` pixels around pixel (row, column), that is, rows row - length // 2 and on; what lies
    outside of the image is ignored (DeVries and Taylor, 2017)."""
    row = torch.arange(x.shape[2], device=x.device) - row[:, None] + length // 2  # [n, H], 0..length - 1 inside
    column = torch.arange(x.shape[3], device=x.device) - column[:, None] + length // 2  # [n, W]
    hit = ((row >= 0) & (row < length))[:, :, None] & ((column >= 0) & (column < length))[:, None, :]
    return x.masked_fill(hit[:, None], 0)


def rotate90(x: Tensor, k: Tensor) -> Tensor:
    """Turn square images [n, c, S, S] counter-clockwise by k (0..3) quarter turns."""
    size = x.shape[-1]
    pixels = torch.arange(size * size, device=x.device).view(size, size)
    source = torch.stack([pixels.rot90(quarter).flatten() for quarter in range(4)])  # [4, S S]
    return x.flatten(2).gather(2, source[k][:, None].expand(-1, x.shape[1], -1)).view_as(x)


def rotation_labels(n: int, generator: torch.Generator) -> Tensor:
    """Quarter turns, int64 [n] on the CPU: floor(n / 4) + 1 copies of 0..3 permuted, the first n of them."""
    labels = torch.arange(4).repeat(n // 4 + 1)
    return labels[torch.randperm(len(labels), generator=generator)[:n]]


def uniforms(n: int, generator: torch.Generator) -> Tensor:
    """The numbers in [0, 1) behind n draws, float64 [37, n]; the first 22 rows make the windows, the next the flips."""
    return torch.rand(37, n, dtype=torch.float64, generator=generator)


def resized_crop_windows(
    u: Tensor, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows (top, left, height, width) from uniform numbers u float64 [22, n]: the first of ten pairs (area, log
    aspect) that fits, at a uniform place; if none does, the largest central window of an allowed aspect."""
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:10])
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[10:20])
    w, h = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()  # [10, n]
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(0, keepdim=True)
    w, h = w.gather(0, first)[0], h.gather(0, first)[0]
    drawn = ((height - h + 1) * u[20]).floor(), ((width - w + 1) * u[21]).floor(), h, w
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    central = (height - h) // 2, (width - w) // 2, h, w
    return tuple(p.where(fits.any(0), c) for p, c in zip(drawn, central, strict=True))


@dataclass(frozen=True)
class Draws:
    """The random parameters of n samples as one float32 matrix (integers are exact): a rank takes its rows, one copy
    brings them to the device. `draws[name]` is [n], or [n, 3] for three columns."""

    table: Tensor
    COLUMNS = {
        **{"top": 0, "left": 1, "height": 2, "width": 3, "flip": 4},  # window in the (padded) image; 0 or 1
        "operation": slice(5, 8),  # order of the three blends, a permutation of BRIGHTNESS, CONTRAST, SATURATION
        "factor": slice(8, 11),  # of these, in that order
        "hue_place": 11,  # after how many of the blends hue comes; 4: this sample has no jitter at all
        **{"hue": 12, "grey": 13, "sigma": 14},  # shift in turns; 0 or 1; of the blur in pixels, 0: none
        **{"row": 15, "column": 16},  # centre of the cutout
    }

    def __getitem__(self, name: str) -> Tensor:
        return self.table[:, self.COLUMNS[name]]

    def __len__(self) -> int:
        return len(self.table)

    def share(self, part: slice | Tensor) -> Draws:
        """The draws of the samples `part` (a slice or positions)."""
        return Draws(self.table[part])

    def to(self, device: torch.device | str) -> Draws:
        """A copy on the device, for which the host does not wait."""
        return Draws(to_device(self.table, device))


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """A copy of a CPU tensor on the device, for which the host does not wait."""
    return (values.pin_memory() if torch.device(device).type == "cuda" else values).to(device, non_blocking=True)


class Augment:
    """crop -> flip -> jitter -> grey -> blur -> floor -> normalise -> cutout, every sample with its own parameters.

    size: pixels S of the square output. mean, std: three floats each; None leaves the images in [0, 1].
    crop: "none" (the images are S x S), "pad" (`pad` zeros around the raw image, S x S window) or "resized" (window of
    a share of the area in `scale` and an aspect in `ratio`, bilinear to S x S). flip, jitter_p, grey, blur_p: chances.
    jitter: strengths s of brightness, contrast, saturation (factors uniform in max(0, 1 - s)..1 + s) and hue (shift
    uniform in -s..s turns), applied in a random order. blur_sigma: range in pixels. blur_floor: round down to 8 bit,
    whether blurred or not. cutout: side in pixels, 0 for none.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        *,
        crop: str = "none",
        pad: int = 4,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.0,
        jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
        jitter_p: float = 1.0,
        grey: float = 0.0,
        blur_p: float = 0.0,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        blur_kernel: int = 3,
        blur_floor: bool = False,
        cutout: int = 0,
    ):
        if crop not in ("none", "pad", "resized"):
            raise ValueError(f"crop must be none, pad or resized, not {crop!r}")
        if min(jitter) < 0 or jitter[3] > 0.5:
            raise ValueError(f"jitter strengths must be at least 0 and that of hue at most 0.5, not {jitter}")
        if blur_p > 0 and (blur_kernel % 2 == 0 or blur_kernel // 2 >= size or blur_sigma[0] <= 0):
            raise ValueError(
                f"blur needs an odd kernel below {2 * size} and sigma > 0, not {blur_kernel}, {blur_sigma}"
            )
        self.size, self.crop, self.pad, self.scale, self.ratio = size, crop, pad * (crop == "pad"), scale, ratio
        self.flip, self.jitter, self.jitter_p, self.grey, self.cutout = flip, jitter, jitter_p, grey, cutout
        self.blur_p, self.blur_sigma, self.blur_kernel, self.blur_floor = blur_p, blur_sigma, blur_kernel, blur_floor
        self.statistics = torch.tensor([mean or (0.0, 0.0, 0.0), std or (1.0, 1.0, 1.0)])

    def draw(self, n: int, generator: torch.Generator, height: int, width: int) -> Draws:
        """Parameters for n images of height x width pixels. The generator gives the same numbers whatever is switched
        on, so that recipes that differ in the jitter alone see the same crops."""
        u = uniforms(n, generator)
        if self.crop == "resized":
            window = resized_crop_windows(u[:22], height, width, self.scale, self.ratio)
        else:
            room = height + 2 * self.pad - self.size, width + 2 * self.pad - self.size
            if min(room) < 0 or (self.crop == "none" and max(room) > 0):
                raise ValueError(
                    f"crop={self.crop!r} cannot make {self.size} px squares of {height} x {width} px images"
                )
            top, left = ((room[axis] + 1) * u[20 + axis] for axis in (0, 1))
            window = top.floor(), left.floor(), *torch.full((2, n), self.size)
        operation = u[28:31].argsort(0)  # [3, n]
        strength = torch.tensor(self.jitter, dtype=u.dtype)
        low, high = (1 - strength).clamp(min=0)[operation], (1 + strength)[operation]
        factor = low + (high - low) * u[24:27]
        hue_place = (4 * u[31]).floor() if self.jitter[3] > 0 else torch.full((n,), 3.0)
        hue_place = hue_place.where(u[23] < (self.jitter_p if any(self.jitter) else 0), 4)
        hue = self.jitter[3] * (2 * u[27] - 1)
        sigma = (self.blur_sigma[0] + (self.blur_sigma[1] - self.blur_sigma[0]) * u[34]).where(u[33] < self.blur_p, 0)
        centre = (self.size * u[35:37]).floor()
        columns = *window, u[22] < self.flip, *operation, *factor, hue_place, hue, u[32] < self.grey, sigma, *centre
        return Draws(torch.stack([column.float() for column in columns], 1))

    def after_crop(self) -> Augment:
        """What is left to do with images that were cut, resized to S x S and flipped elsewhere; same numbers drawn."""
        rest = copy.copy(self)
        rest.crop, rest.pad, rest.flip = "none", 0, 0.0
        return rest

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 [n, 3, H, W] -> float32 [n, 3, S, S] on the same device (channels-last strides); draws: CPU."""
        n, device = len(images), images.device
        if n != len(draws) or images.dtype != torch.uint8:
            raise ValueError(f"{n} {images.dtype} images and draws for {len(draws)}: need uint8 and equal numbers")
        if self.only_normalises:
            return self._normalised(images)
        # Sorted by the place of hue, samples without jitter last, every step of the jitter concerns one slice.
        order = draws["hue_place"].argsort(stable=True)
        ends = torch.bincount(draws["hue_place"].long(), minlength=5).cumsum(0)[:4]  # ends[p]: samples of place <= p
        draws, sort = draws.share(order), bool(ends[3])
        there = Draws(torch.cat([draws.table, order[:, None]], 1)).to(device)
        order, self.statistics = there.table[:, -1].long(), self.statistics.to(device)
        out = torch.empty(n, 3, self.size, self.size, device=device, memory_format=torch.channels_last)
        chunk = max(1, CPU_CHUNK // self.size**2 if device.type == "cpu" else n)
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            raw = images.index_select(0, order[part]) if sort else images[part]
            blurred = draws["sigma"][part].nonzero()[:, 0]
            x = self._chain(raw, there.share(part), (ends - start).clamp(0, len(raw)).tolist(), blurred)
            out[order[part] if sort else part] = x
        return out

    @property
    def only_normalises(self) -> bool:
        """Whether nothing is drawn that changes an image: what evaluation and images cut elsewhere need."""
        busy = self.flip or max(self.jitter) or self.grey or self.blur_p or self.blur_floor or self.cutout
        return self.crop == "none" and not busy

    def _normalised(self, images: Tensor) -> Tensor:
        """The whole chain where `only_normalises`: the same numbers, a few images at a time on a CPU."""
        out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
        mean, std = (part.to(images.device).repeat(self.size) for part in self.statistics)
        raw, rows = (x.permute(0, 2, 3, 1).flatten(2) for x in (images, out))  # [n, S, 3 S]; rows is a view of out
        for x, y in zip(raw.split(8), rows.split(8), strict=True) if images.device.type == "cpu" else [(raw, rows)]:
            y.copy_(x).div_(255).sub_(mean).div_(std)
        return out

    def _chain(self, images: Tensor, draws: Draws, ends: list[int], blurred: Tensor) -> Tensor:
        """Augment images of which the first ends[p] have hue place <= p and `blurred` (CPU positions) are blurred."""
        if self.crop == "resized":
            window = (draws[name] for name in ("top", "left", "height", "width"))
            x = resized_crop(images.float().div_(255), *window, self.size, draws["flip"])
        else:
            if self.crop == "pad" or self.flip > 0:
                images = crop_pad(images, draws["top"], draws["left"], self.pad, (self.size,) * 2, draws["flip"])
            x = images.float().div_(255)

        factor, operation = draws["factor"], draws["operation"]
        weights = factor, (1 - factor) * (operation == SATURATION), (1 - factor) * (operation == CONTRAST)  # 3 x [n, 3]
        for blend, end in enumerate(ends[:3]):  # those that come before hue
            blend_(x[end : ends[3]], *(weight[end : ends[3], blend] for weight in weights))
        if self.jitter[3] > 0:
            x[: ends[3]] = adjust_hue(x[: ends[3]], draws["hue"][: ends[3]])
        for blend, end in enumerate(ends[:3]):  # those that come after it
            blend_(x[:end], *(weight[:end, blend] for weight in weights))
        if self.grey > 0:
            blend_(x, 1 - draws["grey"], draws["grey"], 0 * draws["grey"])

        if len(blurred) == len(x):
            x = gaussian_blur(x, draws["sigma"], self.blur_kernel)
        elif len(blurred):
            blurred = to_device(blurred, x.device)
            x[blurred] = gaussian_blur(x[blurred], draws["sigma"][blurred], self.blur_kernel)
        if self.blur_floor:
            x = x.mul_(255).add_(1e-3).floor_().div_(255)
        x = normalise(x, *self.statistics)
        return cutout(x, draws["row"], draws["column"], self.cutout) if self.cutout else x
