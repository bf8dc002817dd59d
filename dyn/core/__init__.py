"""Tensors in, tensors out: saliency, partitions and routing on torch alone. Nothing here imports the rest of the suite."""
