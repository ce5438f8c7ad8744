"""What a process stands on: its device, its fellow processes, loader workers, time, energy, saved
state.

Imports `base` and `config`.
"""
