"""Fronts of other tools: their names, signatures and configs over our own parts."""
