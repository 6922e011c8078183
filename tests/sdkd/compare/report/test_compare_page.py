"""The HTML page: self-contained, complete, escaped; and, in headless Chromium, working without an error."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from planted_report import PROMPTS, planted_report

from sdkd.compare.report.files import html_page
from sdkd.compare.report.gallery import LARGEST_EMBEDDED_PX, gain_for, kinds, worst_images

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def source() -> str:
    """The planted report's page."""
    return html_page(planted_report())


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    """The same, parsed."""
    return Page(source)


def test_nothing_refers_to_anything_outside(page: Page, source: str) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#"))
    assert "http://" not in source
    assert "https://" not in source
    assert not re.search(r"@import|url\(", source)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'; img-src data:;")


def test_every_subject_has_a_row_and_every_image_is_there(page: Page) -> None:
    report = planted_report()
    rows = [attributes for attributes in page.all("th") if attributes.get("scope") == "row"]
    assert len(rows) == len(report.results) == 12
    shots = [attributes for attributes in page.all("button") if attributes.get("class") == "shot"]
    assert len(shots) == 12 * len(PROMPTS)
    assert {shot["data-prompt"] for shot in shots} == set(PROMPTS)
    tiny = next(shot for shot in shots if shot["data-key"] == "tiny-openvino-1")
    assert (tiny["data-eager"], tiny["data-teacher"]) == ("tiny-eager-1", "teacher-eager-1")
    eager = next(shot for shot in shots if shot["data-key"] == "teacher-eager-0")
    assert (eager["data-eager"], eager["data-teacher"]) == ("", "")


def test_embedded_images_are_the_images(page: Page) -> None:
    report = planted_report()
    embedded = [str(image["src"]) for image in page.all("img")]
    assert len(embedded) == 36 + 2 * 3  # the worst engine image and the worst student image, each with two others
    assert (decoded(embedded[0]) == np.asarray(report.images["teacher eager"][0])).all()


def differences(source: str) -> dict[str, dict[str, str]]:
    found = re.search(r'<script type="application/json" id="differences">(.*?)</script>', source, re.DOTALL)
    assert found is not None
    return dict(json.loads(found.group(1)))


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB"))


def test_differences_are_those_of_the_full_images(source: str) -> None:
    report, found = planted_report(), differences(source)
    own, other = (np.asarray(report.images[label][1], int) for label in ("tiny openvino-bf16", "tiny eager"))
    assert (decoded(found["tiny-openvino-bf16-1"]["eager"]) == abs(own - other)).all()
    assert set(found["tiny-eager-0"]) == {"teacher"}  # its own reference, but a student
    assert "teacher-eager-0" not in found


def test_large_images_are_shown_smaller(source: str) -> None:
    page = html_page(planted_report(size=384, models=("teacher",)))
    found = differences(page)["teacher-openvino-bf16-0"]["eager"]
    assert decoded(found).shape == (192, 192, 3)  # the largest of 2 x 2 pixels
    large = Page(page)
    assert decoded(str(large.all("img")[0]["src"])).shape == (LARGEST_EMBEDDED_PX, LARGEST_EMBEDDED_PX, 3)
    galleries = [div["class"] for div in large.all("div") if div.get("id") == "gallery"]
    assert galleries == ["gallery"]  # not enlarged with square pixels
    assert 'class="gallery pixelated"' in source


def test_the_worst_image_of_each_kind_is_shown() -> None:
    report = planted_report(wrong="small openvino")
    eager, teacher = worst_images(report)
    assert (eager.label, eager.reference, eager.title) == ("small openvino", "small eager", "Furthest from own eager")
    likeness = report.result("small openvino").against_eager
    assert likeness is not None
    assert eager.prompt == PROMPTS[likeness.worst]
    assert eager.figures.startswith(f"{likeness.psnr_min_db:.1f} dB PSNR, SSIM 0.")
    assert teacher.title == "Furthest from the teacher"
    assert [gain_for(levels) for levels in (0, 1, 2, 15, 16, 127, 128, 255)] == [128, 128, 64, 16, 8, 2, 1, 1]
    assert list(kinds(planted_report(models=("teacher",)))) == ["eager"]
    assert [found.title for found in worst_images(planted_report(models=("teacher",)))] == ["Furthest from own eager"]


def test_students_alone_are_held_against_their_teacher() -> None:
    report = planted_report()
    eager = dataclasses.replace(report, results=tuple(row for row in report.results if row.subject.is_eager))
    page = Page(html_page(eager))
    assert [div["data-against"] for div in page.all("div") if div.get("id") == "gallery"] == ["teacher"]
    assert {radio["name"] for radio in page.all("input")} == {"show-gallery", "show-zoom"}
    assert "Below an image: its PSNR against the teacher." in "".join(page.text)
    lone = Page(html_page(dataclasses.replace(report, results=report.results[:1])))
    assert not lone.all("input")  # nothing to switch to


def test_controls_and_regions_have_names(page: Page) -> None:
    radios = [attributes for attributes in page.all("input") if attributes.get("type") == "radio"]
    assert {radio["name"] for radio in radios} == {"show-gallery", "against-gallery", "show-zoom", "against-zoom"}
    labels = [radio["aria-label"] for radio in radios if radio["name"] == "show-zoom"]
    assert labels == ["Image", "Reference", "Difference × 8", "Difference × 64"]
    columns = [attributes for attributes in page.all("th") if attributes.get("scope") == "col"]
    buttons = [attributes for attributes in page.all("button") if "data-name" in attributes]
    assert len(columns) == len(buttons) >= 12
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) in {None, *ids}
    assert all(image.get("alt") for image in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"


def test_what_broke_is_said_first_and_what_is_missing_is_explained_in_escaped_text() -> None:
    report = planted_report(wrong="teacher openvino", models=("teacher",))
    setup = dataclasses.replace(report.setup, prompts=("<script>alert(1)</script>", *PROMPTS[1:]))
    missing = ("LPIPS: it needs the package torchvision",)
    said = {"command": "sdkd 'a\"<b>'", "notes": ("tiny has random weights",), "not_measured": missing}
    source = html_page(dataclasses.replace(report, setup=setup, **said))
    assert "<script>alert(1)" not in source
    assert "&lt;script&gt;alert(1)" in source
    assert "<b>'</code>" not in source
    text = " ".join("".join(Page(source).text).split())
    assert text.index("1 of 4 subjects broke a rule.") < text.index("Time per UNet step")
    for words in (
        "tiny has random weights.",
        "80.0 GFLOP/s, 12.0 GB/s (product of 1024 × 1024 matrices in float32;",
        "Limit. FLOPs of one UNet call: a multiply-add counts as 2;",
        "Not measured. LPIPS: it needs the package torchvision.",
        "Attention, eager PyTorchSDPA, flash attention (CPU)",
        "Scheduler, seedPNDMScheduler, 0",
    ):
        assert words in text


# Reports what the page did, in the page itself, where --dump-dom shows it.
WATCH = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective + " " + event.blockedURI));
console.error = (...words) => problems.push(words.join(" "));
</script>"""
PROBE = """<script>
const found = { problems, ready: document.documentElement.dataset.ready };
const table = document.getElementById("table");
const labels = () => [...table.querySelectorAll("tbody th")].map((cell) => cell.textContent.trim());
const heading = (name) => [...table.querySelectorAll("thead button")].find((button) => button.dataset.name === name);
const step = heading("UNet step, ms");
step.focus();
found.focused = document.activeElement === step;
step.click();
found.fastest = labels()[0];
found.sort = step.parentElement.getAttribute("aria-sort");
step.click();
found.slowest = labels()[0];
found.turned = step.parentElement.getAttribute("aria-sort");
found.status = document.getElementById("sort-status").textContent;
heading("To own eager, dB PSNR").click();
found.last = labels().at(-1);
found.sorted = table.querySelectorAll("[aria-sort]").length;

const shot = (key) => document.querySelector(`[data-key="${key}"]`);
const over = (key) => shot(key).querySelector(".over");
const choose = (name, value) => document.querySelector(`input[name=${name}][value="${value}"]`).click();
const differences = JSON.parse(document.getElementById("differences").textContent);
choose("show-gallery", "reference");
found.reference = over("tiny-openvino-0").src === shot("tiny-eager-0").querySelector("img").src;
choose("show-gallery", "8");
found.difference = over("tiny-openvino-0").src === differences["tiny-openvino-0"].eager;
found.brighter = getComputedStyle(over("tiny-openvino-0")).filter;
found.spoken = over("tiny-openvino-0").alt;
found.caption = shot("tiny-openvino-0").closest("figure").textContent.trim();
found.without = shot("tiny-eager-0").classList.contains("without");
choose("against-gallery", "teacher");
found.teacher = over("tiny-eager-0").src === differences["tiny-eager-0"].teacher;
found.view = document.getElementById("view-status").textContent;
choose("against-gallery", "eager");
choose("show-gallery", "image");
found.back = document.querySelectorAll(".over, .without").length;

const zoom = document.getElementById("zoom");
const press = (key) => zoom.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const enlarged = () => zoom.querySelector(".over");
shot("tiny-openvino-0").click();
found.open = zoom.open;
found.label = document.getElementById("zoom-label").textContent;
press("ArrowRight");
found.next = document.getElementById("zoom-label").textContent;
press("ArrowDown");
found.flipped = enlarged().src === shot("tiny-eager-0").querySelector("img").src;
press("ArrowDown");
press("ArrowDown");
found.amplified = getComputedStyle(enlarged()).filter;
found.same = document.querySelector("input[name=show-gallery]:checked").value;
press("ArrowDown");
found.round = enlarged() === null;
zoom.close();
found.unlabelled = [...document.querySelectorAll("button, input, summary")].filter(
  (control) => !(control.textContent.trim() || control.getAttribute("aria-label") || control.querySelector("img[alt]"))
).length;
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.width = innerWidth;
const output = parent.document.createElement("pre");
output.id = "probe";
output.textContent = JSON.stringify(found);
parent.document.body.append(output);
</script></body>"""
FRAME = '<!doctype html><body style="margin:0"><iframe style="width:{width}px;height:1500px;border:0" srcdoc="{page}">'


def browse(page: Path, folder: Path, width: int) -> str:
    """The page's DOM after its scripts ran, in headless Chromium."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser here: install one of {', '.join(BROWSERS)}")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    where = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1600", page.as_uri()]
    watch = ["--disable-component-update", "--virtual-time-budget=3000", "--dump-dom"]
    command = [browser, *flags.split(), *watch, *where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_works_in_a_browser(source: str, tmp_path: Path, width: int) -> None:
    watched = source.replace("<style>", WATCH + "<style>", 1).replace("</body>", PROBE, 1)
    framed = FRAME.format(width=width, page=html.escape(watched))  # Chromium's own windows are 500 px wide at least
    (tmp_path / "report.html").write_text(framed, encoding="utf-8")
    dom = browse(tmp_path / "report.html", tmp_path, max(width, 500))
    probe = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert probe is not None, dom[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(probe.group(1)))
    likeness = planted_report().result("tiny openvino").against_eager
    assert likeness is not None
    assert found == {
        "problems": [],
        "ready": "true",
        "focused": True,
        "fastest": "tiny openvino-bf16",
        "sort": "ascending",
        "slowest": "teacher eager",
        "turned": "descending",
        "status": "Sorted by UNet step, ms, descending",
        "last": "tiny eager",  # rows without a value come last
        "sorted": 1,
        "reference": True,
        "difference": True,
        "brighter": "brightness(8)",
        "spoken": "Difference of tiny openvino from tiny eager, 8 times as bright",
        "caption": f"{likeness.per_image[0].psnr_db:.1f} dB",
        "without": True,  # eager itself
        "teacher": True,
        "view": "Difference × 8, against the teacher",
        "back": 0,
        "open": True,
        "label": "tiny openvino",
        "next": "tiny openvino-bf16",
        "flipped": True,
        "amplified": "brightness(64)",
        "same": "64",  # one choice for gallery and enlarged image
        "round": True,
        "unlabelled": 0,
        "wide": 0,  # the page itself does not scroll sideways
        "width": width,
    }
