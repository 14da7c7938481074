"""MiniLLM: SFT, knowledge distillation, and distillation by the reverse KL."""
