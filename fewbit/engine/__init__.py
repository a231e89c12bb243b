"""The engine: requests in, tokens out; scheduler, pages, sampler, text. No HTTP here."""
