"""What a run is: one frozen, strict model, read from YAML and dotted overrides.

Durations and intervals count images seen, so a configuration means the same at any batch size. A run's
identity is the digest of what changes its result; where and how fast it runs is not part of that.
Nothing heavy is imported here: a laptop can check a configuration without torch.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from workers.config_text import explain, plain
from workers.errors import ConfigError
from workers.model_config import ModelConfig
from workers.models.sizes import Resampling
from workers.part import Part, Positive

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""Of what ends up in keys of the store, in URLs and in queries."""


class AugmentConfig(Part):
    """What training does to images, in this order; `docs/images.md` says how. The defaults crop and flip."""

    min_scale: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of the image's area that RandomResizedCrop may take."""
    min_ratio: float = Field(default=0.75, gt=0, le=1)
    """Smallest aspect ratio of a crop; the largest is its inverse."""
    flip: bool = True
    three_augment: bool = False
    """3-Augment (Touvron et al. 2022, arXiv 2204.07118): an image becomes grey, or solarised, or blurred."""
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
    """Of the index, which must say the same; identifies the data wherever it lies. None: filled in when a run
    is made."""
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
    optimizer: Literal["adamw", "sgd", "muon", "lamb"] = "adamw"
    """sgd: with momentum. muon: for the matrices of the blocks, AdamW for the rest. lamb: as DeiT-III."""
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled; each step takes learning rate x this of a weight."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd and muon."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    clip_norm: float = Field(default=1.0, gt=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each block's learning rate is this times that of the block above (Clark et al. 2020; BEiT)."""
    freeze: str = "none"
    """What stays as the parent has it: none; patch_embedding; blocks:N, which is all before the first block
    and the first N blocks; backbone, which is all but the head."""
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup_images: int = Field(default=0, ge=0)
    decay_images: int | None = Field(default=None, gt=0)
    """Where cosine and linear reach their end; None: where training does, or its cooldown begins."""
    timescale_images: int = Field(default=10_240_000, gt=0)
    """Of rsqrt: the rate is divided by sqrt(1 + images after warm-up / this) (Zhai et al. 2022)."""
    cooldown_images: int = Field(default=0, ge=0)
    """The last so many images take the rate linearly to 0."""
    final_learning_rate: float = Field(default=0.0, ge=0)
    """Where cosine and linear end."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """sigmoid: each class on its own, summed over classes (Beyer et al. 2020, arXiv 2006.07159)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    ema_images: int = Field(default=0, ge=0)
    """Time constant of the moving average of weights that is evaluated beside them; 0: none."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not re.fullmatch(r"none|patch_embedding|blocks:[1-9]\d{0,3}|backbone", self.freeze):
            raise ValueError(
                f"freeze: {self.freeze!r} is none of none, patch_embedding, blocks:N (N > 0), backbone"
            )
        if self.schedule in ("rsqrt", "constant"):
            if self.decay_images is not None:
                raise ValueError(f"decay_images: {self.schedule} has no end; cosine and linear have")
            if self.final_learning_rate:
                raise ValueError(
                    f"final_learning_rate: {self.schedule} has no end; cosine and linear have, and "
                    "cooldown_images ends any schedule at 0"
                )
        if self.decay_images is not None and self.decay_images < self.warmup_images:
            raise ValueError(
                f"decay_images: {self.decay_images} is before the end of warmup_images {self.warmup_images}"
            )
        return self


class TrainConfig(Part):
    images: int = Field(gt=0)
    """Training ends after so many images, rounded up to whole global batches."""
    global_batch_size: int = Field(gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of what is computed; weights, moments, gradients' sums and the loss are float32 in any case."""
    eval_every_images: int = Field(gt=0)
    checkpoint_every_images: int = Field(gt=0)
    log_every_images: int = Field(default=1024, gt=0)
    max_bad_steps: int = Field(default=10, ge=0)
    """Steps in a row that may be left out because loss or gradient are not finite; in all so many, or 1 % of
    the run's steps if that is more. Beyond, the run ends."""
    spike_sigmas: float | None = Field(default=8.0, gt=0)
    """A loss is suspect if it is above the median of the 128 before by so many (robust) standard deviations,
    and by half of it. None: nothing is suspect."""
    spike_steps: int = Field(default=4, gt=0)
    """So many suspect losses in a row are a spike: the run goes back before them and skips their samples."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Spikes behind which a run may go back; with one more it ends."""
    probe_images: int = Field(default=32, ge=0)
    """Validation images on which each checkpoint's attention is looked at; 0: no probes."""


class InitConfig(Part):
    """Start from the weights of a registered checkpoint instead of from scratch."""

    manifest: str
    """URL of its MANIFEST.json."""
    digest: str
    """sha256 of that manifest; anything else found there is refused."""
    new_head: bool = False
    resampling: Resampling = "timm-bicubic"
    """How position embeddings come to another grid; `workers/models/positions.py`."""
    parent: str
    """The registered version, as `model/version`."""


class ForkConfig(Part):
    """Go on from a checkpoint of another run: its weights, optimizer, average and place in the data."""

    manifest: str
    """URL of its MANIFEST.json."""
    digest: str
    """sha256 of that manifest; anything else found there is refused."""
    parent: str
    """The run that it is of."""


class WorkerRange(Part):
    """Of an elastic run: as many as the cluster has room for, between these. Batches stay what they are."""

    min: Positive
    max: Positive

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} exceeds max {self.max}")
        return self


Workers = Annotated[
    Annotated[Positive, Tag("a number")] | Annotated[WorkerRange, Tag("a range")],
    # Told apart, so that a wrong one has the message of what it was meant to be.
    Discriminator(lambda value: "a range" if isinstance(value, dict | WorkerRange) else "a number"),
]


class DrillConfig(Part):
    """What `vitscale selftest resume` asks of a run."""

    record_batches: bool = False
    """The run's events hold a digest of each global batch: ids, labels and augmented pixels."""
    kill_at_step: int | None = Field(default=None, ge=0)
    """The last rank's process kills itself before this step, in the run's first worker group."""
    fail_at_step: int | None = Field(default=None, ge=0)
    """The run ends with an error before this step; another job may go on."""


class ComputeConfig(Part):
    """Where and how fast; never changes a result, so it is no part of a run's identity."""

    workers: Workers = 2
    """A number, or {min: 2, max: 8}: then the group grows and shrinks with the cluster."""
    cpus_per_worker: int = Field(default=1, gt=0)
    gpus_per_worker: int = Field(default=0, ge=0)
    accelerator: str | None = None
    """Only nodes that have this type of accelerator, as Ray names it: H100, A100, A100-80G, L4; None: any."""
    queue: str = "default"
    """Whose quota it counts to; `vitscale queue limit` sets those."""
    priority: int = Field(default=0, ge=-100, le=100)
    """Runs of higher priority go first, and those of lower make way for them."""
    shard_workers: int | None = Field(default=None, gt=0)
    """Workers that share one copy of weights and moments (hybrid sharding): groups of so many are replicas of
    each other. None: all workers share one."""
    microbatch_size: Positive | Literal["auto"] | None = None
    """Images per forward and rank; auto: what fits the device's memory; None: a rank's whole share of the
    global batch."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass instead of kept: nothing; all but the results of matrix
    products and attention; all within each block."""
    compile: bool = False
    """torch.compile of each block: slow first steps, faster ones after."""
    deterministic: bool = False
    """Only operations that give the same bits each time; slower on GPUs."""
    profile_steps: int = Field(default=0, ge=0)
    """So many steps, from the tenth after a start, are traced by torch.profiler; rank 0's trace lies in the
    run's `traces/`."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Of one worker's device, for MFU; None: known for common GPUs, measured otherwise."""
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
    hang_seconds: float = Field(default=30.0, ge=0)
    """A worker that stands still for so long, in a step or waiting for a batch, is killed, and its group goes
    on from the last commit. 0: nobody looks, as a debugger wants it."""
    max_hours: float | None = Field(default=None, gt=0)
    """After so many since its user's command the run's job commits and stops, whether it trains or waits.
    None: never."""
    drill: DrillConfig = DrillConfig()

    @model_validator(mode="after")
    def _has_names(self) -> Self:
        for field, name in (("queue", self.queue), ("accelerator", self.accelerator)):
            if name is not None and not re.fullmatch(NAME, name):
                raise ValueError(
                    f"{field} {name[:100]!r}: letters, digits, '.', '_' and '-' only, at most 100"
                )
        return self

    @property
    def worker_counts(self) -> list[int]:
        """How many workers a group may have, ascending: whole shard groups."""
        few, most = (
            (self.workers, self.workers)
            if isinstance(self.workers, int)
            else (self.workers.min, self.workers.max)
        )
        return [count for count in range(few, most + 1) if count % (self.shard_workers or 1) == 0]


class RunConfig(Part):
    name: str
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    init: InitConfig | None = None
    fork: ForkConfig | None = None
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,80}", self.name):
            raise ValueError("name: small letters, digits, '.', '_' and '-' only, at most 81")
        batch, lanes = self.train.global_batch_size, self.data.lanes
        if batch % lanes:
            raise ValueError(
                f"train.global_batch_size {batch} is not a multiple of data.lanes {lanes}; "
                f"{-(-batch // lanes) * lanes} would be, or set data.lanes to a divisor of it"
            )
        if self.data.mix and self.data.subset is not None:
            raise ValueError("data.subset: takes no data.mix; a subset is one of a single data set")
        counts = self.compute.worker_counts
        if not counts:
            raise ValueError(
                f"compute.shard_workers {self.compute.shard_workers} does not divide compute.workers "
                f"{self.compute.workers}"
            )
        if counts[-1] > lanes:
            raise ValueError(f"compute.workers {counts[-1]} exceeds data.lanes {lanes}; raise data.lanes")
        if self.init is not None and self.fork is not None:
            raise ValueError("init, fork: a run starts from weights, or goes on from a checkpoint, not both")
        self._check_freeze()
        if self.optim.cooldown_images > self.train.images:
            raise ValueError(
                f"optim.cooldown_images {self.optim.cooldown_images} exceeds train.images {self.train.images}"
            )
        return self

    def _check_freeze(self) -> None:
        freeze = self.optim.freeze
        if freeze == "none":
            return
        if self.init is None and self.fork is None:
            raise ValueError(
                f"optim.freeze: {freeze} is for runs with a parent (init), whose weights it keeps"
            )
        if self.model.family == "resnet":
            raise ValueError(f"optim.freeze: {freeze} is for ViTs and hybrids")
        depth = self.model.spec.size.depth
        if freeze.startswith("blocks:") and int(freeze.removeprefix("blocks:")) > depth:
            raise ValueError(f"optim.freeze: {freeze}, but model.size {self.model.size} has {depth} blocks")

    @property
    def digest(self) -> str:
        """sha256 of all that changes the result and is not as it is by default: a version that knows more
        fields calls the same run by the same name."""
        exclude = {"name": True, "compute": True}
        identity = self.model_dump(mode="json", exclude=exclude, exclude_defaults=True)
        for url, fingerprint in (("url", "fingerprint"), ("validation_url", "validation_fingerprint")):
            if identity["data"].get(fingerprint) is not None:
                identity["data"].pop(url)
        for source in identity["data"].get("mix", ()):
            if source.get("fingerprint") is not None:
                source.pop("url")
        for layout in ("image_key", "label"):  # checks: what they say is in the index, and its fingerprint
            identity["data"].pop(layout, None)
        if self.init is not None:
            for place in ("manifest", "parent"):
                identity["init"].pop(place)
        if self.fork is not None:
            identity["fork"] = self.fork.digest
        for shown in ("log_every_images", "checkpoint_every_images", "eval_every_images", "probe_images"):
            identity["train"].pop(shown, None)
        for budget in ("max_bad_steps", "max_rollbacks"):  # with a larger one the same run goes on
            identity["train"].pop(budget, None)
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
        return RunConfig.model_validate_json(json.dumps(plain(values)))
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from None
