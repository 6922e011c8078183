"""Requests on a real server: images, merging, limits, refusals, cancelling, progress, and processes that die."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving import Running, running, until

from engines import load_pipeline
from sdkd.bundle.manifest import Bundle
from sdkd.serve.errors import CancelledJobError
from sdkd.serve.wanted import Limits, LoraWish, Wanted

ASKED = {"prompt": "a cat", "steps": 2, "seed": 5, "width": 32, "height": 32}


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))), dtype=np.int16)


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def ask(server: Running, **fields: Any) -> dict[str, Any]:
    """The answer to a request that is drawn."""
    with server.client() as client:
        answer = client.post("/api/images", json={**ASKED, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture(scope="module")
def alone(bundle: Path) -> Callable[..., np.ndarray]:
    """What the pipeline call itself draws, as pixels."""
    pipe = load_pipeline(bundle, "openvino")
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str, seed: int, **options: Any) -> np.ndarray:
        usual = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 32, "width": 32}
        generator = torch.Generator().manual_seed(seed)
        return np.asarray(pipe(prompt, generator=generator, **(usual | options)).images[0], dtype=np.int16)

    return draw


def test_an_image_is_that_of_the_pipeline(server: Running, alone: Callable[..., np.ndarray]) -> None:
    answer = ask(server, negative_prompt="a dog", guidance_scale=4.0)
    (image,) = answer["images"]
    expected = alone("a cat", 5, negative_prompt="a dog", guidance_scale=4.0)
    assert np.array_equal(pixels(image["png"]), expected)
    assert image["settings"] == {
        "prompt": "a cat", "negative_prompt": "a dog", "seed": "5", "steps": "2", "guidance_scale": "4.0",
        "size": "32x32", "scheduler": "DDIMScheduler", "model": "small", "target": "openvino",
    }  # fmt: skip
    assert image["timing"]["batch"] == 1
    assert answer["timing"]["total_s"] >= image["timing"]["steps_s"] > 0


def test_images_of_several_requests_share_calls(server: Running, alone: Callable[..., np.ndarray]) -> None:
    """Prompts, negative prompts and seeds of their own; in a call of two, sums may be taken in another order."""
    wishes = [(f"a cat {number}", number, f"no {number}") for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda w: ask(server, prompt=w[0], seed=w[1], negative_prompt=w[2])["images"][0], wishes))
    assert max(image["timing"]["batch"] for image in found) == 2  # what the engines were built for
    for image, (prompt, seed, negative) in zip(found, wishes, strict=True):
        assert image["settings"]["prompt"] == prompt
        assert np.abs(pixels(image["png"]) - alone(prompt, seed, negative_prompt=negative)).max() <= 1


def test_several_images_of_a_request_count_up(server: Running, alone: Callable[..., np.ndarray]) -> None:
    images = ask(server, n=3)["images"]
    assert [(image["index"], image["seed"]) for image in images] == [(0, 5), (1, 6), (2, 7)]
    for image in images:
        assert np.abs(pixels(image["png"]) - alone("a cat", image["seed"])).max() <= 1


def test_an_image_and_a_mask(server: Running) -> None:
    picture = Image.new("RGB", (48, 48), "red")
    mask = Image.new("L", (48, 48), 0)
    mask.paste(255, (0, 0, 24, 48))
    (drawn,) = ask(server, image=png(picture), strength=0.5)["images"]
    assert drawn["settings"]["strength"] == "0.5"
    (inpainted,) = ask(server, image=png(picture), mask=png(mask))["images"]
    assert pixels(inpainted["png"]).shape == (32, 32, 3)
    assert not np.array_equal(pixels(inpainted["png"]), pixels(drawn["png"]))


def test_loras_by_name_and_their_exact_removal(server: Running) -> None:
    plain = pixels(ask(server)["images"][0]["png"])
    styled = ask(server, loras=[{"name": "style", "strength": 0.7}])["images"][0]
    assert styled["settings"]["loras"] == "style:0.7"
    assert np.abs(pixels(styled["png"]) - plain).max() > 5
    assert np.array_equal(pixels(ask(server)["images"][0]["png"]), plain)


def test_another_target_and_scheduler(server: Running) -> None:
    assert server.ids == ["small", "small:onnxruntime"]
    (image,) = ask(server, model="small:onnxruntime", scheduler="euler-a", steps=3)["images"]
    assert image["settings"]["target"] == "onnxruntime"
    assert image["settings"]["scheduler"] == "EulerAncestralDiscreteScheduler"


def test_code_that_pytorch_compiled_draws_too_and_takes_loras(every_target: Path, loras: Path) -> None:
    with running([f"small={every_target}"], target="inductor", lora_dir=loras) as server:
        (image,) = ask(server)["images"]
        plain = pixels(image["png"]).astype(int)
        assert image["settings"]["target"] == "inductor"
        other = pixels(ask(server, loras=[{"name": "style", "strength": 0.7}])["images"][0]["png"]).astype(int)
        assert np.abs(other - plain).max() > 5
        assert np.array_equal(pixels(ask(server)["images"][0]["png"]), plain)


def test_a_seed_by_chance_is_told(server: Running, alone: Callable[..., np.ndarray]) -> None:
    (image,) = ask(server, seed=None)["images"]
    assert np.array_equal(pixels(image["png"]), alone("a cat", image["seed"]))


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "big"}, 404, "model 'big' is not served here: choose one of small, small:onnxruntime"),
        ({"scheduler": "fast"}, 400, "scheduler 'fast' is unknown"),
        ({"loras": [{"name": "../style"}]}, 404, "LoRA '../style' is not on this server (it has style)"),
        ({"loras": [{"name": "style", "strength": 1e9}]}, 400, "strength of a LoRA 1000000000.0 is too large"),
        ({"width": 128}, 400, "outside what model 'small' was built for (width 32..64, height 32..64)"),
        ({"width": 128}, 400, "--size 32x128"),
        ({"width": 33}, 400, "33"),
        ({"width": 0}, 400, "width 0 is too small"),
        ({"n": 9}, 400, "n 9 is too large: give a whole number from 1 to 8"),
        ({"steps": 151}, 400, "steps 151 is too large: give a whole number from 1 to 150"),
        ({"steps": 1.5}, 400, "steps 1.5 is not usable: input should be a valid integer"),
        ({"guidance_scale": "much"}, 400, "guidance_scale 'much' is not usable: input should be a valid number"),
        ({"seed": -1}, 400, "seed -1 is too small"),
        ({"seed": 2**64 - 1, "n": 2}, 400, "seed of the last image"),
        ({"prompt": "x" * 10_001}, 400, "prompt has 10001 characters"),
        ({"image": "%%%"}, 400, "image is not base64"),
        ({"image": base64.b64encode(b"no image").decode()}, 400, "image cannot be read as an image"),
        ({"mask": png(Image.new("L", (8, 8)))}, 400, "mask has no image to act on"),
        ({"strength": 0.5}, 400, "--strength 0.5 has nothing to act on here"),
        ({"strength": 2.0}, 400, "strength 2.0 is too large"),
        ({"path": "/etc/passwd"}, 400, "'path' is not a field that this server knows"),
    ],
)
def test_refusals(server: Running, fields: dict[str, Any], status: int, words: str) -> None:
    with server.client() as client:
        answer = client.post("/api/images", json={**ASKED, **fields})
        assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.text
        assert answer.json()["error"]["message"] == answer.json()["detail"]


def test_broken_json_and_unknown_places(server: Running) -> None:
    with server.client() as client:
        broken = client.post("/api/images", content=b"{", headers={"content-type": "application/json"})
        assert (broken.status_code, "the request is not JSON (Expecting" in broken.json()["detail"]) == (400, True)
        deep = client.post("/api/images", content=b"[" * 100_000, headers={"content-type": "application/json"})
        assert (deep.status_code, "the request is not JSON (maximum recursion" in deep.json()["detail"]) == (400, True)
        listed = client.post("/api/images", json=[])
        assert (listed.status_code, "the request holds a list, not an object" in listed.json()["detail"]) == (400, True)
        typed = client.post("/api/images", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
        assert (typed.status_code, "type 'text/plain' is not read" in typed.json()["detail"]) == (400, True)
        lost = client.get("/nowhere")
        assert (lost.status_code, "GET /nowhere is not known here" in lost.json()["detail"]) == (404, True)
        assert client.get("/page/../app.py").status_code == 404
        assert client.get("/page/%2e%2e%2fapp.py").status_code == 404


def events(server: Running, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    found = []
    with (
        server.client() as client,
        client.stream("POST", "/api/images", json={**ASKED, **fields, "stream": True}) as answer,
    ):
        kind = ""
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                found.append((kind, json.loads(value)))
    return found


def test_events_with_previews(server: Running, alone: Callable[..., np.ndarray]) -> None:
    found = events(server, steps=6)
    kinds = [kind for kind, _ in found]
    assert kinds[0] in ("queued", "progress")
    assert kinds[-2:] == ["image", "done"]
    steps = [data for kind, data in found if kind == "progress"]
    assert [data["step"] for data in steps] == sorted(data["step"] for data in steps)
    assert all(data["steps"] == 6 and 0 <= data["fraction"] < 1 for data in steps)
    preview = next(data["preview"] for data in reversed(steps) if data["preview"])
    assert pixels(preview.removeprefix("data:image/png;base64,")).shape == (16, 16, 3)  # one pixel a latent
    assert np.array_equal(pixels(found[-2][1]["png"]), alone("a cat", 5, num_inference_steps=6))


def test_the_client_that_leaves_ends_its_work(server: Running) -> None:
    """100 steps that nobody waits for end at the next one; others' requests are drawn."""
    with server.client() as client:
        with client.stream("POST", "/api/images", json={**ASKED, "steps": 150, "stream": True}) as answer:
            lines = answer.iter_lines()
            until(lambda: "progress" in next(lines), "it is being drawn")
            (job,) = server.service.current()
        until(lambda: job.state == "cancelled", "it is cancelled")
        ask(server)
        assert job.step < 150


def one_runs_one_waits(server: Running, waiting_steps: int) -> tuple[Any, Any]:
    """A request of 150 steps that is being drawn, and another one behind it."""

    async def begin() -> tuple[Any, Any]:
        first = await server.service.submit(Wanted("a cat", steps=150, width=32, height=32), "native")
        second = await server.service.submit(Wanted("a dog", steps=waiting_steps, width=32, height=32), "native")
        while not first.step:
            await asyncio.sleep(0.01)
        return first, second

    found: tuple[Any, Any] = server.on_loop(begin())
    return found


def test_cancel_by_name(server: Running) -> None:
    first, second = one_runs_one_waits(server, 149)
    with server.client() as client:
        assert client.delete(f"/api/images/{second.id}").status_code == 204  # it waits
        assert client.delete(f"/api/images/{first.id}").status_code == 204  # it runs
        assert client.delete(f"/api/images/{first.id}").status_code == 404
        assert client.delete("/api/images/none").status_code == 404
    with pytest.raises(CancelledJobError, match="was cancelled"):
        server.on_loop(second.result())
    assert second.step == 0


def test_a_killed_process_is_replaced(server: Running) -> None:
    """An image that was drawn alone is drawn again by the next process; that which dies of it twice has failed."""
    ask(server)
    first, second = one_runs_one_waits(server, 2)
    killed = server.service.process_of("small")
    os.kill(killed, signal.SIGKILL)

    async def drawn_again() -> None:
        while server.service.process_of("small") in (None, killed) or not first.step:
            await asyncio.sleep(0.01)

    server.on_loop(drawn_again())
    os.kill(server.service.process_of("small"), signal.SIGKILL)
    with pytest.raises(Exception, match="'small' was ended by SIGKILL: most likely the memory ran out"):
        server.on_loop(first.result())
    assert len(server.on_loop(second.result()).images) == 1
    assert 'sdkd_worker_deaths_total{model="small"} 2.0' in server.service.metrics.text().decode()


def test_of_a_killed_call_of_two_both_are_drawn_again(server: Running) -> None:
    async def begin() -> list[Any]:
        block = await server.service.submit(Wanted("a cat", steps=3, width=32, height=32), "native")
        two = [
            await server.service.submit(Wanted("a dog", steps=100, seed=n, width=32, height=32), "native")
            for n in (1, 2)
        ]
        await block.result()
        while not two[0].step:
            await asyncio.sleep(0.01)
        return two

    ask(server)
    two = server.on_loop(begin())
    os.kill(server.service.process_of("small"), signal.SIGKILL)
    results = [server.on_loop(job.result()) for job in two]
    assert [result.images[0].timing.batch for result in results] == [1, 1]


def test_a_queue_that_is_full(bundle: Path) -> None:
    with running([f"small={bundle}"], target="openvino", limits=Limits(queue=2)) as server, server.client() as client:
        jobs = [
            server.on_loop(server.service.submit(Wanted("a cat", steps=100, width=32, height=32), "native"))
            for _ in range(2)
        ]
        answer = client.post("/api/images", json=ASKED)
        assert (answer.status_code, "2 images wait, and 2 may: ask again later" in answer.text) == (429, True)
        assert all(len(server.on_loop(job.result()).images) == 1 for job in jobs)


def test_models_take_turns_in_little_memory(bundle: Path) -> None:
    """Two engine sets where there is room for one: the one that was used longest ago is ended for the other."""
    with running([f"small={bundle}"], memory_gb=1.0) as server:
        for name in ("small", "small:onnxruntime", "small"):
            ask(server, model=name)
            assert server.service.loaded() == [name]


def test_what_waits_is_answered_when_the_server_ends(bundle: Path) -> None:
    with running([f"small={bundle}"], target="openvino") as server:

        async def begin() -> list[Any]:
            submit = server.service.submit
            jobs = [await submit(Wanted("a cat", steps=steps, width=32, height=32), "native") for steps in (60, 61, 62)]
            while not jobs[0].step:
                await asyncio.sleep(0.01)
            return jobs

        jobs = server.on_loop(begin())
        waiting = asyncio.run_coroutine_threadsafe(
            asyncio.wait([asyncio.ensure_future(job.result(), loop=server.loop) for job in jobs]), server.loop
        )
        with ThreadPoolExecutor(1) as pool:
            health = pool.submit(lambda: server.client().get("/health"))
            assert health.result().status_code == 200
        server.server.should_exit = True
        until(lambda: all(job.over for job in jobs), "all are over")
        waiting.result(60)
    assert [job.state for job in jobs] == ["done", "failed", "failed"]
    assert "the server is about to end" in str(jobs[1].error)


def test_an_engine_that_was_damaged_meanwhile(bundle: Path, tmp_path: Path) -> None:
    """It is refused with the command that repairs it; the other target goes on."""
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    with running([f"small={copy}"]) as server, server.client() as client:
        (copy / Bundle.open(copy).engine("openvino", "unet").files[0].path).write_bytes(b"damaged")
        answer = client.post("/api/images", json=ASKED)
        assert (answer.status_code, "sdkd build-engine" in answer.json()["detail"]) == (503, True), answer.text
        ask(server, model="small:onnxruntime")


def test_images_are_kept_where_asked(bundle: Path, tmp_path: Path) -> None:
    with running([f"small={bundle}"], target="openvino", output=tmp_path / "kept") as server:
        image = ask(server)["images"][0]
        (file,) = (tmp_path / "kept").iterdir()
        assert file.read_bytes() == base64.b64decode(image["png"])
        shutil.rmtree(tmp_path / "kept")
        (tmp_path / "kept").write_text("a file where the folder was")
        with server.client() as client:
            answer = client.post("/api/images", json=ASKED)
        assert (answer.status_code, "is there already" in answer.json()["detail"]) == (500, True), answer.text


def test_metrics_and_about(server: Running) -> None:
    ask(server)
    with server.client() as client:
        text = client.get("/metrics").text
        about = client.get("/api/about").json()
        paths = client.get("/openapi.json").json()["paths"]
    assert 'sdkd_loaded{model="small"} 1.0' in text
    assert "sdkd_request_seconds_bucket" in text
    model = about["models"][0]
    assert (model["id"], model["target"], model["takes"]) == ("small", "openvino", ["text", "image", "mask"])
    assert model["ranges"] == [{"batch": [1, 1, 2], "height": [32, 32, 64], "width": [32, 32, 64]}]
    assert about["loras"] == ["style"]
    assert {"/api/images", "/v1/images/generations", "/sdapi/v1/txt2img", "/health", "/metrics"} <= set(paths)


def test_a_wish_as_data(server: Running) -> None:
    job = server.on_loop(
        server.service.submit(Wanted("a cat", steps=2, width=32, height=32, loras=(LoraWish("style", 0.5),)), "native")
    )
    assert server.on_loop(job.result()).images[0].caption.settings["loras"] == "style:0.5"
