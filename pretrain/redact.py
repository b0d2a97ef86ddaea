"""Secrets out of what is shown or written down: by the name of a setting, and by the look of a value."""

import re

REDACTED = "***"

# Singular only: `num_tokens` is a count.
_SECRET_NAME = re.compile(
    r"(?:^|[^a-z0-9])(?:token|secret|passw(?:or)?d|passphrase|pwd|credentials?|auth|authorization|"
    r"(?:api|access|secret|private)[_-]?key)(?:$|[^a-z0-9])",
    re.IGNORECASE,
)

_SECRET_VALUES = [
    (re.compile(pattern, flags), replacement)
    for pattern, flags, replacement in (
        # scheme://user:password@host and scheme://token@host
        (r"(\b[a-z][a-z0-9+.\-]*://)[^/\s@'\"]+@", re.IGNORECASE, rf"\1{REDACTED}@"),
        # ...?token=, &X-Amz-Signature=, --password=, "api_key": "..."; but not prose, such as `hf_token: unknown key`
        (
            r"((?<![a-z0-9])(?:token|secret|passw(?:or)?d|passphrase|pwd|(?:api|access|secret|private)[_-]?key|"
            r"sig|signature|credential)[\"']?[ \t]*(?:=|:(?![ \t][a-z]{1,12} [a-z]))[ \t]*)"
            r"(?:[\"'][^\"']+[\"']|[^\s&\"',;}]+)",
            re.IGNORECASE,
            rf"\1{REDACTED}",
        ),
        (r"(\b(?:bearer|basic)\s+)[\w.~+/=\-]{8,}", re.IGNORECASE, rf"\1{REDACTED}"),
        (
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
            re.DOTALL,
            REDACTED,
        ),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", 0, REDACTED),  # AWS
        (r"\b(?:hf|gh[pousr]|github_pat|glpat|sk|xox[abprs]|npm|pypi)[_\-][\w\-]{16,}", 0, REDACTED),
        (r"\beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*", 0, REDACTED),  # JSON web token
    )
]


def redact_text(text: str) -> str:
    """`text` with everything that looks like a secret replaced."""
    for pattern, replacement in _SECRET_VALUES:
        text = pattern.sub(replacement, text)
    return text


def redact_setting(name: str, value: str) -> str:
    """The value of a setting, hidden whole where its name says that it is a secret."""
    if _SECRET_NAME.search(name) and value not in ("", "None"):
        return REDACTED
    return redact_text(value)
