"""The help page of every command: all names whole at any width, in known panels, the usual ones first."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer

from sdkd import cli
from sdkd.core.help_page import ARGUMENTS, OUTPUT, PANELS, USUAL, panels

# What a stranger needs first of each command, in the first panel after the arguments.
NEEDED = {
    "demo": {"--output", "--steps"},
    "student": {"--student"},
    "cache": {"--resolution", "--precision"},
    "distill": {"--teacher", "--data", "--output", "--student", "--recipe", "--steps", "--resume", "--batch-size"},
    "finetune": {"--model", "--data", "--output", "--recipe", "--steps", "--learning-rate", "--save-every"},
    "lora": {"--model", "--data", "--output", "--recipe", "--steps", "--lora-rank"},
    "vae-distill": {"--vae-of", "--data", "--output", "--width", "--blocks", "--steps", "--resume"},
    "remap-lora": {"--student"},
    "plot": {"--output"},
    "evaluate": {"--teacher", "--data", "--prompts", "--images", "--output"},
    "convert": {"--precision", "--spaced"},
    "export": {"--precision", "--components", "--target"},
    "build-engine": {"--target", "--precision", "--size", "--batch", "--output"},
    "inspect": {"--details"},
    "generate": {"--prompts", "--output", "--target", "--steps", "--seed", "--size", "--count"},
    "compare": {"--targets", "--prompts", "--steps", "--size", "--output"},
    "serve": {"--host", "--port", "--target", "--lora-dir", "--output"},
    "doctor": {"--try"},
}
TITLE = re.compile(r"^[╭+][─-] (.+?) [─-]+[╮+]$")


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    return {name: cli.load_command(name) for name in cli.SUMMARIES}


def _page(command: Any, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Title -> lines of each panel of a help page, without borders; what stands before them under ''."""
    with pytest.raises(SystemExit, match=r"^0$"):
        command.main(["--help"], prog_name="sdkd")
    found: dict[str, list[str]] = {"": []}
    for line in capsys.readouterr().out.splitlines():
        if match := TITLE.match(line):
            found[match[1]] = []
        elif line[:1] not in "╰+":
            found[[*found][-1]].append(line.strip("│| "))
    return found


def _names(lines: list[str]) -> set[str]:
    """Options that a panel's lines begin with."""
    starts = (re.match(r"(?:\* )?((?:-\w, )?--[\w-]+)(?= |$)", line) for line in lines)
    return {name for start in starts if start for name in start[1].split(", ")}


def _declared(command: Any) -> set[str]:
    params = command.get_params(command.make_context("sdkd", [], resilient_parsing=True))
    return {name for param in params if param.param_type_name == "option" for name in param.opts + param.secondary_opts}


@pytest.mark.parametrize("width", ["0", "40", "80", "120"])
def test_every_name_is_whole_and_in_a_known_panel(
    width: str, commands: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    for name, command in commands.items():
        page = _page(command, capsys)
        titles = [title for title in page if title]
        assert titles == [title for title in PANELS if title in titles]
        assert _names([line for title in titles for line in page[title]]) == _declared(command)
        assert NEEDED[name] <= _names(page[USUAL])
        assert "…" not in str(page)
        found = panels(command, command.make_context("sdkd", [], resilient_parsing=True))
        assert max(len(params) for params in found.values()) <= 16  # none is a list of everything


def test_required_options_types_and_defaults_are_shown(
    commands: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    whole = _page(commands["distill"], capsys)
    assert [line.split()[1] for line in whole[USUAL] if line.startswith("* ")] == ["--teacher", "--data", "--output"]
    assert any(line.startswith("--steps") and "Optimizer steps. [default: 1000]" in line for line in whole[USUAL])
    page = _page(commands["generate"], capsys)
    assert any("in artifacts/]" in line for line in page[USUAL])  # markup would swallow the brackets
    assert page[ARGUMENTS][0].startswith("* model")
    assert page[OUTPUT][-1].startswith("--help")
    monkeypatch.setenv("TERM", "dumb")
    assert _page(commands["distill"], capsys) == whole
    assert not any("\x1b" in line for lines in whole.values() for line in lines)


def test_the_page_of_the_toolkit_lists_its_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    page = _page(typer.main.get_command(cli.app), capsys)
    assert {line.split()[0] for line in page["Commands"]} >= set(cli.SUMMARIES)
    assert _names(page["Options"]) == {"--debug", "--version", "-h", "--help"}


def test_an_empty_text_is_no_value_but_of_a_prompt(commands: dict[str, Any]) -> None:
    """For every option and argument that takes a text: an empty one is not its default, and no path is `.`."""
    taken = set()
    for name, command in commands.items():
        given = [param for param in command.params if not getattr(param, "is_flag", False)]
        needed = {param.name: [*_words(param), "x"] for param in given if param.required}
        for param in given:
            said, empty = (_refusal(command, needed, param, text) for text in ("x", " "))
            if not said and not empty:
                taken.add(param.name)
            elif not said:
                assert empty == "it is empty: give a value, or leave it out", (name, param.name)
    assert taken == {"prompt", "negative_prompt"}


def _words(param: Any) -> list[str]:
    return [] if param.param_type_name == "argument" else [param.opts[0]]


def _refusal(command: Any, needed: dict[str, list[str]], param: Any, text: str) -> str:
    """What a command line that gives a text to a parameter is refused with; empty when it is taken."""
    words = needed | {param.name: [*_words(param), *[text] * abs(param.nargs)]}
    try:
        command.make_context("sdkd", [word for one in words.values() for word in one])
    except typer.BadParameter as error:
        return str(error.message)
    return ""
