"""What fine-tuning leaves as the parent had it."""

from torch import nn

from workers.training.optim import layer_of


def freeze(model: nn.Module, which: str) -> None:
    """Parameters that are `which`, see `OptimConfig.freeze`, take no gradient, and no optimizer will have
    state of them. Call it on a whole model, before it is spread over ranks."""
    depth = len(getattr(model, "blocks", ()))
    for name, parameter in model.named_parameters():
        if _is_frozen(name, depth, which):
            parameter.requires_grad_(False)


def _is_frozen(name: str, depth: int, which: str) -> bool:
    if which == "patch_embedding":
        return name.startswith("patch_embed.")
    if which.startswith("blocks:"):
        return layer_of(name, depth) <= int(which.removeprefix("blocks:"))
    return which == "backbone" and not name.startswith("head.")
