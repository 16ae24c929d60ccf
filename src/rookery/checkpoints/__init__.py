"""Any model file in, tensors out; and back. Nothing here imports torch or executes what a file contains."""
