"""An example of a package that adds to fewbit; see README.md."""
