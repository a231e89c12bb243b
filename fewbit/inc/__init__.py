"""Intel Neural Compressor's FP8: its JSON config, its measurements, its scales, on a model of ours."""
