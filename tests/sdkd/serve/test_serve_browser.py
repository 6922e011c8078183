"""The page of `sdkd serve` and the page of its API, in headless Chromium on a real server."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browsing import BEYOND, GROUND, GROUNDS, UNNAMED, WIDTHS, Watched, chromium, generate, paint, uploaded, watching
from serving import PATIENCE_S, Running, until

from sdkd.serve.api.native import ImageRequest
from sdkd.serve.errors import QueueFullError
from sdkd.serve.wanted import Wanted

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

# As PNG: what an element shows, pixel by pixel.
SHOWN = """image => {
    const canvas = Object.assign(document.createElement("canvas"),
        { width: image.naturalWidth, height: image.naturalHeight });
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL("image/png");
}"""
# Keeps every line of the progress, with how wide the preview is then.
RECORD = """() => {
    window.told = [];
    const [text, preview] = ["progress-text", "preview"].map((id) => document.getElementById(id));
    const note = () => told.push([text.textContent, preview.hidden ? 0 : preview.naturalWidth]);
    new MutationObserver(note).observe(text, { childList: true });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, once for all tests."""
    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser: Browser, server: Running) -> Iterator[Watched]:
    """Opens the pages of the server; afterwards nothing unexpected was logged."""
    with watching(browser, server.url, PATIENCE_S) as found:
        yield found


def shown(image: Any) -> bytes:
    """The pixels of an image in the page."""
    return uploaded(image.evaluate(SHOWN)).convert("RGB").tobytes()


def ask(server: Running, wanted: dict[str, Any]) -> dict[str, Any]:
    """The one image that the API itself gives for a request."""
    with server.client() as client:
        answer = client.post("/api/images", json={**wanted, "stream": False})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["images"][0]
    return found


def pixels(image: dict[str, Any]) -> bytes:
    return uploaded(image["png"]).convert("RGB").tobytes()


def sent(page: Page) -> list[dict[str, Any]]:
    """What the page asks the server to draw, from now on."""
    wanted: list[dict[str, Any]] = []
    drawing = "/api/images"
    page.on("request", lambda one: wanted.append(one.post_data_json) if one.url.endswith(drawing) else None)
    return wanted


def start(page: Page, prompt: str, steps: int, count: int = 1) -> None:
    """Begin to draw, and wait for the first step."""
    page.fill("#prompt", prompt)
    page.fill("#steps", str(steps))
    page.fill("#count", str(count))
    page.click("#generate")
    page.wait_for_selector("#progress-text:has-text('Step ')")


@contextmanager
def held(server: Running) -> Iterator[None]:
    """The process that draws with the first model stands still."""
    server.on_loop(server.service.load())
    pid = server.service.process_of("small")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_an_image_is_that_of_the_api(server: Running, visit: Watched, tmp_path: Path) -> None:
    page = visit()
    page.fill("#negative", "a dog")
    page.fill("#steps", "3")
    page.fill("#guidance", "4")
    page.fill("#width", "48")
    card = generate(page, "a cat", 7)
    asked = {"prompt": "a cat", "negative_prompt": "a dog", "steps": 3, "guidance_scale": 4, "seed": 7}
    image = ask(server, asked | {"width": 48, "height": 32})
    assert shown(card.locator("img")) == pixels(image)
    with page.expect_download() as download:
        card.locator(".download").click()
    download.value.save_as(tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes() == base64.b64decode(image["png"])
    assert card.locator(".settings div").all_text_contents() == [
        "seed7", "steps3", "guidance4.0", "size48 × 32", "schedulerDDIM",
    ]  # fmt: skip
    assert re.fullmatch(r"Done in \d+\.\d\d s", page.locator("#status").text_content() or "")
    assert "loads with its first image" not in (page.locator("#model-hint").text_content() or "")


def test_several_images_of_a_random_seed(server: Running, visit: Watched) -> None:
    page = visit()
    wanted = sent(page)
    start(page, "a cat", 2, count=3)
    page.wait_for_selector("#progress", state="hidden")
    assert [one.get("seed") for one in wanted] == [None]
    seeds = [int(card.get_attribute("data-seed") or "") for card in page.locator(".result").all()]
    assert seeds == [seeds[-1] + 2, seeds[-1] + 1, seeds[-1]]  # the newest first
    asked = {"prompt": "a cat", "steps": 2, "width": 32, "height": 32, "seed": seeds[0]}
    assert shown(page.locator(".result img").first) == pixels(ask(server, asked))  # drawn alone, as in the page


def test_progress_and_previews_of_many_steps(visit: Watched) -> None:
    page = visit()
    page.evaluate(RECORD)
    page.fill("#steps", "100")
    generate(page, "a cat", 1)
    pattern = r"Step (\d+) of 100(, about \d+ s left)?"
    steps = [(line, width) for text, width in page.evaluate("told") if (line := re.fullmatch(pattern, text))]
    numbers = [int(line[1]) for line, _ in steps]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 5
    assert any(line[2] for line, _ in steps)
    assert 16 in {width for _, width in steps}  # one pixel for each latent
    assert page.locator("#preview").get_attribute("alt") == f"Preview at step {numbers[-1]} of 100"


def test_a_drawing_is_cancelled_on_the_server(server: Running, visit: Watched) -> None:
    page = visit()
    start(page, "a cat", 150, count=8)
    (job,) = server.service.current()
    page.click("#cancel")
    page.wait_for_selector("#progress", state="hidden")
    assert page.locator("#status").text_content() == "Cancelled"
    assert page.locator("#error").text_content() == ""
    until(lambda: not server.service.current(), "nothing is drawn any more")
    assert (job.state, job.step < job.steps) == ("cancelled", True)
    page.fill("#steps", "2")
    page.fill("#count", "1")
    generate(page, "a dog", 3)  # both go on


def test_a_page_that_is_closed_ends_its_work(server: Running, visit: Watched) -> None:
    page = visit()
    start(page, "a cat", 150, count=8)
    (job,) = server.service.current()
    page.close()
    until(lambda: not server.service.current(), "nothing is drawn any more")
    assert job.state == "cancelled"


def test_waiting_behind_others(server: Running, visit: Watched) -> None:
    page = visit()
    page.fill("#prompt", "a cat")
    page.fill("#steps", "2")
    with held(server):
        jobs = [server.on_loop(server.service.submit(Wanted("a dog", steps=3, n=n), "native")) for n in (2, 3)]
        page.click("#generate")
        page.wait_for_selector("#progress-text:has-text('Waiting: 5 images are drawn before')")
    page.wait_for_selector(".result")
    page.wait_for_selector("#progress", state="hidden")
    assert [len(server.on_loop(job.result()).images) for job in jobs] == [2, 3]
    assert "waited" in (page.locator(".result .timing-note").text_content() or "")


def test_an_image_and_a_painted_mask(server: Running, visit: Watched) -> None:
    page = visit()
    page.fill("#steps", "4")
    first = generate(page, "a cat", 3)
    start_image = shown(first.locator("img"))
    first.locator(".as-input").click()
    page.wait_for_selector("#editor:not([hidden])")
    wanted = sent(page)
    page.fill("#strength", "0.5")
    changed = generate(page, "a dog", 4)
    assert uploaded(wanted[0]["image"]).convert("RGB").tobytes() == start_image
    assert wanted[0]["strength"] == 0.5
    assert shown(changed.locator("img")) == pixels(ask(server, wanted[0]))
    page.check("#mask-on")
    page.fill("#brush-size", "30")
    paint(page)
    masked = generate(page, "a dog", 5)
    mask = uploaded(wanted[1]["mask"]).convert("L")
    assert (mask.size, mask.getpixel((16, 8)), mask.getpixel((16, 28))) == ((32, 32), 255, 0)
    assert shown(masked.locator("img")) == pixels(ask(server, wanted[1]))
    unmasked = {name: value for name, value in wanted[1].items() if name != "mask"}
    assert shown(masked.locator("img")) != pixels(ask(server, unmasked))
    told = masked.locator(".settings div").all_text_contents()
    assert told[-2:] == ["strength0.5", "maskyes"]


def test_targets_are_compared_side_by_side(server: Running, visit: Watched) -> None:
    page = visit()
    page.fill("#prompt", "a cat")
    page.fill("#seed", "11")
    page.click("#compare-tab")
    for side in ("a", "b"):
        page.fill(f"#compare-steps-{side}", "6")
    page.select_option("#compare-rounds", "3")
    page.click("#compare-generate")
    page.wait_for_selector(".comparison[data-seed='11']")
    page.wait_for_selector("#progress", state="hidden")
    figures = page.locator(".comparison figure").all()
    assert [figure.get_attribute("data-model") for figure in figures] == ["small:onnxruntime", "small"]
    assert len(page.locator(".comparison .who strong").all_text_contents()) == 2
    asked = {"prompt": "a cat", "steps": 6, "seed": 11, "width": 32, "height": 32}
    for figure in figures:
        model = figure.get_attribute("data-model")
        assert shown(figure.locator("img")) == pixels(ask(server, asked | {"model": model}))
        assert (figure.locator(".timing-note").text_content() or "").startswith("median of 3, ")
    ratio = page.locator(".comparison .ratio")
    assert float(ratio.get_attribute("data-ratio") or "") >= 1
    assert re.fullmatch(r"\d+(\.\d+)?× (faster|as fast)", ratio.locator("b").text_content() or "")
    assert re.search(r"small · (openvino|onnxruntime)", ratio.locator("strong").text_content() or "")
    assert set(server.service.loaded()) == {"small", "small:onnxruntime"}


def test_a_lora_is_chosen(server: Running, visit: Watched) -> None:
    page = visit()
    page.fill("#steps", "2")
    plain = shown(generate(page, "a cat", 5).locator("img"))
    page.click("#lora-add")
    assert page.locator("#lora-list select option").all_text_contents() == ["style"]
    page.fill("#lora-list input[type=range]", "0.7")
    page.click("#generate")
    page.wait_for_selector(".result >> nth=1")
    page.wait_for_selector("#progress", state="hidden")
    styled = page.locator(".result").first
    assert "LoRAstyle:0.7" in styled.locator(".settings div").all_text_contents()
    asked = {"prompt": "a cat", "steps": 2, "seed": 5, "width": 32, "height": 32}
    assert shown(styled.locator("img")) == pixels(ask(server, asked | {"loras": [{"name": "style", "strength": 0.7}]}))
    assert shown(styled.locator("img")) != plain


def test_settings_of_a_saved_image_are_read(visit: Watched, tmp_path: Path) -> None:
    page = visit()
    page.fill("#steps", "3")
    card = generate(page, "a cat: red, (large)", 21)
    drawn = shown(card.locator("img"))
    with page.expect_download() as download:
        card.locator(".download").click()
    download.value.save_as(tmp_path / "saved.png")
    again = visit()
    again.set_input_files("#image-file", tmp_path / "saved.png")
    again.click("#image-settings")
    again.wait_for_selector("#status:has-text('Settings taken over')", state="attached")
    again.click("#image-remove")
    again.click("#generate")
    again.wait_for_selector(".result[data-seed='21']")
    assert shown(again.locator(".result img")) == drawn


def test_errors_of_the_server_are_said(server: Running, visit: Watched) -> None:
    visit.expected = ["status of 400", "status of 429"]
    page = visit()
    page.fill("#steps", "2")
    page.fill("#prompt", "a cat")
    page.fill("#width", "128")
    page.click("#generate")  # held up by the form
    assert page.locator("#width").evaluate("field => field.validity.rangeOverflow")
    assert page.locator("#error").text_content() == ""
    page.locator("#form").evaluate("form => { form.reportValidity = () => true; }")
    page.click("#generate")
    page.wait_for_selector("#error[role=alert]:has-text(\"outside what model 'small' was built for\")")
    page.click("#defaults")

    async def fill() -> None:
        while True:
            await server.service.submit(Wanted("a dog", steps=150), "native")
            await asyncio.sleep(0.01)  # the first of them are being drawn, and do not wait

    with held(server):
        with pytest.raises(QueueFullError, match="64 may: ask again later"):
            server.on_loop(fill())
        page.click("#generate")
        page.wait_for_selector("#error[role=alert]:has-text('64 images wait, and 64 may: ask again later')")
        for job in server.service.current():
            server.loop.call_soon_threadsafe(server.service.cancel, job.id)
        until(lambda: not server.service.current(), "all are cancelled")
    generate(page, "a cat", 1)
    assert page.locator("#error").text_content() == ""


def test_the_api_is_described(server: Running, visit: Watched) -> None:
    page = visit()
    page.click("header a.link")
    page.wait_for_url(f"{server.url}/docs")
    page.wait_for_selector("html[data-ready]")
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    listed = {one.get_attribute("data-operation") for one in page.locator("details.operation").all()}
    assert listed == {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert {"POST /api/images", "POST /v1/images/generations", "POST /sdapi/v1/txt2img"} <= listed
    assert page.locator("#groups h2").all_text_contents() == ["sdkd", "OpenAI", "A1111"]
    rows = page.locator("[data-operation='POST /api/images'] tbody tr")
    fields = {row.locator(".name code").text_content(): row.locator("td").all_text_contents() for row in rows.all()}
    assert {name for name in fields if "[]" not in (name or "")} == set(ImageRequest.model_fields)
    assert fields["prompt"] == ["text", "required", "What to draw."]
    assert fields["n"] == ["whole number", "1", "Number of images."]
    assert fields["loras"][0] == "list of objects"
    assert fields["loras[].strength"][:2] == ["number", "1"]
    sizes = page.locator("[data-operation='POST /sdapi/v1/img2img'] tbody tr:has-text('init_images') td")
    assert sizes.all_text_contents()[:2] == ["list of texts1 of them", "required"]
    assert page.locator("[data-operation='DELETE /api/images/{request_id}'] .name").all_text_contents() == [
        "request_idin the path"
    ]


def test_an_example_of_the_api_is_copied(server: Running, visit: Watched) -> None:
    page = visit(path="docs")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    operation = page.locator("[data-operation='POST /api/images']")
    example = operation.locator("pre").text_content() or ""
    operation.get_by_role("button", name="Copy the example of POST /api/images").click()
    page.wait_for_selector("#status:has-text('Copied')", state="attached")
    assert page.evaluate("navigator.clipboard.readText()") == example
    assert example.startswith(f"curl {server.url}/api/images \\\n")
    assert """-d '{"prompt": "a lighthouse in a storm"}'""" in example
    taken_back = page.locator("[data-operation='DELETE /api/images/{request_id}'] pre")
    assert taken_back.text_content() == f"curl -X DELETE {server.url}/api/images/REQUEST_ID"
    picture = page.locator("[data-operation='POST /api/png-info'] pre").text_content() or ""
    assert picture.startswith("""printf '{"png": "%s"}' "$(base64 < image.png | tr -d '\\n')" |\ncurl """)


def test_operations_are_opened_by_keyboard_and_by_address(server: Running, visit: Watched) -> None:
    page = visit(path="docs#post-sdapi-v1-txt2img")
    named = page.locator("#post-sdapi-v1-txt2img")
    assert named.evaluate("one => one.open && one.contains(document.activeElement)")
    page.keyboard.press("Enter")
    assert not named.evaluate("one => one.open")
    page.locator("#contents a:has-text('GET /health')").press("Enter")
    page.wait_for_selector("#get-health[open]")
    page.click("#open-all")
    assert page.locator("details:not([open])").count() == 0
    page.get_by_role("button", name="Close all").click()
    assert page.locator("details[open]").count() == 0
    page.click("header a.link")
    page.wait_for_selector("#prompt")
    assert page.url == f"{server.url}/"


SIZE = {"anyOf": [{"type": "integer", "minimum": 8, "maximum": 64}, {"type": "null"}], "default": None}
FORM = {
    "required": ["image", "prompt"],
    "properties": {
        "image": {"type": "string", "format": "binary"},
        "mask": {"anyOf": [{"type": "string", "format": "binary"}, {"type": "null"}]},
        "prompt": {"type": "string", "description": "What to *draw*, <b>as it is</b>, in `words`."},
        "size": SIZE,
        "kind": {"$ref": "#/components/schemas/Kind", "default": "png"},
    },
}
DESCRIBED = {
    "info": {"version": "9"},
    "components": {"schemas": {"Kind": {"enum": ["png", "webp"], "description": "Of the file."}}},
    "paths": {
        "/forms/{name}": {
            "put": {
                "summary": "Send a form.",
                "parameters": [
                    {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}},
                    {"name": "page", "in": "query", "required": True, "schema": {"type": "integer"}},
                ],
                "requestBody": {"content": {"multipart/form-data": {"schema": FORM}}},
            }
        }
    },
}


def test_forms_are_described_with_a_key(server: Running, visit: Watched) -> None:
    """What the server's own description does not have, or not yet."""
    page = visit(path="docs")
    page.route("**/openapi.json", lambda route: route.fulfill(json=DESCRIBED))
    page.evaluate("sessionStorage.setItem('sdkd-api-key', 'secret')")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#groups h2").all_text_contents() == ["Others"]
    assert page.locator(".short").text_content() == "Send a form."
    assert [row.locator("th, td").all_text_contents() for row in page.locator("tbody tr").all()] == [
        ["namein the path", "text", "required", ""],
        ["pagein the query", "whole number", "required", ""],
        ["image", "file", "required", ""],
        ["mask", "file", "optional", ""],
        ["prompt", "text", "required", "What to *draw*, <b>as it is</b>, in words."],
        ["size", "whole number8 to 64", "optional", ""],
        ["kind", '"png" or "webp"', '"png"', "Of the file."],
    ]
    assert (page.locator("pre").text_content() or "").split(" \\\n  ") == [
        f"curl -X PUT '{server.url}/forms/NAME?page=1'",
        "-H 'Authorization: Bearer KEY'",
        "-F image=@image.png",
        "-F 'prompt=a lighthouse in a storm'",
        "-o answer.json",
    ]


def test_a_description_that_cannot_be_read(visit: Watched) -> None:
    visit.expected = ["status of 503"]
    page = visit(path="docs")
    page.route("**/openapi.json", lambda route: route.fulfill(status=503))
    page.reload()
    page.wait_for_selector("#error[role=alert]:has-text('could not be read. The server answered 503.')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_both_pages_fit_and_everything_has_a_name(visit: Watched, width: int, scheme: str) -> None:
    page = visit(width, scheme)
    page.fill("#steps", "2")
    generate(page, "a cat", 5)
    described = visit(width, scheme, path="docs")
    described.click("#open-all")
    for one in (page, described):
        assert (one.evaluate(UNNAMED), max(0, one.evaluate(BEYOND)), one.evaluate(GROUND)) == ([], 0, GROUNDS[scheme])
