"""A component's module to an ONNX graph."""
