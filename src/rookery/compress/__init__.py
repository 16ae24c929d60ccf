"""Compression of trained RWKV-4 to 7 models (RWKV-Lite, arXiv 2412.10856), for machines with little memory.

`compress(model, out, settings)` makes a file that the compiled runtime runs; `load(path)` gives the same in torch. The
pieces compose from outside: they replace modules of a finished model.
"""

from rookery.compress.file import load, save
from rookery.compress.pipeline import Compressed, Settings, compress, compress_model

__all__ = ["Compressed", "Settings", "compress", "compress_model", "load", "save"]
