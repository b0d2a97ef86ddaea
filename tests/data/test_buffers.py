"""No batch is overwritten while anybody can still see it, and memory is used again once nobody can."""

import gc
import threading
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from made import setting

from pretrain.batch import Batch
from pretrain.data import Dataset, resize
from pretrain.data.buffers import Ring
from pretrain.data.loader import EvalLoader, TrainLoader


def train_loader(dataset: Dataset, **options: object) -> TrainLoader:
    made = setting(dataset, **options)
    return TrainLoader(dataset, made.config.data, made.config.model, made.plan, seed=5, rank=0)


def test_two_tensors_in_use_never_share_memory():
    ring = Ring((4, 2), pinned=False, keep=2)
    held = [ring.take() for _ in range(10)]
    assert len({tensor.data_ptr() for tensor in held}) == 10


def test_memory_is_lent_again_when_its_last_tensor_is_gone():
    ring = Ring((4, 2), pinned=False, keep=2)
    first = ring.take()
    address = first.data_ptr()
    del first
    assert ring.take().data_ptr() == address


@pytest.mark.parametrize(
    "keep",
    [
        lambda tensor: tensor[1:2, 0],
        lambda tensor: tensor.numpy()[2:],
        lambda tensor: tensor.to(torch.device("cpu"), non_blocking=True),
        lambda tensor: torch.from_dlpack(tensor),
        lambda tensor: (torch.ones(4, 2, requires_grad=True) * tensor).sum().grad_fn,
    ],
    ids=["view", "numpy", "to the CPU", "dlpack", "saved for backward"],
)
def test_whatever_shares_a_tensors_memory_keeps_it_from_being_lent(keep):
    ring = Ring((4, 2), pinned=False, keep=2)
    tensor = ring.take()
    address = tensor.data_ptr()
    kept = keep(tensor)
    del tensor
    assert ring.take().data_ptr() != address
    del kept
    gc.collect()
    assert ring.take().data_ptr() == address


def test_no_more_memory_is_kept_than_was_said():
    ring = Ring((4, 2), pinned=False, keep=2)
    held = [ring.take() for _ in range(10)]
    del held
    assert len(ring._free) == 2


def snapshot(batch: Batch) -> Batch:
    return Batch(*(getattr(batch, name).clone() for name in ("images", "labels", "weights", "positions")))


def equal(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("images", "labels", "weights", "positions")
    )


@pytest.mark.parametrize("threads", [0, 2])
def test_batches_that_a_consumer_keeps_stay_what_they_were(train_set, threads):
    generator = np.random.default_rng(0)
    kept: list[tuple[Batch, Batch]] = []
    with train_loader(train_set, decode_threads=threads, prefetch_steps=3, micro_batch=5) as loader:
        for batches in islice(loader.steps(0), 60):
            kept += [(batch, snapshot(batch)) for batch in batches]
            generator.shuffle(kept)  # let go of some, in no order
            del kept[12:]
            assert all(equal(batch, before) for batch, before in kept)


def test_a_batch_outlives_its_loader(train_set):
    with train_loader(train_set, decode_threads=2) as loader:
        [batch] = next(loader.steps(0))
        before = snapshot(batch)
    assert equal(batch, before)


def test_a_loop_that_keeps_nothing_runs_in_the_memory_of_a_few_batches(train_set):
    with train_loader(train_set, decode_threads=2, prefetch_steps=2) as loader:
        addresses = {batches[0].images.data_ptr() for batches in islice(loader.steps(0), 50)}
    assert len(addresses) <= 5


def test_evaluation_may_keep_its_batches_too(val_set):
    made = setting(val_set, micro_batch=4, decode_threads=2)
    with EvalLoader(val_set, made.config.data, made.config.model, made.plan, rank=0) as loader:
        kept = [(batch, snapshot(batch)) for batch in loader]
    assert all(equal(batch, before) for batch, before in kept)


def test_decode_threads_compute_alone_and_the_callers_setting_stays(train_set, monkeypatch):
    seen: dict[str, int] = {}
    planes = resize._planes

    def spy(pixels):
        seen[threading.current_thread().name] = torch.get_num_threads()
        return planes(pixels)

    monkeypatch.setattr(resize, "_planes", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with train_loader(train_set, decode_threads=2) as loader:
            assert torch.get_num_threads() == 3
            next(loader.steps(0))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen
    assert set(seen.values()) == {1}
    assert all(name.startswith("decode") for name in seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory_is_not_lent_again_before_its_copy_has_passed():
    """The stream is kept busy, so that copies are still waiting when their batches are gone."""
    ring = Ring((64, 64, 64, 3), pinned=True, keep=2)
    device = torch.device("cuda")
    copies = []
    busy = torch.randn(4096, 4096, device=device)
    for number in range(20):
        for _ in range(10):
            busy = busy @ busy / 4096
        tensor = ring.take()
        assert tensor.is_pinned()
        tensor.fill_(number)
        copies.append(tensor.to(device, non_blocking=True))
        del tensor
    torch.cuda.synchronize()
    assert [int(copy.min()) for copy in copies] == [int(copy.max()) for copy in copies] == list(range(20))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_cuda_arrive_as_they_were_while_the_device_is_busy(train_set):
    made = setting(train_set, decode_threads=2)
    plan, device = replace(made.plan, device="cuda"), torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    arrived = []
    with TrainLoader(train_set, made.config.data, made.config.model, plan, seed=5, rank=0) as loader:
        for [batch] in islice(loader.steps(0), 30):
            for _ in range(10):
                busy = busy @ busy / 4096
            arrived.append(batch.to(device).images)
    with train_loader(train_set, decode_threads=0) as loader:
        for [expected], images in zip(loader.steps(0), arrived, strict=False):
            assert torch.equal(images.cpu(), expected.images)
