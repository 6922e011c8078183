"""The trainer: losses, features, batches, checkpoints, and whole runs."""
