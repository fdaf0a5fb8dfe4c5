"""What the patch embedding looks for: principal components of its filters."""

import numpy as np

from workers.models.hybrid import HybridTransformer
from workers.models.vit import VisionTransformer
from workers.probes.result import Floats

FIGURE_7_FILTERS = 28


def patch_filters(model: VisionTransformer) -> Floats | None:
    """Principal components of the patch embedding's filters, (K, C, p, p), of unit norm, largest first.

    K is 28, or the rank that so many filters of that size can have. Of the two signs of a component, the
    one whose largest value is positive. None of a hybrid, whose patches are features of a ResNet.
    Dosovitskiy et al. 2021, figure 7 (left).
    """
    if isinstance(model, HybridTransformer):
        return None
    weight = model.patch_embed.proj.weight.detach().double().cpu().numpy()
    filters = weight.reshape(weight.shape[0], -1)
    centred = filters - filters.mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    # Centring takes one from the rank that the number of filters allows.
    components = components[: min(FIGURE_7_FILTERS, len(filters) - 1, filters.shape[1])]
    extremes = np.abs(components).argmax(axis=1, keepdims=True)
    components = components * np.sign(np.take_along_axis(components, extremes, axis=1))
    return np.asarray(components.reshape(-1, *weight.shape[1:]), dtype=np.float64)
