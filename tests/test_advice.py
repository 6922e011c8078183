"""Every command that a message advises is one that the command line takes."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from graph_bundles import graph_bundle
from small_bundles import small_pipeline
from typer.testing import CliRunner

from engines.generate.loading import choose_target
from engines.sessions.opening import open_session
from export.build.ranges import Typed, parse_profile
from sdkd.bundle.manifest import Bundle
from sdkd.cli import SUMMARIES, app, load_command
from sdkd.errors import BundleError, InputError, RangeError
from sdkd.students.blocks import student_spec
from sdkd.targets.registry import check_target

ROOT = Path(__file__).parents[1]
SAMPLES = {  # what the placeholders of messages stand for; a folder with a space, as people have
    "self.path": "my bundle",
    "engine['slot']": "openvino-bf16",
    "*wanted": "--size=64",
    "str(self.path)": "my bundle",
    "slot": "openvino-bf16",
    "str(subject.model)": "my model",
    "subject.target": "openvino-bf16",
    "str(subject.bundle)": "my bundle",
    "model": "my model",
    "job.model": "my model",
    "str(root)": "my model",
    "model if model.isprintable() else 'MODEL'": "my model",
    "str(path)": "my folder",
    "path": "my folder",
    "target": "onnxruntime",
    "found['slot']": "onnxruntime",
    "teacher": "my teacher",
    "spec.short": "tiny",
    "str(summary['output'])": "my output",
    "summary['output']": "my output",
    "source.name": "my bundle",
    "served.name": "my-bundle",
    "size": "64x128",
    "served.target": "openvino-bf16",
    "self.name": "my bundle",
    "*models": "my model",
    "*given": "--steps=2",
    "vae_of": "my model",
    "str(output)": "my vae",
    "lora.file": "my lora",
    "output": "my output",
    "*others": "--vae=my vae",
    "eight": "int8",
    "record.target": "openvino",
    "record.precision": "int8",
    "{}": "tiny",  # filled by format: the short name of a student
}
VALUES: dict[str, Callable[[str], Any]] = {  # options that the commands themselves read as text
    "target": check_target,
    "student": student_spec,
    "size": lambda text: Typed((text,)).check(),
    "batch": lambda text: Typed(batch=text).check(),
    "tokens": lambda text: Typed(tokens=text).check(),
    "profile": lambda text: parse_profile(text, Typed()),
}
COMMAND = re.compile(rf"sdkd (?:{'|'.join(map(re.escape, SUMMARIES))})(?![\w-]).*", re.DOTALL)
# Where a command ends in a sentence: before what a shell would not be given.
END = re.compile(r"[`;\n)]|[,.:](?=\s|$)| (?=and |or |with |finds |tries |takes )")
PLACEHOLDER = re.compile("\x00(\\d+)\x00|(\\{\\})")


QUOTE = ast.parse("shlex.quote", mode="eval").body


class Advice(NamedTuple):
    """A command in a message, with the expressions that its placeholders, NUL number NUL, stand for."""

    where: str
    text: str
    fillings: tuple[ast.expr, ...]

    def words(self) -> list[str]:
        """As a shell reads the command with a sample for every placeholder; fails for one without a sample."""
        return shlex.split(PLACEHOLDER.sub(self._sample, self.text))

    def _sample(self, found: re.Match[str]) -> str:
        node = self.fillings[int(found[1])] if found[1] else None
        quoted = isinstance(node, ast.Call) and ast.unparse(node.func) == "shlex.quote"
        inner = node.args[0] if quoted and isinstance(node, ast.Call) else node
        name = "{}" if inner is None else ast.unparse(inner)
        if name not in SAMPLES:
            pytest.fail(f"{self.where}: no sample for {name!r} in {self.text!r}: add one to SAMPLES")
        return shlex.quote(SAMPLES[name]) if quoted else SAMPLES[name]


def _parts(node: ast.AST) -> tuple[list[ast.expr], bool] | None:
    """What a message is put together of, and whether each of it is quoted; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return node.values, False
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "shlex.join" and isinstance(node.args[0], ast.List):
        return node.args[0].elts, True
    return None


def template(node: ast.AST) -> tuple[str, tuple[ast.expr, ...]] | None:
    """The text of a message with numbered placeholders; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value, ()
    if (found := _parts(node)) is None:
        return None
    text, fillings, quoted = [], list[ast.expr](), found[1]
    for part in found[0]:
        if isinstance(part, ast.Constant):
            text.append(shlex.quote(str(part.value)) if quoted else str(part.value))
            continue
        value = part.value if isinstance(part, ast.FormattedValue) else part
        inner = template(value) if isinstance(value, ast.Call) else None
        if inner is not None:  # a shlex.join inside a message is found by itself
            text.append("<command>")
            continue
        text.append(f"\x00{len(fillings)}\x00")
        fillings.append(ast.Call(QUOTE, [value], []) if quoted else value)
    return (" " if quoted else "").join(text), tuple(fillings)


def docstrings(tree: ast.AST) -> set[int]:
    """Identities of the string expressions that only document."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def advices(file: Path) -> Iterator[Advice]:
    """The commands in a module's messages."""
    tree = ast.parse(file.read_text())
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr) or id(node) in skipped or (found := template(node)) is None:
            continue
        if _parts(node) is not None:
            skipped.update(id(child) for child in ast.walk(node) if isinstance(child, ast.Constant))
        text, fillings = found
        for start in re.finditer(r"\bsdkd (?=[a-z])", text):
            if command := COMMAND.match(text, start.start()):
                yield Advice(f"{file.relative_to(ROOT)}:{node.lineno}", END.split(command[0])[0].strip(), fillings)


FILES = [file for part in ("sdkd", "export", "engines") for file in sorted((ROOT / part).rglob("*.py"))]
ADVICES = [one for file in FILES for one in advices(file)]


def check(words: list[str], where: str = "") -> None:
    """Fail unless the command line takes the words; a command named without words of its own is a mention."""
    _, name, *rest = words
    command = load_command(name)
    if not [word for word in rest if not word.startswith("--")]:
        known = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
        assert set(rest) <= known, f"{where}: {shlex.join(words)}"
        return
    try:
        given = command.make_context(name, list(rest)).params
    except Exception as error:  # noqa: BLE001 - of whatever kind, the command was not taken
        pytest.fail(f"{where}: {shlex.join(words)}: {getattr(error, 'message', error)!s}")
    for option, read in VALUES.items():
        typed = given.get(option)
        for value in typed if isinstance(typed, list | tuple) else [typed]:
            if isinstance(value, str) and not value.isupper():  # capitals are for the reader to fill in
                read(value)


def test_the_walk_finds_the_advice_of_each_package() -> None:
    commands = {one.text.split()[1] for one in ADVICES}
    assert {"build-engine", "export", "generate", "distill", "cache", "remap-lora", "student", "doctor"} <= commands
    assert {one.where.split("/")[0] for one in ADVICES} == {"sdkd", "export", "engines"}


@pytest.mark.parametrize("advice", ADVICES, ids=lambda one: f"{one.where} {one.text.split()[1]}")
def test_an_advised_command_is_one_that_the_command_line_takes(advice: Advice) -> None:
    check(advice.words(), advice.where)


PATH_OPTION = re.compile(r"--(?:init|resume|output|data|teacher|model|lora|prompts|bundle) $")


def test_a_path_behind_an_advised_option_is_quoted() -> None:
    """As shlex.quote does it, or shown as what was given (!r)."""
    bare = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for before, part in itertools.pairwise(parts):
                if isinstance(before, ast.Constant) and PATH_OPTION.search(str(before.value)):
                    shown = ast.unparse(part)
                    if "!r" not in shown and "shlex.quote" not in shown:
                        bare.append(f"{file.relative_to(ROOT)}:{node.lineno} {shown}")
    assert bare == []


def run(words: list[str]) -> Any:
    """The result of a command as it is typed, in this process."""
    return CliRunner().invoke(app, words[1:])


def advised(message: object) -> list[str]:
    """The command at the end of a message, checked."""
    text = str(message)
    words = shlex.split(text[text.rindex("sdkd ") :])
    check(words)
    return words


def test_the_advice_of_a_bundle_mends_it_when_it_is_followed(tmp_path: Path) -> None:
    """A missing engine, a request outside its ranges, a stale engine: each message's command, run as it stands."""
    folder = graph_bundle(tmp_path / "my bundle", "fp32", ("unet", "vae_decoder", "text_encoder")).path
    with pytest.raises(BundleError, match="has no onnxruntime engine for unet") as missing:
        Bundle.open(folder).engine("onnxruntime", "unet")
    result = run(advised(missing.value))
    assert result.exit_code == 0, result.output
    feeds = {
        "sample": torch.zeros(2, 4, 50, 38),
        "timestep": torch.tensor(1.0),
        "encoder_hidden_states": torch.zeros(2, 50, 32),
    }
    with (
        open_session(Bundle.open(folder), "onnxruntime", "unet") as session,
        pytest.raises(RangeError, match="height 100 px, width 76 px, tokens 50") as outside,
    ):
        session.run(feeds)
    result = run(advised(outside.value))
    assert result.exit_code == 0, result.output
    with open_session(Bundle.open(folder), "onnxruntime", "unet") as session:
        assert session.run(feeds)["out_sample"].shape == (2, 4, 50, 38)

    bundle = Bundle.open(folder)
    record = bundle.engine("onnxruntime", "unet")
    old = {**record.environment, "onnxruntime": "1.0"}
    replace(bundle, manifest=bundle.manifest.with_engine(replace(record, environment=old))).save()
    result = run(["sdkd", "inspect", str(folder)])
    assert result.exit_code == 1
    assert run(advised(result.stderr)).exit_code == 0
    assert run(["sdkd", "inspect", str(folder)]).exit_code == 0
    assert Bundle.open(folder).engine("onnxruntime", "unet").profiles == record.profiles  # not the default shapes


def test_the_advice_of_a_target_without_a_bundle(tmp_path: Path) -> None:
    model = tmp_path / "my model"
    small_pipeline().save_pretrained(model)
    with pytest.raises(InputError, match="is not a bundle, so it has no onnxruntime engine") as caught:
        choose_target(str(model), "onnxruntime")
    assert advised(caught.value)[2] == str(model)
    with pytest.raises(BundleError, match="is not a bundle") as opened:
        Bundle.open(model)
    check(shlex.split(re.findall("sdkd export .*(?=, and)", str(opened.value))[0]))
