"""transformers' model definitions, filled from any checkpoint with plain or quantized weights."""
