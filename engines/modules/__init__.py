"""Modules that stand for a pipeline's parts and run on sessions."""
