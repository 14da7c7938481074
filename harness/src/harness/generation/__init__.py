"""Responses to prompts, in transformers or in vLLM."""
