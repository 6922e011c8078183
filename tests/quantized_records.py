"""What the record of an int8 engine holds, with planted figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sdkd.bundle.manifest import Bundle

SCHEME = {"activations": "u8", "weight_bits": 7, "outputs": False, "smooth": 0.5}
FLAGS: dict[str, Any] = {
    "quantization": {"scheme": SCHEME, "calibration": "ab" * 32},
    "rounded_layers": 21,
    "float_layers": {
        "conv_in": "4 channels in: no time to gain, and the noise itself passes",
        "mid_block.resnets.0.conv1": "rounded alone it changes the prediction by about 8.1 %",
        "up_blocks.0.resnets.0.conv1": "rounded alone it changes the prediction by about 5 %",
    },
    "quality": {
        "simulated": [{"timestep": 981.0, "relative": 0.031}, {"timestep": 21.0, "relative": 0.012}],
        "engine": [{"timestep": 981.0, "relative": 0.034}, {"timestep": 21.0, "relative": 0.011}],
        "image_psnr_db": [34.25, 36.5],
        "limit": 0.1,
    },
    "sensitivity": {
        "down_blocks.0.resnets.0.conv1": 1.2e-5,
        "mid_block.resnets.0.conv1": 0.0066,
        "up_blocks.0.resnets.0.conv1": 0.0025,
    },
    "speed": {"against": "fp32", "times": 1.42, "seconds": {"int8": [0.1, 0.11, 0.1], "fp32": [0.14, 0.16, 0.15]}},
}


def planted_engine(bundle: Bundle, slot: str, precision: str = "int8", **flags: Any) -> Bundle:
    """A bundle whose engines of a slot's target are also those of `slot`, the UNet's with a record of its rounding."""
    target = slot.removesuffix(f"-{precision}")
    manifest = bundle.manifest
    for record in bundle.manifest.engines.values():
        if record.slot == target:
            unet = record.component == "unet"
            own = {**record.flags, **FLAGS, **flags} if unet else record.flags
            made = replace(record, slot=slot, precision=precision if unet else record.precision, flags=own)
            manifest = manifest.with_engine(made)
    found = replace(bundle, manifest=manifest)
    found.save()
    return Bundle.open(found.path)
