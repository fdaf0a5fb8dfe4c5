"""All that is asked of one ViT."""

import numpy as np
from torch import Tensor

from workers.models.vit import VisionTransformer
from workers.probes.attention import measure_attention
from workers.probes.filters import patch_filters
from workers.probes.positions import neighbour_similarity, position_similarity
from workers.probes.result import Probes, tile_places


def probe(model: VisionTransformer, images: Tensor) -> Probes:
    """Look into a plain model, in evaluation mode, with normalised images (B, C, H, W) on its device."""
    assert not model.training
    similarity = position_similarity(model)
    attention = measure_attention(model, images)
    spec = model.spec
    return Probes(
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        num_tokens=spec.num_prefix + spec.grid[0] * spec.grid[1],
        num_images=len(images),
        patch_filters=patch_filters(model),
        position_similarity=None if similarity is None else similarity[np.ix_(*tile_places(spec.grid))],
        position_neighbour_similarity=None if similarity is None else neighbour_similarity(similarity),
        attention_distance=attention.distance,
        attention_entropy=attention.entropy,
        attention_logit_max=attention.logit_max,
        attention_logit_rms=attention.logit_rms,
        residual_norm=attention.residual_norm,
        rollout=attention.rollout,
    )
