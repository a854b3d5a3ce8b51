"""A decoder's blocks in slices of rows: the same image and gradient, and a block keeps its input alone.

A slice of a convolution reads a row more on either side. A group norm's statistics are those of the whole image: slices
add up to them, and a second pass over the slices applies them; so it is with the two sums of its backward pass. Whole
tensors are a block's input and output, the gradients of both, and one between its convolutions, computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from diffpp_fast import transforms
from diffpp_fast.networks.decoder.layers import enlarging_taps, laid_out, layout, summed
from diffpp_fast.ops.autograd import needs_gradient, recorded
from diffpp_fast.plain import compute_dtype

Plain = Callable[[Tensor], Tensor]
#: Rows [first, last) of a tensor, cut out or computed.
Read = Callable[[int, int], Tensor]


def residual_block(x: Tensor, block: Any, enlargement: nn.Conv2d | None, rows: int, plain: Plain) -> Tensor:
    """A `ResnetBlock2D` without time embedding, behind an enlargement and its convolution if there is one.

    Args:
        enlargement: this convolution; 3 x 3 with padding 1, as those of the block are.
        rows: of a slice.
        plain: computes all of it at once, and is differentiable: it serves transforms and second derivatives.
    """
    if transforms.active():
        return plain(x)
    numbers = [(norm.num_groups, norm.eps) for norm in (block.norm1, block.norm2)]
    layers = (enlargement, block.norm1, block.conv1, block.norm2, block.conv2, block.conv_shortcut)
    divisor = float(block.output_scale_factor)
    y: Tensor = _ResidualBlock.apply(x, rows, numbers, divisor, _kept(plain), *_parameters_of(*layers))
    return y


def normed_convolution(x: Tensor, norm: nn.GroupNorm, layer: nn.Conv2d, rows: int, plain: Plain) -> Tensor:
    """layer(silu(norm(x))), where the layer is 3 x 3 with padding 1; arguments as those of `residual_block`."""
    if transforms.active():
        return plain(x)
    parameters = _parameters_of(norm, layer)
    y: Tensor = _NormedConvolution.apply(x, rows, norm.num_groups, norm.eps, _kept(plain), *parameters)
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, queries: int) -> Tensor:
    """Attention by so many queries at a time, [B, heads, N, D]; keeps its inputs alone.

    Where torch takes its kernel with a table of weights there is a part of the table at a time.
    """
    if transforms.active() or torch.compiler.is_compiling() or not needs_gradient(q, k, v):
        return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(queries, dim=2)], dim=2)
    y: Tensor = _Attention.apply(q, k, v, queries)
    return y


class _BlockParameters(NamedTuple):
    """The parameters of a residual block, in the order in which its Function takes them."""

    enlargement: Tensor | None
    enlargement_bias: Tensor | None
    norm1: Tensor | None
    norm1_bias: Tensor | None
    conv1: Tensor
    conv1_bias: Tensor | None
    norm2: Tensor | None
    norm2_bias: Tensor | None
    conv2: Tensor
    conv2_bias: Tensor | None
    shortcut: Tensor | None
    shortcut_bias: Tensor | None


class _ResidualBlock(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: int,
        numbers: list[tuple[int, float]],
        divisor: float,
        plain: Plain | None,
        *parameters: Any,
    ) -> Tensor:
        p = _cast(_BlockParameters(*parameters), x)
        source = x if p.enlargement is None else _enlarged(x, p.enlargement, p.enlargement_bias, rows)
        read, slices = _reader(source), _slices(source.shape[2], rows)
        statistics1 = _statistics((read(*part) for part in slices), *numbers[0])
        norm1 = _norm(statistics1, p.norm1, p.norm1_bias, source.shape[1])
        inside = _like(source, p.conv1.shape[0])
        statistics2 = _statistics(
            _filled(inside, slices, _convolved(norm1.output_of(read), p.conv1, p.conv1_bias, inside)), *numbers[1]
        )
        norm2 = _norm(statistics2, p.norm2, p.norm2_bias, inside.shape[1])
        y = _like(inside, p.conv2.shape[0])
        convolved = _convolved(norm2.output_of(_reader(inside)), p.conv2, p.conv2_bias, y)
        for first, last in slices:
            part = read(first, last)
            if p.shortcut is not None:
                part = F.conv2d(part, p.shortcut, p.shortcut_bias)
            part = convolved(first, last).add_(part)
            y[:, :, first:last] = part if divisor == 1.0 else part.div_(divisor)
        ctx.save_for_backward(x, *statistics1, *statistics2, *parameters)
        ctx.rows, ctx.divisor, ctx.plain, ctx.layout = rows, divisor, plain, layout(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean1, rstd1, mean2, rstd2, *parameters = ctx.saved_tensors
        nothing = (None,) * (4 + len(parameters))
        if recorded(grad):
            return _by_plain(ctx.plain, x, grad), *nothing
        p = _cast(_BlockParameters(*parameters), x)
        source = x if p.enlargement is None else _enlarged(x, p.enlargement, p.enlargement_bias, ctx.rows)
        norm1 = _norm((mean1, rstd1), p.norm1, p.norm1_bias, source.shape[1])
        norm2 = _norm((mean2, rstd2), p.norm2, p.norm2_bias, p.conv1.shape[0])
        grad = laid_out(grad, ctx.layout)
        grad = grad if ctx.divisor == 1.0 else grad / ctx.divisor
        if p.enlargement is None and p.shortcut is None:
            return _input_gradient_inside(source, grad, p, (norm1, norm2), ctx.rows), *nothing
        return _input_gradient(x, source, grad, p, (norm1, norm2), ctx.rows), *nothing


def _inside_gradient(
    source: Tensor, grad: Tensor, p: _BlockParameters, norms: tuple[_Norm, _Norm], rows: int
) -> Tensor:
    """Return the gradient of what lies between the convolutions, in the memory where that was computed again."""
    norm1, norm2 = norms
    inside, slices = _like(grad, p.conv1.shape[0]), _slices(grad.shape[2], rows)
    convolved = _convolved(norm1.output_of(_reader(source)), p.conv1, p.conv1_bias, inside)
    adjoint = _adjoint(_reader(grad), p.conv2, grad)
    terms = norm2.terms(
        (part, adjoint(*at)) for at, part in zip(slices, _filled(inside, slices, convolved), strict=True)
    )
    for first, last in slices:
        part = inside[:, :, first:last]
        part.copy_(norm2.input_gradient(part, adjoint(first, last), terms))
    return inside


def _input_gradient_inside(
    source: Tensor, grad: Tensor, p: _BlockParameters, norms: tuple[_Norm, _Norm], rows: int
) -> Tensor:
    """Return the gradient of a block's input where the shortcut is the identity, in the memory of what lies inside."""
    slices, read, norm1 = _slices(grad.shape[2], rows), _reader(source), norms[0]
    inside = _inside_gradient(source, grad, p, norms, rows)
    adjoint = _adjoint(_reader(inside), p.conv1, inside)
    terms = norm1.terms((read(*at), part) for at, part in _overwritten(inside, slices, adjoint))
    for first, last in slices:
        part = inside[:, :, first:last]
        part.copy_(norm1.input_gradient(read(first, last), part, terms, grad[:, :, first:last]))
    return inside


def _input_gradient(
    x: Tensor, source: Tensor, grad: Tensor, p: _BlockParameters, norms: tuple[_Norm, _Norm], rows: int
) -> Tensor:
    """Return the gradient of a block's input through its shortcut's convolution or its enlargement."""
    if p.enlargement is None:
        return _source_gradient(torch.empty_like(x), source, grad, p, norms, rows)
    enlarged = _source_gradient(source, source, grad, p, norms, rows)
    grad_x = torch.empty_like(x)
    _fill(grad_x, _slices(x.shape[2], max(rows // 2, 1)), _enlargement_adjoint(enlarged, p.enlargement))
    return grad_x


def _source_gradient(
    into: Tensor, source: Tensor, grad: Tensor, p: _BlockParameters, norms: tuple[_Norm, _Norm], rows: int
) -> Tensor:
    """Fill `into`, which may be `source`, with the gradient of what the first norm takes.

    That of the norm's output is computed twice, for it has more channels than what lies between the convolutions.
    """
    slices, read, norm1 = _slices(source.shape[2], rows), _reader(source), norms[0]
    inside = _inside_gradient(source, grad, p, norms, rows)
    adjoint = _adjoint(_reader(inside), p.conv1, inside)
    terms = norm1.terms((read(*at), adjoint(*at)) for at in slices)
    for first, last in slices:
        direct = grad[:, :, first:last]
        direct = direct if p.shortcut is None else F.conv_transpose2d(direct, p.shortcut)
        into[:, :, first:last] = norm1.input_gradient(read(first, last), adjoint(first, last), terms, direct)
    return into


class _NormedConvolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: int,
        groups: int,
        eps: float,
        plain: Plain | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        read, slices = _reader(x), _slices(x.shape[2], rows)
        mean, rstd = _statistics((read(*part) for part in slices), groups, eps)
        norm = _norm((mean, rstd), norm_weight, norm_bias, x.shape[1])
        y = _like(x, weight.shape[0])
        cast_bias = None if bias is None else bias.to(x.dtype)
        _fill(y, slices, _convolved(norm.output_of(read), weight.to(x.dtype), cast_bias, x))
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
        ctx.rows, ctx.plain, ctx.layout = rows, plain, layout(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        nothing = (None,) * 8
        if recorded(grad):
            return _by_plain(ctx.plain, x, grad), *nothing
        norm, read = _norm((mean, rstd), norm_weight, norm_bias, x.shape[1]), _reader(x)
        slices = _slices(x.shape[2], ctx.rows)
        adjoint = _adjoint(_reader(laid_out(grad, ctx.layout)), weight.to(grad.dtype), grad)
        terms = norm.terms((read(*at), adjoint(*at)) for at in slices)
        grad_x = torch.empty_like(x)
        _fill(grad_x, slices, lambda first, last: norm.input_gradient(read(first, last), adjoint(first, last), terms))
        return grad_x, *nothing


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, queries: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.queries = queries
        return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(queries, dim=2)], dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        differentiated = torch.is_grad_enabled()
        if recorded(grad):
            with torch.enable_grad():
                y = F.scaled_dot_product_attention(q, k, v)
            return *torch.autograd.grad(y, (q, k, v), grad, create_graph=differentiated), None
        grad_q, sums = torch.empty_like(q), [torch.zeros_like(each, dtype=compute_dtype(each)) for each in (k, v)]
        k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
        for part, outer, into in zip(*(each.split(ctx.queries, dim=2) for each in (q, grad, grad_q)), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                y = F.scaled_dot_product_attention(part, k, v)
            part_gradient, *gradients = torch.autograd.grad(y, (part, k, v), outer)
            into.copy_(part_gradient)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
        return grad_q, sums[0].to(k.dtype), sums[1].to(v.dtype), None


# Group norm and SiLU, by slices


def _statistics(parts: Iterable[Tensor], groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / sqrt(variance + eps) of every group of channels over all slices [B, C, h, W]: [B, groups]."""
    count, mean, squares = 0, None, None
    for part in parts:
        wide = part.to(compute_dtype(part))
        more = part[0].numel() // groups
        own_mean = _by_group(wide.sum((2, 3)), groups) / more
        own_squares = _by_group((wide - _by_channel(own_mean, part.shape[1])).square_().sum((2, 3)), groups)
        if mean is None or squares is None:
            count, mean, squares = more, own_mean, own_squares
            continue
        # Chan, Golub, LeVeque: "Algorithms for computing the sample variance", 1983.
        difference, share = own_mean - mean, more / (count + more)
        squares = squares + own_squares + difference.square() * (count * share)
        mean, count = mean + difference * share, count + more
    assert mean is not None and squares is not None
    return mean, torch.rsqrt(squares / count + eps)


class _Terms(NamedTuple):
    """The part of the input gradient that the two sums give: slope (x - mean) + intercept, [B, C, 1, 1]."""

    slope: Tensor
    intercept: Tensor


class _Norm(NamedTuple):
    """silu((x - mean) scale + bias), numbers by channel, [B, C, 1, 1]: a group norm whose statistics are known."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor  # weight rstd
    bias: Tensor | None
    groups: int

    def output_of(self, read: Read) -> Read:
        def output(first: int, last: int) -> Tensor:
            part = read(first, last)
            return F.silu(self._affine(part - self.mean), inplace=True).to(part.dtype)

        return output

    def terms(self, parts: Iterable[tuple[Tensor, Tensor]]) -> _Terms:
        """Return the terms from slices of x and of the output's gradient that make up the whole."""
        first = second = torch.zeros_like(self.scale)
        count = 0
        for x, grad in parts:
            centered, g = self._through_silu(x, grad)
            first = first + g.sum((2, 3), keepdim=True)
            second = second + centered.mul_(g).sum((2, 3), keepdim=True)
            count += x[0].numel() // self.groups
        first, second = (
            _by_channel(_by_group((total * self.scale).flatten(1), self.groups), total.shape[1]) / count
            for total in (first, second)
        )
        return _Terms(-second * self.rstd.square(), -first)

    def input_gradient(self, x: Tensor, grad: Tensor, terms: _Terms, more: Tensor | None = None) -> Tensor:
        """Return the gradient of a slice, plus `more`."""
        centered, g = self._through_silu(x, grad)
        g.mul_(self.scale).add_(centered.mul_(terms.slope)).add_(terms.intercept)
        return (g if more is None else g.add_(more)).to(x.dtype)

    def _through_silu(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return x - mean, and the gradient of what SiLU takes."""
        centered = x - self.mean
        y = self._affine(centered)
        return centered, torch.ops.aten.silu_backward(grad.to(y.dtype), y)

    def _affine(self, centered: Tensor) -> Tensor:
        return centered * self.scale if self.bias is None else torch.addcmul(self.bias, centered, self.scale)


def _norm(statistics: tuple[Tensor, Tensor], weight: Tensor | None, bias: Tensor | None, channels: int) -> _Norm:
    groups = statistics[0].shape[1]
    mean, rstd = (_by_channel(each, channels) for each in statistics)
    weight, bias = (None if each is None else each.to(mean.dtype)[None, :, None, None] for each in (weight, bias))
    return _Norm(mean, rstd, rstd if weight is None else rstd * weight, bias, groups)


def _by_group(values: Tensor, groups: int) -> Tensor:
    """Sums over the channels of each group: [B, C] -> [B, groups]."""
    return values.unflatten(1, (groups, -1)).sum(2)


def _by_channel(values: Tensor, channels: int) -> Tensor:
    """[B, groups] -> [B, C, 1, 1]."""
    return values.repeat_interleave(channels // values.shape[1], dim=1)[:, :, None, None]


# Convolutions, by slices


def _convolved(read: Read, weight: Tensor, bias: Tensor | None, like: Tensor) -> Read:
    """Return rows of the 3 x 3 convolution of what is read."""
    return _with_halo(read, like.shape[2], lambda part: F.conv2d(part, weight, bias, padding=1))


def _adjoint(read: Read, weight: Tensor, like: Tensor) -> Read:
    """Return rows of the adjoint convolution of what is read."""
    return _with_halo(read, like.shape[2], lambda part: F.conv_transpose2d(part, weight, padding=1))


def _with_halo(read: Read, height: int, convolve: Callable[[Tensor], Tensor]) -> Read:
    def rows(first: int, last: int) -> Tensor:
        low, high = max(first - 1, 0), min(last + 1, height)
        return convolve(read(low, high))[:, :, first - low : last - low]

    return rows


def _enlarged(x: Tensor, kernel: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """Return the transposed convolution, 4 x 4 with stride 2, that enlarges all of x."""
    y = _like(x, kernel.shape[1], 2)

    def made(first: int, last: int) -> Tensor:
        low, high = max((first - 1) // 2, 0), min(last // 2 + 1, x.shape[2])
        part = F.conv_transpose2d(x[:, :, low:high], kernel, bias, stride=2, padding=1)
        return part[:, :, first - 2 * low : last - 2 * low]

    _fill(y, _slices(y.shape[2], rows), made)
    return y


def _enlargement_adjoint(y: Tensor, kernel: Tensor) -> Read:
    """Return rows of the adjoint of `_enlarged`, of a gradient in the shape of its result."""

    def rows(first: int, last: int) -> Tensor:
        low, high = max(2 * first - 1, 0), min(2 * last + 1, y.shape[2])
        part = F.pad(y[:, :, low:high], (0, 0, low - 2 * first + 1, 2 * last + 1 - high))
        return F.conv2d(part, kernel, stride=2, padding=(0, 1))

    return rows


# Slices


def _slices(height: int, rows: int) -> list[tuple[int, int]]:
    return [(first, min(first + rows, height)) for first in range(0, height, rows)]


def _reader(x: Tensor) -> Read:
    return lambda first, last: x[:, :, first:last]


def _fill(y: Tensor, slices: list[tuple[int, int]], made: Read) -> None:
    for first, last in slices:
        y[:, :, first:last] = made(first, last)


def _filled(y: Tensor, slices: list[tuple[int, int]], made: Read) -> Iterator[Tensor]:
    """Fill y and yield its slices one by one."""
    for first, last in slices:
        y[:, :, first:last] = made(first, last)
        yield y[:, :, first:last]


def _overwritten(y: Tensor, slices: list[tuple[int, int]], made: Read) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Fill y with what is made of itself, and yield places and slices.

    A slice is stored when the next one, which reads a row of what was there, is made.
    """
    waiting: tuple[tuple[int, int], Tensor] | None = None
    for at in slices:
        part = made(*at)
        if waiting is not None:
            (first, last), before = waiting
            y[:, :, first:last] = before
        waiting = at, part
        yield at, part
    if waiting is not None:
        (first, last), before = waiting
        y[:, :, first:last] = before


def _like(x: Tensor, channels: int, scale: int = 1) -> Tensor:
    """Return an empty tensor of the layout of x, with other channels, enlarged."""
    size = x.shape[0], channels, scale * x.shape[2], scale * x.shape[3]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout(x))


# Parameters


def _parameters_of(*layers: Any) -> list[Tensor | None]:
    return [None if layer is None else getattr(layer, name) for layer in layers for name in ("weight", "bias")]


def _cast(p: _BlockParameters, like: Tensor) -> _BlockParameters:
    """Convolutions in the dtype of the data; the enlargement's as the transposed convolution."""
    cast = {
        name: value if value is None or name.startswith("norm") else value.to(like.dtype)
        for name, value in p._asdict().items()
    }
    if p.enlargement is not None:
        cast["enlargement"] = summed(p.enlargement, enlarging_taps(like), like.dtype)
    return _BlockParameters(**cast)


# Second derivatives


def _kept(plain: Plain) -> Plain | None:
    """The function that `_by_plain` needs; torch.compile, which has no second derivatives, can't take it along."""
    return None if torch.compiler.is_compiling() else plain


def _by_plain(plain: Plain, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient by x as torch can differentiate or map it."""
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = plain(x)
    return torch.autograd.grad(y, x, grad, create_graph=differentiated)[0]
