"""Building blocks of a model that hold quantized tensors and hand them to kernels."""
