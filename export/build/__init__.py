"""Engines from ONNX graphs, built in a child process and checked."""
