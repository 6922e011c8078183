"""Orders and draws: every image once a pass, whole shards a process, and nothing that depends on what came before."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from PIL import Image

from sdkd.distill import TrainConfig, train
from sdkd.distill.data.draws import draw_at, draw_latents, draw_noise, generator_at, view_generator
from sdkd.distill.data.opening import open_images
from sdkd.distill.data.order import Bucketed, Sharded, Shuffled
from sdkd.distill.training.trainer import Trainer
from sdkd.errors import InputError
from sdkd.students.blocks import build_student

RUN: dict[str, Any] = {"steps": 2, "batch_size": 2, "precision": "fp32", "device": "cpu", "log_every": 1}


def test_every_image_comes_once_a_pass_in_a_new_order() -> None:
    order = Shuffled(7, seed=3)
    passes = [[order.index(7 * number + place) for place in range(7)] for number in range(3)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert [order.index(place) for place in range(7)] == passes[0]  # back to an earlier pass
    assert [Shuffled(7, seed=4).index(place) for place in range(7)] != passes[0]
    with pytest.raises(InputError, match="holds no images"):
        Shuffled(0, 0)


def test_buckets_keep_batches_together() -> None:
    order = Bucketed([range(5), [], range(5, 8), [8]], together=2, seed=0)
    assert order.length == 2 * (2 + 1 + 1)  # 5 // 2, 3 // 2, and the single one repeated
    for number in range(3):
        batches = [[order.index(number * 8 + 2 * batch + row) for row in range(2)] for batch in range(4)]
        kinds = [{0 if index < 5 else 1 if index < 8 else 2 for index in batch} for batch in batches]
        assert all(len(kind) == 1 for kind in kinds)
        assert sorted(kind.pop() for kind in kinds) == [0, 0, 1, 2]
        assert [8, 8] in batches
    with pytest.raises(InputError, match="holds no images"):
        Bucketed([[], []], 2, 0)


def positions(rank: int, world: int, batch: int, count: int) -> list[int]:
    return [(step * world + rank) * batch + row for step in range(count // batch) for row in range(batch)]


def test_shards_go_whole_to_one_process() -> None:
    blocks = [range(4), range(4, 10), range(10, 12), range(12, 16)]
    whole = set()
    for rank in range(2):
        order = Sharded(blocks, batch_size=2, rank=rank, world=2, seed=1)
        first = [order.index(place) for place in positions(rank, 2, 2, order._length(0) // 2 * 2)]
        owned = {next(which for which, block in enumerate(blocks) if index in block) for index in first}
        assert len(owned) == 2
        assert len(set(first)) == len(first)
        whole |= owned
        later = [order.index(place) for place in positions(rank, 2, 2, 60)]
        assert later[: len(first)] == first
        assert set(later) == set(range(16)) or len(set(later)) > len(first)
    assert whole == {0, 1, 2, 3}
    with pytest.raises(InputError, match="4 tar shards cannot feed 5 processes"):
        Sharded(blocks, 1, 0, 5, 0)


def test_draws_hang_on_seed_and_position_alone() -> None:
    settings = {"together": 4, "timesteps": 1000, "caption_dropout": 0.5, "random_conditioning": 0.5}
    mean, std = torch.zeros(4, 2, 2), torch.ones(4, 2, 2)
    one, again, next_one = (draw_at(0, place, **settings) for place in (5, 5, 6))  # type: ignore[arg-type]
    assert torch.equal(draw_latents(one, mean, std), draw_latents(again, mean, std))
    first, second = draw_noise(one, mean.shape), draw_noise(next_one, mean.shape)
    assert torch.equal(first, draw_noise(again, mean.shape))
    assert not torch.equal(first, second)
    draws = [draw_at(0, place, **settings) for place in range(400)]  # type: ignore[arg-type]
    assert all(draw.timestep // 250 == place % 4 for place, draw in enumerate(draws))
    assert 0.4 < sum(draw.empty for draw in draws) / 400 < 0.6
    assert 0.4 < sum(draw.other is not None for draw in draws) / 400 < 0.6
    assert torch.rand(1, generator=generator_at(0, 1)) != torch.rand(1, generator=view_generator(0, 1))
    assert torch.rand(1, generator=generator_at(0, 1)) != torch.rand(1, generator=generator_at(1, 0))


def test_offset_noise_shifts_whole_channels() -> None:
    draw = draw_at(0, 1, together=1, timesteps=10, caption_dropout=0, random_conditioning=0)
    same = draw_at(0, 1, together=1, timesteps=10, caption_dropout=0, random_conditioning=0)
    shape = torch.Size((3, 8, 8))
    difference = draw_noise(draw, shape, 0.5) - draw_noise(same, shape)
    assert difference.flatten(1).std(1).max() < 1e-6
    assert difference.abs().max() > 0.1


def write_shard(path: Path, names: range) -> None:
    with tarfile.open(path, "w") as tar:
        for index in names:
            stream = io.BytesIO()
            Image.new("RGB", (64, 64), (20 * index, 40, 90)).save(stream, "PNG")
            for suffix, content in (("png", stream.getvalue()), ("txt", f"number {index}".encode())):
                member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_training_from_tar_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "a-0.tar", range(3))
    write_shard(tmp_path / "a-1.tar", range(3, 6))
    pipe = helpers.tiny_pipeline()
    config = TrainConfig(**RUN, latents="online")
    data = open_images(tmp_path)
    trainer = Trainer(pipe, build_student(pipe.unet, "tiny"), data, config)
    assert isinstance(trainer.batches.order, Sharded)
    first = [trainer.batches.order.index(place) for place in range(6)]
    assert sorted(first[:3]) in ([0, 1, 2], [3, 4, 5]) or sorted(first) == list(range(6))
    trainer.close()
    done = train(pipe, build_student(pipe.unet, "tiny"), data, config)
    assert done.images == 6
    assert len(done.history) == 2


def test_training_in_buckets_batches_equal_shapes(tmp_path: Path) -> None:
    for index, size in enumerate([(128, 128), (256, 64), (64, 256), (130, 120), (250, 70)]):
        Image.new("RGB", size, (40 * index, 90, 20)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"number {index}")
    pipe = helpers.tiny_pipeline()
    config = TrainConfig(**RUN, buckets=True, resolution=192, flip=True)
    trainer = Trainer(pipe, build_student(pipe.unet, "tiny"), open_images(tmp_path), config)
    shapes = {tuple(trainer.batches.next().latents.shape[2:]) for _ in range(12)}
    trainer.close()
    assert (24, 24) in shapes
    assert len(shapes) > 1
    with pytest.raises(InputError, match="buckets need the sizes of all images"):
        train(pipe, build_student(pipe.unet, "tiny"), [{"image": None, "caption": ""}], config)


def test_a_replacement_of_an_unreadable_image_fits_its_batch(tmp_path: Path) -> None:
    for index in range(120):
        Image.new("RGB", (128, 64) if index % 2 else (64, 64), (index, 90, 20)).save(tmp_path / f"{index:03d}.png")
        (tmp_path / f"{index:03d}.txt").write_text(f"number {index}")
    whole = (tmp_path / "010.png").read_bytes()
    (tmp_path / "010.png").write_bytes(whole[: len(whole) // 2])  # the header is there, the pixels are not
    pipe = helpers.tiny_pipeline()
    config = TrainConfig(**(RUN | {"steps": 60}), buckets=True, resolution=64)
    trainer = Trainer(pipe, build_student(pipe.unet, "tiny"), open_images(tmp_path), config)
    for _ in range(60):
        trainer.batches.next()
    trainer.close()
    assert list(trainer.batches.samples.unreadable) == [10]
    assert "010.png' cannot be read" in trainer.batches.samples.unreadable[10]
