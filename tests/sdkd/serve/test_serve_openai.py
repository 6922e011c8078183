"""OpenAI's client draws, edits and lists models on a real server."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import openai
import pytest
import requests
from PIL import Image
from serving import Running

from sdkd.serve.api.openai import Kept
from sdkd.serve.errors import UnknownNameError

SMALL: dict[str, Any] = {"steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)


def native(server: Running, **fields: Any) -> list[bytes]:
    """The pixels that the server's own API answers."""
    answer = requests.post(f"{server.url}/api/images", json=fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return [pixels(base64.b64decode(one["png"])) for one in answer.json()["images"]]


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def decoded(answer: Any) -> list[bytes]:
    return [base64.b64decode(one.b64_json) for one in answer.data]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 32)).convert("RGB")


def test_images_are_those_of_the_servers_own_api(server: Running, client: openai.OpenAI):
    answer = client.images.generate(
        prompt="a red cat", n=2, size="64x32", quality="standard", user="me", extra_body=SMALL
    )
    expected = native(server, prompt="a red cat", n=2, width=64, height=32, **SMALL)
    assert [pixels(data) for data in decoded(answer)] == expected
    assert [one.seed for one in answer.data] == [3, 4]
    assert (answer.size, answer.output_format, answer.usage) == ("64x32", "png", None)
    first = Image.open(io.BytesIO(decoded(answer)[0]))
    assert first.text["seed"] == "3"
    assert "Steps: 2, " in first.text["parameters"]


def test_fields_of_ours_reach_the_model(server: Running, client: openai.OpenAI):
    more = SMALL | {"negative_prompt": "dogs", "guidance_scale": 3.5, "scheduler": "euler"}
    answer = client.images.generate(prompt="a cat", model=server.ids[-1], size="auto", extra_body=more)
    assert decoded(answer)
    settings = Image.open(io.BytesIO(decoded(answer)[0])).text
    assert (settings["negative_prompt"], settings["guidance_scale"]) == ("dogs", "3.5")
    assert settings["scheduler"] == "EulerDiscreteScheduler"
    assert server.ids[-1].endswith(f":{settings['target']}")
    with pytest.raises(openai.NotFoundError, match=r"LoRA 'nobody' is not on this server"):
        client.images.generate(prompt="a cat", extra_body=SMALL | {"loras": [{"name": "nobody"}]})


def test_openais_own_model_names_mean_the_first_model(client: openai.OpenAI):
    drawn = [
        decoded(client.images.generate(prompt="a cat", model=name, size="32x32", extra_body=SMALL))
        for name in ("dall-e-3", "gpt-image-1")
    ]
    assert drawn[0] == drawn[1] == decoded(client.images.generate(prompt="a cat", size="32x32", extra_body=SMALL))
    with pytest.raises(openai.NotFoundError, match=r"model 'sdxl' is not served here: choose one of "):
        client.images.generate(prompt="a cat", model="sdxl")


def test_images_are_answered_as_addresses_and_in_other_formats(server: Running, client: openai.OpenAI):
    answer = client.images.generate(
        prompt="a cat", size="32x32", response_format="url", output_format="jpeg", output_compression=50,
        extra_body=SMALL,
    )  # fmt: skip
    url = answer.data[0].url
    assert url.startswith(f"{server.url}/files/")
    file = requests.get(url, timeout=60)
    assert (file.status_code, file.headers["content-type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(file.content)).size == (32, 32)
    gone = requests.get(f"{server.url}/files/guessed.png", timeout=60)
    assert gone.status_code == 404
    assert "image 'guessed.png' is not, or no longer, kept" in gone.json()["error"]["message"]


def test_the_oldest_images_go_when_there_are_too_many():
    kept = Kept(images=2, size=10)
    names = [kept.add(data, "png") for data in (b"one", b"two", b"three")]
    assert [kept.get(name) for name in names[1:]] == [b"two", b"three"]
    large = kept.add(bytes(11), "webp")
    assert kept.get(large) == bytes(11)
    for name in names:
        with pytest.raises(UnknownNameError, match=r"is not, or no longer, kept: draw it again"):
            kept.get(name)


def test_transparent_areas_of_a_mask_are_drawn_again(server: Running, client: openai.OpenAI):
    mask = Image.new("RGBA", (64, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 24, 32))
    ours = Image.new("L", (64, 32))
    ours.paste(255, (0, 0, 24, 32))
    answer = client.images.edit(
        image=png(picture()), mask=png(mask), prompt="a cat", size="64x32", n=2, extra_body=SMALL | {"strength": 0.9}
    )
    given = {name: base64.b64encode(png(one)).decode() for name, one in (("image", picture()), ("mask", ours))}
    same = {"prompt": "a cat", "width": 64, "height": 32, "n": 2, "strength": 0.9}
    assert [pixels(data) for data in decoded(answer)] == native(server, **same, **given, **SMALL)


def test_an_image_without_a_mask_is_changed_as_a_whole(server: Running, client: openai.OpenAI):
    answer = client.images.edit(image=[png(picture())], prompt="a cat", size="64x32", extra_body=SMALL)
    given = base64.b64encode(png(picture())).decode()
    expected = native(server, prompt="a cat", width=64, height=32, image=given, **SMALL)
    assert [pixels(data) for data in decoded(answer)] == expected


def test_loras_are_read_from_json_and_forms(server: Running, client: openai.OpenAI):
    loras = [{"name": "style", "strength": -0.5}]
    answer = client.images.generate(prompt="a cat", size="64x32", extra_body=SMALL | {"loras": loras})
    same = {"prompt": "a cat", "width": 64, "height": 32, **SMALL}
    assert [pixels(data) for data in decoded(answer)] == native(server, loras=loras, **same) != native(server, **same)
    given = base64.b64encode(png(picture())).decode()
    expected = native(server, loras=loras, image=given, **same)
    by_client = client.images.edit(
        image=png(picture()), prompt="a cat", size="64x32", extra_body=SMALL | {"loras": loras}
    )
    assert [pixels(data) for data in decoded(by_client)] == expected
    form = {"prompt": "a cat", "size": "64x32", **SMALL}
    for sent, message in (
        (json.dumps(loras), None),
        ("style", "loras is not JSON"),
        ("[1]", "loras.0 1 is not usable"),
    ):
        files = {"image": png(picture())}
        by_hand = requests.post(f"{server.url}/v1/images/edits", data=form | {"loras": sent}, files=files, timeout=60)
        if message is None:
            assert [pixels(base64.b64decode(by_hand.json()["data"][0]["b64_json"]))] == expected
        else:
            assert message in by_hand.json()["error"]["message"]


def test_models_are_listed(server: Running, client: openai.OpenAI):
    assert [one.id for one in client.models.list()] == server.ids
    assert client.models.retrieve(server.ids[-1]).owned_by == "sdkd"
    with pytest.raises(openai.NotFoundError, match=r"model 'dall-e-2' is not served here"):
        client.models.retrieve("dall-e-2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "speed": "high"}, r"'speed' is not a field that this server knows: leave it out"),
        ({"prompt": "a", "stream": True}, r"stream True is not possible: leave it out"),
        ({"prompt": "a", "partial_images": 2}, r"partial_images 2 is not possible"),
        ({"prompt": "a", "quality": "hd"}, r"quality 'hd' is not usable: input should be 'auto' or 'standard'"),
        ({"prompt": "a", "background": "transparent"}, r"background 'transparent' is not usable"),
        ({"prompt": "a", "size": "64*64"}, r"size '64\*64' is not usable: give WIDTHxHEIGHT in pixels"),
        ({"prompt": "a", "output_compression": 50}, r"output_compression 50 has nothing to act on, a PNG loses"),
        ({"prompt": "a", "steps": "many"}, r"steps 'many' is not usable: input should be a valid integer"),
        ({"prompt": "a", "loras": [{"nam": "b"}]}, r"loras.0.name is missing: send it; 'loras.0.nam' is not a field"),
        ({}, r"prompt is missing: send it"),
        ({"prompt": "a", "n": 0}, r"n 0 is too small"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], message: str):
    with pytest.raises(openai.BadRequestError, match=message):
        client.post("/images/generations", body=fields, cast_to=object)


@pytest.mark.parametrize(
    ("data", "files", "message"),
    [
        ([("prompt", "a")], {"mask": b"m"}, "image was sent 0 times, or not as a file: send one image file"),
        ([("prompt", "a"), ("image", "text")], {"x": b"m"}, "file 'x' is not one that this server knows"),
        ([("prompt", "a"), ("prompt", "b")], {"image": b"m"}, "prompt is there twice: send it once"),
        ([("prompt", "a"), ("stream", "true")], {"image": b"m"}, "stream True is not possible"),
        ([("prompt", "a")], {"image": b"no image"}, "image cannot be read as an image"),
        ([("prompt", "a"), ("seed", "x")], {"image": b"m"}, "seed 'x' is not usable"),
        ([("prompt", "a")], {}, "images are sent as a form: send multipart/form-data"),
    ],
)
def test_forms_that_cannot_be_used_are_refused(server: Running, data: Any, files: Any, message: str):
    refused = requests.post(f"{server.url}/v1/images/edits", data=data, files=files, timeout=60)
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]
