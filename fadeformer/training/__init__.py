"""Training: the loop and its state, optimizers, batch sampling, augmentation, checkpoints and multi-device setup."""
