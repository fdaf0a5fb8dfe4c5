"""Models by name: Vision Transformers, the ResNets that they are compared with, and hybrids of both."""

from typing import TYPE_CHECKING, Any

from workers.errors import ConfigError
from workers.models.hybrid_sizes import HybridSpec, hybrid_size
from workers.models.resnet_sizes import BiTSize, resnet_size
from workers.models.sizes import ViTSpec, image_shape, patch_grid, vit_size

if TYPE_CHECKING:
    from torch import nn

FAMILIES = ("vit", "hybrid", "resnet")


def build_model(
    family: str,
    size: str,
    *,
    image_size: int | tuple[int, int],
    patch_size: int,
    channels: int,
    num_classes: int,
    **options: Any,
) -> "nn.Module":
    """A model with initial weights on torch's current device (meta: call `init_weights` after `to_empty`).

    It maps float images (B, channels, height, width) to logits (B, num_classes). `options` are those of a
    `ViTSpec`; a ResNet has neither patches nor options, and leaves them unread. The patch size of a hybrid is
    the stride of its ResNet. ConfigError names the field that cannot work.
    """
    for field, value in (("channels", channels), ("num_classes", num_classes)):
        if value < 1:
            raise ConfigError(f"model.{field}: {value} is not positive")
    # Imported on use: planning reads workers.models.sizes where nobody needs torch (2 s and 200 MB).
    shape = {"patch_size": patch_size, "channels": channels, "num_classes": num_classes, **options}
    if family == "vit":
        from workers.models.vit import VisionTransformer

        patch_grid(image_size, patch_size)
        return VisionTransformer(ViTSpec(size=vit_size(size), image_size=image_shape(image_size), **shape))
    if family == "hybrid":
        from workers.models.hybrid import HybridTransformer

        stem, vit = hybrid_size(size, patch_size)
        patch_grid(image_size, patch_size)
        return HybridTransformer(HybridSpec(stem=stem, size=vit, image_size=image_shape(image_size), **shape))
    if family == "resnet":
        from workers.models.bit import BiT
        from workers.models.resnet import ResNet

        image_shape(image_size)
        found = resnet_size(size)
        if isinstance(found, BiTSize):
            return BiT(found, channels=channels, num_classes=num_classes)
        return ResNet(found, channels=channels, num_classes=num_classes)
    raise ConfigError(f"model.family: {family!r} is not known; choose one of {', '.join(FAMILIES)}")
