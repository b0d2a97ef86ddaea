"""What is compared: for each question its variants, and the runs that answer it. Pure: nothing is read or started here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).absolute().parents[2] / "configs" / "studies"


@dataclass(frozen=True)
class Variant:
    """One row of a table. shared: the run of another study, as study/variant, that is this one too and is not repeated;
    base: the one whose weights it starts from."""

    name: str
    overrides: tuple[str, ...] = ()
    shared: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class Study:
    """A question's variants; the first one is what the others are compared with.

    groups: names of variants that are alike in how much they vary, each group apart from the others; none: all are.
    copies: those that are nearly another one; see `statistics.compare`.
    """

    name: str
    variants: tuple[Variant, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    copies: tuple[str, ...] = ()

    @property
    def config(self) -> Path:
        return CONFIGS / f"{self.name}.yaml"

    @property
    def is_handoff(self) -> bool:
        return any(variant.base for variant in self.variants)


@dataclass(frozen=True)
class Setting:
    """How long the runs are, and how many seeds each variant gets. overrides: of runs that start from nothing; handoff: of
    those that start from one of them."""

    name: str
    seeds: int
    overrides: tuple[str, ...] = ()
    handoff: tuple[str, ...] = ()


SHORT = Setting("short", 3)
LONG = Setting(
    "long",
    3,
    overrides=("train.total_steps=1000", "optim.warmup_steps=80"),
    handoff=("train.total_steps=400", "optim.warmup_steps=40"),
)
_TWO_STEPS = ("train.total_steps=2", "optim.warmup_steps=1", "train.log_every_steps=1")
SMOKE = Setting("smoke", 1, overrides=_TWO_STEPS, handoff=_TWO_STEPS)

BASE = "position/learned_1d stem"

POSITION = Study(
    "position",
    (
        Variant("learned_1d stem"),
        Variant("none", ("model.pos_embed=none",)),
        *(
            Variant(f"{kind} {at}", (f"model.pos_embed={kind}", f"model.pos_embed_at={at}"))
            for kind in ("learned_1d", "learned_2d")
            for at in ("stem", "every_layer", "every_layer_shared")
            if (kind, at) != ("learned_1d", "stem")
        ),
        Variant("relative", ("model.pos_embed=relative", "model.pos_embed_at=every_layer")),
        Variant("sincos_2d_mae", ("model.pos_embed=sincos_2d_mae",)),
        Variant("sincos_2d_big_vision", ("model.pos_embed=sincos_2d_big_vision",)),
        Variant("rope_2d", ("model.pos_embed=rope_2d",)),
    ),
)

ACTIVATION = Study(
    "activation",
    (
        Variant("gelu", shared=BASE),
        *(Variant(act, (f"model.act={act}",)) for act in ("gelu_tanh", "relu", "elu", "silu")),
    ),
)

ORDER = Study(
    "order",
    (
        Variant("cls_then_pe", shared=BASE),
        Variant("pe_then_cls", ("model.pos_embed_order=pe_then_cls",)),
    ),
)

HANDOFF = Study(
    "handoff",
    (
        *(
            Variant(f"resize, {kernel}", (f"init.resize_kernel={kernel}",), base=BASE)
            for kernel in ("bicubic_antialias", "bicubic", "bilinear", "align_corners")
        ),
        Variant("reset", ("init.position=reset",), base=BASE),
        Variant("drop", ("init.position=drop",), base=BASE),
        Variant("no PE in either stage", ("model.pos_embed=none",), base="position/none"),
    ),
    # Kernels start from the same table, moved a little: a seed changes far less about them than about the others.
    groups=(
        ("resize, bicubic", "resize, bilinear", "resize, align_corners"),
        ("reset", "drop", "no PE in either stage"),
    ),
    copies=("drop",),  # a table of zeros is nearly one of N(0, 0.02)
)

STUDIES = {study.name: study for study in (POSITION, ACTIVATION, ORDER, HANDOFF)}


@dataclass(frozen=True)
class Run:
    """One training run: a variant with a seed, under a folder that holds all runs of a setting."""

    study: Study
    variant: Variant
    seed: int
    setting: Setting
    folder: Path

    @property
    def directory(self) -> Path:
        return directory(self.folder, f"{self.study.name}/{self.variant.name}", self.seed)

    @property
    def base(self) -> Path | None:
        return directory(self.folder, self.variant.base, self.seed) if self.variant.base else None

    @property
    def overrides(self) -> list[str]:
        """All that the run's config differs by from the file."""
        found = [f"run.dir={self.directory}", f"run.seed={self.seed}"]
        found.append(f"run.campaign=studies-{self.setting.name}-{self.study.name}")
        found += [*(self.setting.handoff if self.base else self.setting.overrides), *self.variant.overrides]
        return [*found, f"init.from={self.base}"] if self.base else found


def directory(folder: Path, path: str, seed: int) -> Path:
    """The run directory of study/variant."""
    study, variant = path.split("/")
    return folder / study / variant.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"


def runs_of(studies: Sequence[Study], setting: Setting, folder: Path) -> list[Run]:
    """Every run that the studies need, each once: seed by seed, so that a stop in between leaves whole pairs, and bases
    before what starts from them."""
    found: dict[Path, Run] = {}
    for seed in range(setting.seeds):
        for study in studies:
            for variant in study.variants:
                for path in (variant.base, variant.shared or f"{study.name}/{variant.name}"):
                    if path is not None:
                        run = _run(path, seed, setting, folder)
                        found.setdefault(run.directory, run)
    return list(found.values())


def _run(path: str, seed: int, setting: Setting, folder: Path) -> Run:
    owner, name = path.split("/")
    study = STUDIES[owner]
    variant = next(variant for variant in study.variants if variant.name == name)
    return Run(study, variant, seed, setting, folder)
