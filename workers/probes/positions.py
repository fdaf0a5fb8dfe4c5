"""What position embeddings say of where a patch is."""

import numpy as np

from workers.models.vit import VisionTransformer
from workers.probes.result import Floats


def position_similarity(model: VisionTransformer) -> Floats | None:
    """Cosine between the position embeddings of each pair of patches, (h, w, h, w), no prefix tokens.

    None of rotary positions, which turn queries and keys and embed nothing. Dosovitskiy et al. 2021,
    figure 7 (centre).
    """
    if model.spec.positions == "rope":
        return None
    embedding = model.pos_embed.detach()[0, model.spec.embedded_prefix :].double().cpu().numpy()
    norms = np.linalg.norm(embedding, axis=1, keepdims=True)
    unit = embedding / np.maximum(norms, np.finfo(np.float64).tiny)
    return np.asarray((unit @ unit.T).reshape(*model.spec.grid, *model.spec.grid), dtype=np.float64)


def neighbour_similarity(similarity: Floats) -> float | None:
    """Mean cosine of the patches that share an edge, of (h, w, h, w); None of a single patch."""
    below = np.einsum("ijij->ij", similarity[:-1, :, 1:])
    beside = np.einsum("ijij->ij", similarity[:, :-1, :, 1:])
    pairs = np.concatenate([below.ravel(), beside.ravel()])
    return float(pairs.mean()) if len(pairs) else None
