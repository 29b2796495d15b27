"""What a data set is made of, and what can be wrong with it."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Record:
    """One (image, mask, prompts) triple.

    image, mask: a path, or the pixels (uint8 `[H, W, 3]`, bool `[H, W]`).
    """

    name: str  # of the image, for people
    mask_name: str
    image: object
    mask: object
    prompts: dict = field(default_factory=dict)
    class_word: str | None = None
    problem: str | None = None  # why it cannot be used, where that is known before its files are read


class DataError(ValueError):
    """All that is wrong with a data set, grouped, in one message.

    `bad`: indices of the records it concerns.
    """

    def __init__(self, problems, total):
        self.problems = problems  # kind of problem -> [(index of the record, name)]
        self.bad = sorted({i for hits in problems.values() for i, _ in hits})
        lines = [f"{len(self.bad)} of {total} records cannot be used:"]
        for kind, hits in problems.items():
            names = list(dict.fromkeys(name for _, name in hits))
            lines.append(
                f"  {len(names)} x {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            )
        super().__init__("\n".join(lines))


def index_images(records):
    """Find records that share an image: (the first record of each image, the image of each record)."""
    rows, image_of, first = {}, [], []
    for i, r in enumerate(records):
        key = str(r.image) if isinstance(r.image, (str, Path)) else id(r.image)
        if key not in rows:
            rows[key] = len(first)
            first.append(i)
        image_of.append(rows[key])
    return first, image_of
