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

import pytest
from PIL import Image
from planted_report import PROMPTS, planted_report

from sdkd.compare.page import LARGEST_EMBEDDED_PX, html_page

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
    assert len(embedded) == 36
    first = Image.open(io.BytesIO(base64.b64decode(embedded[0].split(",", 1)[1])))
    assert first.tobytes() == report.images["teacher eager"][0].tobytes()


def test_large_images_are_shown_smaller(source: str) -> None:
    large = Page(html_page(planted_report(size=384, models=("teacher",))))
    encoded = str(large.all("img")[0]["src"]).split(",", 1)[1]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (LARGEST_EMBEDDED_PX,) * 2
    galleries = [div["class"] for div in large.all("div") if div.get("id") == "gallery"]
    assert galleries == ["gallery"]  # not enlarged with square pixels
    assert 'class="gallery pixelated"' in source


def test_headings_of_the_table_are_buttons_and_regions_have_names(page: Page) -> None:
    columns = [attributes for attributes in page.all("th") if attributes.get("scope") == "col"]
    buttons = [attributes for attributes in page.all("button") if "data-name" in attributes]
    assert len(columns) == len(buttons) >= 12
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) in {None, *ids}
    assert all(image.get("alt") for image in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"


def test_a_broken_rule_is_said_first_and_notes_are_shown() -> None:
    report = dataclasses.replace(planted_report(wrong="tiny openvino"), notes=("tiny has random weights",))
    text = " ".join("".join(Page(html_page(report)).text).split())
    assert "1 of 12 subjects broke a rule." in text
    assert text.index("broke a rule") < text.index("Time per UNet step")
    assert "tiny has random weights." in text


def test_text_from_outside_is_escaped() -> None:
    report = planted_report(models=("teacher",))
    prompts = ("<script>alert(1)</script>", *PROMPTS[1:])
    hostile = dataclasses.replace(
        report, setup=dataclasses.replace(report.setup, prompts=prompts), command="sdkd 'a\"<b>'"
    )
    source = html_page(hostile)
    assert "<script>alert(1)" not in source
    assert "&lt;script&gt;alert(1)" in source
    assert "<b>'</code>" not in source


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
const labels = () => [...document.querySelectorAll("tbody th")].map((cell) => cell.textContent.trim());
const heading = [...document.querySelectorAll("thead button")].find((button) => button.dataset.name === "UNet step");
heading.click();
found.fastest = labels()[0];
found.sort = heading.parentElement.getAttribute("aria-sort");
heading.click();
found.slowest = labels()[0];
found.turned = heading.parentElement.getAttribute("aria-sort");
found.status = document.getElementById("sort-status").textContent;
const psnr = [...document.querySelectorAll("thead button")].find((button) => button.dataset.name === "To own eager");
psnr.click();
found.last = labels().at(-1);
document.querySelector("#views input[value=eager]").click();
const shot = (key) => document.querySelector(`[data-key="${key}"]`);
const over = shot("tiny-openvino-0").querySelector(".over");
found.difference = over !== null && over.src === shot("tiny-eager-0").querySelector("img").src;
found.caption = shot("tiny-openvino-0").closest("figure").textContent.trim();
found.reference = shot("tiny-eager-0").classList.contains("without");
document.querySelector("#views input[value=image]").click();
found.back = document.querySelectorAll(".over").length;
shot("tiny-openvino-0").click();
found.open = document.getElementById("zoom").open;
found.label = document.getElementById("zoom-label").textContent;
document.getElementById("zoom").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
found.next = document.getElementById("zoom-label").textContent;
document.getElementById("zoom").close();
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const output = document.createElement("pre");
output.id = "probe";
output.textContent = JSON.stringify(found);
document.body.append(output);
</script></body>"""


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
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_works_in_a_browser(source: str, tmp_path: Path, width: int) -> None:
    watched = source.replace("<style>", WATCH + "<style>", 1).replace("</body>", PROBE, 1)
    (tmp_path / "report.html").write_text(watched, encoding="utf-8")
    dom = browse(tmp_path / "report.html", tmp_path, width)
    probe = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert probe is not None, dom[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(probe.group(1)))
    assert found == {
        "problems": [],
        "ready": "true",
        "fastest": "tiny openvino-bf16",
        "sort": "ascending",
        "slowest": "teacher eager",
        "turned": "descending",
        "status": "Sorted by UNet step, descending",
        "last": "tiny eager",  # rows without a value come last
        "difference": True,
        "caption": f"{planted_report().result('tiny openvino').against_eager.per_image[0].psnr_db:.1f} dB",
        "reference": True,
        "back": 0,
        "open": True,
        "label": "tiny openvino",
        "next": "tiny openvino-bf16",
        "wide": 0,  # the page itself does not scroll sideways
    }
