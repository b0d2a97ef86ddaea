"""What may name shards: local paths, and URLs of four schemes. Nothing that is given is run, rewritten or guessed.

    data/train    data/a-{000..099}.tar    https://host/set/train    s3://bucket/set/a-{000..099}.tar    gs://bucket/set

A URL has no user name, no password, no query and no fragment: what opens a store comes from the environment, so a
source can be shown, logged and tracked as it is. Checked before braces are expanded and again after.
"""

import re
from collections import Counter
from pathlib import Path

from pretrain.errors import DataError

SCHEMES = ("http", "https", "s3", "gs")

_URL = re.compile(
    rf"(?:{'|'.join(SCHEMES)})://"
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?::[0-9]{1,5})?"  # a host with its port, or a bucket
    r"(?:/[\w.~+=,:@!()/{} -]*)?"
)
_SCHEME = re.compile(r"^\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_SECRETS = ((re.compile(r"(://)[^/]*@"), r"\1***@"), (re.compile(r"([?#]).*", re.DOTALL), r"\1***"))
_SHOWN = 5


def is_remote(path: str) -> bool:
    """Whether a checked path is a URL."""
    return "://" in path


def folder_of(path: str) -> str:
    folder, slash, _ = path.rpartition("/")
    return folder or slash or "."


def name_of(path: str) -> str:
    return path.rpartition("/")[2]


def some(paths: list[str]) -> str:
    """The first few, and how many more there are."""
    more = len(paths) - _SHOWN
    return ", ".join(paths[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def redacted(source: str) -> str:
    """`source` without what may be a secret in a URL: user name, password, query and fragment."""
    for pattern, shown in _SECRETS:
        source = pattern.sub(shown, source)
    return source


def check_source(source: str) -> None:
    """Raise `DataError` for anything but a local path or a URL that we read, before expansion or after."""
    for part in source.split("::"):
        if "://" in part:
            _check_url(part)
        else:
            _check_path(part)


def expand(pattern: str) -> list[str]:
    """A brace pattern (several joined by `::`) as paths and URLs, by webdataset's own expander; each once."""
    from webdataset.shardlists import expand_urls  # imports torch; a folder does without

    check_source(pattern)
    try:
        names: list[str] = expand_urls(pattern)
    except ValueError as error:
        raise DataError(f"{pattern!r}: not a pattern of braces: {error}") from None
    for name in names:
        check_source(name)
        if is_remote(name) and set("{}") & set(name):
            raise DataError(f"{name!r}: braces are left after the pattern {pattern!r} was expanded")
    names = [name if is_remote(name) else str(Path(name)) for name in names]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"{pattern!r} names {some(twice)} twice; an epoch holds every sample once. List it once."
        )
    return names


def _check_path(part: str) -> None:
    for piece in re.split(r"[{},]", part):
        if _SCHEME.match(piece) or "|" in piece or "$" in piece:
            raise DataError(
                f"{redacted(part)!r} is not a local path: {redacted(piece.strip())!r}\n"
                "  Shards are read from a folder or a brace pattern of paths, such as data/train or data/a-{000..099}.tar,\n"
                f"  or from such a folder or pattern at {', '.join(f'{s}://' for s in SCHEMES)}; commands and variables are not."
            )


def _check_url(part: str) -> None:
    shown = redacted(part)
    address = part.partition("://")[2].partition("/")[0]
    if "@" in address:
        raise DataError(
            f"{shown!r}: a URL must not hold a user name or a password: it is shown, logged and tracked\n"
            "  Give credentials in the environment; docs/stores.md says how for each kind of store."
        )
    if "?" in part or "#" in part:
        raise DataError(
            f"{shown!r}: a URL must not have a query or a fragment: signatures and tokens stand there\n"
            "  Name the object itself; docs/stores.md says how to give credentials."
        )
    if not _URL.fullmatch(part):
        raise DataError(
            f"{shown!r} is not a URL that shards are read from\n"
            f"  Allowed are {', '.join(f'{s}://' for s in SCHEMES)} in small letters, a plain host or bucket, and a path of letters,\n"
            "  digits and . _ - ~ + = , : @ ! ( ) as they are stored, without %; braces in the path only."
        )
    path = part.partition("://")[2].partition("/")[2]
    if any(step in ("", ".", "..") for step in path.rstrip("/").split("/")) and path:
        raise DataError(f"{shown!r}: a path with empty steps, `.` or `..`; write it plainly")
