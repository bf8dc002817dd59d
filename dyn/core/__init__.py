"""Tensors in, tensors out: saliency, splits and routing on torch alone. Nothing here imports the rest of the suite."""
