"""Reading .safetensors one tensor at a time gives what the library itself reads, in any dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdkd.errors import ModelError
from sdkd.models import safetensors_file as weights
from sdkd.models.safetensors_file import Weights

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_tensors_are_those_of_the_library(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK", chunk)
    for own in FLOATS:
        state = {"matrix": torch.randn(5, 7), "scalar": torch.tensor(0.5), "empty": torch.zeros(2, 0)}
        save_file({name: value.to(own) for name, value in state.items()}, tmp_path / "x.safetensors", {"who": "me"})
        opened = Weights.open(tmp_path / "x.safetensors")
        assert opened.metadata == {"who": "me"}
        for name, value in load_file(tmp_path / "x.safetensors").items():
            for wanted in (None, torch.float32, torch.float16, torch.bfloat16):
                read = opened.tensors[name].read(wanted)
                assert (read.dtype, read.shape) == (wanted or own, value.shape)
                assert torch.equal(read.float(), value.to(wanted or own).float())


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        value = torch.arange(6).to(dtype)
        save_file({"x": value}, tmp_path / "x.safetensors")
        tensor = Weights.open(tmp_path / "x.safetensors").tensors["x"]
        assert torch.equal(tensor.read(torch.float16), value)
        for span in ((0, 2), (1, 6), (3, 3)):
            assert torch.equal(tensor.rows(*span).read(), value[slice(*span)])


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    tensor = Weights.open(tmp_path / "x.safetensors").tensors["x"]
    with pytest.raises(ModelError, match="holds weights of dtype F4: give it in float32, float16 or bfloat16"):
        tensor.read()


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    """Its length, 640 bytes, is written as the two bytes that a pickle begins with."""
    header = json.dumps({"__metadata__": {"x": ""}}).encode().ljust(0x280)
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert (tmp_path / "x.safetensors").read_bytes().startswith(b"\x80\x02")
    assert Weights.open(tmp_path / "x.safetensors").tensors == {}


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100)}, tmp_path / "x.safetensors")
    tensor = Weights.open(tmp_path / "x.safetensors").tensors["x"]
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"x.safetensors' is cut off; download or save it again"):
        tensor.read()


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be read \(No such file or directory\): check that it is there"):
        Weights.open(tmp_path / "gone.safetensors")
