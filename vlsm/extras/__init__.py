"""What a run can do without: ONNX files, the hub, several tuners at once, converting CRIS checkpoints."""
