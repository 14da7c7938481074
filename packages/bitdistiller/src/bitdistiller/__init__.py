"""BitDistiller: 2- and 3-bit models by clipping and quantization-aware self-distillation."""
