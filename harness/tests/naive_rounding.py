"""Rounding with straight-through gradients, left to autograd: the oracle of fake quantization."""


def through(exact, value):
    """``value``, with the gradient of ``exact``."""
    return exact + (value - exact).detach()


def learned(groups, scale, zero, grid):
    position = groups / scale
    codes = (through(position, position.round()) + zero).clamp(0, grid.max_code)
    return (codes - zero) * scale
