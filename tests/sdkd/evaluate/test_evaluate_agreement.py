"""Agreement with the teacher: same inputs for all, nothing but the UNets can make a difference."""

from __future__ import annotations

import helpers
import pytest
import torch
from PIL import Image

from sdkd.errors import InputError, ModelError
from sdkd.evaluate.agreement import BUCKETS, draw_images, make_probe, noise_agreement
from sdkd.models.generation import Generation

IMAGES = [{"image": Image.new("RGB", (64, 64), name), "caption": f"all {name}"} for name in ("red", "blue", "lime")]


def test_a_probe_is_noised_by_the_teachers_schedule_once_in_every_bucket_and_depends_on_the_seed_alone() -> None:
    pipe = helpers.tiny_pipeline()
    probe, more, other = make_probe(pipe, IMAGES, 2), make_probe(pipe, IMAGES, 3), make_probe(pipe, IMAGES, 2, seed=5)
    assert probe.edges == tuple(range(0, 1001, 100))
    assert torch.equal(probe.timesteps // 100, torch.arange(10).expand(2, 10))
    assert torch.equal(more.noisy[:2], probe.noisy)
    assert not torch.equal(other.noisy, probe.noisy)
    assert not torch.equal(probe.timesteps[0], probe.timesteps[1])  # every image has noise of its own
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    assert float(alphas[probe.timesteps[0, -1]].sqrt()) < 0.2
    assert float(probe.noisy[0, -1].std()) == pytest.approx(1.0, abs=0.3)  # nearly noise alone
    found = noise_agreement(pipe, probe)  # the teacher with itself
    assert (found.per_image, found.mean) == (((0.0,) * BUCKETS,) * 2, 0.0)


def test_error_is_the_mean_square_of_the_difference() -> None:
    teacher, student = helpers.tiny_pipeline(), helpers.tiny_pipeline(student="tiny")
    probe = make_probe(teacher, IMAGES, 2)
    found = noise_agreement(student, probe)
    with torch.no_grad():
        ids = teacher.tokenizer(
            ["all blue"], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        text = teacher.text_encoder(ids)[0]
        sample, step = probe.noisy[1, 3:4], probe.timesteps[1, 3:4]
        own, other = (pipe.unet(sample, step, encoder_hidden_states=text).sample for pipe in (student, teacher))
    assert found.per_image[1][3] == pytest.approx(float((own - other).square().mean()), rel=1e-4)
    assert found.per_image[1][3] > 1e-3
    assert found.buckets[3] == pytest.approx((found.per_image[0][3] + found.per_image[1][3]) / 2)
    assert found.mean == pytest.approx(sum(found.buckets) / BUCKETS)


def test_what_cannot_be_compared_is_refused() -> None:
    pipe = helpers.tiny_pipeline()
    probe, own = make_probe(pipe, IMAGES, 1), pipe.unet
    with pytest.raises(InputError, match="holds no images"):
        make_probe(pipe, [], 4)
    pipe.unet = helpers.tiny_unet(cross_attention_dim=16)
    with pytest.raises(ModelError, match="cross_attention_dim 16, the teacher's has 32"):
        noise_agreement(pipe, probe)
    pipe.unet = helpers.tiny_unet(in_channels=9)
    with pytest.raises(ModelError, match="in_channels 9"):
        noise_agreement(pipe, probe)
    pipe.unet = helpers.tiny_unet(time_cond_proj_dim=8)
    with pytest.raises(ModelError, match="time_cond_proj_dim 8, the teacher's has None"):
        noise_agreement(pipe, probe)
    pipe.unet = helpers.tiny_unet(in_channels=9)
    with pytest.raises(ModelError, match=r"takes 9 channels and gives 4 \(inpainting\)"):
        make_probe(pipe, IMAGES, 1)
    pipe.unet = own
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(ModelError, match="it predicts v_prediction, the teacher epsilon"):
        noise_agreement(pipe, probe)


def test_an_image_depends_on_its_own_seed_only() -> None:
    pipe = helpers.tiny_pipeline()
    first = draw_images(pipe, ["red", "blue"], Generation(2, 4.0), seed=3)
    second = draw_images(pipe, ["blue"], Generation(2, 4.0), seed=4)
    assert first[1].tobytes() == second[0].tobytes()
    assert first[0].tobytes() != first[1].tobytes()
