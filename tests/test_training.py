import itertools
import os
import random
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch.nn import functional

from pipelines.ingest import ingest
from pipelines.recipes import fine_tune, read_facts
from tests.distributed import Ranks, on_ranks
from tests.runs import (
    BATCH,
    CPU,
    At,
    copy_cut,
    die,
    head_manifest,
    losses,
    outcome,
    replay,
    tensors,
    tiny_config,
    train_on,
    train_rank,
)
from workers.config import InitConfig, make_config
from workers.config_text import override
from workers.data.index import DatasetIndex
from workers.data.indexing import build_index
from workers.data.mixture import Source
from workers.data.mixture import make_order as make_order_of
from workers.data.stream import TrainStream
from workers.errors import CheckpointError, ConfigError, DataError
from workers.models import build_model
from workers.models.positions import resample_position_embedding
from workers.models.weights import HEAD
from workers.storage import open_store
from workers.training import loop
from workers.training.commits import CommitLog
from workers.training.optim import learning_rate
from workers.training.restore import restore_test

GOLDEN = [
    *(2.30259, 2.30259, 2.29986, 2.30474, 2.29074, 2.28141, 2.29053, 2.35249, 2.36262, 2.30360),
    *(2.27014, 2.30427, 2.30820, 2.29781, 2.27220, 2.23952, 2.27729, 2.28090, 2.26613, 2.31310),
]


def set_values(config, *overrides):
    return make_config(override(config.model_dump(mode="json"), overrides))


def make_order(config):
    return make_order_of(config.data, DatasetIndex.open(config.data.url), config.seed)


class RecordingStream(TrainStream):
    """Keeps the ids of the real samples of each batch."""

    def __next__(self):
        batch = super().__next__()
        self.recorded.append(batch.ids[: batch.num_real].tolist())
        return batch


def train_recording_ids(config, run_url):
    """(steps) lists of ids that this rank trained on."""
    RecordingStream.recorded = []
    loop.TrainStream = RecordingStream
    loop.train(config, run_url, CPU)
    return RecordingStream.recorded


@pytest.fixture(scope="module")
def by_world_size(digits_url, tmp_path_factory):
    """The same 20 steps on 1, 2, 3 and 4 ranks: (URL of the run, ids by rank and step)."""
    config = tiny_config(digits_url)
    runs = {}
    for world_size in (1, 2, 3, 4):
        url = (tmp_path_factory.mktemp("runs") / str(world_size)).as_uri()
        runs[world_size] = url, on_ranks(world_size, train_recording_ids, config, url)
    return runs


def test_the_loss_curve_is_the_golden_one(by_world_size):
    url, _ = by_world_size[1]
    assert losses(url) == pytest.approx(GOLDEN, abs=1e-4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_world_size_changes_neither_global_batches_nor_losses(digits_url, by_world_size, world_size):
    order = make_order(tiny_config(digits_url))
    _, rows = DatasetIndex.open(f"{digits_url}/train").records(0, order.num_samples)
    url, ids = by_world_size[world_size]
    global_batches = [sorted(id for part in parts for id in part) for parts in zip(*ids, strict=True)]
    positions = [range(step * BATCH, (step + 1) * BATCH) for step in range(20)]
    assert global_batches == [sorted(rows["id"][[order.sample(at) for at in batch]]) for batch in positions]
    one_url, _ = by_world_size[1]
    # Sums of floats in another order; at this rate of learning they drift apart.
    assert losses(url)[:10] == pytest.approx(losses(one_url)[:10], abs=1e-5)
    assert losses(url) == pytest.approx(losses(one_url), abs=1e-3)
    assert head_manifest(url).world_size == world_size


def plain_training(config):
    """A run in plain PyTorch, one process, whole batches: parameters, and moments as manifests name them."""
    index, part = DatasetIndex.open(config.data.url), config.optim
    stream = TrainStream(
        [Source.of(index, make_order(config), BATCH, max_bad_fraction=0)],
        rank=0,
        world_size=1,
        start_step=0,
        image_size=8,
        channels=1,
        augment=config.data.augment,
        prefetch_batches=1,
    )
    torch.manual_seed(config.seed)
    model = build_model("vit", "digits-xs", image_size=8, patch_size=2, channels=1, num_classes=10)
    spared = [name for name, value in model.named_parameters() if value.ndim == 1]
    spared += ["cls_token", "pos_embed"]
    groups = [
        {"params": [value], "weight_decay": 0.0 if name in spared else part.weight_decay}
        for name, value in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(part.beta1, part.beta2))
    for step in range(config.num_steps):
        batch = next(stream)
        logits = model(batch.images / 127.5 - 1)
        loss = functional.cross_entropy(logits, batch.labels, label_smoothing=part.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), part.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(part, step * BATCH, config.num_steps * BATCH)
        optimizer.step()
    stream.close()
    state = {name: value.detach() for name, value in model.named_parameters()}
    for name, value in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"state.{name}.{moment}"] = optimizer.state[value][moment]
    return state


@pytest.mark.parametrize(("world_size", "microbatch_size"), [(1, 7), (2, None), (2, 3), (3, None), (3, 7)])
def test_steps_are_those_of_plain_pytorch(digits_url, store_url, world_size, microbatch_size):
    """Ranks of 12 and 18 images, padded to 18, and microbatches that do not divide them."""
    # The head starts at zero, so only the second step has gradients everywhere; they are clipped.
    config = tiny_config(
        digits_url,
        "optim.warmup_images=0",
        "optim.learning_rate=0.001",
        "optim.clip_norm=0.25",
        "optim.label_smoothing=0.1",
        f"compute.microbatch_size={microbatch_size or 'null'}",
        steps=2,
    )
    train_on(world_size, config, store_url)
    found, expected = tensors(store_url, head_manifest(store_url)), plain_training(config)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wrong = (found[name] - value).abs()
        if name.endswith("qkv.bias"):
            # A bias of all keys changes no softmax: that gradient is rounding, which AdamW makes a step of.
            wrong[16:32] = 0
        assert wrong.max() < 3e-6, name  # sums in another order, through AdamW
    assert all(found[name].abs().max() > 0 for name in expected)


@pytest.fixture(scope="module")
def interrupted_config(digits_url):
    """Twenty steps and ten commits."""
    return tiny_config(digits_url, f"train.checkpoint_every_images={2 * BATCH}")


@pytest.fixture(scope="module")
def undisturbed(interrupted_config, tmp_path_factory):
    """URLs of complete runs by world size."""
    urls = {size: (tmp_path_factory.mktemp("undisturbed") / str(size)).as_uri() for size in (1, 2)}
    for world_size, url in urls.items():
        train_on(world_size, interrupted_config, url)
    return urls


@pytest.mark.parametrize(
    ("world_size", "crashes"),
    [
        (1, [At("model-00000", 0, die), At("part-00000", 0, die), At("MANIFEST", 0, die)]),
        (1, [At("commits", 0, die, after=True), At("optimizer-00000", 1, die), At("commits", 7, die)]),
        (2, [At("optimizer-00001", 0, die), At("part-00001", 1, die), At("model-00001", 2, die)]),
        (2, [At("MANIFEST", 3, die), At("commits", 4, die, after=True)]),
    ],
)
def test_a_run_that_dies_again_and_again_while_committing_ends_bit_equal(
    interrupted_config, undisturbed, store_url, world_size, crashes
):
    commits = 0
    for crash in crashes:
        with Ranks(world_size, train_rank, interrupted_config, store_url, crash) as ranks:
            ranks.wait_for_death()
        commits += crash.nth + crash.after
        head = CommitLog(open_store(store_url)).head()
        assert (head.seq + 1 if head else 0) == commits
    assert train_on(world_size, interrupted_config, store_url) == []
    assert outcome(store_url) == outcome(undisturbed[world_size])
    assert replay(store_url) == replay(undisturbed[world_size])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_is_killed_at_random_ends_bit_equal(
    interrupted_config, undisturbed, store_url, world_size, seed
):
    rng = random.Random(seed)
    commits = CommitLog(open_store(store_url))
    kills = 0
    while (head := commits.head()) is None or not head.complete:
        target = (head.seq if head else -1) + rng.randint(1, 4)
        with Ranks(world_size, train_rank, interrupted_config, store_url) as ranks:
            while ranks.alive() and ((now := commits.head()) is None or now.seq < target):
                time.sleep(0.005)
            if ranks.alive():
                time.sleep(rng.uniform(0, 0.1))
            kills += ranks.alive()
    assert kills
    assert outcome(store_url) == outcome(undisturbed[world_size])
    assert replay(store_url) == replay(undisturbed[world_size])


def test_a_run_that_changes_its_world_size_stays_close(interrupted_config, undisturbed, tmp_path):
    url = copy_cut(undisturbed[2], tmp_path / "run", commits=4)
    assert train_on(3, interrupted_config, url) == []
    assert head_manifest(url).world_size == 3
    assert [seen for seen, _ in replay(url)] == [seen for seen, _ in replay(undisturbed[2])]
    assert losses(url) == pytest.approx(losses(undisturbed[2]), abs=1e-3)


def test_a_complete_run_is_left_alone(interrupted_config, undisturbed, tmp_path):
    url = copy_cut(undisturbed[1], tmp_path / "run", commits=10)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert train_on(2, interrupted_config, url) == []
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_what_was_saved_computes_the_logits_that_were_recorded(undisturbed):
    recorded = []
    for url in undisturbed.values():
        head = CommitLog(open_store(url)).head()
        assert "logits are those recorded" in restore_test(f"{url}/{head.manifest}", head.digest)
        recorded.append(head_manifest(url).probe)
    one, two = (torch.tensor(probe["logits"]) for probe in recorded)
    assert one.shape == (2, 10) and one.std() > 0.1
    assert torch.allclose(one, two, atol=0.05)  # whatever the parameters were shared out to


def fine_tuning(parent_config, parent_url, data_url, *, new_head=False, digest=None):
    """One step at 16 px from a run's head, at a learning rate of 0: what it saves is what it started from."""
    head = CommitLog(open_store(parent_url)).head()
    init = InitConfig(
        manifest=f"{parent_url}/{head.manifest}",
        digest=digest or head.digest,
        new_head=new_head,
        parent="digits/1",
    )
    config = fine_tune(
        parent_config, parent_config.model, read_facts(data_url), init, image_size=16, epochs=1
    )
    return set_values(config, f"train.images={BATCH}", f"optim.warmup_images={BATCH}")


@pytest.mark.parametrize("world_size", [1, 3])
def test_fine_tuning_starts_from_the_parents_weights_at_a_higher_resolution(
    digits_url, interrupted_config, undisturbed, store_url, world_size
):
    config = fine_tuning(interrupted_config, undisturbed[2], digits_url)
    train_on(world_size, config, store_url)
    parent = tensors(undisturbed[2], head_manifest(undisturbed[2]))
    child = tensors(store_url, head_manifest(store_url))
    for name in (name for name in parent if not name.startswith("state.")):
        expected = parent[name]
        if name == "pos_embed":
            expected = resample_position_embedding(expected, (4, 4), (8, 8), num_prefix=1)
        assert torch.equal(child[name], expected), name


def test_fine_tuning_on_other_classes_needs_a_new_head(interrupted_config, undisturbed, store_url, photos):
    data_url = f"{store_url}/photos"
    ingest(photos(cat=60, dog=60), data_url)
    config = fine_tuning(interrupted_config, undisturbed[2], data_url, new_head=True)
    train_on(2, config, f"{store_url}/run")
    parent = tensors(undisturbed[2], head_manifest(undisturbed[2]))
    child = tensors(f"{store_url}/run", head_manifest(f"{store_url}/run"))
    assert [child[name].shape for name in HEAD] == [(2, 16), (2,)]
    assert not any(child[name].any() for name in HEAD)
    assert torch.equal(child["blocks.2.mlp.fc2.weight"], parent["blocks.2.mlp.fc2.weight"])
    old_head = fine_tuning(interrupted_config, undisturbed[2], data_url)
    with pytest.raises(CheckpointError, match=r"head.weight is \(10, 16\), .* ask for a new head"):
        train_on(1, old_head, f"{store_url}/refused")


def test_fine_tuning_refuses_a_manifest_of_another_digest(
    digits_url, interrupted_config, undisturbed, store_url
):
    config = fine_tuning(interrupted_config, undisturbed[2], digits_url, digest="0" * 64)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: its sha256 is not the registered 0000"):
        train_on(2, config, store_url)


def test_fine_tuning_resumes_without_its_parent(
    digits_url, interrupted_config, undisturbed, store_url, tmp_path
):
    parent_url = copy_cut(undisturbed[2], tmp_path / "parent", commits=10)
    config = set_values(
        fine_tuning(interrupted_config, parent_url, digits_url),
        f"train.images={4 * BATCH}",
        f"train.checkpoint_every_images={2 * BATCH}",
    )
    train_on(1, config, store_url)
    complete = outcome(store_url)
    resumed_url = copy_cut(store_url, tmp_path / "resumed", commits=1)
    (tmp_path / "parent").rename(tmp_path / "gone")
    train_on(1, config, resumed_url)
    assert outcome(resumed_url) == complete


def test_only_a_vit_is_fine_tuned(digits_url, interrupted_config, undisturbed, store_url):
    config = fine_tuning(interrupted_config, undisturbed[2], digits_url)
    config = set_values(config, "model.family=resnet", "model.size='8'")
    with pytest.raises(ConfigError, match=r"model\.family"):
        train_on(1, config, store_url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.fingerprint='5eed'", r"data\.fingerprint is 5eed, but .*/train has [0-9a-f]{64}"),
        ("data.validation_fingerprint='5eed'", r"data\.validation_fingerprint is 5eed, but "),
        ("model.num_classes=3", r"model\.num_classes is 3, the data has 10 classes"),
        ("data.subset=1000", r"data\.subset 1000 is not between 1 and the 309 samples"),
        ("data.lanes=1", r"data\.lanes 1 is the most ranks possible"),
    ],
)
def test_a_configuration_that_does_not_fit_names_its_field(digits_url, store_url, change, message):
    config = set_values(tiny_config(digits_url, "compute.workers=1"), change)
    with pytest.raises(ConfigError, match=message):
        train_on(2, config, store_url)
    assert CommitLog(open_store(store_url)).head() is None


def test_validation_of_other_classes_is_refused(digits_url, store_url, photos):
    ingest(photos(cat=30, dog=30), f"{store_url}/photos")
    config = set_values(
        tiny_config(digits_url),
        f"data.validation_url={store_url}/photos/val",
        "data.validation_fingerprint=null",
    )
    with pytest.raises(ConfigError, match=r"data\.validation_url: .*/photos/val are not those"):
        train_on(1, config, f"{store_url}/run")


def test_validation_may_lack_the_last_classes(digits_url, store_url, tiny_url):
    build_index(tiny_url, classes=[str(digit) for digit in range(2)])
    config = set_values(
        tiny_config(digits_url, steps=1),
        f"data.validation_url={tiny_url}",
        "data.validation_fingerprint=null",
    )
    train_on(1, config, store_url)
    assert head_manifest(store_url).metrics["val_images"] == 13


def test_a_global_batch_that_the_lanes_do_not_divide_is_refused(digits_url):
    with pytest.raises(ConfigError, match=r"train\.global_batch_size 44 is not a multiple of data\.lanes 8"):
        tiny_config(digits_url, "train.global_batch_size=44")


def test_another_order_in_the_same_run_is_refused(interrupted_config, undisturbed, tmp_path):
    url = copy_cut(undisturbed[2], tmp_path / "run", commits=4)
    config = set_values(interrupted_config, "data.chunk_samples=2")
    with pytest.raises(DataError, match="chunk_samples is 2, saved was 4; resume with the saved settings"):
        train_on(2, config, url)
    assert CommitLog(open_store(url)).head().seq == 3


def test_another_model_in_the_same_run_is_refused(interrupted_config, undisturbed, tmp_path):
    url = copy_cut(undisturbed[2], tmp_path / "run", commits=4)
    config = set_values(interrupted_config, "model.size=digits-s")
    with pytest.raises(CheckpointError, match=r"another model: .*bias \(checkpoint \[16\], model \[32\]"):
        train_on(2, config, url)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_diverges_ends_before_it_commits_that(digits_url, store_url, world_size):
    config = tiny_config(
        digits_url,
        "optim.learning_rate=1e30",
        f"train.checkpoint_every_images={BATCH}",
        f"train.log_every_images={100 * BATCH}",
    )
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: .* diverged before image \d+"):
        train_on(world_size, config, store_url)
    saved = tensors(store_url, head_manifest(store_url))
    assert all(value.isfinite().all() for value in saved.values())


def test_points_cover_all_steps_whatever_is_evaluated_or_committed_between(digits_url, store_url, tmp_path):
    """One point per 7 steps, and before each evaluation and commit; each is the mean since the one before."""
    every_step = tiny_config(digits_url)
    train_on(1, every_step, store_url)
    config = set_values(
        every_step,
        f"train.log_every_images={7 * BATCH}",
        f"train.eval_every_images={10 * BATCH}",
        f"train.checkpoint_every_images={4 * BATCH}",
    )
    url = (tmp_path / "seldom").as_uri()
    train_on(1, config, url)
    steps = [0, 4, 7, 8, 10, 12, 14, 16, 20]
    seen = [images_seen for images_seen, values in replay(url) if "loss" in values]
    assert seen == [BATCH * step for step in steps[1:]]
    means = [sum(losses(store_url)[first:last]) / (last - first) for first, last in itertools.pairwise(steps)]
    assert losses(url) == pytest.approx(means, abs=1e-5)


SCRIPT = """
    import logging, sys, threading, torch
    import torch.distributed as dist
    from workers.config import make_config
    from workers.training.loop import train_worker

    train_worker({payload}, torch.device("cpu"))
    assert not dist.is_initialized()
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(30)
            assert not thread.is_alive(), thread
"""


def run_script(payload, *launcher, **environment):
    script = textwrap.dedent(SCRIPT.format(payload=repr(payload)))
    return subprocess.run(
        [sys.executable, *launcher, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_plain_process_trains_two_runs_and_ends_clean(digits_url, store_url):
    configs = [tiny_config(digits_url, f"seed={seed}", steps=2) for seed in (0, 1)]
    runs = [
        {"config": config.model_dump(mode="json"), "url": f"{store_url}/{config.run}"} for config in configs
    ]
    result = run_script({"runs": runs})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [head_manifest(run["url"]).complete for run in runs] == [True, True]


def train_as_torchrun_would(config, run_url):
    """The pool's group is left for the one that torchrun's environment describes."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True) if rank == 0 else None
    ports = [store.port if store else None]
    torch.distributed.broadcast_object_list(ports)
    torch.distributed.destroy_process_group()
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports[0]),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    loop.train(config, run_url, CPU)
    return torch.distributed.is_initialized()


def test_torchrun_makes_one_group(digits_url, store_url):
    assert on_ranks(2, train_as_torchrun_would, tiny_config(digits_url, steps=2), store_url) == [False, False]
    assert head_manifest(store_url).world_size == 2
    assert [event.name for event in (open_store(store_url).root / "leases").iterdir()] == ["000000.json"]
