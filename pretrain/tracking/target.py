"""Where a run is tracked: the URI of a configuration made whole, or refused."""

from pathlib import Path
from urllib.parse import urlsplit

from pretrain.errors import ConfigError

_SQLITE = "sqlite:///"


def resolve_uri(uri: str) -> str:
    """`uri` as the drainer and MLflow's page can both use it from any directory.

    A relative sqlite path is taken from the current directory. Raises `ConfigError` for a URI that carries a user
    or a password (they would land in logs and pages) and for stores that are not supported.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ConfigError(f"tracking.uri is not a URI: {error}") from None
    if "@" in parts.netloc:
        raise ConfigError(
            f"tracking.uri holds a user or a password ({parts.scheme}://***@...): leave it out of the URI and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"tracking.uri {uri.split('?')[0]!r} must not have a query or a fragment (? or #)")
    if parts.scheme in ("http", "https") and parts.hostname:
        return uri.rstrip("/")
    if uri.startswith(_SQLITE) and uri != _SQLITE:
        return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).absolute())
    raise ConfigError(
        f"tracking.uri {uri!r} is not supported: use sqlite:///path/to/mlflow.db, http://host:port, "
        "https://host, or null for the journal alone"
    )


def sqlite_path(uri: str) -> Path | None:
    """The database file of a resolved URI; None for a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None
