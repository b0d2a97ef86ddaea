"""The resolved plan: a pure function of config, world, data and hardware."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import Plan, resolve
from pretrain.config.load import parse
from pretrain.config.plan import DataFacts, Hardware, slice_bounds
from pretrain.errors import ConfigError

TEXT = """\
run: {dir: runs/x}
data: {train: {shards: data/train}}
model: {size: Ti, img_size: [48, 32], patch_size: [8, 4], num_classes: 10}
optim: {lr: 1e-3}
train: {global_batch: 64, total_steps: 10}
engine: {precision: auto}
"""
FACTS = DataFacts(samples=1000, shards=4, bytes=1000 * 2**10, digest="d" * 64)
WITH_BF16 = Hardware("cuda", "a GPU", has_bf16=True)
WITHOUT_BF16 = Hardware("cpu", "a CPU", has_bf16=False)


def plan(*overrides: str, world: int = 1, facts: DataFacts = FACTS, hardware: Hardware = WITH_BF16) -> Plan:
    return resolve(parse(TEXT, "x.yaml", overrides), world, facts, hardware)


@given(batch=st.integers(1, 5000), world=st.integers(1, 300), micro=st.integers(1, 64) | st.none())
def test_slices_cut_the_batch_and_micro_batches_hold_every_slice(
    batch: int, world: int, micro: int | None
) -> None:
    world = min(world, batch)
    resolved = plan(f"train.global_batch={batch}", f"train.micro_batch={micro or 'null'}", world=world)
    slices = [resolved.slice_of(rank) for rank in range(world)]
    assert slices[0][0] == 0
    assert slices[-1][1] == batch
    assert all(before[1] == after[0] for before, after in itertools.pairwise(slices))
    lengths = {stop - start for start, stop in slices}
    assert lengths == {resolved.smallest_slice, resolved.largest_slice}
    assert resolved.largest_slice - resolved.smallest_slice <= 1
    assert resolved.micro_batch * resolved.accumulation >= resolved.largest_slice
    assert resolved.micro_batch * (resolved.accumulation - 1) < resolved.largest_slice
    assert micro is None or resolved.micro_batch <= micro


@given(pairs=st.integers(1, 2500), world=st.integers(1, 300), micro=st.integers(2, 64) | st.none())
def test_with_mixing_no_slice_and_no_micro_batch_parts_a_pair(
    pairs: int, world: int, micro: int | None
) -> None:
    world = min(world, pairs)
    resolved = plan(
        f"train.global_batch={2 * pairs}",
        f"train.micro_batch={micro or 'null'}",
        "objective.mixup_alpha=0.8",
        world=world,
    )
    slices = [resolved.slice_of(rank) for rank in range(world)]
    assert all(edge % 2 == 0 for bounds in slices for edge in bounds)
    assert (slices[0][0], slices[-1][1]) == (0, 2 * pairs)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(slices))
    assert {stop - start for start, stop in slices} == {resolved.smallest_slice, resolved.largest_slice}
    assert 0 < resolved.smallest_slice <= resolved.largest_slice <= resolved.smallest_slice + 2
    assert resolved.micro_batch % 2 == 0
    assert micro is None or resolved.micro_batch <= micro
    assert resolved.micro_batch * (resolved.accumulation - 1) < resolved.largest_slice
    assert resolved.micro_batch * resolved.accumulation >= resolved.largest_slice


@pytest.mark.parametrize(
    ("given_sizes", "world", "named"),
    [
        (["train.global_batch=63"], 1, "train.global_batch 63"),
        (["train.global_batch=64"], 33, "at least 66"),
        (["train.global_batch=64", "train.micro_batch=1"], 2, "train.micro_batch 1"),
    ],
)
def test_a_batch_that_cannot_be_cut_into_pairs_is_refused_with_mixing_alone(
    given_sizes: list[str], world: int, named: str
) -> None:
    assert plan(*given_sizes, world=world).row_unit == 1
    for mixing in ("objective.mixup_alpha=0.8", "objective.cutmix_alpha=1.0"):
        with pytest.raises(ConfigError, match="pairs") as caught:
            plan(*given_sizes, mixing, world=world)
        assert named in str(caught.value)


def test_without_a_micro_batch_nothing_is_accumulated() -> None:
    resolved = plan(world=3)
    assert (resolved.micro_batch, resolved.accumulation) == (22, 1)


@pytest.mark.parametrize(("world", "micro"), [(1, 64), (3, 5), (4, 16), (5, 3), (64, 1)])
def test_the_loss_scale_makes_uneven_slices_the_mean_over_the_global_batch(world: int, micro: int) -> None:
    resolved = plan(f"train.micro_batch={micro}", world=world)
    losses = [float(position) for position in range(64)]
    per_rank = []
    for rank in range(world):
        start, stop = resolved.slice_of(rank)
        sums = [
            sum(losses[at : min(at + resolved.micro_batch, stop)])
            for at in range(start, start + resolved.micro_batch * resolved.accumulation, resolved.micro_batch)
        ]
        # What the engine does by itself: it adds up micro-steps here and takes the mean over ranks below.
        per_rank.append(sum(s * resolved.loss_scale for s in sums))
    assert sum(per_rank) / world == pytest.approx(sum(losses) / 64)


def test_a_batch_smaller_than_the_world_is_refused() -> None:
    assert plan(world=64).smallest_slice == 1
    with pytest.raises(ConfigError, match="global_batch 64 is smaller than the world of 65 ranks"):
        plan(world=65)


@pytest.mark.parametrize(
    ("batch", "lanes"), [(1, 1), (64, 64), (96, 96), (256, 256), (1000, 250), (257, 1), (4096, 256)]
)
def test_lanes_are_the_largest_divisor_of_the_batch_up_to_256(batch: int, lanes: int) -> None:
    assert plan(f"train.global_batch={batch}").lanes == lanes


def test_repeats_divide_the_batch_and_lanes_what_is_left() -> None:
    assert plan("data.augment.repeats=4").lanes == 16
    with pytest.raises(ConfigError, match=r"data\.augment\.repeats 3 does not divide train\.global_batch 64"):
        plan("data.augment.repeats=3")
    with pytest.raises(ConfigError, match=r"lanes 32 does not divide train\.global_batch 64 / .*repeats 4"):
        plan("data.augment.repeats=4", "data.lanes=32")


def test_given_lanes_divide_the_batch() -> None:
    assert plan("data.lanes=16").lanes == 16
    with pytest.raises(ConfigError, match=r"data\.lanes 7 does not divide train\.global_batch 64"):
        plan("data.lanes=7")


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_what_is_learned_does_not_depend_on_the_world(world: int) -> None:
    def learned(resolved: Plan) -> tuple[object, ...]:
        return (
            resolved.lanes,
            resolved.block_samples,
            resolved.total_steps,
            resolved.lr,
            resolved.global_batch,
        )

    assert learned(plan(world=world)) == learned(plan())


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ("total_steps=10", 10),
        ("total_epochs=1.0", 16),  # 1000 / 64 = 15.6
        ("total_epochs=32.0", 500),
        ("total_samples=64", 1),
        ("total_samples=65", 2),
    ],
)
def test_every_unit_of_length_becomes_whole_steps(length: str, steps: int) -> None:
    others = [f"train.{name}=null" for name in ("total_steps", "total_epochs", "total_samples")]
    resolved = plan(*others, f"train.{length}")
    assert resolved.total_steps == steps
    assert resolved.epochs == pytest.approx(steps * 64 / 1000)


@pytest.mark.parametrize(("warmup", "steps"), [("steps=3", 3), ("epochs=0.5", 8), ("samples=128", 2)])
def test_every_unit_of_warmup_becomes_whole_steps(warmup: str, steps: int) -> None:
    assert plan(f"optim.warmup_{warmup}").warmup_steps == steps


def test_a_warmup_longer_than_the_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="warm-up of 11 steps is longer than the training of 10 steps"):
        plan("optim.warmup_steps=11")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("precision", "hardware", "expected"),
    [
        ("fp32", WITH_BF16, "fp32"),
        ("auto", WITHOUT_BF16, "fp32"),
        ("auto", WITH_BF16, "bf16"),
        ("bf16", WITHOUT_BF16, "bf16"),
        ("bf16", WITH_BF16, "bf16"),
    ],
)
def test_precision_follows_the_hardware_and_stage_zero_never_uses_deepspeeds_bf16(
    stage: int, precision: str, hardware: Hardware, expected: str
) -> None:
    resolved = plan(f"engine.precision={precision}", f"engine.zero_stage={stage}", hardware=hardware)
    assert resolved.precision == ("bf16_autocast" if (stage, expected) == (0, "bf16") else expected)


def test_the_table_says_where_auto_took_the_precision_from() -> None:
    shown = dict(plan("engine.precision=auto", hardware=WITHOUT_BF16).table())["precision"]
    assert shown == "fp32 (auto: this hardware does not multiply bf16)"
    assert dict(plan("engine.precision=fp32").table())["precision"] == "fp32 (as set)"


def test_the_grid_is_rows_by_columns_and_tokens_count_the_prefix() -> None:
    assert (plan().grid, plan().num_tokens) == ((6, 8), 49)
    assert plan("model.global_pool=avg").num_tokens == 48


def test_a_block_is_as_many_samples_as_fill_its_bytes() -> None:
    assert plan("data.block_mib=1.0").block_samples == 1024  # samples of 1 KiB
    assert plan("data.block_mib=1e-6").block_samples == 1


def test_evaluation_and_checkpoints_come_at_the_end_where_no_interval_is_given() -> None:
    assert (plan().eval_every_steps, plan().save_every_steps) == (10, 10)
    given_intervals = plan("train.eval_every_steps=3", "checkpoint.every_steps=4")
    assert (given_intervals.eval_every_steps, given_intervals.save_every_steps) == (3, 4)


def test_the_table_has_a_row_for_each_fact_and_says_when_slices_are_uneven() -> None:
    rows = dict(plan(world=3).table())
    assert rows["per rank"] == "21 to 22 (uneven; losses are weighted)"
    assert rows["validation"] == "none"
    assert rows["training data"] == "1,000 samples in 4 shards, dddddddddddd"
    assert dict(plan().table())["per rank"] == "64"


def test_slice_bounds_need_no_plan() -> None:
    assert [slice_bounds(10, rank, 4) for rank in range(4)] == [(0, 2), (2, 5), (5, 7), (7, 10)]
