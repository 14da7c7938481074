"""SparseGPT, Wanda, magnitude pruning, LLM-Pruner, and recovery."""
