"""What each model family *is*, as data: configuration, presets, tensor names and shapes, and how to recognise it.

No file here imports torch. How a family *computes* is in the file of the same name under `rookery.models`.
"""

from rookery.families.base import Family, Kind, Shapes

__all__ = ["Family", "Kind", "Shapes"]
