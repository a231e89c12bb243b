"""Transforms: linear changes of coordinates that weights and activations undergo together."""
