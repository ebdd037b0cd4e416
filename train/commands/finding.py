"""What `python -m train doctor` reports about one subject."""

import dataclasses
from typing import Literal

Level = Literal["fine", "warning", "failure"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check, with a remedy unless it is fine."""

    level: Level
    subject: str
    found: str
    remedy: str = ""
