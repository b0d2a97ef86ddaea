"""What may stand in a batch script, and how it is quoted for each of its two readers, sbatch and bash.

A line break would begin another line, and a line that begins with `#SBATCH` is a directive: no control character
gets past `plain`. Everything else is quoted by `word` for bash and by `directive` for sbatch.
"""

import re
import shlex
import unicodedata
from collections.abc import Iterable

from pretrain.errors import ConfigError

NAME = r"^[A-Za-z0-9_.-]{1,64}$"
"""Names that Slurm is given: of jobs, accounts, partitions, nodes."""

_REFUSED = {"Cc": "a control character", "Cs": "half a character", "Zl": "a line break", "Zp": "a line break"}
_BARE = r"[A-Za-z0-9_@%+=:,./-]+"


def plain(text: str, what: str) -> str:
    """`text` itself; raises `ConfigError` where it holds what no line of a script may hold."""
    for character in text:
        found = _REFUSED.get(unicodedata.category(character))
        if found:
            raise ConfigError(
                f"{what} {text!r} holds {found} ({character!r}): it cannot stand in a batch script"
            )
    return text


def name(text: str, what: str) -> str:
    """`text` itself; raises `ConfigError` where it is no name of 1 to 64 ASCII letters, digits, `_`, `.` or `-`."""
    if not re.fullmatch(NAME.strip("^$"), text):
        raise ConfigError(f"{what} {text!r}: 1 to 64 ASCII letters, digits, _ . or - are a name")
    return text


def word(text: str, what: str = "the argument") -> str:
    """`text` as one word of bash."""
    return shlex.quote(plain(text, what))


def words(arguments: Iterable[str]) -> str:
    """Arguments as the words of one line of bash."""
    return " ".join(word(argument) for argument in arguments)


def directive(option: str, value: str | None = None) -> str:
    """A `#SBATCH` line. sbatch reads a value in double quotes as bash does, except that `$` and backquotes are plain."""
    if value is None:
        return f"#SBATCH --{option}"
    if re.fullmatch(_BARE, plain(value, f"--{option}")):
        return f"#SBATCH --{option}={value}"
    return f'#SBATCH --{option}="' + re.sub(r'["\\]', r"\\\g<0>", value) + '"'


def log_folder(path: str) -> str:
    """A folder for `--output`, where sbatch replaces `%j` and its like and takes backslashes away, however quoted."""
    for character in "%\\":
        if character in path:
            raise ConfigError(
                f"{path!r} holds a {character}, which Slurm replaces in the path of a log: choose another run.dir"
            )
    return path
