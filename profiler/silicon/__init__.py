"""Measured tables of GPUs that are not at hand, read from files that others publish; nothing of theirs is executed."""
