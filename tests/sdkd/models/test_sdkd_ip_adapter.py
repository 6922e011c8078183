"""Files of IP-Adapters: what is taken, what is refused, and FaceID's LoRAs in the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_exports import small_pipeline
from small_ip_adapter import WIDTH, ip_adapter, prompted, write
from small_sdxl import sdxl_pipeline
from typer.testing import CliRunner

from export import export_pipeline
from sdkd.cli import app
from sdkd.errors import InputError, ModelError
from sdkd.models.ip_adapter import check_projections, image_prompts
from sdkd.models.ip_adapter_file import IpAdapter, add_to


def test_faceid_has_its_loras_in_the_weights(tmp_path: Path) -> None:
    pipe = small_pipeline()
    state = ip_adapter(pipe.unet, "faceid")
    found = add_to(pipe.unet, [IpAdapter.of(write(state, tmp_path / "faceid.safetensors"))])
    assert image_prompts(found).embeddings == ((WIDTH,),)
    eager = prompted(small_pipeline(), state).unet  # PEFT's layers
    generator = torch.Generator().manual_seed(0)
    call = (torch.randn(2, 4, 8, 8, generator=generator), 9, torch.randn(2, 7, 32, generator=generator))
    added = {"image_embeds": [torch.randn(2, 1, WIDTH, generator=generator)]}
    expected = eager(*call, added_cond_kwargs=added).sample
    torch.testing.assert_close(found(*call, added_cond_kwargs=added).sample, expected, atol=1e-5, rtol=1e-5)
    eager.disable_adapters()
    assert not torch.allclose(eager(*call, added_cond_kwargs=added).sample, expected, atol=1e-3)


def test_files_that_are_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"adapter\.bin' is no \.safetensors file here.* a pickle"):
        IpAdapter.of(tmp_path / "adapter.bin")
    save_file({"proj.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"is no IP-Adapter: it has no weights named image_proj\.\* and ip_adapter\."):
        IpAdapter.of(tmp_path / "other.safetensors")


def test_adapters_of_other_unets(tmp_path: Path) -> None:
    pipe, other = small_pipeline(), sdxl_pipeline()
    of_sdxl = IpAdapter.of(write(ip_adapter(other.unet), tmp_path / "sdxl.safetensors"))
    with pytest.raises(ModelError, match=r"for a UNet of \d+ layers .* and this one has 3: .*student"):
        add_to(pipe.unet, [of_sdxl])
    wide = IpAdapter.of(write(ip_adapter(small_pipeline(cross_attention_dim=48).unet), tmp_path / "wide.safetensors"))
    with pytest.raises(ModelError, match=r"for a UNet whose text is 48 wide, and this one's is 32"):
        add_to(pipe.unet, [wide])
    own = IpAdapter.of(write(ip_adapter(pipe.unet), tmp_path / "own.safetensors"))
    state = ip_adapter(pipe.unet)
    state["image_proj"]["norm.weight"] = torch.zeros(3)
    broken = IpAdapter.of(write(state, tmp_path / "broken.safetensors"))
    with pytest.raises(ModelError, match=r"diffusers cannot load it into this UNet \(.*norm.weight"):
        add_to(small_pipeline().unet, [broken])
    with pytest.raises(InputError, match=r"has an IP-Adapter already"):
        add_to(add_to(pipe.unet, [own]), [own])


def test_step_caching_is_without(tmp_path: Path) -> None:
    pipe = small_pipeline()
    prompted(pipe, ip_adapter(pipe.unet))
    with pytest.raises(InputError, match=r"step caching does not go with an IP-Adapter, which its last layer has"):
        export_pipeline(pipe, tmp_path / "bundle", step_caching=True)


def test_the_command_line_hands_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def export_pipeline(*_: object, **options: Any) -> None:
        asked.update(options)
        raise InputError("as far as here")

    words = ["export", "demo", str(tmp_path / "bundle"), "--ip-adapter", "one.bin", "--ip-adapter", "two"]
    found = CliRunner().invoke(app, words)
    assert "IP-Adapter 'one.bin' is no .safetensors file here" in " ".join(found.output.split())
    monkeypatch.setattr("export.pipeline.export_pipeline", export_pipeline)
    CliRunner().invoke(app, [*words, "--t2i-adapter", "--timesteps"])
    assert asked["ip_adapters"] == ["one.bin", "two"]
    assert (asked["t2i_adapter"], asked["timesteps"]) == (True, True)


def test_faceid_plus_is_refused() -> None:
    from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection, MultiIPAdapterImageProjection

    unet = small_pipeline().unet
    layer = IPAdapterFaceIDPlusImageProjection(8, 8, 8, 8, depth=1, heads=1, num_tokens=1)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([layer])
    with pytest.raises(ModelError, match=r"with IPAdapterFaceIDPlusImageProjection, which sdkd does not export"):
        check_projections(unet)
