"""A copy of the run's checkpoints in another place, made beside training, and brought back when the run has none.

    URL/
      owner                          which run's checkpoints these are: a word that the run keeps too
      journal                        what the run logged, up to the time of the newest checkpoint or later
      latest, best                   as in the run directory
      step_00000800/rank_*.safetensors
      step_00000800/manifest.json    put last: without it there is no checkpoint

Rank 0's thread sends the journal, then the newest checkpoint, then the best, then takes away what the run does not keep any
more. Nothing that it meets reaches training: what fails is logged and counted, and tried again when the next checkpoint is there.
"""

import re
import secrets
import shutil
import threading
import time
from pathlib import Path

from pretrain.checkpoint import layout
from pretrain.checkpoint.layout import Manifest
from pretrain.checkpoint.load import damaged
from pretrain.checkpoint.place import MirrorError, Place
from pretrain.checkpoint.save import publish
from pretrain.config import CheckpointConfig
from pretrain.distributed import Ranks
from pretrain.documents import replace_file, sync_folder
from pretrain.errors import CheckpointError, UserError
from pretrain.logs import log

OWNER = "owner"
JOURNAL = "journal"
OWNER_FILE = "mirror"
"""In the run's checkpoints/: the word that `owner` holds."""
SMALL = 4096
_WORD = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"step_\d{8,}")


class Mirror:
    """Rank 0: keeps the copy. `wake` after each change of the run's checkpoints, `close` at the end.

    journal: a file that only ever grows, line by line, kept beside the checkpoints.
    """

    def __init__(self, run_dir: Path, url: str, journal: Path) -> None:
        self._run_dir, self._url, self._journal = run_dir, url, journal
        self._change = threading.Condition()
        self._asked, self._done = 0, 0
        self._closed = False
        self._busy: str | None = None
        self._place: Place | None = None
        self._undone_after: int | None = None
        self.failures = 0
        self._mirrored = 0
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """The run's checkpoints changed: bring the copy up to date. Returns at once."""
        with self._change:
            self._asked += 1
            self._change.notify_all()

    def go_back(self, step: int) -> None:
        """The run went back to this step: later checkpoints of the copy go too."""
        self._undone_after = step
        self.wake()

    def in_use(self) -> Path | None:
        """The checkpoint that is being sent, which must not be deleted meanwhile."""
        busy = self._busy
        return None if busy is None else self._run_dir / layout.FOLDER / busy

    def metrics(self) -> dict[str, float]:
        """Steps that the copy is behind the run's newest checkpoint, and how often bringing it up to date failed."""
        known = layout.checkpoints(self._run_dir)
        newest = layout.step_of(known[-1]) if known else 0
        return {
            "checkpoint/mirror_lag_steps": max(0, newest - self._mirrored),
            "checkpoint/mirror_failures": self.failures,
        }

    def close(self, seconds: float) -> None:
        """Wait for the copy to be up to date, at most so long; then give up, and say what it lacks."""
        deadline = time.monotonic() + seconds
        self.wake()  # the journal has grown since
        with self._change:
            while self._done < self._asked and (left := deadline - time.monotonic()) > 0:
                self._change.wait(left)
            behind, self._closed = self._done < self._asked, True
            self._change.notify_all()
        if self._place is not None:
            self._place.close()
        if behind:
            log.warning("%s: not up to date when the run ended; the next start goes on with it", self._url)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._done < self._asked)
                if self._closed:
                    return
                asked = self._asked
            try:
                self._update()
            except (UserError, OSError) as error:
                self.failures += 1
                log.warning("checkpoints are not mirrored: %s; tried again with the next one", error)
            except Exception as error:  # a bug of ours must not end a run that trains well
                self.failures += 1
                log.exception("checkpoints are not mirrored: %s", type(error).__name__)
            finally:
                self._busy = None
                with self._change:
                    self._done = asked
                    self._change.notify_all()

    def _update(self) -> None:
        if self._place is None:
            self._place = Place(self._url, self._run_dir)
        place, back = self._place, self._undone_after  # before anything that the run may change meanwhile
        local = layout.checkpoints(self._run_dir)
        newest = layout.pointer(self._run_dir, layout.LATEST)
        self._busy = None if newest is None else newest.name
        _own(place, self._run_dir, claims=newest is not None)
        if newest is None:
            return
        self._send_journal(place)  # first: a checkpoint that can be restored has the lines that led to it
        self._send(place, newest)
        place.put(f"{newest.name}\n".encode(), layout.LATEST)
        self._mirrored = layout.step_of(newest)
        best = layout.pointer(self._run_dir, layout.BEST)
        if best is not None and best in local:
            self._send(place, best)
            place.put(f"{best.name}\n".encode(), layout.BEST)
        self._prune(place, newest, back)

    def _send_journal(self, place: Place) -> None:
        """As it is at this moment: it grows while it is sent, and may end in half a line, which its reader knows of."""
        if not self._journal.is_file():
            return
        aside = self._journal.with_name(self._journal.name + ".sent")
        shutil.copyfile(self._journal, aside)
        place.put_file(aside, JOURNAL)
        aside.unlink()

    def _send(self, place: Place, folder: Path) -> None:
        """Let the copy hold this checkpoint, its manifest last."""
        self._busy = folder.name
        manifest, key = layout.read_manifest(folder), f"{folder.name}/{layout.MANIFEST}"
        text = (folder / layout.MANIFEST).read_bytes()
        there = _manifest_there(place, folder.name)
        if there is not None and layout.manifest_digest(there) == layout.manifest_digest(manifest):
            return
        if there is None or there.files != manifest.files:  # else it was amended: the slices are the same
            problems = damaged(folder, manifest, 0, 1)
            if problems:
                raise CheckpointError(f"{folder} is damaged ({'; '.join(problems)})")
            place.delete(key)
            for name, (size, _) in manifest.files.items():
                if self._closed:
                    raise MirrorError(f"{place.url}: the run ended while {folder.name} was sent")
                place.put_file(folder / name, f"{folder.name}/{name}")
                found = place.size(f"{folder.name}/{name}")
                if found != size:
                    raise MirrorError(
                        f"{place.url}/{folder.name}/{name}: {found} bytes arrived, {size} were sent"
                    )
        place.put(text, key)
        self._busy = None

    def _prune(self, place: Place, newest: Path, back: int | None) -> None:
        """Delete from the copy what the run deleted. `newest` is whole there by now, and stays.

        Later ones stay too, unless the run went `back`: another copy of the run may have come further.
        """
        kept = {folder.name for folder in layout.checkpoints(self._run_dir)} | {newest.name}
        gone: dict[str, list[str]] = {}
        for key in place.listed():
            name, _, file = key.partition("/")
            if file and _NAME.fullmatch(name) and name not in kept:
                gone.setdefault(name, []).append(file)
        for name, files in gone.items():
            step = int(name.removeprefix("step_"))
            if step < layout.step_of(newest) or (back is not None and step > back):
                for file in sorted(
                    files, key=lambda file: file != layout.MANIFEST
                ):  # it first: then there is none
                    place.delete(f"{name}/{file}")
        if self._undone_after == back:
            self._undone_after = None


def restore(run_dir: Path, url: str, ranks: Ranks, journal: Path) -> bool:
    """Bring the newest checkpoint that verifies back from the copy, and the best. All ranks, each fetching its share of
    the files.

    journal: where the copy of the journal is put, before there is a checkpoint: a kill between the two restores both again.
    Returns whether there was any; raises `CheckpointError` on all ranks where there are some and none verifies, or
    where the copy cannot be asked: to begin anew then would end with its being overwritten.
    """
    place: Place | None = None
    names: list[str] = []
    best = ""
    with ranks.together():
        place = Place(url, run_dir)
        if ranks.is_main:
            names = sorted(
                {key.partition("/")[0] for key in place.listed() if key.endswith(f"/{layout.MANIFEST}")},
                key=lambda name: (len(name), name),
                reverse=True,
            )
            names = [name for name in names if _NAME.fullmatch(name)]
            best = (place.read(layout.BEST, SMALL) or b"").decode(errors="replace").strip()
    names, best = ranks.broadcast((names, best))
    with ranks.together():
        if ranks.is_main and names:
            _restore_journal(place, journal)
    rejected = []
    for number, name in enumerate(names):
        problem = _restore_one(place, run_dir, name, ranks)
        if problem is None:
            log.info("restored %s from %s", name, place.url)
            if best in names[number + 1 :]:  # else the run no longer has it, and the copy would lose it too
                problem = _restore_one(place, run_dir, best, ranks)
                if problem and ranks.is_main:
                    log.warning("the best checkpoint is not restored: %s/%s: %s", place.url, best, problem)
            with ranks.together():
                if ranks.is_main:
                    layout.point(run_dir, layout.LATEST, run_dir / layout.FOLDER / name)
                    _adopt(place, run_dir)
            return True
        rejected.append(f"{place.url}/{name}: {problem}")
        if ranks.is_main:
            log.warning("passed over in the mirror: %s", rejected[-1])
    if rejected:
        raise CheckpointError(
            "none of the mirror's checkpoints can be restored:\n  " + "\n  ".join(rejected) + "\n"
            "Mend it, or set checkpoint.mirror to another place to start the run anew."
        )
    return False


def _restore_journal(place: Place, journal: Path) -> None:
    """There is none in a copy of an earlier release."""
    size = place.size(JOURNAL)
    if size is not None:
        aside = journal.with_name(journal.name + ".tmp")
        place.fetch(JOURNAL, aside, size)
        aside.replace(journal)
        sync_folder(journal.parent)


def _restore_one(place: Place, run_dir: Path, name: str, ranks: Ranks) -> str | None:
    """Fetch, verify and publish one checkpoint; what is wrong with it, the same on all ranks. All ranks."""
    folder = run_dir / layout.FOLDER / name
    aside = folder.with_name(name + ".tmp")
    manifest, problem = None, None
    if ranks.is_main:
        try:
            manifest = _manifest_there(place, name, strict=True)
            aside.mkdir(parents=True, exist_ok=True)
        except (UserError, OSError) as error:
            problem = str(error)
    manifest, problem = ranks.broadcast((manifest, problem))
    if manifest is None:
        return problem or "its manifest is missing"
    try:
        for file, (size, digest) in list(manifest.files.items())[ranks.rank :: ranks.size]:
            if place.fetch(f"{name}/{file}", aside / file, size) != digest:
                raise MirrorError(f"{file} does not match its sha256")
    except (UserError, OSError) as error:
        problem = str(error)
    problem = next(filter(None, ranks.gather(problem)), None)
    with ranks.together():
        if ranks.is_main and problem is None:
            publish(aside, folder, manifest)
    return problem


def _manifest_there(place: Place, name: str, *, strict: bool = False) -> Manifest | None:
    """The manifest of a checkpoint of the copy; None where there is none that can be used, unless `strict`."""
    where = f"{place.url}/{name}/{layout.MANIFEST}"
    text = place.read(f"{name}/{layout.MANIFEST}", layout.MAX_MANIFEST_BYTES)
    if text is None:
        return None
    try:
        manifest = layout.parse_manifest(text, where)
        if manifest.step != int(name.removeprefix("step_")):
            raise CheckpointError(f"{where} is of step {manifest.step}")
    except CheckpointError:
        if strict:
            raise
        return None
    return manifest


def _own(place: Place, run_dir: Path, *, claims: bool) -> None:
    """See that the copy is this run's, or nobody's yet; raises `MirrorError` where it is another's.

    claims: whether it becomes this run's by that. A copy without a checkpoint is nobody's: the run that began it is gone,
    its disk was wiped maybe, or is refused from now on.
    """
    file = run_dir / layout.FOLDER / OWNER_FILE
    ours = file.read_text().strip() if file.is_file() else None
    theirs = (place.read(OWNER, SMALL) or b"").decode(errors="replace").strip()
    if theirs and theirs == ours:
        return
    if theirs and place.read(layout.LATEST, SMALL) is not None:
        raise MirrorError(
            f"{place.url} mirrors another run, whose checkpoints would be deleted; "
            f"give this one a checkpoint.mirror of its own, or delete {place.url}/{OWNER} to hand it over"
        )
    if claims:
        ours = ours or secrets.token_hex(16)
        replace_file(file, ours + "\n")
        place.put(f"{ours}\n".encode(), OWNER)


def _adopt(place: Place, run_dir: Path) -> None:
    """Go on as the run whose checkpoints were restored."""
    word = (place.read(OWNER, SMALL) or b"").decode(errors="replace").strip()
    if _WORD.fullmatch(word):
        replace_file(run_dir / layout.FOLDER / OWNER_FILE, word + "\n")


def opened(run_dir: Path, config: CheckpointConfig, ranks: Ranks, journal: Path) -> Mirror | None:
    """Rank 0's mirror where the config names one; the others have none."""
    return Mirror(run_dir, config.mirror, journal) if ranks.is_main and config.mirror is not None else None
