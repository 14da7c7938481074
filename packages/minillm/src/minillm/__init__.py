"""MiniLLM: SFT, knowledge distillation, and distillation by the reverse KL."""

__all__ = ["Distiller"]


def __getattr__(name: str):
    # Loaded on first use: the command lines answer --help without importing torch.
    if name == "Distiller":
        from minillm.distill import Distiller

        return Distiller
    raise AttributeError(name)
