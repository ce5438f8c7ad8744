"""What a run leaves and shows: results, log, weights folder, evaluation, suspects, sheets, banner.

Imports the rooms before it: `base` to `engine`.
"""
