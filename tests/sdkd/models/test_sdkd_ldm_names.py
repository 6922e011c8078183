"""Names of the original code: students of every layout, and by which names other programs tell what a file is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import helpers
import pytest

from sdkd.errors import ModelError
from sdkd.families import MODELS
from sdkd.models.ldm_names import UNET, Layout, read_layout, unet_places
from sdkd.students.blocks import full_config, meta_unet, student_config

# depths down, middle and up as Segmind's and KOALA's papers and configs say
LAYOUTS = {
    "sdxl": (((0, 0), (2, 2), (10, 10)), 10, ((10,) * 3, (2,) * 3, (0,) * 3)),
    "ssd-1b": (((0, 0), (2, 2), (4, 4)), 0, ((4, 4, 10), (2, 1, 1), (0,) * 3)),
    "vega": (((0, 0), (1, 1), (2, 2)), 0, ((2,) * 3, (1,) * 3, (0,) * 3)),
    "koala-1b": (((0,), (2,), (6,)), 6, ((6, 6), (2, 2), (0, 0))),
    "koala-700m": (((0,), (2,), (5,)), None, ((5, 5), (2, 2), (0, 0))),
    "sd15": (((1, 1),) * 3 + ((0, 0),), 1, ((0,) * 3, *((1,) * 3,) * 3)),
    "sd15-small": (((1,),) * 3 + ((0,),), 1, ((0, 0), *((1, 1),) * 3)),
    "sd15-bk-small": (((1,),) * 3 + ((0,),), None, ((0, 0), *((1, 1),) * 3)),
    "sd15-tiny": (((1,),) * 3, None, ((1, 1),) * 3),
    "sd21-tiny": (((1,),) * 3, None, ((1, 1),) * 3),
}


def config_of(name: str) -> dict[str, Any]:
    """The UNet's config of a model by its name: `sd15`, `sd15-tiny`, `ssd-1b`."""
    base, _, student = name.partition("-") if name.startswith("sd") else ("sdxl", "-", name)
    config = full_config(MODELS[base][1].unet)
    return student_config(config, student) if student else config


def shapes_of(name: str, spaced: bool = False) -> dict[str, Any]:
    """Names in a file, and weights without memory, of a full-size UNet."""
    config = config_of(name)
    weights = meta_unet(config).state_dict()
    places = unet_places(weights, replace(Layout.of(config), spaced=spaced))
    assert places.keys() == weights.keys()
    return {places[own].name: weight for own, weight in weights.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_back_from_names_alone(name: str) -> None:
    config, names = config_of(name), shapes_of(name)
    layout = Layout.of(config)
    assert (layout.down, layout.mid, layout.up) == LAYOUTS[name]
    assert len(names) == len(meta_unet(config).state_dict())
    assert read_layout(names) == layout
    read = full_config({**config, **layout.config})
    assert Layout.of(read) == layout
    assert meta_unet(read).state_dict().keys() == meta_unet(config).state_dict().keys()


@pytest.mark.parametrize(("name", "count"), [("sd15", 686), ("sd21", 686), ("sdxl", 1680)])
def test_as_many_weights_as_in_the_published_files(name: str, count: int) -> None:
    assert len(shapes_of(name)) == count


def numbers(names: Iterable[str], side: str) -> list[int]:
    """The numbers of a UNet's input or output blocks."""
    return sorted({int(name.split(".")[3]) for name in names if name.startswith(f"{UNET}{side}_blocks.")})


def test_numbers_of_one_layer_a_level_with_and_without_gaps() -> None:
    """By the original code with num_res_blocks 1, and by diffusers' script to the original layout."""
    plain, gaps = shapes_of("sd15-tiny"), shapes_of("sd15-tiny", spaced=True)
    assert numbers(plain, "input") == numbers(plain, "output") == [0, 1, 2, 3, 4, 5]
    assert numbers(gaps, "input") == [0, 1, 3, 4, 6, 7]
    assert numbers(gaps, "output") == [0, 1, 2, 3, 4, 5, 6, 7]  # 2 and 5 are upsamplers alone
    assert {f"{UNET}output_blocks.2.1.conv.weight", f"{UNET}output_blocks.5.2.conv.weight"} <= gaps.keys()
    assert {f"{UNET}output_blocks.1.2.conv.weight", f"{UNET}output_blocks.3.2.conv.weight"} <= plain.keys()
    assert read_layout(gaps) == replace(Layout.of(config_of("sd15-tiny")), spaced=True)
    assert shapes_of("sd15", spaced=True).keys() == shapes_of("sd15").keys()


def test_blocks_that_fit_no_layout_are_said() -> None:
    names = shapes_of("sd15-tiny")
    rest = {name: weight for name, weight in names.items() if "output_blocks.5." not in name}
    with pytest.raises(ModelError, match=r"blocks of \[1, 1, 1\] layers down and \[2, 2, 1\] up"):
        read_layout(rest)
    with pytest.raises(ModelError, match="layers with and without attention in one block"):
        Layout((8,), ((1, 0),), 1, ((1, 1, 1),)).config  # noqa: B018
    with pytest.raises(ModelError, match="mid block has 3 transformers, the level above it 1"):
        Layout((8,), ((1, 1),), 3, ((1, 1, 1),)).config  # noqa: B018
    deep = Layout.of(full_config(helpers.TEACHER_UNET | {"layers_per_block": 3}))
    with pytest.raises(ModelError, match="3 layers in a level, too many to number them in threes"):
        list(replace(deep, spaced=True).modules())


# What other programs make of the names, by their published rules, in our words.


def comfyui(names: Mapping[str, Any]) -> dict[str, Any]:
    """comfy/model_detection.py, detect_unet_config: what it finds in a UNet of Stable Diffusion."""
    found = numbers(names, "input")
    count = next(number for number in range(99) if number not in found)  # a gap ends it

    def depth(side: str, number: int) -> int:
        blocks = f"{UNET}{side}_blocks.{number}.1.transformer_blocks."
        return len({name[len(blocks) :].split(".")[0] for name in names if name.startswith(blocks)})

    def has(text: str) -> bool:
        return UNET + text in names

    down, up, layers = [], [], [0]
    for number in range(count):
        other = count - number - 1
        if has(f"input_blocks.{number}.0.op.weight"):
            layers.append(0)
            up.append(depth("output", other))
            continue
        if has(f"input_blocks.{number}.0.in_layers.0.weight"):
            layers[-1] += 1
            down.append(depth("input", number))
        if has(f"output_blocks.{other}.0.in_layers.0.weight"):
            up.append(depth("output", other))
    middle = -1 if has("middle_block.0.in_layers.0.weight") else -2
    if has("middle_block.1.proj_in.weight"):
        middle = len({name.split(".")[5] for name in names if name.startswith(f"{UNET}middle_block.1.transformer_b")})
    context = next(name for name in names if name.endswith("attn2.to_k.weight"))
    return {
        "num_res_blocks": layers, "transformer_depth": down, "transformer_depth_output": up,
        "transformer_depth_middle": middle, "context_dim": names[context].shape[1],
    }  # fmt: skip


# Rows of comfy/supported_models.py and of unet_config_from_diffusers_unet: layers, depths down, up, middle.
COMFYUI = {
    "sdxl": ([2, 2, 2], [0, 0, 2, 2, 10, 10], [0, 0, 0, 2, 2, 2, 10, 10, 10], 10, 2048),
    "ssd-1b": ([2, 2, 2], [0, 0, 2, 2, 4, 4], [0, 0, 0, 1, 1, 2, 10, 4, 4], -1, 2048),
    "vega": ([2, 2, 2], [0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], -1, 2048),
    "koala-700m": ([1, 1, 1], [0, 2, 5], [0, 0, 2, 2, 5, 5], -2, 2048),
    "koala-1b": ([1, 1, 1], [0, 2, 6], [0, 0, 2, 2, 6, 6], 6, 2048),
    "sd15": ([2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0], [1] * 9 + [0] * 3, 1, 768),
    "sd15-small": ([1, 1, 1, 1], [1, 1, 1, 0], [1] * 6 + [0] * 2, 1, 768),
    "sd15-bk-small": ([1, 1, 1, 1], [1, 1, 1, 0], [1] * 6 + [0] * 2, -2, 768),
    "sd15-tiny": ([1, 1, 1], [1, 1, 1], [1] * 6, -2, 768),
    "sd21-tiny": ([1, 1, 1], [1, 1, 1], [1] * 6, -2, 1024),
}


@pytest.mark.parametrize("name", COMFYUI)
def test_comfyui_sees_every_layout_and_no_gaps(name: str) -> None:
    found = comfyui(shapes_of(name))
    layers, down, up, middle, context = COMFYUI[name]
    assert found == {
        "num_res_blocks": layers, "transformer_depth": down, "transformer_depth_output": up,
        "transformer_depth_middle": middle, "context_dim": context,
    }  # fmt: skip
    if name == "sd15-tiny":
        assert comfyui(shapes_of(name, spaced=True))["num_res_blocks"] == [1]


def stable_diffusion_cpp(names: Mapping[str, Any]) -> str:
    """src/model.cpp, get_sd_version: the kind of UNet, of text width 768 or with two text encoders."""
    middle = any(name.startswith(f"{UNET}middle_block.1.") for name in names)
    if any(name.startswith(f"{UNET}label_emb.") for name in names):
        wide = any(name.startswith(f"{UNET}output_blocks.3.1.transformer_blocks.1") for name in names)
        return "SDXL" if middle else "SSD1B" if wide else "VEGA"
    last = any(name.startswith(f"{UNET}output_blocks.7.1") for name in names)
    return "SD1" if middle else "SD1_TINY_UNET" if last else "SDXS_512_DS"


@pytest.mark.parametrize(
    ("name", "spaced", "kind"),
    [
        ("sd15", False, "SD1"),
        ("sd15-tiny", True, "SD1_TINY_UNET"),
        ("sd15-tiny", False, "SDXS_512_DS"),  # which has other blocks
        ("ssd-1b", False, "SSD1B"),
        ("vega", False, "VEGA"),
        ("koala-700m", False, "SSD1B"),  # which has other blocks
    ],
)
def test_stable_diffusion_cpp_tells_by_names(name: str, spaced: bool, kind: str) -> None:
    names = shapes_of(name, spaced)
    assert stable_diffusion_cpp(names) == kind
    if kind == "SD1_TINY_UNET":  # src/unet.hpp, UnetModelBlock with tiny_unet: where it looks for its samplers
        samplers = {f"{UNET}{name}.weight" for name in (
            "input_blocks.3.0.op", "input_blocks.6.0.op", "output_blocks.2.1.conv", "output_blocks.5.2.conv",
        )}  # fmt: skip
        assert samplers <= names.keys()
