import io
import math
import tarfile

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.distributed import on_ranks
from tests.runs import CPU
from workers.config import ModelConfig
from workers.data.index import DatasetIndex
from workers.data.transforms import DecodeTimes, eval_transform
from workers.models import build_model
from workers.storage import open_store
from workers.training.evaluate import evaluate, normalize
from workers.training.parallel import shard

CONFIG = ModelConfig(size="digits-xs", image_size=8, patch_size=2, channels=1, num_classes=10)


def make_model():
    """Whose answers differ from image to image."""
    torch.manual_seed(0)
    model = build_model("vit", "digits-xs", image_size=8, patch_size=2, channels=1, num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    return model


def evaluate_with(url, batch_sizes):
    model = shard(make_model(), CPU)
    index = DatasetIndex.open(url)
    results = [
        evaluate(model, CONFIG, index, batch_size=size, max_bad_fraction=0, device=CPU)
        for size in batch_sizes
    ]
    assert model.training
    return results


@pytest.fixture(scope="module")
def plain(digits_url):
    """(confusion, summed loss) of one image after the other, read by tarfile."""
    model = make_model().eval()
    store = open_store(f"{digits_url}/val")
    confusion = [[0] * 10 for _ in range(10)]
    total = 0.0
    for info in store.list():
        if not info.key.endswith(".tar"):
            continue
        with tarfile.open(fileobj=io.BytesIO(store.read(info.key))) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            if name.endswith(".cls"):
                continue
            label = int(members[name.replace(".png", ".cls")])
            pixels = np.empty((1, 8, 8), np.uint8)
            eval_transform(data, size=8, channels=1, out=pixels, times=DecodeTimes())
            with torch.no_grad():
                logits = model(torch.tensor(pixels)[None] / 127.5 - 1)
            confusion[label][logits.argmax().item()] += 1
            total += functional.cross_entropy(logits, torch.tensor([label])).item()
    return confusion, total


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_counts_are_those_of_a_plain_loop_whatever_the_ranks_and_batches(digits_url, plain, world_size):
    confusion, total = plain
    num_images = sum(map(sum, confusion))
    assert num_images == 91
    assert sum(map(any, confusion)) == 10
    correct = sum(confusion[label][label] for label in range(10))
    batch_sizes = [1, 7, 13, 91, 200] if world_size == 2 else [7, 64]
    by_rank = on_ranks(world_size, evaluate_with, f"{digits_url}/val", batch_sizes)
    for results in by_rank:
        for result in results:
            assert result.confusion == confusion
            assert result.num_images == num_images
            assert result.accuracy == correct / num_images
            assert result.loss == pytest.approx(total / num_images, rel=1e-6)
    assert by_rank == by_rank[:1] * world_size


def test_fewer_images_than_ranks(tiny_index):
    """13 images on 4 ranks one at a time: three ranks have one batch less, and fill it up."""
    results = on_ranks(4, evaluate_with, tiny_index.url, [1])
    for (result,) in results:
        assert result.num_images == 13
        assert [sum(row) for row in result.confusion] == [7, 6] + [0] * 8
        assert math.isfinite(result.loss)


def test_normalize_maps_bytes_to_one_around_zero():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.equal(normalize(images), torch.tensor([-1.0, -0.6, 1.0]))
    assert images.dtype == torch.uint8
