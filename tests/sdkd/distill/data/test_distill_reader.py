"""Reading ahead: order, replacement of unreadable rows whatever the threads do, and their limit; aspect buckets."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from PIL import Image

from sdkd.distill.data.buckets import aspect_buckets, fit_pixels, nearest_bucket
from sdkd.distill.data.reader import Reader
from sdkd.errors import InputError, TrainingError


def loader(bad: set[int], slow: bool = False):
    def load(position: int, index: int) -> tuple[int, int]:
        if slow and index % 3 == 0:
            time.sleep(0.002)
        if index in bad:
            raise InputError(f"image {index} cannot be read")
        return position, index

    return load


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_one_unreadable_image_in_200_is_replaced_and_named(workers: int) -> None:
    reader = Reader(loader({7}, slow=True), 200, workers=workers, ahead=9)
    order = [*range(200), 7, 199]
    rows = list(reader.rows((position + 1000, index) for position, index in enumerate(order)))
    assert [position for position, _ in rows] == [1000 + place for place in range(202)]
    assert [row for _, row in rows] == [(1000 + place, 8 if i == 7 else i) for place, i in enumerate(order)]
    assert reader.unreadable == {7: "image 7 cannot be read"}
    assert reader.waited > 0


@pytest.mark.parametrize("workers", [0, 3])
def test_three_in_200_stop_the_run(workers: int) -> None:
    reader = Reader(loader({5, 6, 100}), 200, workers=workers)
    rows = reader.rows((index, index) for index in range(200))
    assert [next(rows)[1][1] for _ in range(7)] == [0, 1, 2, 3, 4, 7, 7]
    message = r"3 of 200 images \(1.5%\) could not be read, more than 1% may not: repair or remove them \(image 5 .*100"
    with pytest.raises(TrainingError, match=message):
        list(rows)
    assert list(reader.unreadable) == [5, 6, 100]


def test_the_last_image_is_replaced_by_the_first() -> None:
    assert list(Reader(loader({199}), 200).rows([(0, 199)])) == [(0, (0, 0))]


def test_nothing_readable() -> None:
    reader = Reader(loader(set(range(10))), 10, limit=1.0)
    with pytest.raises(TrainingError, match=r"10 of 10 images \(100.0%\) could not be read, .*and 5 more\)"):
        next(reader.rows([(0, 3)]))


def test_other_errors_come_through_and_stop_the_threads() -> None:
    def load(position: int, index: int) -> int:
        if index == 3:
            raise ZeroDivisionError("a bug")
        return index

    rows = Reader(load, 10).rows((i, i) for i in range(10))
    assert [next(rows), next(rows), next(rows)] == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        next(rows)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sdkd-reader")]


def test_closing_stops_the_threads_and_reads_no_further_than_ahead() -> None:
    seen: list[int] = []

    def load(position: int, index: int) -> int:
        seen.append(index)
        return index

    rows = Reader(load, 1000, ahead=8).rows((i, i) for i in range(1000))
    assert next(rows) == (0, 0)
    rows.close()  # type: ignore[attr-defined]
    assert len(seen) <= 9
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sdkd-reader")]


def test_settings_of_a_reader() -> None:
    with pytest.raises(InputError, match="the data holds no images"):
        Reader(loader(set()), 0)
    with pytest.raises(InputError, match=r"workers -1, ahead 32, limit 0.01 are not usable"):
        Reader(loader(set()), 5, workers=-1)


def test_aspect_buckets() -> None:
    assert aspect_buckets(512) == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
    for resolution in (256, 512, 768):
        for height, width in aspect_buckets(resolution):
            assert height * width <= resolution**2
            assert height % 64 == width % 64 == 0
            assert 0.5 <= width / height <= 2
    assert aspect_buckets(64) == [(64, 64)]
    with pytest.raises(InputError, match="resolution 32 is too small for buckets: give 64 pixels or more"):
        aspect_buckets(32)


def test_nearest_bucket() -> None:
    sizes = aspect_buckets(512)
    found = [sizes[nearest_bucket(*size, sizes)] for size in ((1000, 1000), (1600, 900), (300, 400), (10, 5000))]
    assert found == [(512, 512), (384, 640), (576, 448), (640, 384)]


def test_pixels_of_a_bucket() -> None:
    image = Image.new("RGB", (40, 10), "black")
    image.paste("white", (10, 0, 30, 10))
    assert torch.equal(fit_pixels(image, 10, 20), torch.ones(3, 10, 20))
    assert fit_pixels(image, 20, 10).shape == (3, 20, 10)


def test_random_crop_and_flip_are_the_generators() -> None:
    image = Image.frombytes("RGB", (64, 64), torch.arange(64 * 64 * 3).remainder(251).to(torch.uint8).numpy().tobytes())

    def view(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return fit_pixels(image.resize((96, 64)), 64, 64, crop="random", flip=True, generator=generator)

    assert torch.equal(view(3), view(3))
    assert len({view(seed).numpy().tobytes() for seed in range(8)}) > 4
    middle = fit_pixels(image, 64, 64)
    flipped = [fit_pixels(image, 64, 64, flip=True, generator=torch.Generator().manual_seed(s)) for s in range(8)]
    kinds = {"same" if torch.equal(v, middle) else "mirror" if torch.equal(v.flip(2), middle) else "?" for v in flipped}
    assert kinds == {"same", "mirror"}
    with pytest.raises(InputError, match="a random crop or flip needs a generator"):
        fit_pixels(image, 64, 64, flip=True)
