"""Checkpoints: found, read, written, resumed; how a compressed matrix lies in a file."""
