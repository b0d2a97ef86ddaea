"""Which file system a path lies on: sqlite needs one whose locks hold, and those of a network rarely do."""

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")

_NETWORK = re.compile(
    r"nfs\d?|lustre|gpfs|cifs|smb\w*|beegfs(_\w+)?|ceph|glusterfs|panfs|wekafs|orangefs|pvfs2|afs|ncpfs|9p|daos|ocfs2|gfs2|"
    r"fuse\.(?!fuseblk|overlayfs|squashfuse)\w.*"
)


def network_filesystem(path: Path) -> str | None:
    """The kind of network file system, such as `nfs4`, that `path` lies on or would lie on; None for a local one."""
    real = path.resolve()
    best, kind = Path(), ""
    for line in MOUNTS.read_text(errors="replace").splitlines() if MOUNTS.is_file() else []:
        _, point, found, *_ = line.split(" ")
        place = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        if real.is_relative_to(place) and len(place.parts) >= len(
            best.parts
        ):  # the later mount covers the earlier
            best, kind = place, found
    return kind if _NETWORK.fullmatch(kind) else None


def sqlite_trouble(database: Path) -> str | None:
    """Why a sqlite file should not lie where it does, and what to do; None where it may."""
    kind = network_filesystem(database)
    if kind is None:
        return None
    return (
        f"{database} lies on a network file system ({kind}), whose locks sqlite cannot rely on: two processes that write "
        "at once may damage it. Run an MLflow server with the file on its own disk (launch/mlflow-server) and set "
        "tracking.uri to it"
    )
