"""A run's surroundings: devices, processes, clocks, checkpoints."""
