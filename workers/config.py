"""What a run is: one frozen, strict model, read from YAML and dotted overrides.

Durations and intervals count images seen, so a configuration means the same at any batch size. A run's
identity is the digest of what changes its result; where and how fast it runs is not part of that.
Nothing heavy is imported here: a laptop can check a configuration without torch.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workers.errors import ConfigError
from workers.models.sizes import (
    patch_grid,
    resnet_flops,
    resnet_parameters,
    resnet_size,
    vit_flops,
    vit_parameters,
    vit_size,
)

MAX_SHOWN = 60
"""Characters of a wrong value that a message repeats."""


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Part):
    family: Literal["vit", "resnet"] = "vit"
    size: str
    """A name of `workers/models/sizes.py`: ti, s, b, l, h, the toy sizes, or a ResNet's depth."""
    image_size: int = Field(gt=0)
    """Pixels per side at which the model sees images."""
    patch_size: int = Field(default=16, gt=0)
    channels: Literal[1, 3] = 3
    num_classes: int = Field(default=0, ge=0)
    """0: as many as the data set has."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.family == "vit":
            vit_size(self.size)
            patch_grid(self.image_size, self.patch_size)
        else:
            resnet_size(self.size)
        return self

    @property
    def parameters(self) -> int:
        shape = {"channels": self.channels, "num_classes": self.num_classes}
        if self.family == "resnet":
            return resnet_parameters(resnet_size(self.size), **shape)
        grid = {"image_size": self.image_size, "patch_size": self.patch_size}
        return vit_parameters(vit_size(self.size), **grid, **shape)

    @property
    def flops(self) -> int:
        """Of the forward pass, per image; a training step costs three times that."""
        shape = {"image_size": self.image_size, "channels": self.channels, "num_classes": self.num_classes}
        if self.family == "resnet":
            return resnet_flops(resnet_size(self.size), **shape)
        return vit_flops(vit_size(self.size), patch_size=self.patch_size, **shape)


class AugmentConfig(Part):
    """What training does to images, in this order; `docs/images.md` says how. The defaults crop and flip."""

    min_scale: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of the image's area that RandomResizedCrop may take."""
    min_ratio: float = Field(default=0.75, gt=0, le=1)
    """Smallest aspect ratio of a crop; the largest is its inverse."""
    flip: bool = True
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Brightness, contrast and saturation are each multiplied by 1 - this .. 1 + this."""
    rand_augment_layers: int = Field(default=0, ge=0, le=14)
    """Operations of RandAugment per image; 0: none."""
    rand_augment_magnitude: float = Field(default=9.0, ge=0, le=30)
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability of random erasing."""
    mixup: float = Field(default=0.0, ge=0)
    """Alpha of the Beta distribution from which mixup draws; 0: no mixup."""
    cutmix: float = Field(default=0.0, ge=0)
    """Likewise for cutmix; where both are above 0, each global batch gets one of them by a fair coin."""

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class MixedSource(Part):
    """A further set of training shards, of the same classes as the first."""

    url: str
    weight: float = Field(default=1.0, gt=0)
    fingerprint: str | None = None


class DataConfig(Part):
    url: str
    """Training shards, with their index beside them: a prefix, or shards as `prefix/train-{000..099}.tar`."""
    weight: float = Field(default=1.0, gt=0)
    """Of these shards against those of `mix`: every global batch is shared out by weight."""
    mix: tuple[MixedSource, ...] = ()
    validation_url: str
    """Validation shards, likewise."""
    fingerprint: str | None = None
    """Filled in from the index when a run is made; identifies the data wherever it lies."""
    validation_fingerprint: str | None = None
    image_key: str | None = None
    """Extensions of a sample's image, such as "jpg;png"; None: as the data was indexed. Otherwise the index
    must say the same."""
    label: str | None = None
    """Where labels are: cls, txt, json:FIELD, key:REGEX or none; None and otherwise as for image_key."""
    subset: int | None = Field(default=None, gt=0)
    """Train on the first so many samples of a seeded permutation; nested across sizes."""
    subset_seed: int = 0
    stratified: bool = False
    """The subset has each class in its share of the whole."""
    max_bad_fraction: float = Field(default=0.001, ge=0, lt=1)
    """Share of a data set's samples that may be damaged; others stand in for them and a ledger lists them."""
    augment: AugmentConfig = AugmentConfig()
    lanes: int = Field(default=8, gt=0)
    """The order's degree of parallelism: any world size up to this sees the same global batches."""
    chunk_samples: int | None = Field(default=None, gt=0)
    """Neighbouring samples that are read and dealt together; None: about 4 MB of them."""
    window_chunks: int = Field(default=8, gt=0)


class OptimConfig(Part):
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    warmup_images: int = Field(default=0, ge=0)
    final_learning_rate: float = Field(default=0.0, ge=0)
    """Where the cosine ends."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class TrainConfig(Part):
    images: int = Field(gt=0)
    """Training ends after so many images, rounded up to whole global batches."""
    global_batch_size: int = Field(gt=0)
    eval_every_images: int = Field(gt=0)
    checkpoint_every_images: int = Field(gt=0)
    log_every_images: int = Field(default=1024, gt=0)


class InitConfig(Part):
    """Start from the weights of a registered checkpoint instead of from scratch."""

    manifest: str
    """URL of its MANIFEST.json."""
    digest: str
    """sha256 of that manifest; anything else found there is refused."""
    new_head: bool = False
    parent: str
    """The registered version, as `model/version`."""


class ComputeConfig(Part):
    """Where and how fast; never changes a result, so it is no part of a run's identity."""

    workers: int = Field(default=2, gt=0)
    cpus_per_worker: int = Field(default=1, gt=0)
    gpus_per_worker: int = Field(default=0, ge=0)
    microbatch_size: int | None = Field(default=None, gt=0)
    """Images per forward and rank; None: a rank's whole share of the global batch."""
    prefetch_batches: int = Field(default=4, gt=0)
    readers: int = Field(default=0, ge=0)
    """Processes per worker that read and decode, each some of its lanes; 0: threads of the worker itself.
    Several cores per GPU want some: one process can use about eight."""
    prefetch_bytes: int = Field(default=256 << 20, gt=0)
    """Of samples that a worker reads ahead; the window of each of its lanes in any case."""
    cache_directory: str | None = None
    """Local directory of each node for what was read of the shards; None: no cache."""
    cache_bytes: int = Field(default=100 << 30, gt=0)
    """Limit of that directory, for all processes of a node."""


class RunConfig(Part):
    name: str
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    init: InitConfig | None = None
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,80}", self.name):
            raise ValueError("name: small letters, digits, '.', '_' and '-' only, at most 81")
        batch, lanes = self.train.global_batch_size, self.data.lanes
        if batch % lanes:
            raise ValueError(
                f"train.global_batch_size {batch} is not a multiple of data.lanes {lanes}; "
                f"{-(-batch // lanes) * lanes} would be"
            )
        if self.data.mix and self.data.subset is not None:
            raise ValueError("data.subset: takes no data.mix; a subset is one of a single data set")
        if self.compute.workers > lanes:
            raise ValueError(
                f"compute.workers {self.compute.workers} exceeds data.lanes {lanes}; raise data.lanes"
            )
        return self

    @property
    def digest(self) -> str:
        """sha256 of all that changes the result."""
        identity = self.model_dump(mode="json", exclude={"name": True, "compute": True})
        for url, fingerprint in (("url", "fingerprint"), ("validation_url", "validation_fingerprint")):
            if identity["data"][fingerprint] is not None:
                identity["data"].pop(url)
        for source in identity["data"]["mix"]:
            if source["fingerprint"] is not None:
                source.pop("url")
        for layout in ("image_key", "label"):  # checks: what they say is in the index, and its fingerprint
            identity["data"].pop(layout)
        if self.init is not None:
            identity["init"] = {"digest": self.init.digest, "new_head": self.init.new_head}
        for interval in ("log_every_images", "checkpoint_every_images", "eval_every_images"):
            identity["train"].pop(interval)
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def run(self) -> str:
        """The run's name in the store and the tracking server; the same configuration gives the same."""
        return f"{self.name}-{self.digest[:10]}"

    @property
    def num_steps(self) -> int:
        return -(-self.train.images // self.train.global_batch_size)

    @property
    def training_flops(self) -> int:
        return 3 * self.model.flops * self.num_steps * self.train.global_batch_size


def make_config(values: Mapping[str, Any]) -> RunConfig:
    """A configuration from plain values; ConfigError names each wrong field."""
    try:
        return RunConfig.model_validate_json(json.dumps(_plain(values)))
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from None


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    return make_config(override(read_yaml(path), overrides))


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = _parse(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected fields, found {type(values).__name__}")
    return _plain(values, str(path))


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`["optim.learning_rate=0.01"]` applied; values are read as YAML."""
    result = _plain(values)
    for text in overrides:
        path, separator, value = text.partition("=")
        *parents, last = (part.strip() for part in path.split("."))
        if not separator or not all([*parents, last]):
            raise ConfigError(f"--set {text}: expected field=value, such as optim.learning_rate=0.01")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {text}: {parent} is a value, not a group of fields")
            node = child
        try:
            node[last] = _parse(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: {value!r} is not YAML: {error}") from None
    return _plain(result)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 and 1e6 as text; people mean the numbers, of which the second is whole."""


def _exponential(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | int:
    value = float(node.value)
    return int(value) if value.is_integer() else value


_Loader.add_implicit_resolver(
    "!exponential", re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+$"), list("+-.0123456789")
)
_Loader.add_constructor("!exponential", _exponential)


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 a SafeLoader


def _plain(values: Mapping[str, Any], where: str = "configuration") -> dict[str, Any]:
    """As JSON has it: what else YAML knows, such as dates, becomes text."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=str))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
    return plain


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per wrong field, with the nearest known name for a misspelt one."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown field; {_hint(item['loc'], model)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing")
        elif item["type"] == "value_error":
            lines.append(f"{where}: {item['ctx']['error']}" if where else str(item["ctx"]["error"]))
        else:
            found = repr(item["input"])
            found = found if len(found) <= MAX_SHOWN else f"{found[:MAX_SHOWN]}..."
            lines.append(f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}, got {found}")
    return "\n".join(lines)


def _hint(path: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """The field that was meant: of that name elsewhere, or one of the same group with a like name."""
    *group, name = path
    model = root
    for part in group:
        if isinstance(part, str):
            model = _groups(model)[part]
    near = difflib.get_close_matches(str(name), model.model_fields, n=1)
    meant = _find(root, str(name)) or [".".join(str(part) for part in (*group, like)) for like in near]
    return f"did you mean {' or '.join(meant)}?" if meant else f"known: {', '.join(model.model_fields)}"


def _find(model: type[BaseModel], name: str) -> list[str]:
    """Dotted paths of all fields of this name."""
    found = [name] if name in model.model_fields else []
    for group, part in _groups(model).items():
        found += [f"{group}.{path}" for path in _find(part, name)]
    return found


def _groups(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields that hold fields, with what they hold."""
    return {
        name: option
        for name, field in model.model_fields.items()
        for option in (field.annotation, *getattr(field.annotation, "__args__", ()))
        if isinstance(option, type) and issubclass(option, BaseModel)
    }
