"""Engines inside diffusers pipelines."""
