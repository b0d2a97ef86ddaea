"""Copies of the weights that have to agree, and do not: memory or a link of a node went wrong, silently."""

from collections import Counter

from pretrain.distributed import Ranks
from pretrain.engine import Engine
from pretrain.errors import ReplicaError

MOST_NAMES = 5


def check_replicas(engine: Engine, ranks: Ranks, step: int) -> None:
    """Compare the weights that the forward pass uses over all ranks, which hold them whole at ZeRO stages 0 to 2.

    All ranks. Raises `ReplicaError` on each rank that differs from the most, or on all where there is no most, and
    `PeerError` on the others.
    """
    mine = engine.checksums()
    sums = ranks.gather(hash(tuple(mine.values())))  # of integers: the same in every process
    if len(set(sums)) == 1:
        return
    (most, count), (_, next_count) = Counter(sums).most_common(2)
    differing = [rank for rank, value in enumerate(sums) if value != most or count == next_count]
    theirs = ranks.gather(mine)
    reference = theirs[sums.index(most)] if count > next_count else theirs[0 if ranks.rank else 1]
    names = [name for name, value in mine.items() if value != reference[name]]
    with ranks.together():
        if ranks.rank in differing:
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            raise ReplicaError(
                f"rank {ranks.rank}: its copy of the weights differs at step {step}, in {', '.join(names[:MOST_NAMES])}"
                f"{more}; ranks that differ: {', '.join(map(str, differing))}.\n"
                "  The same numbers were added up everywhere: memory, the processor or a link of this node is at fault.\n"
                "  No checkpoint was made of it; the same command goes on from the last one, better without this node."
            )
