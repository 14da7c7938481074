"""LLM-Pruner: heads, channels, hidden channels or blocks taken out of a model for good."""
