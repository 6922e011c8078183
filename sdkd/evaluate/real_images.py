"""A folder of real images, of which one at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sdkd.core.images import image_size, read_rgb
from sdkd.distill.data.image_folder import images_below
from sdkd.distill.data.reader import check_unreadable
from sdkd.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


class RealImages:
    """All images under a folder, RGB, by name, each read when its turn comes.

    Those that cannot be read are left out and named in `unreadable`; TrainingError when they are more than 1 %, which
    their headers are asked for at once. InputError when the folder holds no images.
    """

    def __init__(self, folder: Path) -> None:
        self.files = images_below(folder)
        self.unreadable: dict[int, str] = {}
        for index, path in enumerate(self.files):
            try:
                image_size(path)
            except InputError as error:
                self._leave_out(index, error)

    def __len__(self) -> int:
        return len(self.files) - len(self.unreadable)

    def __iter__(self) -> Iterator[Image]:
        for index, path in enumerate(self.files):
            if index in self.unreadable:
                continue
            try:
                image = read_rgb(path)
            except InputError as error:
                self._leave_out(index, error)
                continue
            yield image

    def _leave_out(self, index: int, error: InputError) -> None:
        self.unreadable[index] = str(error)
        check_unreadable(self.unreadable, len(self.files))
