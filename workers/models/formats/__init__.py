"""Weights of Vision Transformers from elsewhere, and ours for elsewhere.

A module per format knows its names. `reading.py` opens files without running code, `infer.py` tells the model
from its tensors; `importing.py` and `exporting.py` put these together.
"""

from typing import Literal

Format = Literal["safetensors", "timm", "hf", "big_vision"]
FORMATS: tuple[Format, ...] = ("safetensors", "timm", "hf", "big_vision")
"""safetensors: our own, which any model of ours can have."""
MODEL_KEY = "vitscale.model"
"""Where the metadata of our own safetensors has the ModelConfig."""
