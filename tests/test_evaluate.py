import dataclasses
import io
import math
import tarfile

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.distributed import on_ranks
from tests.runs import CPU
from workers.config import ComputeConfig
from workers.data.index import DatasetIndex
from workers.data.indexing import build_index
from workers.data.transforms import DecodeTimes, eval_transform
from workers.model_config import ModelConfig
from workers.models import build_model
from workers.storage import open_store
from workers.training.evaluate import evaluate, normalize
from workers.training.parallel import parallelize

CONFIG = ModelConfig(size="digits-xs", image_size=8, patch_size=2, channels=1, num_classes=10)


def make_model():
    """Whose answers differ from image to image."""
    torch.manual_seed(0)
    model = build_model("vit", "digits-xs", image_size=8, patch_size=2, channels=1, num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    return model


def evaluate_with(url, batch_sizes):
    """With all that is a function of the predictions, and the predictions."""
    model = parallelize(make_model(), ComputeConfig(), "float32", CPU)
    index = DatasetIndex.open(url)
    results = [
        evaluate(model, CONFIG, index, batch_size=size, max_bad_fraction=0, device=CPU)
        for size in batch_sizes
    ]
    assert model.training
    rows = [{name: array.tolist() for name, array in vars(r.predictions).items()} for r in results]
    return [(result, result.details(), row) for result, row in zip(results, rows, strict=True)]


@pytest.fixture(scope="module")
def plain(digits_url):
    """Label and logits (10,) of one image after the other, read by tarfile in the order of the shards."""
    model = make_model().eval()
    store = open_store(f"{digits_url}/val")
    labels, rows = [], []
    for info in sorted(store.list(), key=lambda info: info.key):
        if not info.key.endswith(".tar"):
            continue
        with tarfile.open(fileobj=io.BytesIO(store.read(info.key))) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            if name.endswith(".cls"):
                continue
            labels.append(int(members[name.replace(".png", ".cls")]))
            pixels = np.empty((1, 8, 8), np.uint8)
            eval_transform(data, size=8, channels=1, out=pixels, times=DecodeTimes())
            with torch.no_grad():
                rows.append(model(torch.tensor(pixels)[None] / 127.5 - 1)[0])
    return torch.tensor(labels), torch.stack(rows)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_is_that_of_a_plain_loop_whatever_the_ranks_and_batches(digits_url, plain, world_size):
    labels, logits = plain
    assert len(labels) == 91 and len(set(labels.tolist())) == 10
    predicted = logits.argmax(dim=1)
    confusion = [
        [int(((labels == true) & (predicted == other)).sum()) for other in range(10)] for true in range(10)
    ]
    top5 = (logits.topk(5).indices == labels[:, None]).any(dim=1)
    batch_sizes = [1, 7, 13, 91, 200] if world_size == 2 else [7, 64]
    by_rank = on_ranks(world_size, evaluate_with, f"{digits_url}/val", batch_sizes)
    for result, details, rows in by_rank[0]:
        assert result.confusion == details["confusion"] == confusion
        assert result.num_images == 91
        assert result.accuracy == int((predicted == labels).sum()) / 91
        assert result.top5 == int(top5.sum()) / 91
        assert result.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
        assert details["class_images"] == torch.bincount(labels, minlength=10).tolist()
        assert details["class_correct"] == [confusion[label][label] for label in range(10)]
        assert rows["ordinals"] == list(range(91))
        assert rows["labels"] == labels.tolist() and rows["classes"] == predicted.tolist()
        assert rows["in_top5"] == top5.tolist()
        assert rows["confidences"] == pytest.approx(logits.softmax(dim=1).amax(dim=1).tolist(), rel=1e-5)
        metrics = details["metrics"]
        assert metrics["val_accuracy_low"] < metrics["val_accuracy"] < metrics["val_accuracy_high"]
        assert metrics["val_images"] == 91
    assert by_rank == by_rank[:1] * world_size


def test_the_number_of_ranks_changes_nothing_not_even_the_last_bit_of_an_interval(digits_url):
    one, two, three = (on_ranks(n, evaluate_with, f"{digits_url}/val", [16])[0] for n in (1, 2, 3))
    assert one == two == three


def test_fewer_images_than_ranks(tiny_index):
    """13 images on 4 ranks one at a time: three ranks have one batch less, and fill it up."""
    for ((result, details, rows),) in on_ranks(4, evaluate_with, tiny_index.url, [1]):
        assert result.num_images == 13
        assert details["class_images"] == [7, 6] + [0] * 8
        assert rows["ordinals"] == list(range(13))
        assert math.isfinite(result.loss)


def test_damaged_images_are_left_out_on_every_rank(tiny_url, tmp_path):
    path = next(tmp_path.rglob("tiny-2.tar"))
    data = path.read_bytes()
    at = data.rindex(b"IHDR")
    path.write_bytes(data[:at] + b"XXXX" + data[at + 4 :])
    index = build_index(tiny_url, classes=("dark", "light"))
    for result, rows in on_ranks(2, evaluate_damaged, index.url):
        assert [bad.ordinal for bad in result.bad_samples] == [12]
        assert result.num_images == 12
        assert rows == list(range(12))


def evaluate_damaged(url):
    model, index = parallelize(make_model(), ComputeConfig(), "float32", CPU), DatasetIndex.open(url)
    result = evaluate(model, CONFIG, index, batch_size=4, max_bad_fraction=0.1, device=CPU)
    return result, result.predictions.ordinals.tolist()


def test_a_result_says_nothing_of_its_predictions_when_it_is_printed_or_compared(tiny_index):
    ((result, _, _),) = on_ranks(1, evaluate_with, tiny_index.url, [5])[0]
    assert "predictions" not in repr(result)
    assert result == dataclasses.replace(result, predictions=None)


def test_normalize_maps_bytes_to_one_around_zero():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.equal(normalize(images), torch.tensor([-1.0, -0.6, 1.0]))
    assert images.dtype == torch.uint8
