"""What rules of selection share: stored scores, doubt of labels, losses, the schedule, counts.

Imports `base`, `config`, `machine` and `data`.
"""
