"""What is said of a resize: nothing changed where nothing did, and every figure against its definition."""

import pytest
import torch
from torch.nn import functional

from workers.models import build_model
from workers.models.resample_report import resample_report
from workers.models.vit import VisionTransformer
from workers.models.weights import adapt_state_dict

IMAGES = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def model(image_size: int | tuple[int, int] = 24, **options: object) -> VisionTransformer:
    torch.manual_seed(0)
    made = build_model(
        "vit", "digits-xs", image_size=image_size, patch_size=4, channels=3, num_classes=5, **options
    )
    torch.nn.init.normal_(made.head.weight)
    return made


def resized(before: VisionTransformer, image_size: int | tuple[int, int], *, new_head: bool = False):
    after = model(image_size)
    after.load_state_dict(
        adapt_state_dict(before.state_dict(), source_grid=before.spec.grid, target=after, new_head=new_head)
    )
    return after


def test_no_resize_changes_nothing() -> None:
    before = model()
    before.train()
    report = resample_report(before, resized(before, 24), IMAGES)
    assert report["feature_cosine"] == pytest.approx(1, abs=1e-5)
    assert (report["logit_change"], report["top1_agreement"]) == (0, 1)
    assert report["logit_kl"] == pytest.approx(0, abs=1e-6)
    for name in ("position_norm", "neighbour_cosine", "border_norm_ratio"):
        assert report[f"{name}_before"] == report[f"{name}_after"]
    assert before.training and not before.head._forward_pre_hooks


def test_figures_of_the_outputs_are_as_defined() -> None:
    before = model()
    after = resized(before, (40, 32))
    report = resample_report(before, after, IMAGES)
    with torch.no_grad():
        old = before(IMAGES)
        new = after(functional.interpolate(IMAGES, size=(40, 32), mode="bilinear", antialias=True))
    assert report["logit_change"] == pytest.approx((old - new).abs().mean().item(), rel=1e-5)
    assert report["top1_agreement"] == (old.argmax(1) == new.argmax(1)).float().mean().item()
    p, q = old.double().softmax(1), new.double().softmax(1)
    assert report["logit_kl"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    assert 0 < report["feature_cosine"] < 1


def test_a_new_head_is_not_compared() -> None:
    before = model()
    report = resample_report(before, resized(before, 32, new_head=True), IMAGES)
    assert "feature_cosine" in report
    assert not {"logit_change", "logit_kl", "top1_agreement"} & report.keys()


def test_figures_of_the_positions_are_as_defined() -> None:
    before = model()
    # A vector that turns by 0.1 rad per column and not along rows; border twice as long.
    angle = 0.1 * torch.arange(6.0).expand(6, 6)
    length = torch.full((6, 6), 2.0)
    length[1:-1, 1:-1] = 1
    plane = torch.zeros(6, 6, 16)
    plane[..., 0], plane[..., 1] = length * angle.cos(), length * angle.sin()
    with torch.no_grad():
        before.pos_embed[0, 1:] = plane.flatten(0, 1)
    report = resample_report(before, before, IMAGES)
    assert report["position_norm_before"] == pytest.approx((20 * 2 + 16) / 36, rel=1e-5)
    assert report["border_norm_ratio_before"] == pytest.approx(2, rel=1e-5)
    cosine_sideways = torch.tensor(0.1).cos().item()
    assert report["neighbour_cosine_before"] == pytest.approx((cosine_sideways + 1) / 2, rel=1e-5)
    finer = resample_report(before, resized(before, 48), IMAGES)
    assert finer["neighbour_cosine_after"] > finer["neighbour_cosine_before"]


def test_rotary_positions_and_grids_without_an_inside() -> None:
    rope = model(positions="rope")
    assert "position_norm_before" not in resample_report(rope, rope, IMAGES)
    small = model(8)
    report = resample_report(small, small, IMAGES)
    assert "neighbour_cosine_after" in report and "border_norm_ratio_after" not in report
