"""Secrets out of what is shown or written down: by the name of a setting, and by the look of a value."""

import re

REDACTED = "***"

# Singular only: `num_tokens` is a count. Weights of a ViT are called `cls_token` and the like.
_NO_WEIGHT = r"(?<!cls_)(?<!reg_)(?<!mask_)(?<!dist_)"
# As one word too, as in PGPASSWORD or accessToken.
_JOINED = r"[a-z0-9]*passw(?:or)?d|(?:access|api|auth|client|hf|id|refresh|session|shared)(?:token|secret)"
_SECRET_NAME = re.compile(
    rf"(?:^|[^a-z0-9]){_NO_WEIGHT}(?:token|secret|{_JOINED}|passphrase|pwd|credentials?|auth|authorization|"
    r"(?:api|access|secret|private)[_-]?key)(?:$|[^a-z0-9])",
    re.IGNORECASE,
)

_SECRET_VALUES = [
    (re.compile(pattern, flags), replacement)
    for pattern, flags, replacement in (
        # scheme://user:password@host and scheme://token@host
        (r"(\b[a-z][a-z0-9+.\-]*://)[^/\s'\"]+@", re.IGNORECASE, rf"\1{REDACTED}@"),
        # ...?token=, &X-Amz-Signature=, --password=, "api_key": "..."; but not prose, such as `hf_token: unknown key`
        (
            rf"((?<![a-z0-9]){_NO_WEIGHT}(?:token|secret|{_JOINED}|passphrase|pwd|(?:api|access|secret|private)[_-]?key|"
            r"sig|signature|credentials?)[\"']?[ \t]*(?:=|:(?![ \t][a-z]{1,12} [a-z]))[ \t]*)"
            r"(?:[\"'][^\"']+[\"']|[^\s&\"',;}]+)",
            re.IGNORECASE,
            rf"\1{REDACTED}",
        ),
        (r"(\bbearer\s+)[\w.~+/=\-]{8,}", re.IGNORECASE, rf"\1{REDACTED}"),
        # any other scheme of such a header; prose has no figure in its second word
        (
            r"(\bauthorization[\"']?[ \t]*:[ \t]*[\"']?(?:\w+[ \t]+)?)(?=\S*[0-9])[^\s\"',]{6,}",
            re.IGNORECASE,
            rf"\1{REDACTED}",
        ),
        # with a figure or padding in it: `basic augmentation` is no header
        (r"(\bbasic\s+)(?=\S*[0-9=])[\w.~+/=\-]{8,}", re.IGNORECASE, rf"\1{REDACTED}"),
        (
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
            re.DOTALL,
            REDACTED,
        ),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", 0, REDACTED),  # AWS
        # as Hugging Face, GitHub, npm, GitLab, Slack, PyPI and others mark theirs; `hf-vit-base-patch16-224` is a folder
        (r"\b(?:hf|gh[pousr]|npm)_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}", 0, REDACTED),
        (r"\b(?:glpat|xox[abprs]|pypi)-[\w\-]{16,}", 0, REDACTED),
        (r"\bsk-(?=[\w\-]*[0-9])(?=[\w\-]*[A-Z])[\w\-]{20,}", 0, REDACTED),
        (r"\beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*", 0, REDACTED),  # JSON web token
    )
]


def redact_text(text: str) -> str:
    """`text` with everything that looks like a secret replaced."""
    for pattern, replacement in _SECRET_VALUES:
        text = pattern.sub(replacement, text)
    return text


def printable(text: str) -> str:
    """For a terminal: names of files, classes and samples may hold its commands, or what is no text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def redact_setting(name: str, value: str) -> str:
    """The value of a setting, hidden whole where its name says that it is a secret."""
    if _SECRET_NAME.search(name) and value not in ("", "None"):
        return REDACTED
    return redact_text(value)
