"""Checkpoint to ONNX pair. The only subpackage that imports torch (``triton-sam[export]``)."""
