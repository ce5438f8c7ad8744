"""Sweeps: which runs are planned, who does which of them, their processes, and how each ended. No
torch at import.
"""
