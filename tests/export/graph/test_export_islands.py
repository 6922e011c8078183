"""Islands of float32: found where float16 overflows, asked for by name, recorded, and right in the graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_exports import small_pipeline

from export import export_pipeline
from export.graph.islands import Flow, blocks, find_islands, float_weights, kept_float, probe_latents, recorded
from export.graph.precision import cast
from sdkd.errors import InputError

LAST = "decoder.up_blocks.1"
ASKED = "decoder.up_blocks.0.resnets.1"


def overflowing_vae() -> Any:
    """A VAE whose residual stream passes float16's largest number in the last up block, as SDXL's does."""
    vae = small_pipeline().vae
    resnet = vae.decoder.up_blocks[1].resnets[0]
    for parameter in resnet.conv2.parameters():
        parameter.data *= 60_000.0
    return vae


@torch.no_grad()
def test_every_block_that_sees_too_much_is_an_island() -> None:
    vae = overflowing_vae()
    with recorded(vae) as flows:
        for latents in probe_latents(vae.config):
            vae.decoder(vae.post_quant_conv(latents))
    islands = find_islands(flows)
    assert next(iter(islands.reasons)) == f"{LAST}.resnets.0"
    assert set(islands.reasons) == {f"{LAST}.resnets.0", f"{LAST}.resnets.1", "decoder.conv_norm_out"}
    assert islands.overflowing == {f"{LAST}.resnets.0", f"{LAST}.resnets.1"}
    assert islands.largest is not None
    assert islands.largest > 65_504 / 2
    assert "activations up to" in islands.reasons[f"{LAST}.resnets.0"]


@torch.no_grad()
def test_attention_scores_that_overflow_are_seen() -> None:
    """Queries and keys of 300 fit float16; their products over 8 dimensions do not."""
    vae = small_pipeline().vae
    attention = vae.decoder.mid_block.attentions[0]
    for part in (attention.to_q, attention.to_k):
        part.weight.data.zero_()
        part.bias.data.fill_(300.0)
    with recorded(vae) as flows:
        vae.decoder(torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
    name = "decoder.mid_block.attentions.0"
    width = attention.to_q.out_features / attention.heads
    assert flows[name].inside == pytest.approx(300.0**2 * width**0.5, rel=1e-4)
    assert name in find_islands(flows).reasons


def test_a_sound_vae_has_no_islands() -> None:
    vae = small_pipeline().vae
    with recorded(vae) as flows, torch.no_grad():
        for latents in probe_latents(vae.config):
            vae.decoder(vae.post_quant_conv(latents))
    assert find_islands(flows).reasons == {}
    assert set(flows) == set(blocks(vae))


@torch.no_grad()
def test_half_precision_overflows_without_islands_and_not_with_them() -> None:
    vae = overflowing_vae()
    latents = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    exact = vae.decoder(latents)
    with recorded(vae) as flows:
        vae.decoder(latents)
    plain = cast(copy.deepcopy(vae), "fp16")
    assert not torch.isfinite(plain.decoder(latents.half())).all()
    islands = find_islands(flows)
    half = cast(vae, "fp16", keep=float_weights(vae, islands))
    assert half.decoder.up_blocks[1].resnets[0].conv2.weight.dtype == torch.float32
    assert half.decoder.up_blocks[0].resnets[0].conv2.weight.dtype == torch.float16
    with kept_float(half, islands, torch.float16):
        found = half.decoder(latents.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0.03)


def test_timesteps_are_not_rounded_beside_islands() -> None:
    unet = small_pipeline().unet
    with recorded(unet) as flows:
        pass
    islands = find_islands(flows, ["conv_out"], automatic=False)
    half = cast(copy.deepcopy(unet), "fp16", keep=float_weights(unet, islands))
    seen: list[torch.Tensor] = []
    half.time_proj.register_forward_hook(lambda module, given, answer: seen.append(given[0]))
    with kept_float(half, islands, torch.float16):
        half(torch.zeros(2, 4, 8, 8, dtype=torch.float16), torch.tensor([999.3, 700.7]), torch.zeros(2, 7, 32).half())
    torch.testing.assert_close(seen[0], torch.tensor([999.3, 700.7]), rtol=0, atol=0)


def test_a_graph_with_islands_is_recorded_checked_and_does_not_overflow(tmp_path: Path) -> None:
    """The overflowing VAE's decoder in fp16, with one block asked to stay float32; the pipeline stays as it was."""
    pipe = small_pipeline()
    pipe.vae = overflowing_vae()
    before, steps = copy.deepcopy(pipe.vae.state_dict()), list[tuple[str, float | None]]()
    bundle = export_pipeline(
        pipe, tmp_path / "bundle", precision="fp16", components=("vae_decoder",), keep_float=(f"vae_decoder.{ASKED}",),
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert all(
        value.dtype == before[name].dtype and value.equal(before[name]) for name, value in pipe.vae.state_dict().items()
    )
    fractions = [fraction for _, fraction in steps if fraction is not None]
    assert fractions == sorted(fractions)
    assert steps[-1] == ("exported", 1.0)
    assert "vae_decoder: exporting to ONNX" in [message for message, _ in steps]

    assert tuple(bundle.manifest.components) == ("vae_decoder",)
    record = bundle.component("vae_decoder")
    assert record.parity
    assert record.parity["finite"] is True
    assert 0 < record.parity["relative"] < 2e-2
    assert record.parity["eager_rms"] > 0
    found = record.details["islands"]
    assert f"{LAST}.resnets.0" in found["float32_blocks"]
    assert found["float32_blocks"][ASKED] == "asked for"
    assert not [name for name in found["float32_blocks"] if "mid_block" in name]
    assert found["largest_activation"] > 65_504 / 2
    assert found["largest_in"].startswith("decoder.")
    assert record.details["float32_nodes"]["Softmax"] == record.details["operators"]["Softmax"] == 1  # no island

    file = bundle.path / "vae_decoder" / "model.onnx"
    graph = onnx.load(file).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert kinds[f"{LAST}.resnets.0.conv2.weight"] == kinds[f"{ASKED}.conv2.weight"] == onnx.TensorProto.FLOAT
    assert kinds["decoder.up_blocks.0.resnets.0.conv2.weight"] == onnx.TensorProto.FLOAT16
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    latents = 3 * np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float16)
    (image,) = session.run(None, {"latent_sample": latents})
    exact = overflowing_vae().decode(torch.from_numpy(latents).float()).sample.detach().numpy()
    assert np.isfinite(image).all()
    assert np.abs(image - exact).max() < 0.02 * np.abs(exact).max()


def test_a_block_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"block 'decoder\.up_blocks\.9' .* does not exist: give a module path such as"
    ):
        find_islands({"decoder.conv_in": Flow()}, ["decoder.up_blocks.9"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16", "keep_float": ("decoder.up_blocks.3",)}, r"give <component>\.<module path>"),
        ({"precision": "fp32", "keep_float": ("unet.conv_in",)}, "everything is float32 already"),
        ({"precision": "fp16", "keep_float": ("unet.conv_in",), "verify": False}, "needs the float32 weights"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_pipeline("demo", tmp_path / "bundle", **options)
