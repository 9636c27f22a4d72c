"""Training: an adapter attached, transformers' Trainer with its callbacks, checkpoints."""
