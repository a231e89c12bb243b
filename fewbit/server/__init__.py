"""HTTP over the engine: the OpenAI API, metrics, and a page."""
