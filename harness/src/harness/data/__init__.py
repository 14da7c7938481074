"""Texts, instruction sets and questions as tokens."""
