"""What fine-tuning leaves as the parent had it."""

from torch import nn

from workers.models.layers import is_frozen


def freeze(model: nn.Module, which: str) -> None:
    """Parameters that are `which`, see `OptimConfig.freeze`, take no gradient, and no optimizer will have
    state of them. Call it on a whole model, before it is spread over ranks."""
    depth = len(getattr(model, "blocks", ()))
    for name, parameter in model.named_parameters():
        if is_frozen(name, depth, which):
            parameter.requires_grad_(False)
