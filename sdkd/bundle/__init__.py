"""The bundle folder: its manifest, its ONNX weights, and what its engines take of memory."""
