"""Fake quantization with straight-through gradients, and the linear that trains under it.

Values are those of :mod:`quant.grid`, bit for bit: what is trained is what is stored. Gradients
are those that autograd gives to the same formulas with rounding taken as the identity. Nothing is
kept for the backward pass but the weight itself; the rest is computed again there.

Legend: O rows (out features), I columns (in features), G groups per row, g = I / G.

Passes over the O x I numbers, in float32: 7 forward (a copy from 16 bits, two extremes, divide,
round, clamp, multiply; one more back to 16 bits) and about twice that backward. On CPUs they run
over CHUNK numbers at a time, which stay in the cache between passes.
"""

from types import SimpleNamespace

import torch
from torch import nn

from harness.quant import normal_float
from harness.quant.grid import Grid, QuantizedWeight, nearest, round_to_codes, weight_scales
from harness.quant.normal_float import NormalFloat

CHUNK = 2**18


def fake_quantize(
    weight: torch.Tensor, grid: Grid | NormalFloat, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Every group of ``weight`` on the min-max grid of its own values (BitDistiller section 3.3,
    the quantizers ``Ste*Quantizer`` of its code).

    Args:
        weight: [O, I], any float dtype. grid: asymmetric where of integers.
        dtype: of the result and of the stored scale (default: the weight's).

    Returns:
        [O, I] in ``dtype``: ``nearest(weight.float(), grid, dtype)`` of the grid's own module.

    With s = (max - min) / (2^b - 1), z = round(-min / s) and q = clamp(round(w / s) + z) - z, the
    gradient of s q is 1 for values that are not clamped, plus that of s, q - w / s (q where
    clamped), handed on to the group's extremes; equal extremes share. The zero point has none. On a
    normal-float grid each sign has a scale, its extreme, whose gradient is level - w / s.
    """
    function = _MinMax if isinstance(grid, Grid) else _Levels
    return function.apply(weight, grid, dtype or weight.dtype)


def fake_quantize_with(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The same on a grid that is learned with the weight (LSQ+, arXiv 2004.09576; EfficientQAT,
    arXiv 2407.11062, section 3.2).

    Args:
        weight: [O, I]. scale, zero: [O, G], any float dtype; the scale is rounded to ``dtype`` and
            kept positive, the zero point rounded and clamped to the codes, straight-through.
        dtype: of the result and of the stored scale (default: the weight's).

    Returns:
        [O, I] in ``dtype``, equal to :class:`harness.quant.grid.QuantizedWeight`'s values.
    """
    return _Learned.apply(weight, scale, zero, grid, dtype or weight.dtype)


def quantize_with(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid, dtype: torch.dtype
) -> QuantizedWeight:
    """Codes and grid whose values :func:`fake_quantize_with` gives."""
    scale, zero = _stored(scale, zero, grid, dtype)
    grouped = weight.float().unflatten(1, (scale.shape[1], -1))
    codes = round_to_codes(grouped, scale[..., None], zero[..., None], grid.max_code)
    return QuantizedWeight(
        codes.flatten(1).to(torch.uint8), scale.to(dtype), zero.to(torch.uint8), grid
    )


def _stored(scale, zero, grid: Grid, dtype: torch.dtype):
    """Scale and zero point as a file holds them, in float32."""
    scale = scale.float().clamp_min(torch.finfo(dtype).tiny).to(dtype).float()
    return scale, zero.float().round().clamp(0, grid.max_code)


def _chunks(weight: torch.Tensor) -> list[slice]:
    # On GPUs, where launches cost, chunks only bound the memory of the passes between.
    size = CHUNK if weight.device.type == "cpu" else 64 * CHUNK
    step = max(1, size // weight.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def _values(weight, scale, zero, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """scale * (code - zero) of some rows; scale and zero [R, G] float32."""
    # Clamped by the zero point's distance to both ends: two passes less than adding it and
    # taking it off again, and the same numbers, integers all.
    steps = weight.float().unflatten(1, (scale.shape[1], -1)) / scale[..., None]
    steps.round_().clamp_(-zero[..., None], grid.max_code - zero[..., None])
    return steps.mul_(scale[..., None]).flatten(1).to(dtype)


def _gradients(gradient, weight, scale, zero, max_code: int):
    """Gradients of some rows: of the weight [R, G, g], the scale and the zero point [R, G]."""
    shape = (scale.shape[1], -1)
    gradient = gradient.float().unflatten(1, shape)
    position = weight.float().unflatten(1, shape) / scale[..., None]
    rounded = position.round()
    steps = rounded.clamp(-zero[..., None], max_code - zero[..., None])
    clamped = rounded != steps
    steps -= position.masked_fill_(clamped, 0)
    of_scale = steps.mul_(gradient).sum(dim=2)
    of_weight = gradient.masked_fill(clamped, 0)
    of_zero = (of_weight - gradient).sum(dim=2) * scale
    return of_weight, of_scale, of_zero


class _MinMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, grid, dtype):
        ctx.save_for_backward(weight)
        ctx.grid, ctx.dtype = grid, dtype
        result = torch.empty_like(weight, dtype=dtype)
        for rows in _chunks(weight):
            scale, zero = weight_scales(weight[rows].float(), grid, dtype)
            result[rows] = _values(weight[rows], scale, zero, grid, dtype)
        return result

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        result = torch.empty_like(weight)
        for rows in _chunks(weight):
            part = weight[rows].float()
            scale, zero = weight_scales(part, ctx.grid, ctx.dtype)
            max_code = ctx.grid.max_code
            given, of_scale, _ = _gradients(gradient[rows], part, scale, zero, max_code)
            values = part.unflatten(1, given.shape[1:])
            _to_extremes(given, values, of_scale, max_code, ctx.dtype)
            result[rows] = given.flatten(1).to(weight.dtype)
        return result, None, None


def _to_extremes(gradient, values, of_scale, max_code: int, dtype: torch.dtype) -> None:
    """Add the scale's gradient [R, G] to that of its group's extremes [R, G, g], in place."""
    # The range always holds 0: where that is its end, no value may equal it.
    low = values.amin(dim=2, keepdim=True).clamp(max=0)
    high = values.amax(dim=2, keepdim=True).clamp(min=0)
    share = torch.where(_fits((high - low) / max_code, dtype), of_scale[..., None] / max_code, 0)
    _share(gradient, values == high, share)
    _share(gradient, values == low, -share)


def _fits(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where the stored scale follows the range; elsewhere it is held at what ``dtype`` can hold."""
    limits = torch.finfo(dtype)
    return (scale >= limits.tiny) & (scale <= limits.max)


def _share(gradient, chosen, amount) -> None:
    """Deal ``amount`` [R, G, 1] evenly to the chosen of each group, as autograd's amax does."""
    chosen = chosen.float()
    gradient.addcmul_(chosen, amount / chosen.sum(dim=2, keepdim=True).clamp_min_(1))


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, grid, dtype):
        ctx.save_for_backward(weight)
        ctx.grid, ctx.dtype = grid, dtype
        result = torch.empty_like(weight, dtype=dtype)
        for rows in _chunks(weight):
            result[rows] = normal_float.nearest(weight[rows].float(), grid, dtype).to(dtype)
        return result

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        limits = torch.finfo(ctx.dtype)
        shape = (-1, ctx.grid.columns_per_group(weight.shape[1]))
        result = torch.empty_like(weight)
        for rows in _chunks(weight):
            part = weight[rows].float()
            moved = normal_float.nearest(part, ctx.grid, ctx.dtype).sub_(part)
            values, given = part.unflatten(1, shape), gradient[rows].float().unflatten(1, shape)
            moved = moved.unflatten(1, shape).mul_(given)
            total = given.clone()
            ends = (values.amax(dim=2, keepdim=True), 1), (values.amin(dim=2, keepdim=True), -1)
            for end, sign in ends:
                scale = (sign * end).clamp(limits.tiny, limits.max).to(ctx.dtype).float()
                own = values >= 0 if sign == 1 else values < 0
                of_scale = (moved * own).sum(dim=2, keepdim=True) / scale
                amount = torch.where(_fits(sign * end, ctx.dtype), sign * of_scale, 0)
                _share(total, values == end, amount)
            result[rows] = total.flatten(1).to(weight.dtype)
        return result, None, None


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, scale, zero, grid, dtype):
        ctx.save_for_backward(weight, scale, zero)
        ctx.grid, ctx.dtype = grid, dtype
        scale, zero = _stored(scale, zero, grid, dtype)
        result = torch.empty_like(weight, dtype=dtype)
        for rows in _chunks(weight):
            result[rows] = _values(weight[rows], scale[rows], zero[rows], grid, dtype)
        return result

    @staticmethod
    def backward(ctx, gradient):
        weight, raw_scale, raw_zero = ctx.saved_tensors
        scale, zero = _stored(raw_scale, raw_zero, ctx.grid, ctx.dtype)
        of_weight = torch.empty_like(weight)
        of_scale, of_zero = torch.empty_like(raw_scale), torch.empty_like(raw_zero)
        for rows in _chunks(weight):
            parts = _gradients(
                gradient[rows], weight[rows], scale[rows], zero[rows], ctx.grid.max_code
            )
            for whole, part in zip((of_weight, of_scale, of_zero), parts, strict=True):
                whole[rows] = part.reshape(whole[rows].shape).to(whole.dtype)
        return of_weight, of_scale, of_zero, None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, codes, zero, grid, dtype):
        ctx.save_for_backward(scale, codes, zero)
        stored, _ = _stored(scale, zero, grid, dtype)
        return QuantizedWeight(codes, stored, zero, grid).dequantize(dtype)

    @staticmethod
    def backward(ctx, gradient):
        scale, codes, zero = ctx.saved_tensors
        result = torch.empty_like(scale)
        for rows in _chunks(codes):
            steps = codes[rows].float().unflatten(1, (scale.shape[1], -1))
            steps -= zero[rows].float()[..., None]
            steps *= gradient[rows].float().view(steps.shape)
            result[rows] = steps.sum(dim=2).to(scale.dtype)
        return result, None, None, None, None


class FakeQuantLinear(nn.Module):
    """Takes the place of a linear and gives what that would give with quantized weights.

    Args:
        module: nn.Linear, a subclass of it, or Conv1D; its parameters move here.
        transposed: the weight is [I, O] (Conv1D).
        learn: what will be trained. "weights": the grid follows the weight's extremes; "all": the
            grid is parameters ``scale`` and ``zero`` beside the weight; "scales": codes and zero
            points are fixed, the weight is gone, ``scale`` is a parameter.
        dtype: of the values and of the stored scale, whatever is computed in (default: the
            weight's).
        start: codes and grid to begin from, [O, I]; the min-max grid of the weight without it.
    """

    def __init__(self, module, grid, *, transposed=False, learn="weights", dtype=None, start=None):
        super().__init__()
        self.weight, self.bias = module.weight, module.bias
        self.grid, self.transposed, self.dtype = grid, transposed, dtype or self.weight.dtype
        module.weight = module.bias = None
        self.__dict__["plain"] = module  # for its forward alone: no submodule, no parameters
        self.register_parameter("scale", None)
        if learn == "weights":
            return
        start = start or nearest(self._matrix().detach().float(), grid, self.dtype)
        self.scale = nn.Parameter(start.scale.to(self.weight.dtype))
        if learn == "all":
            self.zero = nn.Parameter(start.zero.to(self.weight.dtype))
        else:
            self.register_buffer("codes", start.codes, persistent=False)
            self.register_buffer("zero", start.zero, persistent=False)
            self.weight = None

    def _matrix(self) -> torch.Tensor:
        return self.weight.T if self.transposed else self.weight

    def value(self) -> torch.Tensor:
        """The quantized weight as the plain module holds it."""
        dtype = self.dtype
        if self.scale is None:
            value = fake_quantize(self._matrix(), self.grid, dtype)
        elif self.weight is None:
            value = _Scaled.apply(self.scale, self.codes, self.zero, self.grid, dtype)
        else:
            value = fake_quantize_with(self._matrix(), self.scale, self.zero, self.grid, dtype)
        return value.T if self.transposed else value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The plain module's own arithmetic: Falcon's linear adds its bias after rounding.
        own = SimpleNamespace(
            weight=self.value().to(x.dtype), bias=self.bias, nf=getattr(self.plain, "nf", None)
        )
        return type(self.plain).forward(own, x)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight | torch.Tensor:
        """Codes and grid, [O, I]; :meth:`forward` computes with their values. On a normal-float
        grid the values themselves."""
        dtype = self.dtype
        if isinstance(self.grid, NormalFloat):
            return fake_quantize(self._matrix(), self.grid, dtype)
        if self.scale is None:
            return nearest(self._matrix().float(), self.grid, dtype)
        if self.weight is None:
            stored, _ = _stored(self.scale, self.zero, self.grid, dtype)
            return QuantizedWeight(self.codes, stored.to(dtype), self.zero, self.grid)
        return quantize_with(self._matrix(), self.scale, self.zero, self.grid, dtype)

    @torch.no_grad()
    def unwrap(self) -> tuple[nn.Module, QuantizedWeight | torch.Tensor]:
        """The plain module with the quantized values for its weight; and :meth:`quantized`."""
        quantized = self.quantized()
        packed = isinstance(quantized, QuantizedWeight)
        value = quantized.dequantize(self.dtype) if packed else quantized
        value = value.T.contiguous() if self.transposed else value
        self.plain.weight = nn.Parameter(value, requires_grad=False)
        self.plain.bias = self.bias
        return self.plain, quantized
