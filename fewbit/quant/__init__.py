"""The algebra of low-bit formats: pure data and pure functions, no model, no file, no device."""
