"""Orders and draws: every image once a pass, whole shards a process, and nothing that depends on what came before."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import trained, trainer

from sdkd.distill.data.opening import open_images
from sdkd.distill.data.order import (
    WINDOW,
    Bucketed,
    Order,
    Sharded,
    draw_at,
    draw_latents,
    draw_noise,
    generator_at,
    view_generator,
)
from sdkd.errors import InputError


def test_every_image_comes_once_a_pass_in_a_new_order() -> None:
    order = Order(7, seed=3)
    passes = [[order.index(7 * number + place) for place in range(7)] for number in range(3)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert [order.index(place) for place in range(7)] == passes[0]  # back to an earlier pass
    assert [Order(7, seed=4).index(place) for place in range(7)] != passes[0]
    with pytest.raises(InputError, match="holds no images"):
        Order(0, 0)


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
        first = [order.index(place) for place in positions(rank, 2, 2, sum(map(len, order._shards(0))) // 2 * 2)]
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


def test_each_window_of_a_shard_is_mixed_in_an_order_of_its_own() -> None:
    order = Sharded([range(2 * WINDOW)], batch_size=1, rank=0, world=1, seed=1)
    drawn = [order.index(place) for place in range(2 * WINDOW)]
    first, second = drawn[:WINDOW], [index - WINDOW for index in drawn[WINDOW:]]
    assert sorted(first) == sorted(second) == list(range(WINDOW))
    assert first != second


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


def test_training_from_tar_shards(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"a-{shard}.tar", "w") as tar:
            for index in range(3 * shard, 3 * shard + 3):
                stream = io.BytesIO()
                Image.new("RGB", (64, 64), (20 * index, 40, 90)).save(stream, "PNG")
                for suffix, content in (("png", stream.getvalue()), ("txt", f"number {index}".encode())):
                    member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    done, made = trained(open_images(tmp_path), latents="online"), trainer(data=open_images(tmp_path), latents="online")
    made.close()
    assert isinstance(made.batches.order, Sharded)
    first = [made.batches.order.index(place) for place in range(6)]
    assert sorted(first) == list(range(6))
    assert (done.images, len(done.history)) == (6, 2)


def test_buckets_batch_equal_shapes_also_where_an_unreadable_image_is_replaced(tmp_path: Path) -> None:
    sizes = [(128, 64), (64, 64), (64, 128)]
    for index in range(102):
        Image.new("RGB", sizes[index % 3], (index, 90, 20)).save(tmp_path / f"{index:03d}.png")
        (tmp_path / f"{index:03d}.txt").write_text(f"number {index}")
    whole = (tmp_path / "010.png").read_bytes()
    (tmp_path / "010.png").write_bytes(whole[: len(whole) // 2])  # the header is there, the pixels are not
    made = trainer(data=open_images(tmp_path), steps=51, resolution=192, buckets=True, flip=True)
    shapes = {tuple(made.batches.next().latents.shape[2:]) for _ in range(51)}
    made.close()
    assert shapes == {(24, 24), (16, 32), (32, 16)}
    assert list(made.batches.samples.unreadable) == [10]
    assert "010.png' cannot be read" in made.batches.samples.unreadable[10]
    with pytest.raises(InputError, match="buckets need the sizes of all images"):
        trained([{"image": None, "caption": ""}], buckets=True)
