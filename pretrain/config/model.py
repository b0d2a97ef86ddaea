"""The settings of the network: all that its shape and its numbers depend on beside the weights."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pretrain.config.section import NonNegative, Positive, Section
from pretrain.config.sizes import SIZES, SizeName

PosEmbed = Literal[
    "none",
    "learned_1d",
    "learned_2d",
    "relative",
    "sincos_2d_mae",
    "sincos_2d_big_vision",
    "rope_2d",
]


class ModelConfig(Section):
    """A plain ViT. Names are timm's where timm has one."""

    size: SizeName | None = Field(None, description="width, depth, heads and MLP of a published size")
    embed_dim: Positive | None = Field(None, description="width D of a token; from `size` or given")
    depth: Positive | None = Field(None, description="number of blocks; from `size` or given")
    num_heads: Positive | None = Field(None, description="attention heads; from `size` or given")
    mlp_dim: Positive | None = Field(None, description="width of the MLP; from `size` or given")
    img_size: tuple[Positive, Positive] = Field(description="image (height, width) in pixels")
    patch_size: tuple[Positive, Positive] = Field(description="patch (height, width) in pixels")
    in_chans: Literal[1, 3] = Field(3, description="1: greyscale, 3: RGB; images are converted")
    num_classes: Positive = Field(description="classes K of the head")
    global_pool: Literal["token", "avg", "norm_avg", "map"] = Field(
        "token",
        description="what the head sees: the cls token; the mean of the patches, normalised after or (norm_avg) before; "
        "or attention pooling",
    )
    num_registers: NonNegative = Field(
        0, description="learned tokens behind the cls token that no head reads (arXiv 2309.16588)"
    )
    pos_embed: PosEmbed = Field("learned_1d", description="kind of position embedding: see docs/model.md")
    pos_embed_at: Literal["stem", "every_layer", "every_layer_shared"] = Field(
        "stem",
        description="where a learned one acts: before block 0, in each block by a table of its own, or by one for all",
    )
    pos_embed_order: Literal["cls_then_pe", "pe_then_cls"] = Field(
        "cls_then_pe",
        description="paper: cls token and registers come first and have positions; DeiT-3: they come after and have none",
    )
    rope_reference_grid: tuple[Positive, Positive] | None = Field(
        None,
        description="rope_2d: patches (rows, columns) that the coordinates are stretched to; none: the model's own grid",
    )
    act: Literal["gelu", "gelu_tanh", "relu", "elu", "silu", "swiglu"] = Field(
        "gelu",
        description="of the MLP: gelu_tanh approximates GELU; swiglu: SiLU-gated, with a third matrix of mlp_dim",
    )
    qk_norm: bool = Field(False, description="LayerNorm of each head's queries and keys (arXiv 2302.05442)")
    layer_scale: Annotated[float, Field(gt=0)] | None = Field(
        None, description="first value of LayerScale's factors (arXiv 2103.17239); none: no LayerScale"
    )
    representation_size: Positive | None = Field(
        None, description="width of the paper's tanh layer before the head; none: the head is one linear map"
    )
    head_bias: float = Field(
        0.0, description="first value of the head's bias; -6.9 to -10 suits objective.name sigmoid"
    )
    norm_eps: Annotated[float, Field(gt=0)] = Field(1e-6, description="epsilon of LayerNorm")
    dropout_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0,
        description="dropout at the paper's places: after PE and after every dense layer but qkv and head",
    )
    drop_path_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="stochastic depth of the last block, per sample; rises linearly from 0 at the first"
    )
    mean: tuple[float, ...] = Field(
        (0.5,), description="subtracted from pixels in [0, 1]; one value or one a channel"
    )
    std: tuple[float, ...] = Field((0.5,), description="divides pixels in [0, 1]; one value or one a channel")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        # Behind a validator like this one pydantic takes JSON's arrays for lists, and strictly no tuple is a list.
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if settings.get("size") not in SIZES:
            return settings
        size = SIZES[settings["size"]]._asdict()
        for name, number in size.items():
            given = settings.get(name)
            if given is not None and given != number:
                raise ValueError(
                    f"size {settings['size']} means {name} {number}, but {name} {given} is given; drop one"
                )
        return settings | size

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        missing = [n for n in ("embed_dim", "depth", "num_heads", "mlp_dim") if getattr(self, n) is None]
        if missing:
            raise ValueError(
                f"give `size` ({', '.join(SIZES)}) or all of embed_dim, depth, num_heads, mlp_dim; "
                f"missing: {', '.join(missing)}"
            )
        if self.width % self.heads:
            raise ValueError(f"embed_dim {self.width} is not divisible by num_heads {self.heads}")
        for axis, image, patch in zip(("height", "width"), self.img_size, self.patch_size, strict=True):
            if image % patch:
                raise ValueError(f"img_size {axis} {image} is not a multiple of patch_size {axis} {patch}")
        self._check_position()
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.in_chans):
                raise ValueError(f"{name} has {len(getattr(self, name))} values; give 1 or {self.in_chans}")
        if min(self.std) <= 0:
            raise ValueError(f"std {list(self.std)} must be above 0")
        return self

    def _check_position(self) -> None:
        kind, at = self.pos_embed, self.pos_embed_at
        parts, what, size = {
            "learned_2d": (2, "embed_dim", self.width),
            "sincos_2d_mae": (4, "embed_dim", self.width),
            "sincos_2d_big_vision": (4, "embed_dim", self.width),
            "rope_2d": (4, "the width of a head", self.width // self.heads),
        }.get(kind, (1, "", 0))
        if size % parts:
            raise ValueError(f"pos_embed {kind} needs {what} to be a multiple of {parts}; it is {size}")
        if kind == "sincos_2d_big_vision" and self.width < 8:
            raise ValueError(f"pos_embed {kind} needs embed_dim of at least 8; it is {self.width}")
        if kind == "relative" and at == "stem":
            raise ValueError(
                "pos_embed relative acts inside attention, not at the stem: "
                "add pos_embed_at every_layer (a table for each block) or every_layer_shared"
            )
        if at != "stem" and not (self.has_position_table or kind == "relative"):
            raise ValueError(
                f"pos_embed_at {at} is for learned kinds; pos_embed {kind} has no table: leave it out"
            )

    @property
    def width(self) -> int:
        return self.embed_dim or 0

    @property
    def heads(self) -> int:
        return self.num_heads or 0

    @property
    def num_blocks(self) -> int:
        return self.depth or 0

    @property
    def mlp_width(self) -> int:
        return self.mlp_dim or 0

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def has_cls_token(self) -> bool:
        """Whether there is a cls token: where the head reads it."""
        return self.global_pool == "token"

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the cls token, then the registers."""
        return int(self.has_cls_token) + self.num_registers

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    @property
    def has_position_table(self) -> bool:
        """Whether positions are learned vectors that are added to tokens."""
        return self.pos_embed in ("learned_1d", "learned_2d")

    @property
    def num_pos_prefix(self) -> int:
        """Rows of a learned position table that belong to prefix tokens."""
        if not self.has_position_table or self.pos_embed_order == "pe_then_cls":
            return 0
        return self.num_prefix_tokens
