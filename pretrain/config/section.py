"""What every section of the settings is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Strict: no unknown key, no conversion between types (an int may stand for a float), no change after."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def one_of(section: Section, *names: str, at_least: int) -> None:
    """Raise unless one of these keys of `section` is given, or none where `at_least` is 0."""
    given = [n for n in names if getattr(section, n) is not None]
    if not at_least <= len(given) <= 1:
        raise ValueError(
            f"give {'exactly' if at_least else 'at most'} one of {', '.join(names)}; given: "
            f"{', '.join(given) or 'none'}"
        )
