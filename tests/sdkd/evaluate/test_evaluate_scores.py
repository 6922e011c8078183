"""CMMD against the formula, CLIP score against the model, and what is said when weights are missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_clip import SIZE, save_small_clip, small_clip

from sdkd.compare.measure import scores
from sdkd.compare.measure.scores import (
    NotMeasuredError,
    accumulate,
    clip_embeddings,
    clip_scores,
    cmmd,
    find_clip,
    find_inception,
    frechet_distance,
    load_clip,
)
from sdkd.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_clip(tmp_path_factory.mktemp("clip"))


def images(count: int, seed: int = 0, side: int = 48) -> list[Image.Image]:
    numbers = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in numbers]


def unit(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    found = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)) + shift
    return torch.nn.functional.normalize(found, dim=1)


def by_formula(x: np.ndarray, y: np.ndarray, unbiased: bool) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-np.sum((a - b) ** 2) / (2 * 10.0**2)))

    def own(z: np.ndarray) -> float:
        pairs = [kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if not (unbiased and i == j)]
        return sum(pairs) / len(pairs)

    return 1000 * (own(x) + own(y) - 2 * float(np.mean([kernel(a, b) for a in x for b in y])))


@pytest.mark.parametrize("unbiased", [True, False])
def test_cmmd_is_the_papers_formula(unbiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdkd.compare.measure.scores.CMMD_BLOCK", 4)
    x, y = unit(7, 1), unit(9, 2, shift=0.5)
    expected = by_formula(x.double().numpy(), y.double().numpy(), unbiased)
    assert cmmd(x, y, unbiased=unbiased) == pytest.approx(expected, abs=1e-9)
    assert cmmd(x, y, unbiased=unbiased) == pytest.approx(cmmd(y, x, unbiased=unbiased), abs=1e-9)


def test_cmmd_grows_with_the_distance_of_the_sets() -> None:
    x = unit(200, 1)
    same, near, far = (cmmd(x, unit(200, 2, shift)) for shift in (0.0, 0.3, 1.0))
    assert abs(same) < 0.2 < near < far
    assert cmmd(x, x, unbiased=False) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(InputError, match="CMMD of 1 and 3 images: give at least 2 of each"):
        cmmd(unit(1, 1), unit(3, 2))


def test_embeddings_are_unit_rows_and_do_not_depend_on_the_batch() -> None:
    model, some = small_clip(), images(5, side=SIZE)
    found = clip_embeddings(model, some)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(clip_embeddings(model, some, batch_size=2), found, rtol=1e-5, atol=1e-5)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (torch.from_numpy(np.array(some[0])) / 255 - mean) / std  # of the model's own size: not resized
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([[512, 513]]), pixel_values=pixels.permute(2, 0, 1)[None].float()
        ).image_embeds
    torch.testing.assert_close(found[:1], output, rtol=1e-4, atol=1e-4)


def test_clip_score_is_the_cosine_in_percent_and_long_prompts_are_cut(folder: Path) -> None:
    model, processor = load_clip(find_clip(folder, "any"))
    some, prompts = images(3), ["a red star", "a heart", "b"]
    found = clip_scores(model, processor, some, prompts)
    with torch.no_grad():
        output = model(**processor(text=prompts, images=some, return_tensors="pt", padding=True))
        cosine = (output.text_embeds * output.image_embeds).sum(1)
    assert found == pytest.approx((100 * cosine).clamp(min=0).tolist(), abs=1e-3)
    assert len(set(found)) > 1
    long = "xy " * 100
    with torch.no_grad():
        ids = processor(text=[long], images=some[:1], return_tensors="pt", truncation=True, max_length=77)
        assert ids.input_ids[0, -1] == 513  # its end token is kept
        output = model(**ids)
    expected = 100 * float((output.text_embeds * output.image_embeds).sum())
    assert clip_scores(model, processor, some[:1], [long]) == pytest.approx([max(expected, 0.0)], abs=1e-3)


class Channels(torch.nn.Module):
    """Mean of each colour channel in place of Inception's features."""

    num_features = 3

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=(2, 3))


def test_fid_is_the_distance_of_two_gaussians() -> None:
    metric = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(Channels())
    flat = np.random.default_rng(1).integers(0, 256, (2, 20, 3))
    sets = [[Image.new("RGB", (299, 299), tuple(map(int, colour))) for colour in one] for one in flat]
    means, covariances = [one.mean(0) for one in flat], [np.cov(one.T) for one in flat]
    values = np.linalg.eigvals(covariances[0] @ covariances[1])
    traces = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(values).real.sum()
    expected = np.sum((means[0] - means[1]) ** 2) + traces
    assert accumulate(metric, *sets, batch_size=7) == pytest.approx(expected, rel=1e-3)


def test_what_is_missing_or_damaged_is_said_with_how_to_get_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(NotMeasuredError, match=r"hf download no-such-user/no-such-clip`, or give .* with --clip"):
        find_clip(None, "no-such-user/no-such-clip")
    with pytest.raises(NotMeasuredError, match=r"get https://.*inception.*\.pth and give it with --inception"):
        find_inception(None)
    with pytest.raises(InputError, match=r"holds no config\.json"):
        find_clip(tmp_path, "any")
    with pytest.raises(InputError, match=r"'nowhere\.pth' does not exist"):
        find_inception(Path("nowhere.pth"))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match=r"cannot be loaded .*it needs config\.json, model\.safetensors"):
        load_clip(tmp_path)

    here = {"torchmetrics", "torchvision", "torch_fidelity"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in here else None)
    with pytest.raises(NotMeasuredError, match="the weights of AlexNet are not on this disk; get them with"):
        scores.lpips_distance()
    here.remove("torch_fidelity")
    with pytest.raises(NotMeasuredError, match="FID needs the package torch-fidelity; get it with: pip install"):
        frechet_distance(images(2), images(2), tmp_path / "weights.pth")
    here.remove("torchvision")
    with pytest.raises(NotMeasuredError, match="LPIPS needs the package torchvision; get it with: pip install torchv"):
        scores.lpips_distance()
    here.remove("torchmetrics")
    with pytest.raises(NotMeasuredError, match="LPIPS needs the package torchmetrics; get it with: pip install"):
        scores.lpips_distance()
