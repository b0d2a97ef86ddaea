"""Progress on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


@contextlib.contextmanager
def bar(total: int, unit: str, what: str) -> Iterator[tqdm[Any]]:
    """A progress bar; none where there is nothing to do."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", desc=what, disable=not total) as shown:
        yield shown


def counter(shown: tqdm[Any], total: int | None = None) -> Callable[[], None]:
    """Counts shards behind the images of a bar."""
    count = 0

    def one_more() -> None:
        nonlocal count
        count += 1
        of = f" of {total:,}" if total else ""
        shown.set_postfix_str(f"{count:,}{of} shards")

    return one_more
