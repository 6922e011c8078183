"""A1111's client draws, paints over masks, asks how far it is and interrupts on a real server."""

from __future__ import annotations

import base64
import io
import re
import threading
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from serving import Running, until
from webuiapi import WebUIApi, b64_img

from sdkd.serve.api.webui_fields import read_prompt
from sdkd.serve.wanted import LoraWish

SMALL: dict[str, Any] = {"steps": 2, "seed": 3, "width": 64, "height": 32, "cfg_scale": 3.0}
NATIVE: dict[str, Any] = {"steps": 2, "seed": 3, "width": 64, "height": 32, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def client(server: Running) -> WebUIApi:
    return WebUIApi(server.host, server.port, sampler="Euler")


def native(server: Running, **fields: Any) -> list[bytes]:
    """The pixels that the server's own API answers."""
    answer = requests.post(f"{server.url}/api/images", json={"scheduler": "euler", **NATIVE, **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(one["png"]))).tobytes() for one in answer.json()["images"]]


def post(server: Running, path: str, **fields: Any) -> requests.Response:
    return requests.post(f"{server.url}/sdapi/v1/{path}", json=fields, timeout=60)


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 32)).convert("RGB")


def mask() -> Image.Image:
    """White in a box at the left."""
    found = Image.new("L", (64, 32))
    found.paste(255, (8, 8, 24, 24))
    return found


def test_images_are_those_of_the_servers_own_api(server: Running, client: WebUIApi):
    answer = client.txt2img(prompt="a cat", negative_prompt="dogs", batch_size=2, n_iter=2, **SMALL)
    expected = native(server, prompt="a cat", negative_prompt="dogs", n=4)
    assert [one.tobytes() for one in answer.images] == expected
    info = answer.info
    assert (info["seed"], info["all_seeds"]) == (3, [3, 4, 5, 6])
    assert (info["sampler_name"], info["steps"], info["cfg_scale"]) == ("Euler", 2, 3.0)
    assert (info["prompt"], info["negative_prompt"], info["width"], info["height"]) == ("a cat", "dogs", 64, 32)
    assert info["infotexts"][1] == answer.images[1].text["parameters"]
    assert answer.parameters["hr_upscaler"] == "Latent"


def test_what_a_request_leaves_out_is_the_models_own(server: Running):
    answer = post(server, "txt2img", prompt="a cat", steps=1, seed=-1, send_images=False, sampler_name="").json()
    assert answer["images"] == []
    served = server.service.catalog.default
    height, width = served.size
    text = post(server, "txt2img", prompt="a", steps=1).json()["info"]
    assert f"CFG scale: {served.generation.guidance_scale}, " in text
    assert f"Size: {width}x{height}, " in text


def test_an_image_is_changed_as_a_whole(server: Running, client: WebUIApi):
    answer = client.img2img(images=[picture()], prompt="a cat", denoising_strength=0.5, **SMALL)
    assert [answer.image.tobytes()] == native(server, prompt="a cat", image=b64_img(picture()), strength=0.5)
    assert answer.parameters["init_images"] is None
    assert answer.info["denoising_strength"] == 0.5


def test_a_masked_area_is_drawn_and_the_rest_kept_to_the_bit(server: Running, client: WebUIApi):
    plain = {"inpaint_full_res": False, "mask_blur": 0, "inpainting_fill": 1, "denoising_strength": 1.0}
    answer = client.img2img(images=[picture()], mask_image=mask(), prompt="a cat", **plain, **SMALL)
    whole = native(server, prompt="a cat", image=b64_img(picture()), mask=b64_img(mask()), strength=1.0)[0]
    expected = picture()
    expected.paste(Image.frombytes("RGB", (64, 32), whole), (0, 0), mask())
    assert answer.image.tobytes() == expected.tobytes()
    inverted = client.img2img(
        images=[picture()], mask_image=mask(), inpainting_mask_invert=1, prompt="a cat", **plain, **SMALL
    )
    found, before = np.asarray(inverted.image), np.asarray(picture())
    assert np.array_equal(found[8:24, 8:24], before[8:24, 8:24])
    assert not np.array_equal(found[:, 32:], before[:, 32:])


def test_the_clients_own_way_to_inpaint_draws_the_area_alone(client: WebUIApi):
    large = picture().resize((120, 90))
    white = Image.new("L", (120, 90))
    white.paste(255, (60, 30, 90, 50))
    answer = client.img2img(images=[large], mask_image=white, mask_blur=2, prompt="a cat", **SMALL)
    found, before = np.asarray(answer.image), np.asarray(large)
    assert answer.image.size == (120, 90)
    changed = np.argwhere((found != before).any(axis=-1))
    assert changed.min(axis=0).min() >= 20
    assert np.array_equal(found[:, :50], before[:, :50])
    assert not np.array_equal(found[35:45, 65:85], before[35:45, 65:85])
    assert answer.parameters["mask"] is None


def test_every_sampler_in_the_list_draws(client: WebUIApi):
    names = client.util_get_sampler_names()
    assert {"Euler a", "DPM++ 2M", "DDIM", "PLMS", "UniPC", "LMS", "Heun", "LCM", "dpm++-single"} <= set(names)
    found = {
        name: client.txt2img(prompt="a cat", sampler_name=name, **{**SMALL, "steps": 4, "width": 32}) for name in names
    }
    assert {name: one.info["sampler_name"] for name, one in found.items() if name != "dpm++-single"} == {
        name: name for name in names if name != "dpm++-single"
    }
    assert len({one.image.tobytes() for one in found.values()}) > len(names) // 2
    aliases = {alias: one["name"] for one in client.get_samplers() for alias in one["aliases"]}
    assert (aliases["euler-a"], aliases["EulerDiscreteScheduler"]) == ("Euler a", "Euler")


def test_the_model_is_an_option_of_this_api(server: Running, client: WebUIApi):
    first, other = server.ids[:2]
    target = other.split(":")[1]
    assert client.util_get_model_names() == sorted(server.ids)
    assert client.util_get_current_model() == first
    by_request = client.txt2img(prompt="a", override_settings={"sd_model_checkpoint": other}, **SMALL)
    assert by_request.image.text["target"] == target
    assert client.util_get_current_model() == first
    try:
        client.util_set_model(other, find_closest=False)
        assert client.util_get_current_model() == other
        assert client.txt2img(prompt="a", **SMALL).image.text["target"] == target
        # Open WebUI sends all options back, with another model
        assert post(server, "options", **{**client.get_options(), "sd_model_checkpoint": first}).status_code == 200
    finally:
        client.set_options({"sd_model_checkpoint": first})
    assert client.util_get_current_model() == first


def test_what_clients_ask_for_at_the_start_is_answered(client: WebUIApi):
    assert (client.get_upscalers(), client.get_sd_vae(), client.get_cmd_flags()) == ([], [], {})
    assert [(one["name"], one["path"]) for one in client.get_loras()] == [("style", "style.safetensors")]
    assert client.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert client.get_scripts() == {"txt2img": [], "img2img": []}
    assert [one["label"] for one in client.get_schedulers()] == ["Automatic"]
    assert client.get_memory()["ram"]["total"] > 0
    assert client.refresh_checkpoints() is None
    idle = client.get_progress()
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)


def test_png_info_gives_the_settings_back(client: WebUIApi):
    image = client.txt2img(prompt="a cat", **SMALL).image
    found = client.png_info(image)
    assert found.info == image.text["parameters"]
    assert {name: found.parameters[name] for name in ("Prompt", "Seed", "Size-1", "Size-2", "Sampler")} == {
        "Prompt": "a cat", "Seed": "3", "Size-1": "64", "Size-2": "32", "Sampler": "Euler",
    }  # fmt: skip
    assert found.json["items"]["guidance_scale"] == "3.0"
    assert client.png_info(picture()).json == {"info": "", "items": {}, "parameters": {}}


def test_progress_is_told_and_what_runs_is_interrupted(server: Running, client: WebUIApi):
    outcome: list[str] = []

    def draw() -> None:
        try:
            WebUIApi(server.host, server.port).txt2img(prompt="a cat", batch_size=8, steps=150, width=64, height=64)
        except RuntimeError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=draw)
    thread.start()
    seen = until(lambda: (now := client.get_progress())["current_image"] and now, "there is a preview")
    assert 0 < seen["progress"] < 1
    assert seen["eta_relative"] > 0
    assert (seen["state"]["job_count"], seen["state"]["sampling_steps"]) == (8, 150)
    preview = Image.open(io.BytesIO(base64.b64decode(seen["current_image"])))
    assert 0 < preview.width < 64
    url = f"{server.url}/sdapi/v1/progress?skip_current_image=true"
    assert requests.get(url, timeout=60).json()["current_image"] is None
    assert client.interrupt() == {}
    thread.join(30)
    assert len(outcome) == 1
    assert "499" in outcome[0]
    assert "was cancelled" in outcome[0]
    assert until(lambda: client.get_progress()["state"]["job"] == "", "nothing runs")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enable_hr": True}, r"enable_hr True asks for something that this server does not do: leave it out"),
        ({"restore_faces": True}, r"restore_faces True asks for"),
        ({"tiling": True}, r"tiling True asks for"),
        ({"styles": ["anime"]}, r"styles \['anime'\] asks for"),
        ({"subseed_strength": 0.5}, r"subseed_strength 0.5 asks for"),
        ({"script_name": "X/Y/Z plot"}, r"script_name 'X/Y/Z plot' asks for"),
        ({"save_images": True}, r"save_images True asks for"),
        ({"eta": 0.5}, r"eta 0.5 asks for"),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, r"alwayson_scripts \{'ControlNet': .* asks for"),
        ({"scheduler": "Karras"}, r"scheduler 'Karras' \(a noise schedule\) is not possible: .* send Automatic"),
        ({"sampler_name": "DPM++ 2M Karras"}, r"sampler 'DPM\+\+ 2M Karras' is not possible: .* take 'DPM\+\+ 2M'"),
        ({"sampler_name": "Best"}, r"sampler 'Best' is unknown: choose one of Euler a, Euler,"),
        ({"prompt": "<hypernet:a:1> b"}, r"'<hypernet:a:1> b' in the prompt is not usable: write <lora:NAME:STRENGTH>"),
        ({"prompt": "<lora:a:b>"}, r"strength 'b' of LoRA 'a' is no number: write <lora:a:0.8>"),
        ({"prompt": "<lora:a:1:2>"}, r"'<lora:a:1:2>' in the prompt is not usable"),
        ({"steps": "many"}, r"steps 'many' is not usable: input should be a valid integer"),
        ({"n_iter": 0}, r"n_iter 0 is not usable: input should be greater than or equal to 1"),
        ({"override_settings": {"sd_vae": "other"}}, r"override_settings sd_vae cannot be set to 'other'"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server: Running, fields: dict[str, Any], message: str):
    refused = post(server, "txt2img", **{"prompt": "a", **fields})
    assert refused.status_code == 400
    assert re.search(message, refused.json()["detail"]), refused.text


def test_images_and_options_that_cannot_be_used_are_refused(server: Running, client: WebUIApi):
    for fields, message in (
        ({}, "init_images is missing: send it"),
        ({"init_images": []}, "init_images [] is not usable: list should have at least 1 item"),
        ({"init_images": ["a*"]}, "init_images is not base64"),
        ({"init_images": [b64_img(picture())], "mask": "a*"}, "mask is not base64"),
        ({"init_images": [b64_img(picture())], "inpainting_fill": 2}, "inpainting_fill 2 is not usable"),
        ({"init_images": [b64_img(picture())], "mask": b64_img(mask()), "width": 10**400}, "width 2^1328 is too large"),
        ({"init_images": [b64_img(picture())], "resize_mode": 1}, "resize_mode 1 asks for something"),
        ({"init_images": [b64_img(picture())], "upscale": 1}, "'upscale' is not a field that this server knows"),
    ):
        refused = post(server, "img2img", **fields)
        assert (refused.status_code, message in refused.json()["detail"]) == (400, True), refused.text
    assert "option samples_format cannot be set to 'jpg'" in client.set_options({"samples_format": "jpg"})["detail"]
    unknown = post(server, "options", sd_model_checkpoint="sdxl")
    assert (unknown.status_code, unknown.json()["detail"][:35]) == (404, "model 'sdxl' is not served here: ch")


def test_loras_are_asked_for_in_the_prompt(server: Running, client: WebUIApi):
    assert read_prompt("a <lora:fur:0.8>cat <lora:long tail> <lora:c.v2:-1>") == (
        "a cat",
        (LoraWish("fur", 0.8), LoraWish("long tail", 1.0), LoraWish("c.v2", -1.0)),
    )
    answer = client.txt2img(prompt="a cat <lora:style:0.8>", **SMALL)
    style = {"loras": [{"name": "style", "strength": 0.8}]}
    assert [answer.image.tobytes()] == native(server, prompt="a cat", **style) != native(server, prompt="a cat")
    assert answer.image.text["parameters"].startswith("a cat <lora:style:0.8>\nSteps: 2, ")
    refused = post(server, "txt2img", prompt="a cat <lora:fur:0.8>")
    assert (refused.status_code, refused.json()["detail"][:36]) == (404, "LoRA 'fur' is not on this server (it")
    with pytest.raises(RuntimeError, match=r"404.*LoRA .*fur.* is not on this server"):
        client.txt2img(prompt="a cat <lora:fur:0.8>", **SMALL)
