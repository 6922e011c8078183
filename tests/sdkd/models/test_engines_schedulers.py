"""Schedulers by name: each works or is refused before a model is loaded; steps beyond the schedule are refused."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import diffusers
import pytest
import torch
from graph_bundles import graph_bundle

from engines.modules.base import run_split
from engines.sessions.profiles import Profiles
from engines.sessions.ranges import check_sizes
from sdkd.errors import BundleError, InputError, MissingExtraError, ModelError, RangeError
from sdkd.models.resolve import resolve
from sdkd.models.schedulers import SCHEDULERS, check_steps, scheduler_class, seed_scheduler, set_scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_name_works_or_says_what_to_install(name: str) -> None:
    pipe = SimpleNamespace(scheduler=diffusers.PNDMScheduler(beta_schedule="scaled_linear"))
    if name == "dpm-sde" and importlib.util.find_spec("torchsde") is None:
        with pytest.raises(MissingExtraError, match=r"'dpm-sde' needs the package 'torchsde'.*sdkd\[sde\]"):
            set_scheduler(pipe, name)
        return
    set_scheduler(pipe, name)
    check_steps(pipe.scheduler, 5)
    with pytest.raises(InputError, match=r"steps 1001.*1000"):
        check_steps(pipe.scheduler, 1001)


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "CogVideoXDDIMScheduler", "DDIMInverseScheduler"]
)
def test_schedulers_of_other_families_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"scheduler '{name}' is of another family"):
        scheduler_class(name)


def test_a_models_own_scheduler_of_another_family_is_refused() -> None:
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler has no noise schedule"):
        check_steps(diffusers.FlowMatchEulerDiscreteScheduler(), 5)


def test_steps_that_a_scheduler_cannot_do_are_refused() -> None:
    with pytest.raises(InputError, match=r"LCMScheduler cannot do 60 steps .*give another number or --scheduler"):
        check_steps(diffusers.LCMScheduler(), 60)


def test_a_scheduler_with_noise_of_its_own_gets_the_seeds() -> None:
    scheduler = SimpleNamespace(noise_sampler_seed=None)
    seed_scheduler(scheduler, [3, 4])
    assert scheduler.noise_sampler_seed == [3, 4]


class Fixed:
    """A session of fixed shapes, two rows at once."""

    contract = SimpleNamespace(inputs=(SimpleNamespace(name="x", axes=(2, 3)), SimpleNamespace(name="t", axes=())))

    def run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert feeds["x"].shape == (2, 3)
        return {"y": feeds["x"] * feeds["t"]}


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_an_engine_of_fixed_shapes_takes_any_batch(rows: int) -> None:
    x = torch.arange(rows * 3.0).reshape(rows, 3)
    found = run_split(Fixed(), {"x": x, "t": torch.tensor(2.0)})  # type: ignore[arg-type]
    torch.testing.assert_close(found["y"], 2 * x)


def test_an_export_of_another_tool_is_named(tmp_path) -> None:
    from sdkd.bundle.manifest import Bundle

    for part in ("unet", "text_encoder", "vae_decoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.onnx").write_bytes(b"")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ModelError, match=r"is an export by Optimum.*give the model that it was made from"):
        resolve(tmp_path)
    with pytest.raises(BundleError, match=r"is an export by Optimum.*not a bundle"):
        Bundle.open(tmp_path)


def test_an_image_of_odd_size_says_what_to_resize_it_to(tmp_path) -> None:
    bundle = graph_bundle(tmp_path / "bundle", "fp32", ("unet", "vae_decoder"))
    contract = bundle.component("vae_decoder").contract
    checked = SimpleNamespace(
        bundle=bundle, contract=contract, steps={}, profiles=Profiles(), scale=2, label="the engine"
    )
    with pytest.raises(RangeError, match=r"34x64 px .* height 34 is not a multiple of 4 pixels.*resize it, to 32x64"):
        check_sizes(checked, {"batch": 1, "height": 17, "width": 32})  # type: ignore[arg-type]
