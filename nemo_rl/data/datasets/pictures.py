"""Problems that show images: how the records of each data set become a question, its answer and the images.

In the words of a question `IMAGE` marks where an image belongs; the images travel beside it as the files that they are.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from nemo_rl.data.datasets.records import Record, field_of
from nemo_rl.data.types import IMAGE, Chat, EncodedImage, Message, Task
from nemo_rl.errors import DataError

type PictureLayout = Literal["clevr", "refcoco", "geometry3k"]

_ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_LOCATE = "Please give the bounding box of the region that this phrase describes, as [x1, y1, x2, y2] in thousandths of"


class Illustrated(NamedTuple):
    """A question that shows images, and its known answer."""

    question: str
    answer: str
    images: tuple[EncodedImage, ...]


@dataclass(frozen=True, slots=True)
class PictureProblems:
    """Turns records of one layout into problems to solve.

    Attributes:
        layout: which one.
        environment: name of the environment that judges the answers.
        folder: where the files are that records name.
    """

    layout: PictureLayout
    environment: str
    folder: str | None = None

    def read(self, record: Record, index: int, where: str) -> Task:
        """Turn one record into task `index`.

        Raises:
            DataError: a field or an image is missing; it begins with `where`.
        """
        seen = _illustrated(record, self.layout, self.folder, where)
        asked = Message(role="user", content=seen.question)
        return Task((asked,), self.environment, {"ground_truth": seen.answer}, index, images=seen.images)


@dataclass(frozen=True, slots=True)
class PictureChats:
    """Turns records of one layout into conversations; see `PictureProblems`."""

    layout: PictureLayout
    folder: str | None = None

    def read(self, record: Record, index: int, where: str) -> Chat:
        """Turn one record into conversation `index`; see `PictureProblems.read`."""
        seen = _illustrated(record, self.layout, self.folder, where)
        turns = (Message(role="user", content=seen.question), Message(role="assistant", content=seen.answer))
        return Chat(turns, index=index, images=seen.images)


def _illustrated(record: Record, layout: PictureLayout, folder: str | None, where: str) -> Illustrated:
    match layout:
        case "clevr":
            question = str(field_of(record, "problem", where, setting=None))
            solution = str(field_of(record, "solution", where, setting=None))
            tagged = _ANSWER.search(solution)
            image = _encoded(field_of(record, "image", where, setting=None), folder, where)
            return _checked(f"{IMAGE}{question}", tagged[1] if tagged else solution.strip(), (image,), where)
        case "geometry3k":
            question, answer = (str(field_of(record, key, where, setting=None)) for key in ("problem", "answer"))
            images = cast("Sequence[object]", field_of(record, "images", where, setting=None))
            return _checked(question, answer, tuple(_encoded(image, folder, where) for image in images), where)
        case "refcoco":
            captions = cast("Sequence[str]", field_of(record, "captions", where, setting=None))
            question = f"{IMAGE}{_LOCATE} the image's width and height: {max(captions, key=len)}"
            path = str(field_of(record, "image_path", where, setting=None)).removeprefix("coco/")
            image = _encoded({"path": path}, folder, where)
            return _checked(question, str(_thousandths(record, where)), (image,), where)


def _checked(question: str, answer: str, images: tuple[EncodedImage, ...], where: str) -> Illustrated:
    if (places := question.count(IMAGE)) != len(images):
        raise DataError(f"{where} has {len(images)} images and {places} places {IMAGE} for them; correct it")
    return Illustrated(question, answer, images)


def _encoded(image: object, folder: str | None, where: str) -> EncodedImage:
    """Take the file of an image out of a record, or from where the record says that it is."""
    if isinstance(image, bytes):
        return image
    held = cast("Mapping[str, Any]", image) if isinstance(image, Mapping) else {}
    if isinstance(held.get("bytes"), bytes):
        return held["bytes"]
    path = Path(folder or ".").expanduser() / str(held.get("path"))
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where} shows an image that is not at {path}; set image_folder to where it is") from error


def _thousandths(record: Record, where: str) -> list[int]:
    """The box of a region, which the record has in pixels, in thousandths of the image's size."""
    box = cast("Sequence[float]", field_of(record, "bbox", where, setting=None))
    about = field_of(record, "raw_image_info", where, setting=None)
    size = cast("Mapping[str, float]", json.loads(about) if isinstance(about, str) else about)
    width, height = (float(str(field_of(size, key, where, setting=None))) for key in ("width", "height"))
    return [round(1000 * place / length) for place, length in zip(box, (width, height) * 2, strict=True)]
