"""Grids, rounding, second moments, fake quantization, masks: mathematics on tensors."""
