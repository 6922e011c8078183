"""The page of `sdkd serve`, in headless Chromium against a stand-in of the server."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import BEYOND, GROUND, GROUNDS, UNNAMED, WIDTHS, Watched, chromium, generate, paint, uploaded, watching
from page_server import PAGE, RANDOM_SEED, Stand, picture, standing
from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, once for all tests."""
    with chromium() as found:
        yield found


@pytest.fixture
def stand() -> Iterator[Stand]:
    """The stand-in of the server."""
    with standing() as found:
        yield found


@pytest.fixture
def visit(browser: Browser, stand: Stand) -> Iterator[Watched]:
    """Opens the page; afterwards nothing unexpected was logged."""
    with watching(browser, stand.url) as found:
        yield found


def test_the_page_is_self_contained() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    for name in ("index.html", "docs.html"):
        assert not re.search(r"\sstyle=|<style|\son[a-z]+=|<script(?![^>]*src=)", texts[name]), name
    waiting, scripts = ["app.js", "docs.js"], set()
    while waiting:
        scripts.add(name := waiting.pop())
        waiting += [found for found in re.findall(r'from "\./(\S+)"', texts[name]) if found not in scripts]
    assert scripts == {name for name in texts if name.endswith(".js")}
    for name, text in texts.items():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text), name
        assert len(text.splitlines()) < 350, name


@pytest.mark.browser
def test_an_image_is_drawn_as_typed(stand: Stand, visit: Watched) -> None:
    page = visit()
    page.fill("#prompt", "a red ball")
    page.fill("#negative", "text")
    page.select_option("#model", "tiny:eager")
    page.fill("#steps", "12")
    page.fill("#guidance", "5.5")
    page.select_option("#scheduler", "euler")
    page.fill("#width", "96")
    page.fill("#height", "128")
    page.fill("#seed", "7")
    page.fill("#count", "2")
    stand.pause_at = 3
    page.click("#generate")
    page.wait_for_selector("#progress-text:has-text('Step 3 of 12, about 5 s left')")
    assert page.locator("#progress-title").text_content() == "Drawing 2 images with tiny · eager"
    assert page.locator("#preview").evaluate("image => image.naturalWidth") == 8
    assert page.locator("#preview").evaluate("image => getComputedStyle(image).imageRendering") == "auto"
    stand.pause_at = None
    page.wait_for_selector("#progress", state="hidden")
    assert page.locator("#status").text_content() == "Done in 4.00 s"
    assert stand.wanted == [
        {
            "prompt": "a red ball",
            "negative_prompt": "text",
            "model": "tiny:eager",
            "width": 96,
            "height": 128,
            "steps": 12,
            "guidance_scale": 5.5,
            "scheduler": "euler",
            "seed": 7,
            "n": 2,
            "stream": True,
        }
    ]
    cards = page.locator(".result")
    assert [card.get_attribute("data-seed") for card in cards.all()] == ["8", "7"]  # newest first
    image = cards.first.locator("img")
    assert image.get_attribute("alt") == "a red ball"
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [96, 128]
    assert cards.first.locator(".settings div").all_text_contents() == [
        "seed8", "steps12", "guidance5.5", "size96 × 128", "schedulereuler",
    ]  # fmt: skip
    assert cards.first.locator(".timing-total").text_content() == "4.00 s"
    assert cards.first.locator(".timing-numbers div").all_text_contents() == [
        "text0.20 s", "steps3.40 s", "decode0.40 s",
    ]  # fmt: skip
    bars = cards.first.locator(".timing-bar i").evaluate_all("bars => bars.map(bar => bar.style.width)")
    assert bars == ["5%", "85%", "10%"]
    assert cards.first.locator(".timing-note").text_content() == "2 images drawn in the same call, waited 0.20 s before"


@pytest.mark.browser
def test_a_random_seed_is_drawn_by_the_server_and_can_be_fixed(stand: Stand, visit: Watched) -> None:
    page = visit()
    assert page.locator("#seed-last").is_disabled()
    page.fill("#prompt", "a ball")
    page.locator("#prompt").press("Control+Enter")
    page.wait_for_selector(f".result[data-seed='{RANDOM_SEED}']")
    page.wait_for_selector("#progress", state="hidden")
    assert "seed" not in stand.wanted[0]
    page.click("#seed-last")
    page.locator("#steps").press("Control+Enter")
    page.wait_for_selector(".result >> nth=1")
    page.wait_for_selector("#progress", state="hidden")
    assert stand.wanted[1]["seed"] == RANDOM_SEED
    page.click("#seed-random")
    assert page.input_value("#seed") == ""


@pytest.mark.browser
@pytest.mark.parametrize("way", ["Escape", "button"])
def test_a_drawing_is_cancelled(stand: Stand, visit: Watched, way: str) -> None:
    page = visit()
    assert page.locator("#cancel").is_disabled()
    page.fill("#prompt", "a ball")
    stand.pause_at = 3
    page.click("#generate")
    page.wait_for_selector("#progress-text:has-text('Step 3')")
    assert page.evaluate("document.activeElement.id") == "cancel"  # not lost with the button that was switched off
    assert page.locator("#generate").is_disabled()
    if way == "Escape":
        page.keyboard.press("Escape")
    else:
        page.click("#cancel")
    page.wait_for_selector("#progress", state="hidden")
    assert stand.deleted == ["job-1"]
    assert page.locator("#status").text_content() == "Cancelled"
    assert page.locator("#error").text_content() == ""
    assert page.locator(".result").count() == 0
    stand.pause_at = None
    generate(page, "a ball", 1)  # the page goes on
    assert len(stand.wanted) == 2


@pytest.mark.browser
def test_values_follow_the_model_unless_typed(stand: Stand, visit: Watched) -> None:
    page = visit()
    assert page.locator("#model optgroup").evaluate_all("all => all.map(one => one.label)") == ["tiny"]
    fields = ("#steps", "#guidance", "#width", "#height")
    assert [page.input_value(field) for field in fields] == ["25", "7.5", "64", "64"]
    assert page.locator("#width").evaluate("field => field.readOnly")  # built for one size
    assert page.locator("#presets").is_hidden()
    page.select_option("#model", "quick:onnxruntime")
    assert [page.input_value(field) for field in fields] == ["4", "1", "64", "64"]
    assert page.locator("#height").evaluate("field => [field.min, field.max, field.step]") == ["32", "128", "8"]
    assert page.locator("#size-hint").text_content() == "64–128 × 32–128 px, in steps of 8."
    page.fill("#height", "136")
    page.fill("#prompt", "a ball")
    page.click("#generate")
    assert page.locator("#height").evaluate("field => field.validity.rangeOverflow")
    assert stand.wanted == []
    page.select_option("#presets", "128x64")
    assert [page.input_value(field) for field in fields] == ["4", "1", "128", "64"]
    page.click("#swap")
    page.fill("#steps", "6")
    page.select_option("#model", "tiny:eager")
    assert [page.input_value(field) for field in fields] == ["6", "7.5", "64", "128"]
    page.select_option("#model", "tiny")
    assert [page.input_value(field) for field in fields] == ["6", "7.5", "64", "64"]
    page.click("#defaults")
    assert page.input_value("#steps") == "25"


@pytest.mark.browser
def test_a_painted_mask_is_sent(stand: Stand, visit: Watched) -> None:
    page = visit()
    generate(page, "a ball", 3).locator(".as-input").click()
    page.wait_for_selector("#editor:not([hidden])")
    assert page.input_value("#strength") == "0.75"
    page.check("#mask-on")
    assert page.input_value("#strength") == "1"
    page.click("#generate")
    assert page.locator("#error").text_content() == "Paint the area that is to be drawn again, or switch the mask off."
    page.fill("#brush-size", "25")
    canvas = page.locator("#mask-canvas")
    paint(page)
    page.locator("#strength").fill("0.8")
    page.click("#generate")
    page.wait_for_selector(".result >> nth=1")
    page.wait_for_selector("#progress", state="hidden")
    sent = stand.wanted[1]
    assert sent["strength"] == 0.8
    assert uploaded(sent["image"]).convert("RGB").tobytes() == decoded_picture(3).tobytes()
    mask = uploaded(sent["mask"])
    assert (mask.format, mask.size) == ("PNG", (64, 64))
    shades = {place: mask.convert("L").getpixel(place) for place in ((16, 16), (32, 16), (48, 16), (32, 40), (2, 2))}
    assert shades == {(16, 16): 255, (32, 16): 255, (48, 16): 255, (32, 40): 0, (2, 2): 0}
    # Without a pointer: inverted, then cleared, undone; the eraser takes away.
    page.focus("#mask-invert")
    page.keyboard.press("Enter")
    assert sent_mask(page, stand).getpixel((32, 16)) == 0
    assert sent_mask(page, stand).getpixel((32, 40)) == 255
    page.click("#mask-clear")
    page.click("#mask-undo")
    page.check("#eraser", force=True)
    canvas.evaluate("canvas => canvas.scrollIntoView({ block: 'center' })")
    canvas.click()
    assert sent_mask(page, stand).getpixel((32, 32)) == 0
    assert sent_mask(page, stand).getpixel((32, 60)) == 255
    page.click("#image-remove")
    generate(page, "a ball", 9)
    assert not {"image", "mask", "strength"} & set(stand.wanted[-1])


def decoded_picture(seed: int) -> Image.Image:
    return Image.open(io.BytesIO(picture(seed, 64, 64))).convert("RGB")


def sent_mask(page: Page, stand: Stand) -> Image.Image:
    """The mask of the next request."""
    before = len(stand.wanted)
    page.click("#generate")
    page.wait_for_selector("#progress", state="hidden")
    assert len(stand.wanted) == before + 1
    return uploaded(stand.wanted[-1]["mask"]).convert("L")


@pytest.mark.browser
def test_a_file_is_cropped_to_the_size_and_restored_with_its_settings(
    stand: Stand, visit: Watched, tmp_path: Path
) -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    wide.save(tmp_path / "wide.jpg", quality=95)
    (tmp_path / "broken.png").write_bytes(b"no image")
    page = visit()
    page.set_input_files("#image-file", tmp_path / "broken.png")
    page.wait_for_selector("#error:has-text('broken.png is not an image that this browser can read.')")
    page.set_input_files("#image-file", tmp_path / "wide.jpg")
    page.wait_for_selector("#editor:not([hidden])")
    page.fill("#strength", "0.3")
    card = generate(page, "a blue wall", 5)
    sent = uploaded(stand.wanted[0]["image"]).convert("RGB")
    assert (sent.size, stand.wanted[0]["strength"]) == ((64, 64), 0.3)
    red, _, blue = sent.getpixel((32, 32))
    assert blue > 240
    assert red < 15
    page.click("#image-remove")
    page.select_option("#model", "quick:onnxruntime")
    assert page.locator("#input-hint").text_content() == "This model takes no input image: text only."
    assert page.locator("#drop").is_hidden()
    card.locator(".reuse").click()
    page.wait_for_selector("#editor:not([hidden])")
    assert page.input_value("#model") == "tiny"
    page.click("#generate")
    page.wait_for_selector(".result >> nth=1")
    page.wait_for_selector("#progress", state="hidden")
    again = stand.wanted[1]
    assert uploaded(again["image"]).convert("RGB").tobytes() == sent.tobytes()
    assert {**again, "image": 0} == {**stand.wanted[0], "image": 0}


@pytest.mark.browser
def test_settings_are_read_from_a_file(stand: Stand, visit: Watched, tmp_path: Path) -> None:
    told = {"prompt": "an old ball", "negative_prompt": "text", "seed": "99", "steps": "11", "guidance_scale": "3.5"}
    told |= {"size": "80x72", "scheduler": "PNDMScheduler", "model": "tiny", "target": "eager", "loras": "ink:0.25"}
    written = PngInfo()
    for name, value in told.items():
        written.add_text(name, value)
    Image.new("RGB", (72, 80), "red").save(tmp_path / "old.png", pnginfo=written)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "plain.png")
    page = visit()
    page.set_input_files("#image-file", tmp_path / "plain.png")
    page.click("#image-settings")
    page.wait_for_selector("#error:has-text('There are no settings in this file.')")
    page.click("#image-remove")
    page.set_input_files("#image-file", tmp_path / "old.png")
    page.click("#image-settings")
    page.wait_for_selector("#status:has-text('Settings taken over')", state="attached")
    page.click("#image-remove")
    page.click("#generate")
    page.wait_for_selector(".result[data-seed='99']")
    expected = {"prompt": "an old ball", "negative_prompt": "text", "model": "tiny:eager", "width": 72, "height": 80}
    expected |= {"steps": 11, "guidance_scale": 3.5, "scheduler": "PNDMScheduler", "seed": 99, "n": 1, "stream": True}
    assert stand.wanted == [{**expected, "loras": [{"name": "ink", "strength": 0.25}]}]


@pytest.mark.browser
def test_settings_are_used_again(stand: Stand, visit: Watched) -> None:
    page = visit()
    page.fill("#negative", "text")
    page.fill("#count", "3")
    page.fill("#steps", "9")
    page.click("#lora-add")
    page.click("#lora-add")
    assert page.locator("#lora-add").is_hidden()  # there are two
    page.fill(".lora >> nth=1 >> input", "0.5")
    generate(page, "first", 30)
    assert stand.wanted[0]["loras"] == [{"name": "chalk", "strength": 1}, {"name": "ink", "strength": 0.5}]
    page.fill("#negative", "")
    page.click(".lora .icon >> nth=0")
    page.click(".lora .icon >> nth=0")
    page.select_option("#model", "quick:onnxruntime")
    page.fill("#count", "1")
    generate(page, "second", 1)
    assert "loras" not in stand.wanted[1]
    page.locator(".result[data-seed='32'] .reuse").click()
    page.click("#generate")
    page.wait_for_selector(".result >> nth=4")
    page.wait_for_selector("#progress", state="hidden")
    assert stand.wanted[2] == {**stand.wanted[0], "seed": 32, "n": 1}


@pytest.mark.browser
def test_images_are_saved_enlarged_and_removed(stand: Stand, visit: Watched, tmp_path: Path) -> None:
    page = visit()
    page.select_option("#model", "tiny:eager")
    card = generate(page, "a ball", 12)
    with page.expect_download() as download:
        card.locator(".download").click()
    assert download.value.suggested_filename == "tiny-eager-seed-12.png"
    download.value.save_as(tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes() == picture(12, 64, 64)
    card.locator(".shot").click()
    assert page.locator("#zoom-image").get_attribute("alt") == "a ball"
    assert page.locator("#zoom-text").text_content() == "a ball (tiny · eager, seed 12)"
    page.keyboard.press("Escape")
    assert page.locator("#zoom").is_hidden()
    generate(page, "another", 13)
    page.click(".result[data-seed='13'] .remove")
    assert page.locator(".result").count() == 1
    page.click("#clear-results")
    assert page.locator("#results-empty").is_visible()


@pytest.mark.browser
def test_two_targets_are_compared_at_one_seed(stand: Stand, visit: Watched) -> None:
    page = visit()
    page.click("#compare-tab")
    assert page.locator("#generate").is_hidden()
    assert [page.input_value(f"#compare-model-{side}") for side in "ab"] == ["tiny:eager", "tiny"]
    assert page.locator("#width").evaluate("field => [field.value, field.readOnly]") == ["64", True]  # what both draw
    page.fill("#prompt", "a ball")
    page.select_option("#compare-model-b", "quick:onnxruntime")
    assert [page.input_value(f"#compare-{name}-b") for name in ("steps", "guidance")] == ["4", "1"]
    page.click("#compare-generate")
    page.wait_for_selector(".comparison")
    page.wait_for_selector("#progress", state="hidden")
    assert [(each["model"], each["steps"]) for each in stand.wanted] == [
        ("tiny:eager", 2),  # short drawings to warm up
        ("quick:onnxruntime", 2),
        ("tiny:eager", 25),
        ("quick:onnxruntime", 4),
    ]
    assert len({each["seed"] for each in stand.wanted}) == 1
    assert [each["n"] for each in stand.wanted] == [1, 1, 1, 1]
    assert page.locator(".ratio b").text_content() == "4.0× faster"
    assert page.locator(".ratio strong").text_content() == "quick · onnxruntime is faster than tiny · eager"
    assert page.locator(".ratio").get_attribute("data-ratio") == "4.000"
    figures = page.locator(".comparison figure")
    assert figures.count() == 2
    boxes = [figure.bounding_box() for figure in figures.all()]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]  # beside one another
    assert figures.locator(".timing-total").all_text_contents() == ["4.00 s", "1.00 s"]
    widths = (
        figures.nth(1).locator(".timing-bar i").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
    )
    assert widths == pytest.approx([1.25, 21.25, 2.5])  # of the slower one's time
    page.click(".over-one-another")
    assert page.locator("#overlay p span").all_text_contents() == ["tiny · eager", "quick · onnxruntime"]
    assert page.locator("#overlay-b").evaluate("image => image.style.clipPath") == "inset(0px 0px 0px 50%)"
    page.keyboard.press("ArrowRight")
    assert page.locator("#overlay-b").evaluate("image => image.style.clipPath") == "inset(0px 0px 0px 51%)"
    page.click("#overlay-close", force=True)
    seed = stand.wanted[0]["seed"]
    page.click(".comparison .reuse")
    assert page.input_value("#seed") == str(seed)


@pytest.mark.browser
def test_a_comparison_is_repeated_and_says_when_it_says_little(stand: Stand, visit: Watched) -> None:
    page = visit(390)
    page.click("#compare-tab")
    page.fill("#prompt", "a ball")
    page.fill("#seed", "77")
    page.uncheck("#compare-warm")
    page.select_option("#compare-rounds", "3")
    page.select_option("#compare-model-a", "tiny")
    stand.batch = 2
    page.locator("#prompt").press("Control+Enter")
    page.wait_for_selector(".comparison[data-seed='77']")
    page.wait_for_selector("#progress", state="hidden")
    assert [(each["model"], each["seed"]) for each in stand.wanted] == [("tiny", 77)] * 6
    assert page.locator(".ratio b").text_content() == "1.0× as fast"
    assert page.locator(".ratio strong").text_content() == (
        "tiny · openvino (left) and tiny · openvino (right) are equally fast"
    )
    assert page.locator(".warning").text_content() == (
        "Images of others were drawn in the same call: these times say little. Draw again."
    )
    assert page.locator(".comparison figure .timing-note").last.text_content() == "median of 3, 2.00 s to 2.00 s"
    page.click("#generate-tab")
    assert page.locator("#compare-panel").is_hidden()


@pytest.mark.browser
def test_models_without_a_common_size_are_not_compared(stand: Stand, visit: Watched) -> None:
    stand.about["models"][2]["ranges"][0] |= {"width": [128, 128, 128]}
    page = visit()
    page.click("#compare-tab")
    page.select_option("#compare-model-a", "quick:onnxruntime")
    assert page.locator("#size-hint").text_content() == "There is no size that both models draw."
    assert page.locator("#compare-generate").is_disabled()
    page.select_option("#compare-model-b", "tiny:eager")
    assert page.locator("#compare-generate").is_enabled()
    assert [page.input_value("#width"), page.input_value("#height")] == ["128", "64"]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("prompt", "status", "message"),
    [
        ("refuse", 400, "steps is 999: give 1 to 150"),
        ("full", 429, "the queue is full: 64 jobs wait"),
        ("break", 0, "the engine ran out of memory"),
    ],
)
def test_errors_are_said(stand: Stand, visit: Watched, prompt: str, status: int, message: str) -> None:
    visit.expected = [f"status of {status}"]
    page = visit()
    page.fill("#prompt", prompt)
    page.click("#generate")
    page.wait_for_selector(f"#error[role=alert]:has-text('{message}')")
    assert page.locator("#progress").is_hidden()
    generate(page, "a ball", 1)
    assert page.locator("#error").text_content() == ""


@pytest.mark.browser
def test_an_api_key_is_asked_for_and_kept(stand: Stand, visit: Watched) -> None:
    stand.key = "open sesame"
    visit.expected = ["status of 401"]
    page = visit(ready=False)
    page.fill("#key", "wrong")
    page.click("#key-submit")
    page.wait_for_selector("#key-text:has-text('The server did not accept that key.')")
    page.click("#key-cancel")
    page.wait_for_selector("#error:has-text('an API key is needed Press Generate to try again.')")
    page.click("#generate")
    page.fill("#key", "open sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("html[data-ready]")
    generate(page, "a ball", 1)
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#key-dialog").is_hidden()
    assert page.locator("#error").text_content() == ""


@pytest.mark.browser
def test_what_a_model_does_not_read_is_not_sent(stand: Stand, visit: Watched) -> None:
    stand.about["models"][1] |= {"negative_prompt": False, "scheduler": "lcm"}
    page = visit()
    page.fill("#negative", "text")
    page.select_option("#model", "tiny:eager")
    assert page.locator("#negative").is_disabled()
    assert page.locator("#negative-hint").is_visible()
    assert page.locator("#scheduler option").first.text_content() == "Own: lcm"
    stand.notes = ["the last 3 words of the prompt were not read"]
    card = generate(page, "a ball", 1)
    assert not {"negative_prompt", "scheduler"} & set(stand.wanted[0])
    assert card.locator(".notes").text_content() == stand.notes[0]
    page.select_option("#model", "tiny")
    generate(page, "a ball", 2)
    assert stand.wanted[1]["negative_prompt"] == "text"


@pytest.mark.browser
def test_waiting_is_said(stand: Stand, visit: Watched) -> None:
    page = visit()
    stand.pause_at, stand.position = 0, 3
    page.fill("#prompt", "a ball")
    page.click("#generate")
    page.wait_for_selector("#progress-text:has-text('Waiting: 3 images are drawn before')")
    page.click("#cancel")
    page.wait_for_selector("#progress", state="hidden")


@pytest.mark.browser
def test_loras_are_hidden_where_there_are_none(stand: Stand, visit: Watched) -> None:
    stand.about["loras"] = []
    assert visit().locator("#loras").is_hidden()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_and_everything_has_a_name(stand: Stand, visit: Watched, width: int, scheme: str) -> None:
    page = visit(width, scheme)
    states = []

    def look(name: str) -> None:
        states.append((name, page.evaluate(UNNAMED), page.evaluate(BEYOND)))

    look("empty")
    long = "an_unusually_long_word_" * 12
    generate(page, f"{long} a ball", 5).locator(".as-input").click()
    page.wait_for_selector("#editor:not([hidden])")
    page.check("#mask-on")
    page.click("#lora-add")
    look("with an image")
    page.click("#image-remove")
    page.click("#compare-tab")
    look("side by side")
    page.click("#compare-generate")
    page.wait_for_selector(".comparison")
    page.wait_for_selector("#progress", state="hidden")
    look("compared")
    page.locator(".comparison .shot").first.click()
    look("enlarged")
    assert [(name, unnamed, beyond) for name, unnamed, beyond in states if unnamed or beyond > 0] == []
    assert page.evaluate(GROUND) == GROUNDS[scheme]
