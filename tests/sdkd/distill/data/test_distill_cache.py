"""Latents on disk: equal to the online encoders bit for bit, gone on with after a kill, refused when damaged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_pipeline
from PIL import Image
from processes import Dropping
from safetensors.torch import save
from training_runs import job, trained

from sdkd.distill.data.buckets import fit_pixels
from sdkd.distill.data.cache import write_cache
from sdkd.distill.data.disk_cache import INDEX, SCHEMA, DiskCache
from sdkd.distill.data.encode import STATES, TextParts, encode_captions, encode_image, placed
from sdkd.distill.data.latents import Latents
from sdkd.distill.data.opening import open_images_or_cache
from sdkd.distill.training.run import run
from sdkd.errors import InputError, ModelError, OutputExistsError, TrainingError


class Noise:
    """Images of noise by index; those in `bad` cannot be read, and after `reads` of them comes a Ctrl-C, which is
    `lost` in a `__del__`, or raised.
    """

    def __init__(self, count: int = 7, bad: tuple[int, ...] = (), reads: int = 10**9, lost: bool = False) -> None:
        self.count, self.bad, self.reads, self.lost = count, bad, reads, lost

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.bad:
            raise InputError(f"image {index} cannot be read")
        self.reads -= 1
        if self.reads < 0 and not self.lost:
            raise KeyboardInterrupt("here")
        if self.reads == -1:
            thing = Dropping()
            del thing
        data = torch.randint(0, 256, (80, 64, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return {"image": Image.fromarray(data.numpy()), "caption": ["a", "b", "", "a"][index % 4]}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


def write(pipe: Any, images: Noise, out: Path, **changes: Any) -> Any:
    return write_cache(pipe, images, out, **({"size": 64, "precision": "fp32", "shard_images": 3} | changes))


def states(cache: DiskCache, index: int) -> torch.Tensor:
    """The text of a row, which is all that a cache of Stable Diffusion holds."""
    found = cache.text(index)
    assert found is not None
    (value,) = found.values()
    return value


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cache_equals_the_online_encoders(precision: str, pipe: Any, tmp_path: Path) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    images = Noise()
    write(pipe, images, tmp_path / "c", precision=precision)
    found = DiskCache(tmp_path / "c")
    assert isinstance(found, Latents)
    assert (len(found), found.size, found.precision) == (7, 64, precision)
    assert list(found.captions) == ["a", "b", "", "a", "a", "b", ""]
    vae, parts = placed(pipe.vae, "cpu", dtype), TextParts.of(pipe).placed("cpu", dtype)
    for index in (6, 0, 3, 1):
        mean, std = encode_image(vae, fit_pixels(images[index]["image"], 64, 64))
        stored = found.posterior(index)
        assert mean.dtype == stored[0].dtype == dtype
        assert torch.equal(stored[0], mean)
        assert torch.equal(stored[1], std)
        # Beside other captions, at another place in the chunk: the same bits.
        online = encode_captions(parts, ["x", "y", images[index]["caption"]])[STATES][2]
        assert torch.equal(states(found, index), online)
    assert torch.equal(states(found, -1), encode_captions(parts, [""])[STATES][0])
    assert not torch.equal(states(found, 0), states(found, 1))
    assert found.sizes(0) is None
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    with pytest.raises(IndexError, match="range object index out of range"):
        found.posterior(7)


def test_latents_are_the_scaled_posterior(pipe: Any) -> None:
    pixels = fit_pixels(Noise()[0]["image"], 64, 64)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels[None]).latent_dist
    mean, std = encode_image(pipe.vae, pixels)
    torch.testing.assert_close(mean, posterior.mean[0] * 0.5)
    torch.testing.assert_close(std, posterior.std[0] * 0.5)


def test_captions_beyond_a_chunk_are_the_pipelines(pipe: Any) -> None:
    captions = [f"a star {'x' * n}" for n in range(11)]
    parts = TextParts.of(pipe)
    found = encode_captions(parts, captions)[STATES]
    torch.testing.assert_close(found, pipe.encode_prompt(captions, "cpu", 1, False)[0])
    assert torch.equal(found[9:], encode_captions(parts, captions[9:])[STATES])
    assert encode_captions(parts, [])[STATES].shape == (0, 77, 32)


def test_what_is_in_the_folder(pipe: Any, tmp_path: Path) -> None:
    index = write(pipe, Noise(7), tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "captions.jsonl", "index.json", *(f"latents-0000{n}.safetensors" for n in range(3)), "text-00000.safetensors",
    ]  # fmt: skip
    assert json.loads((tmp_path / "c" / "index.json").read_text()) == index
    assert [record["shapes"]["mean"] for record in index["latents"]] == [[3, 4, 8, 8], [3, 4, 8, 8], [1, 4, 8, 8]]
    assert index["captions"]["unique"] == 3
    said: list[str] = []
    assert write(pipe, Noise(7), tmp_path / "c", progress=lambda text, _: said.append(text)) == index
    assert "is complete already: kept" in said[0]


@pytest.mark.parametrize("lost", [False, True])
def test_an_interrupted_cache_goes_on(lost: bool, pipe: Any, tmp_path: Path) -> None:
    whole = write(pipe, Noise(7), tmp_path / "whole")
    reads = 7 + 5 - lost  # 7 to tell the data, then 5 of 7
    with pytest.raises(KeyboardInterrupt, match=r"^$" if lost else "here"):
        write(pipe, Noise(7, reads=reads, lost=lost), tmp_path / "c", workers=0)
    with pytest.raises(InputError, match="is not complete: run the same `sdkd cache` again"):
        DiskCache(tmp_path / "c")
    first = tmp_path / "c" / "latents-00000.safetensors"
    before = first.stat().st_mtime_ns
    said: list[str] = []
    assert write(pipe, Noise(7), tmp_path / "c", progress=lambda text, _: said.append(text)) == whole
    assert "1 of 3 shards are there already: kept" in said
    assert first.stat().st_mtime_ns == before


def test_text_of_other_captions_is_made_again_on_going_on(pipe: Any, tmp_path: Path) -> None:
    def stop(text: str, _: float | None) -> None:
        if text.startswith("encoding caption 3"):
            raise KeyboardInterrupt("here")

    with pytest.raises(KeyboardInterrupt, match="here"):
        write(pipe, Noise(7), tmp_path, shard_images=2, progress=stop)
    first = tmp_path / "latents-00000.json"  # as it is where the caption was changed, and the shard made again
    first.write_text(json.dumps(json.loads(first.read_text()) | {"captions": ["c", "b"]}))
    write(pipe, Noise(7), tmp_path, shard_images=2)
    found, expected = DiskCache(tmp_path), encode_captions(TextParts.of(pipe), ["c", "b", "", "a"])[STATES]
    assert list(found.captions[:4]) == ["c", "b", "", "a"]
    for index in range(4):
        torch.testing.assert_close(states(found, index), expected[index])


def test_a_damaged_shard_is_made_again_on_going_on(pipe: Any, tmp_path: Path) -> None:
    whole = write(pipe, Noise(7), tmp_path / "whole")
    write(pipe, Noise(7), tmp_path / "c", rank=0, world=2)
    (tmp_path / "c" / "latents-00000.safetensors").write_bytes(b"short")
    record = tmp_path / "c" / "latents-00002.json"
    whole_record = json.loads(record.read_text())
    for change in ({"captions": "abc"}, {"unreadable": []}, {"shapes": {"mean": []}}, {"file": "x"}, {"sha256": None}):
        record.write_text(json.dumps(whole_record | change))
        write(pipe, Noise(7), tmp_path / "c", rank=0, world=2)
        assert json.loads(record.read_text()) == whole_record
    record.write_text("{")
    write(pipe, Noise(7), tmp_path / "c", rank=1, world=2)
    assert write(pipe, Noise(7), tmp_path / "c") == whole
    read_all(tmp_path / "c")


def test_other_settings_are_refused(pipe: Any, tmp_path: Path) -> None:
    write(pipe, Noise(7), tmp_path / "c")
    message = r"made with other settings \(resolution: there 64, asked 128\): choose another folder or pass --overwrite"
    with pytest.raises(OutputExistsError, match=message):
        write(pipe, Noise(7), tmp_path / "c", size=128)
    with pytest.raises(OutputExistsError, match=r"other settings .*data: there"):
        write(pipe, Noise(7, bad=(0,)), tmp_path / "c")


@pytest.mark.parametrize("name", ["latents-00001.safetensors", "text-00000.safetensors", "captions.jsonl"])
def test_truncated_and_altered_files_are_refused(name: str, pipe: Any, tmp_path: Path) -> None:
    write(pipe, Noise(7), tmp_path / "c")
    path = tmp_path / "c" / name
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(InputError, match=rf"{name} of cache .* (is not there with its|was changed)"):
        DiskCache(tmp_path / "c")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"{name} of cache .* was changed: make the cache again"):
        read_all(tmp_path / "c")
    path.unlink()
    with pytest.raises(InputError, match=rf"{name} of cache"):
        DiskCache(tmp_path / "c")


def read_all(path: Path) -> None:
    cache = DiskCache(path)
    for index in range(len(cache)):
        cache.posterior(index), cache.text(index)


def test_another_model_is_refused(pipe: Any, tmp_path: Path) -> None:
    write(pipe, Noise(3), tmp_path / "c", precision="bf16")
    cache = DiskCache(tmp_path / "c")
    cache.check(pipe)
    half = tiny_pipeline().to(torch.bfloat16)
    cache.check(half)
    with torch.no_grad():
        half.vae.decoder.conv_in.weight += 1  # latents do not depend on the decoder
        cache.check(half)
        half.vae.encoder.conv_in.weight += 1
    with pytest.raises(InputError, match=r"was made by another model \(differs: vae\)"):
        cache.check(half)
    with pytest.raises(InputError, match="is no cache"):
        DiskCache(tmp_path)


def test_unreadable_images_are_replaced_and_add_up_over_ranks(pipe: Any, tmp_path: Path) -> None:
    index = write(pipe, Noise(100, bad=(66,)), tmp_path / "one", shard_images=67, text=False)
    assert index["unreadable"] == {"66": "image 66 cannot be read"}
    cache = DiskCache(tmp_path / "one")
    assert torch.equal(cache.posterior(66)[0], cache.posterior(67)[0])
    assert json.loads((tmp_path / "one" / "captions.jsonl").read_text().splitlines()[66]) == {
        "index": 66, "image": 67, "text": "a",
    }  # fmt: skip
    assert cache.text(0) is None
    images = Noise(100, bad=(1, 99))
    for rank in range(2):
        write(pipe, images, tmp_path / "c", shard_images=50, rank=rank, world=2)
    with pytest.raises(TrainingError, match=r"2 of 100 images \(2.0%\) could not be read"):
        write(pipe, images, tmp_path / "c", shard_images=50)


def test_results_that_are_not_finite(tmp_path: Path) -> None:
    broken = tiny_pipeline()
    broken.vae.encoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="mean of latents-00000 is not finite in fp32"):
        write(broken, Noise(3), tmp_path / "c")


CACHES = {"fp32": True, "bf16": True, "fp16": False}  # precision, and whether it has text


@pytest.fixture(scope="module")
def caches(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of all precisions, one of them without text, and one of mirrored images."""
    folder = tmp_path_factory.mktemp("caches")
    for precision, text in CACHES.items():
        write(pipe, Noise(4), folder / precision, precision=precision, text=text)
    write(pipe, Noise(12), folder / "mirrored", flip=True)
    return folder


def test_a_cache_below_the_home_folder(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(caches))
    assert isinstance(open_images_or_cache("~/bf16"), DiskCache)


def losses(data: Any, **settings: Any) -> list[dict[str, float]]:
    rows = trained(data, **settings).history
    return [{name: record[name] for name in record if name.startswith("loss/")} for record in rows]


@pytest.mark.parametrize("run_precision", ["fp32", "bf16"])
def test_a_run_of_any_precision_takes_a_cache_of_any_and_equals_images_from_its_own(
    run_precision: str, caches: Path
) -> None:
    expected = losses(Noise(4), precision=run_precision)
    for name in CACHES:
        found = losses(DiskCache(caches / name), precision=run_precision)
        assert found[0]["loss/total"] == pytest.approx(expected[0]["loss/total"], rel=0.02), name
        assert (found == expected) == (name == run_precision), name


def test_mirrored_latents_equal_mirrored_images(caches: Path) -> None:
    data = DiskCache(caches / "mirrored")
    settings: dict[str, Any] = {"steps": 1, "batch_size": 6, "seed": 3}
    mirrored = losses(data, flip=True, **settings)
    assert mirrored == losses(Noise(12), flip=True, latents="online", **settings)
    assert mirrored != losses(data, **settings)


def test_settings_that_a_cache_cannot_follow_are_refused_by_name(caches: Path, tmp_path: Path) -> None:
    plain, mirrored = (caches / name for name in ("bf16", "mirrored"))
    for data, settings, message in (
        (plain, {"flip": True}, "flip needs mirrored images, .*: make it with sdkd cache --flip, or give --no-flip"),
        (mirrored, {"crop": "random", "buckets": True}, "crop 'random' .* --crop center; buckets .* --no-buckets"),
        (mirrored, {"latents": "online"}, "latents 'online' is about images: leave it out"),
        (plain, {"resolution": 128}, "resolution 128 is not the cache's 64"),
    ):
        with pytest.raises(InputError, match=message):
            run(job(tmp_path / "out", data=data, **settings))
    with pytest.raises(InputError, match="has no columns: leave --image-column and --caption-columns out"):
        run(replace(job(tmp_path / "out", data=plain), caption_columns=("text",)))
    assert not (tmp_path / "out").exists()


def cache(folder: Path, lines: tuple[str, ...] = ('{"text": "a"}',) * 3, **changes: Any) -> DiskCache:
    """A cache of three latents in two shards, with two rows of text, and something of its index changed."""
    (folder / "captions.jsonl").write_text("".join(f"{line}\n" for line in lines))
    tensors = {"mean": torch.zeros(2, 1, 1, 1), "std": torch.ones(2, 1, 1, 1), "text": torch.zeros(2, 1, 1)}
    records = []
    for name in ("latents-00000", "latents-00001", "text-00000"):
        data = save({key: value for key, value in tensors.items() if (key == "text") == name.startswith("text")})
        (folder / f"{name}.safetensors").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        records.append({"file": f"{name}.safetensors", "bytes": len(data), "sha256": digest})
    index = {
        "schema": SCHEMA, "images": 3, "resolution": 8, "precision": "fp32", "shard_images": 2, "flip": False,
        "unreadable": {}, "latents": records[:2], "texts": records[2:],
        "captions": {"sha256": hashlib.sha256((folder / "captions.jsonl").read_bytes()).hexdigest()},
    }  # fmt: skip
    changed = {key: change(index[key]) if callable(change) else change for key, change in changes.items()}
    (folder / INDEX).write_text(json.dumps(index | changed))
    return DiskCache(folder)


SHARD = {"file": "latents-00000.safetensors", "bytes": 8, "sha256": "0"}
ROW = '{"text": "a"}'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": "64"}, r"index\.json of cache .*resolution is .* not a whole number"),
        ({"precision": "fp8"}, "precision"),
        ({"shard_images": 0}, "shard_images of .* 0 is too small"),
        ({"latents": {"file": "x"}}, "latents.*a list"),
        ({"latents": [{"file": "latents-00000.safetensors"}]}, "bytes"),
        ({"latents": [SHARD | {"bytes": None}]}, "bytes"),
        ({"latents": [SHARD]}, "is not there with its 8 bytes"),
        ({"texts": [5]}, "texts"),
        ({"captions": None}, "captions.*an object"),
        ({"schema": 99}, "is not of a cache that this version reads"),
        ({"latents": lambda rows: rows[:1]}, r"index\.json of cache .*1 shards of latents for 3 rows, 2 in each"),
        ({"texts": lambda rows: rows * 2}, r"index\.json of cache .*2 shards of texts for 2 rows, 2 in each"),
        ({"lines": (ROW, ROW)}, r"captions\.jsonl of cache .*holds 2 captions of 3 images: make the cache again"),
        ({"lines": (ROW, ROW, '{"text": 1}')}, r"captions\.jsonl of cache .*text is 1, not text"),
        ({"lines": (ROW, ROW, "[" * 100_000)}, r"captions\.jsonl of cache .*nested too deeply"),
        ({"lines": (ROW, ROW, "5")}, r"captions\.jsonl of cache .*5, not an object"),
        *(
            ({kind: [SHARD | {"file": name}]}, rf"index.json of cache .* names '{name}', which is no file of a cache")
            for kind in ("latents", "texts")
            for name in ("../x.safetensors", "/etc/hostname", "sub/latents-00000.safetensors", "index.json")
        ),
    ],
)
def test_a_damaged_or_hostile_cache_is_one_message(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        cache(tmp_path, **changes)


@pytest.mark.parametrize(("text", "message"), [("[" * 9000, "nested"), ('{"a": 1, "a": 2}', "a"), ("[]", "an object")])
def test_an_index_that_is_no_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError, match=message):
        DiskCache(tmp_path)


def test_a_shard_with_fewer_rows_than_its_index_says(tmp_path: Path) -> None:
    found = cache(tmp_path)
    assert [float(found.posterior(index)[1]) for index in range(3)] == [1, 1, 1]
    found = cache(tmp_path, shard_images=3, latents=lambda rows: rows[:1])
    with pytest.raises(InputError, match=r"latents-00000\.safetensors of cache .*has no row 2"):
        found.posterior(2)
    found = cache(tmp_path, texts=lambda rows: json.loads((tmp_path / INDEX).read_text())["latents"][:1])
    with pytest.raises(InputError, match=r"latents-00000\.safetensors of cache .*has no row 0"):
        found.text(-1)
