"""Eight bits: what is rounded and how, calibration, fake quantization in PyTorch, and Q/DQ nodes in ONNX graphs."""
