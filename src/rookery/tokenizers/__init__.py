"""Text to token ids and back, which tokenizer belongs to a model, and chat templates. Nothing here needs torch."""

from rookery.tokenizers.base import StreamDecoder, Tokenizer
from rookery.tokenizers.pairing import load_tokenizer, resolve

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer", "resolve"]
