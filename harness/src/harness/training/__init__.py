"""Training on DeepSpeed: the loop, its looks, a teacher's cache."""
