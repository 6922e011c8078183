"""Reading ahead: order, replacement of unreadable rows whatever the threads do, and their limit; aspect buckets."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from PIL import Image

from sdkd.distill.data.buckets import aspect_buckets, fit_pixels, nearest_bucket
from sdkd.distill.data.reader import AHEAD, Reader
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
    reader = Reader(loader({7}, slow=True), 200, workers=workers)
    order = [*range(200), 7, 199]
    rows = list(reader.rows((position + 1000, index) for position, index in enumerate(order)))
    assert [position for position, _ in rows] == [1000 + place for place in range(202)]
    assert [row for _, row in rows] == [(1000 + place, 8 if i == 7 else i) for place, i in enumerate(order)]
    assert reader.unreadable == {7: "image 7 cannot be read"}
    assert reader.waited > 0
    assert list(Reader(loader({199}), 200, workers=workers).rows([(0, 199)])) == [(0, (0, 0))]  # by the first


@pytest.mark.parametrize("workers", [0, 3])
def test_three_in_200_stop_the_run(workers: int) -> None:
    reader = Reader(loader({5, 6, 100}), 200, workers=workers)
    rows = reader.rows((index, index) for index in range(200))
    assert [next(rows)[1][1] for _ in range(7)] == [0, 1, 2, 3, 4, 7, 7]
    message = r"3 of 200 images \(1.5%\) could not be read, more than 1% may not: repair or remove them \(image 5 .*100"
    with pytest.raises(TrainingError, match=message):
        list(rows)
    assert list(reader.unreadable) == [5, 6, 100]
    with pytest.raises(TrainingError, match=r"7 of 600 images \(1.2%\) could not be read, .*and 2 more\)"):
        next(Reader(loader(set(range(10))), 600, workers=workers).rows([(0, 3)]))


@pytest.mark.parametrize("end", [0, 3])
def test_other_errors_and_closing_stop_the_threads_and_no_more_is_read_than_ahead(end: int) -> None:
    def load(position: int, index: int) -> int:
        if index == 3:
            raise ZeroDivisionError("a bug")
        return index

    pairs = iter(range(1000))
    rows = Reader(load, 1000).rows((i, i) for i in pairs)
    assert next(rows) == (0, 0)
    if end:
        assert [next(rows), next(rows)] == [(1, 1), (2, 2)]
        with pytest.raises(ZeroDivisionError, match="a bug"):
            next(rows)
    rows.close()
    assert next(pairs) == AHEAD + end
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sdkd-reader")]


def test_settings_of_a_reader() -> None:
    with pytest.raises(InputError, match="the data holds no images"):
        Reader(loader(set()), 0)
    with pytest.raises(InputError, match=r"workers -1 is too small: give 0 or more"):
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


def test_nearest_bucket_and_its_pixels() -> None:
    sizes = aspect_buckets(512)
    found = [sizes[nearest_bucket(*size, sizes)] for size in ((1000, 1000), (1600, 900), (300, 400), (10, 5000))]
    assert found == [(512, 512), (384, 640), (576, 448), (640, 384)]
    image = Image.new("RGB", (40, 10), "black")
    image.paste("white", (10, 0, 30, 10))
    assert torch.equal(fit_pixels(image, 10, 20), torch.ones(3, 10, 20))
    assert fit_pixels(image, 20, 10).shape == (3, 20, 10)
    assert fit_pixels(Image.new("L", (100, 37), 0), 16, 16).unique().tolist() == [-1.0]


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
