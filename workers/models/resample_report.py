"""What a resize did to a model before it is trained on: how far it is from the one that it came from."""

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.models.vit import VisionTransformer


@torch.no_grad()
def resample_report(before: VisionTransformer, after: VisionTransformer, images: Tensor) -> dict[str, float]:
    """The same pictures, normalised floats (B, C, H, W) of any size, as both models see them.

    Each model gets them at its own size (bilinear, antialiased). Of what comes out:

    feature_cosine        mean cosine of what the heads see; 1: the resize changed nothing
    logit_change          mean |difference|; only where both have the same head, as are the next two
    logit_kl              mean KL divergence of the resized model's probabilities from the other's, in nats
    top1_agreement        share of pictures for which both name the same class

    and of the position embeddings, unless rotary, before and after:

    position_norm         mean norm of a patch's embedding
    neighbour_cosine      mean cosine of patches side by side; nearer to 1 on a finer grid
    border_norm_ratio     norm at the border against that of the inside: extrapolation shows here first

    Both models are left in the mode that they were in.
    """
    features, logits = zip(*(_outputs(model, images) for model in (before, after)), strict=True)
    values = {"feature_cosine": F.cosine_similarity(*features).mean().item()}
    if _same_head(before, after):
        old, new = (each.log_softmax(dim=1) for each in logits)
        values |= {
            "logit_change": (logits[0] - logits[1]).abs().mean().item(),
            "logit_kl": F.kl_div(new, old, log_target=True, reduction="batchmean").item(),
            "top1_agreement": (old.argmax(dim=1) == new.argmax(dim=1)).float().mean().item(),
        }
    if before.spec.positions != "rope" and after.spec.positions != "rope":
        for when, model in (("before", before), ("after", after)):
            values |= {f"{name}_{when}": value for name, value in describe_positions(model).items()}
    return values


def _outputs(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """(features, logits)"""
    height, width = model.spec.image_size
    resized = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
    caught: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    training = model.training
    try:
        logits: Tensor = model.eval()(resized)
    finally:
        handle.remove()
        model.train(training)
    return caught[0].float(), logits.float()


def _same_head(before: VisionTransformer, after: VisionTransformer) -> bool:
    return before.spec.num_classes == after.spec.num_classes and all(
        torch.equal(one, other)
        for one, other in zip(before.head.parameters(), after.head.parameters(), strict=True)
    )


def describe_positions(model: VisionTransformer) -> dict[str, float]:
    """`position_norm`, `neighbour_cosine`, `border_norm_ratio` of embeddings; rotary models have none."""
    grid = model.spec.grid
    embedding = model.pos_embed[0, model.spec.embedded_prefix :].float().reshape(*grid, -1)
    norms = embedding.norm(dim=-1)
    values = {"position_norm": norms.mean().item()}
    sideways = F.cosine_similarity(embedding[:, 1:], embedding[:, :-1], dim=-1)
    downward = F.cosine_similarity(embedding[1:], embedding[:-1], dim=-1)
    if neighbours := sideways.numel() + downward.numel():
        values["neighbour_cosine"] = (sideways.sum() + downward.sum()).item() / neighbours
    inside = norms[1:-1, 1:-1]
    if inside.numel():
        border = (norms.sum() - inside.sum()) / (norms.numel() - inside.numel())
        values["border_norm_ratio"] = (border / inside.mean()).item()
    return values
