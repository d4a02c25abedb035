"""Training: engines, averages, checkpoints, the two updates and the loop around them."""
