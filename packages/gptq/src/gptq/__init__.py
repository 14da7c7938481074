"""GPTQ: accurate post-training quantization of generative pre-trained transformers.

Frantar, Ashkboos, Hoefler and Alistarh, ICLR 2023, arXiv:2210.17323.
"""

__all__ = ["quantize"]


def __getattr__(name: str):
    # Loaded on first use: the command line answers --help without importing torch.
    if name == "quantize":
        from gptq.cli import quantize

        return quantize
    raise AttributeError(name)
