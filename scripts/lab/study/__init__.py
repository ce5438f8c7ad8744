"""What is made of several runs, and what commands share: results, analysis, sweep, benchmark, cli.

Imports any room. `results`, `sweep` and `analysis` need no torch.
"""
