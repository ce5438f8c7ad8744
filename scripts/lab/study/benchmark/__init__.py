"""What a training step and the input cost, and what a step would take on more GPUs."""
