"""Published sizes of the plain ViT, by name.

B, L, H: Dosovitskiy et al. 2020 (arXiv 2010.11929) table 1. Ti, S: Touvron et al. 2021 (arXiv 2012.12877) table 1.
g, G: Zhai et al. 2021 (arXiv 2106.04560) table 2. So400m: Alabdulmohsin et al. 2023 (arXiv 2305.13035).
"""

from typing import Literal, NamedTuple

SizeName = Literal["Ti", "S", "B", "L", "H", "g", "G", "So400m"]


class Size(NamedTuple):
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int


SIZES: dict[str, Size] = {
    "Ti": Size(192, 12, 3, 768),
    "S": Size(384, 12, 6, 1536),
    "B": Size(768, 12, 12, 3072),
    "L": Size(1024, 24, 16, 4096),
    "H": Size(1280, 32, 16, 5120),
    "g": Size(1408, 40, 16, 6144),
    "G": Size(1664, 48, 16, 8192),
    "So400m": Size(1152, 27, 16, 4304),
}
