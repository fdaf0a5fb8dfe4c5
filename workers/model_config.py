"""What a model is: family, size and shape; its parameters and FLOPs in closed form, without torch."""

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from workers.config_text import explain, plain
from workers.errors import ConfigError
from workers.models.hybrid_sizes import HybridSpec, hybrid_size
from workers.models.resnet_sizes import resnet_flops, resnet_parameters, resnet_size
from workers.models.sizes import (
    Activation,
    Pool,
    Positions,
    ViTSpec,
    image_shape,
    patch_grid,
    skipped_flops,
    vit_flops,
    vit_parameters,
    vit_size,
)
from workers.part import Part, Positive

VIT_OPTIONS = (
    *("pool", "norm_after_pool", "positions", "embed_prefix", "registers", "qk_norm", "layer_scale"),
    *("activation", "norm_epsilon", "hidden_head", "drop_path", "drop_path_uniform", "dropout"),
)


class ModelConfig(Part):
    family: Literal["vit", "hybrid", "resnet"] = "vit"
    size: str
    """A name of `workers/models/sizes.py` (ti, s, b, l, h, ..., the toy sizes), `resnet_sizes.py` (20, r50x1,
    ...) or `hybrid_sizes.py` (r50-b, ...)."""
    image_size: Positive | tuple[Positive, Positive]
    """Pixels per side at which the model sees images; [height, width] for those that are no squares."""
    patch_size: int = Field(default=16, gt=0)
    channels: Literal[1, 3] = 3
    num_classes: int = Field(default=0, ge=0)
    """0: as many as the data set has."""
    # What follows is of ViTs and hybrids; `ViTSpec` in `workers/models/sizes.py` says what each does.
    pool: Pool = "cls"
    norm_after_pool: bool = False
    positions: Positions = "learned"
    embed_prefix: bool = True
    registers: int = Field(default=0, ge=0, le=64)
    qk_norm: bool = False
    layer_scale: float | None = Field(default=None, gt=0)
    activation: Activation = "gelu"
    norm_epsilon: float = Field(default=1e-6, gt=0)
    hidden_head: bool = False
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    drop_path_uniform: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.family == "resnet":
            resnet_size(self.size)
            image_shape(self.image_size)
        else:
            patch_grid(self.image_size, self.patch_size)
            _ = self.spec
        return self

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return image_shape(self.image_size)

    @property
    def spec(self) -> ViTSpec:
        """Of a ViT or a hybrid."""
        shape = ("patch_size", "channels", "num_classes")
        values = {name: getattr(self, name) for name in (*shape, *VIT_OPTIONS)}
        if self.family == "hybrid":
            stem, size = hybrid_size(self.size, self.patch_size)
            return HybridSpec(stem=stem, size=size, image_size=self.image_shape, **values)
        return ViTSpec(size=vit_size(self.size), image_size=self.image_shape, **values)

    @property
    def parameters(self) -> int:
        if self.family != "resnet":
            return vit_parameters(self.spec)
        size = resnet_size(self.size)
        return resnet_parameters(size, channels=self.channels, num_classes=self.num_classes)

    @property
    def computed_flops(self) -> int:
        """Of `flops`, those that the model computes: not what nobody looks at in the last block."""
        return self.flops - (skipped_flops(self.spec) if self.family != "resnet" else 0)

    @property
    def flops(self) -> int:
        """Of the forward pass, per image; a training step costs three times that."""
        if self.family != "resnet":
            return vit_flops(self.spec)
        return resnet_flops(
            resnet_size(self.size),
            image_size=self.image_size,
            channels=self.channels,
            num_classes=self.num_classes,
        )


def make_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """A model from plain values, as a checkpoint has it; ConfigError names each wrong field."""
    try:
        return ModelConfig.model_validate_json(json.dumps(plain(values)))
    except ValidationError as error:
        raise ConfigError(explain(error, ModelConfig)) from None
