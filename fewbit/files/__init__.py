"""Files on disk: strict readers and writers of safetensors, GGUF and checkpoint folders.

Everything a file declares is checked against its real size before memory is taken for it.
"""
