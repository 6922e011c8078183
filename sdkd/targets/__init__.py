"""What can be built and run here: the targets, and what each of their libraries needs on this machine."""
