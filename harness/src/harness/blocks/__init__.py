"""Layer-wise work: any causal LM, one decoder block in memory at a time."""
