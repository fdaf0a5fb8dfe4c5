import numpy as np
import pytest
import torch

from workers.config import AugmentConfig
from workers.data.mixing import mix

CLASSES = 5
LANES = 4
PER_LANE = 3


def batch(seed=0, dtype=torch.uint8):
    """A global batch as the ranks have it: rows in the order of their positions, lanes in turn."""
    generator = torch.Generator().manual_seed(seed)
    n = LANES * PER_LANE
    images = torch.randint(0, 256, (n, 3, 16, 12), generator=generator).to(dtype)
    return images, torch.randint(0, CLASSES, (n,), generator=generator), torch.arange(n) % LANES


def mixed(rows, *, seed=0, step=0, **options):
    augment = AugmentConfig(**(options or {"mixup": 0.8, "cutmix": 1.0}))
    return mix(*rows, augment=augment, seed=seed, step=step, num_classes=CLASSES)


def pad(rows, size):
    """As a rank pads: with its first sample, in a slot of its own."""
    images, labels, slots = rows
    more = size - len(labels)
    return (
        torch.cat([images, images[:1].expand(more, -1, -1, -1)]),
        torch.cat([labels, labels[:1].expand(more)]),
        torch.cat([slots, torch.full((more,), -1)]),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_mix_as_the_whole_batch_does(world_size):
    rows = batch()
    for step in range(12):
        images, targets = mixed(rows, step=step)
        for rank in range(world_size):
            own = (rows[2] * world_size // LANES) == rank
            share = tuple(tensor[own] for tensor in rows)
            size = PER_LANE * -(-LANES // world_size)
            found = mixed(pad(share, size), step=step)
            assert torch.equal(found[0][: own.sum()], images[own])
            assert torch.equal(found[1][: own.sum()], targets[own])


def test_mixing_is_a_function_of_seed_and_step():
    rows = batch()
    views = [mixed(rows, seed=seed, step=step)[0] for seed in range(2) for step in range(10)]
    assert len({view.numpy().tobytes() for view in views}) == 20
    again = [mixed(rows, seed=seed, step=step)[0] for seed in range(2) for step in range(10)]
    assert all(map(torch.equal, views, again))
    assert torch.equal(rows[0], batch()[0])  # what was given is left alone


def partners(slots):
    """Row by row, told from one-hot targets."""
    n = len(slots)
    images, labels = torch.zeros(n, 1, 8, 8, dtype=torch.uint8), torch.arange(n)
    for step in range(50):
        _, targets = mix(
            images, labels, slots, augment=AugmentConfig(mixup=1.0), seed=0, step=step, num_classes=n
        )
        share = targets[labels, labels]
        if (share < 0.9).any() and (share > 0.1).all():
            targets[labels, labels] -= share.min()
            return targets.argmax(dim=1).tolist()
    raise AssertionError("never mixed")


def test_partners_are_of_one_slot():
    assert partners(torch.tensor([7, 7, 7, 7])) == [1, 2, 3, 0]
    assert partners(torch.tensor([3, 1, 3, 1, 9, 3])) == [2, 3, 5, 1, 4, 0]


def test_a_slot_of_one_row_stays_as_it_is():
    images, labels, _ = batch()
    alone = torch.arange(len(labels))
    for step in range(12):
        found, targets = mixed((images, labels, alone), step=step)
        assert torch.equal(found, images)
        assert torch.equal(targets, torch.eye(CLASSES)[labels])


def test_an_empty_batch():
    found, targets = mixed(tuple(tensor[:0] for tensor in batch()))
    assert found.shape == (0, 3, 16, 12) and targets.shape == (0, CLASSES)


def test_without_mixing_targets_are_one_hot():
    rows = batch()
    images, targets = mixed(rows, mixup=0.0)
    assert images is rows[0] and torch.equal(targets, torch.eye(CLASSES)[rows[1]])
    assert targets.dtype == torch.float32


def test_mixup_blends_pixels_and_labels_by_one_share():
    images, labels, slots = batch()
    other = torch.tensor([(row + LANES) % len(labels) for row in range(len(labels))])
    distinct = torch.arange(len(labels))
    shares = []
    for step in range(200):
        found, targets = mix(
            images,
            distinct,
            slots,
            augment=AugmentConfig(mixup=1.0),
            seed=0,
            step=step,
            num_classes=len(labels),
        )
        share = targets[0, 0].item()
        exact = share * images.double() + (1 - share) * images[other].double()
        assert found.dtype == torch.uint8 and (found.double() - exact).abs().max() <= 0.5
        assert torch.equal(targets, share * torch.eye(12) + (1 - share) * torch.eye(12)[other])
        shares.append(share)
    assert abs(np.mean(shares) - 0.5) < 0.07 and min(shares) < 0.05 and max(shares) > 0.95  # Beta(1, 1)
    peaked = [mixed(batch(), step=step, mixup=0.1)[1].max(dim=1).values.min().item() for step in range(100)]
    assert np.mean(np.array(peaked) > 0.95) > 0.6  # Beta(0.1, 0.1)


def test_mixup_of_floats():
    images, labels, slots = batch(dtype=torch.float32)
    found, targets = mixed((images, labels, slots), step=3, mixup=1.0)
    whole, same = mixed(batch(), step=3, mixup=1.0)
    assert torch.equal(targets, same) and found.dtype == torch.float32
    assert (found - whole.float()).abs().max() <= 0.51


def test_cutmix_pastes_a_box_and_counts_its_area():
    images, labels, slots = batch()
    other = torch.tensor([(row + LANES) % len(labels) for row in range(len(labels))])
    lefts, shares = [], []
    for step in range(300):
        found, targets = mix(
            images,
            torch.arange(12),
            slots,
            augment=AugmentConfig(cutmix=1.0),
            seed=0,
            step=step,
            num_classes=12,
        )
        share = targets[0, 0].item()
        pasted = (found != images).any(dim=(0, 1))
        rows, columns = pasted.any(dim=1).nonzero()[:, 0], pasted.any(dim=0).nonzero()[:, 0]
        shares.append(share)
        if not len(rows):
            assert share == 1 and torch.equal(found, images)
            continue
        box = np.s_[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert torch.equal(found[box], images[other][box])
        area = (rows[-1] + 1 - rows[0]) * (columns[-1] + 1 - columns[0]) / (16 * 12)
        assert share == pytest.approx(1 - area.item())
        assert torch.allclose(targets, share * torch.eye(12) + (1 - share) * torch.eye(12)[other])
        lefts.append(columns[0].item())
    assert set(lefts) >= set(range(10)) and 0.5 < np.mean(shares) < 0.75


def test_with_both_a_coin_decides_for_the_whole_batch():
    rows = batch()
    cut = 0
    for step in range(300):
        found, _ = mixed(rows, step=step)
        whole = (found == rows[0]) | (found == rows[0].roll(-LANES, dims=0))
        cut += bool(whole.all())
    assert 120 < cut < 185


def test_shares_are_pinned():
    """Saved runs were mixed with these."""
    images, _, slots = batch()
    shares = []
    for step in range(6):
        augment = AugmentConfig(mixup=0.8)
        _, targets = mix(images, torch.arange(12), slots, augment=augment, seed=1, step=step, num_classes=12)
        shares.append(256 * targets[0, 0].item())
    assert shares == [32.0, 14.0, 242.0, 60.0, 195.0, 130.0]
