"""What drives a run: the optimizer, its checks before the start, its checkpoints and resumption.

Imports the rooms before it: `base` to `models`.
"""
