"""timm and transformers, with which models and weights are compared: `from tests.reference import timm`.

PyPI's torchvision, which both import, is built for CUDA: beside CPU torch its own operators cannot be loaded.
None of them is used here, and their schemas are enough to import it.
"""

import warnings

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, _name):
        _LIBRARY.define(f"{_name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm
    import timm.loss
    import timm.optim
    import transformers

__all__ = ["timm", "transformers"]
