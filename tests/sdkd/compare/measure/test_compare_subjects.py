"""What is compared, how it is called and what it weighs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compare_models import engine_models
from helpers import tiny_pipeline

from sdkd.compare.measure.calls import Request, make_images, native_side
from sdkd.compare.measure.subjects import (
    Subject,
    check_subjects,
    count_parameters,
    has_random_weights,
    open_subject,
    size_on_disk,
    weight_bytes,
)
from sdkd.errors import InputError, ModelError
from sdkd.models.generation import Generation


def engine(target: str, precision: str = "fp32", label: str = "x") -> Subject:
    return Subject(label, "models/tiny", target, precision, Path("bundle"))


def test_names_for_people_and_files() -> None:
    assert Subject("tiny eager", "a/b/model").model_label == "tiny"
    assert Subject("my favourite", "a/b/model/").model_label == "model"
    assert engine("openvino-bf16", "bf16", "tiny, openvino-bf16").model_label == "tiny"
    assert Subject("Tiny (öpen) / VINO", "m").slug == "tiny-pen-vino"
    half = engine("openvino-bf16", "bf16"), engine("tensorrt", "fp16"), Subject("x", "m", precision="bf16")
    assert [subject.runs_as for subject in half] == ["openvino-bf16", "tensorrt-fp16", "eager-bf16"]
    references = [subject.is_reference for subject in (Subject("x", "m"), half[2], engine("openvino"))]
    assert references == [True, False, False]  # eager in float32


def test_subjects_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match="subject 'x' runs on 'openvino', which needs a bundle"):
        Subject("x", "m", "openvino")
    with pytest.raises(InputError, match="precision 'int4' is unknown"):
        Subject("x", "m", precision="int4")
    with pytest.raises(InputError, match="nothing to compare"):
        check_subjects([])
    with pytest.raises(InputError, match="subject label 'a' is used twice"):
        check_subjects([Subject("a", "m"), Subject("a", "n")])
    with pytest.raises(InputError, match="subject slug 'a-b' is used twice"):
        check_subjects([Subject("a b", "m"), Subject("a-b", "n")])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_an_engine_s_scheduler_rounds_as_eager_s_of_its_precision(precision: str, dtype: torch.dtype) -> None:
    """An engine in half precision is judged by eager in half precision: both have the same latents between steps."""
    models, request = engine_models(), Request(("a",), 0, 32, run=Generation(2, 1.0))
    on_engines = Subject("x", models / "right", "onnxruntime", precision, models / "bundle")
    for subject in (on_engines, Subject("x", models / "right", precision=precision)):
        pipe, seen = open_subject(subject), set()
        step = pipe.scheduler.step

        def noted(output: torch.Tensor, time: int, sample: torch.Tensor, step: Any = step, **more: Any) -> Any:
            seen.update({output.dtype, sample.dtype})  # noqa: B023 - called at once
            return step(output, time, sample, **more)

        pipe.scheduler.step = noted
        make_images(pipe, request, 0)
        assert seen == {dtype}


def test_parameters_and_bytes_of_an_eager_subject_and_its_precision(tmp_path: Path) -> None:
    model = tmp_path / "tiny-sd"
    made = tiny_pipeline()
    made.save_pretrained(model)
    subject, pipe = Subject("x", model), open_subject(Subject("x", model, precision="bf16"))
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    unet, whole = count_parameters(subject, pipe)
    assert unet == sum(p.numel() for p in made.unet.parameters())
    assert whole == unet + sum(p.numel() for part in (made.vae, made.text_encoder) for p in part.parameters())
    files = [model / "unet/diffusion_pytorch_model.safetensors", model / "vae/diffusion_pytorch_model.safetensors",
             model / "text_encoder/model.safetensors"]  # fmt: skip
    assert size_on_disk(subject) == sum(file.stat().st_size for file in files)
    assert not has_random_weights(subject)
    assert has_random_weights(Subject("x", "random:sd15-tiny"))
    assert size_on_disk(Subject("x", "random:sd15-tiny")) is None
    assert native_side(pipe) == 64
    pipe.unet.register_to_config(sample_size=[8, 16])
    with pytest.raises(ModelError, match=r"sample_size \[8, 16\] is not one integer: give the image size with --size"):
        native_side(pipe)


def test_one_format_of_several_is_counted(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name, size in {"diffusion_pytorch_model.safetensors": 100, "diffusion_pytorch_model.fp16.safetensors": 50,
                       "diffusion_pytorch_model.bin": 101}.items():  # fmt: skip
        (tmp_path / "unet" / name).write_bytes(b"x" * size)
    assert weight_bytes(tmp_path) == 100
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert weight_bytes(tmp_path) == 50
    (tmp_path / "file.safetensors").write_bytes(b"x" * 7)
    assert weight_bytes(tmp_path / "file.safetensors") == 7
    assert weight_bytes(tmp_path / "nowhere") is None
