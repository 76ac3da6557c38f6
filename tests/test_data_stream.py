"""Batches as they come out of real loaders and a real Trainer: the same in every layout, and after every stop."""

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from numbered import BATCH, CLASSES, COUNT, Counted, global_batches, number_of, pixels, plan_of, take
from pytorch_lightning import LightningModule, Trainer

from diffusion.data.module import ImageShardsDataModule
from diffusion.data.sets import CelebAHQDataModule, CIFAR10DataModule, LSUNDataModule
from diffusion.data.shards.index import read_index, write_index
from diffusion.data.shards.layout import Layout
from diffusion.data.shards.order import Plan
from diffusion.data.shards.readers import LocalShards
from diffusion.data.shards.samples import Samples
from diffusion.data.shards.stream import StreamLoader
from diffusion.data.shards.writer import ShardWriter


@pytest.fixture(scope="module")
def uninterrupted(root):
    samples = Samples(read_index(root))
    numbers = plan_of(samples).locate(np.arange(5 * BATCH))[1]
    return torch.stack([torch.arange(5 * BATCH), torch.from_numpy(numbers)]).reshape(2, 5, BATCH)


# ---- the same batches in every layout ----


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks, accumulate", [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_loaders_make_the_same_global_batches_in_every_layout(root, uninterrupted, ranks, accumulate, workers):
    met = global_batches(Samples(read_index(root), cache="memory"), ranks, workers, steps=4, accumulate=accumulate)
    assert (met == uninterrupted[:, :4]).all()


@pytest.mark.parametrize("ranks", [3, 5, 6, 7])
def test_odd_numbers_of_ranks_too(root, uninterrupted, ranks):
    met = global_batches(Samples(read_index(root), cache="memory"), ranks, workers=0, steps=4)
    assert (met == uninterrupted[:, :4]).all()


def test_a_batch_has_the_types_it_promises(root, tmp_path):
    samples = Samples(read_index(root))
    batch = next(iter(StreamLoader(samples, plan_of(samples), Layout(BATCH))))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "image": (torch.uint8, (BATCH, 1, 2, 2)),
        "label": (torch.int64, (BATCH,)),
        "position": (torch.int64, (BATCH,)),
    }
    with ShardWriter(tmp_path, "unlabelled", image_size=2, channels=1, classes=0) as writer:
        for number in range(5):
            writer.write(pixels(number))
    samples = Samples(read_index(tmp_path))
    assert set(next(iter(StreamLoader(samples, plan_of(samples, 8, 1), Layout(8))))) == {"image", "position"}


# ---- stopping and going on ----


def test_resuming_on_other_ranks_loses_nothing_repeats_nothing_and_decodes_nothing_skipped(root):
    rng = np.random.default_rng(1)
    index, batch_size, total = read_index(root), 120, 60  # seven epochs
    stops = np.sort(rng.choice(np.arange(1, total), 7, replace=False)).tolist()
    whole = plan_of(Samples(index), batch_size)
    met = []
    for start, stop in itertools.pairwise([0, *stops, total]):
        samples, ranks = Counted(index), int(rng.choice([1, 2, 3, 4, 5, 6, 8]))
        met.append(global_batches(samples, ranks, 0, stop - start, start=start, batch_size=batch_size))
        assert len(samples.decoded) == (stop - start) * batch_size
        ahead = whole.locate(np.arange(start * batch_size, (stop + 1) * batch_size))[1]
        assert set(samples.decoded) <= set(ahead.tolist())
    positions, numbers = torch.cat(met, dim=1)
    assert (positions.ravel() == torch.arange(total * batch_size)).all()
    epoch, expected = whole.locate(np.arange(total * batch_size))
    assert (numbers.ravel().numpy() == expected).all()
    for e in range(7):
        assert sorted(numbers.ravel().numpy()[epoch == e]) == list(range(COUNT))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_start_in_order_at_any_step(root, uninterrupted, workers):
    samples = Samples(read_index(root))
    for start in (1, 2):
        met = global_batches(samples, 1, workers, steps=3, start=start)
        assert (met == uninterrupted[:, start : start + 3]).all()


# ---- what is read and decoded ----


def test_all_ranks_together_open_each_shard_about_once(tmp_path):
    rng = np.random.default_rng(2)
    with ShardWriter(tmp_path, "many", image_size=2, channels=1, classes=CLASSES, max_samples=1000) as writer:
        number = 0
        for shard in range(64):  # uneven shards: a change of split closes one
            for _ in range(int(rng.integers(5, 40))):
                writer.write(pixels(number), number % CLASSES, split=f"{shard}")
                number += 1
    index = read_index(tmp_path)
    index = replace(index, shards=tuple(replace(shard, split="train") for shard in index.shards))
    opened = []

    class Noting(LocalShards):
        def open(self, shard):
            opened.append(shard)
            return super().open(shard)

    batch_size = 64
    for ranks in (1, 2, 4, 8):
        opened.clear()
        for rank in range(ranks):
            samples = Samples(index, shards=Noting(index))
            plan = plan_of(samples, batch_size, lanes=64)
            in_epoch = plan.locate(np.arange(number + batch_size))[0] == 0
            places = [Layout(batch_size, rank, ranks).places(step) for step in range(-(-number // batch_size))]
            for place in np.concatenate(places):
                if in_epoch[place]:
                    samples[int(plan.locate(place[None])[1][0])]
        assert {shard.path for shard in opened} == {shard.path for shard in index.shards}
        assert sum(shard.bytes for shard in opened) <= 1.15 * sum(shard.bytes for shard in index.shards)


def test_few_files_stay_open(root, monkeypatch):
    monkeypatch.setattr("diffusion.data.shards.samples.OPEN_SHARDS", 3)
    samples = Samples(read_index(root))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(0, COUNT, 17):
        samples[number]
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 3  # a shard and its offsets
    del samples
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_cached_sample_is_decoded_once_and_not_every_epoch(root):
    index = read_index(root)
    for cache, limit, decodes in [("memory", 0, 1), ("auto", COUNT * 4, 1), ("auto", COUNT * 4 - 1, 3), ("none", 0, 3)]:
        samples = Counted(index, cache=cache, cache_bytes=limit)
        plan = plan_of(samples, batch_size=1, lanes=1)  # whose epochs end between two batches
        take(StreamLoader(samples, plan, Layout(1)), 3 * COUNT)
        assert len(samples.decoded) == decodes * COUNT


def test_workers_share_the_cache(root):
    samples = Counted(read_index(root), cache="memory")
    take(StreamLoader(samples, plan_of(samples), Layout(BATCH), num_workers=2), 4)
    samples_in_two_batches = set(plan_of(samples).locate(np.arange(4 * BATCH))[1].tolist())
    for number in samples_in_two_batches:
        image, label = samples[number]
        assert (image == pixels(number)).all() and label == number % CLASSES
    assert samples.decoded == []  # here: the workers did


def test_workers_ignore_the_signals_that_stop_the_trainer(root):
    samples = Samples(read_index(root))
    before = set(multiprocessing.active_children())
    loader = iter(StreamLoader(samples, plan_of(samples, 24), Layout(24), num_workers=1))
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.pid, number)
    positions = torch.cat([next(loader)["position"] for _ in range(10)])
    assert (positions == torch.arange(24, 11 * 24)).all() and worker.is_alive()


# ---- stopping and going on, at random ----


class Watched(LocalShards):
    """Shards that note which ones are opened."""

    def __init__(self, index):
        super().__init__(index)
        self.opened = []

    def open(self, shard):
        self.opened.append(self.index.shards.index(shard))
        return super().open(shard)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """48 shards of 20 to 60 samples."""
    root, rng, number = tmp_path_factory.mktemp("uneven"), np.random.default_rng(0), 0
    with ShardWriter(root, "uneven", image_size=2, channels=1, classes=CLASSES) as writer:
        for split in range(48):  # a change of split closes a shard
            for _ in range(int(rng.integers(20, 61))):
                writer.write(pixels(number), number % CLASSES, split=f"{split}")
                number += 1
    index = read_index(root)
    write_index(replace(index, shards=tuple(replace(shard, split="train") for shard in index.shards)))
    return root


@pytest.mark.parametrize("case", [*range(10), *(pytest.param(case, marks=pytest.mark.slow) for case in range(10, 50))])
def test_a_random_stop_loses_and_repeats_nothing_and_looks_no_further_than_it_must(uneven, case):
    """Stop at any step, go on with another number of ranks: the very next samples. Until a rank has its first batch it
    opens no shard but those of the windows that its lanes are in and of their next ones; nothing skipped is decoded."""
    rng, index, batch_size = np.random.default_rng(case), read_index(uneven), 120
    before, after = (int(rng.choice([1, 2, 3, 4, 5, 6, 8])) for _ in range(2))
    lanes, accumulate = int(rng.choice([1, 2, 4, 8])), int(rng.choice([1, 5]))
    stop = int(rng.integers(1, 40))
    whole = Plan([shard.samples for shard in index.shards], batch_size, lanes, seed=case)
    met = []
    for ranks, first, steps in ((before, 0, stop), (after, stop, 5)):
        parts = []
        for rank in range(ranks):
            layout = Layout(batch_size, rank, ranks, accumulate if batch_size % (ranks * accumulate) == 0 else 1)
            shards = Watched(index)
            samples = Counted(index, shards=shards)
            plan = Plan(samples.counts, batch_size, lanes, seed=case)
            loader = iter(StreamLoader(samples, plan, layout, first * layout.accumulate))
            allowed, _ = whole.ahead(layout.slots(first))
            batches = [next(loader)]
            assert set(shards.opened) <= set(allowed)
            batches += take(loader, steps * layout.accumulate - 1)
            assert len(samples.decoded) == steps * layout.accumulate * layout.micro_batch_size
            mine = [whole.locate(layout.slots(step))[1] for step in range(first, first + steps)]
            assert sorted(samples.decoded) == sorted(np.concatenate(mine).tolist())
            parts.append(torch.cat([number_of(batch["image"]) for batch in batches]).view(steps, -1))
        met.append(torch.cat(parts, dim=1).ravel())
    expected = whole.locate(np.arange((stop + 5) * batch_size))[1]
    assert (torch.cat(met).numpy() == expected).all()


@pytest.mark.slow
@pytest.mark.parametrize("count, batch_size", [(10_000, 840), (9_973, 840), (10_000, 64)])
def test_ten_thousand_samples_in_every_layout_for_three_epochs(tmp_path, count, batch_size):
    with ShardWriter(tmp_path, "numbered", image_size=2, channels=1, classes=CLASSES, max_samples=211) as writer:
        for number in range(count):
            writer.write(pixels(number), number % CLASSES)
    samples, steps = Samples(read_index(tmp_path), cache="memory"), -(-3 * count // batch_size)
    epoch, expected = plan_of(samples, batch_size).locate(np.arange(steps * batch_size))
    for e in range(3):
        assert sorted(expected[epoch == e]) == list(range(count))
    for ranks, workers in itertools.product((1, 2, 4, 8), (0, 1, 3)):
        met = global_batches(samples, ranks, workers, steps, batch_size=batch_size)
        assert (met[1].ravel().numpy() == expected).all()


# ---- the data module and the Trainer ----


class Noting(LightningModule):
    """A model of one number that notes the batches it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.positions, self.numbers = [], []

    def training_step(self, batch, batch_idx):
        self.positions.append(batch["position"].clone())
        self.numbers.append(number_of(batch["image"]))
        return self.weight * batch["image"].float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(root, folder, max_steps, workers, accumulate, resume):
    module = Noting()
    trainer = Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    data = ImageShardsDataModule(root, batch_size=120, seed=3, lanes=8, num_workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data, ckpt_path=folder / "last.ckpt" if resume else None)
    trainer.save_checkpoint(folder / "last.ckpt")
    assert trainer.global_step == max_steps
    return torch.cat(module.positions), torch.cat(module.numbers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_goes_on_with_the_very_next_sample(root, tmp_path, workers):
    parts = [fit(root, tmp_path, stop, workers, accumulate=2, resume=stop > 5) for stop in (5, 12, 20)]  # 2 epochs
    positions, numbers = (torch.cat(part) for part in zip(*parts, strict=True))
    assert (positions == torch.arange(20 * 120)).all()
    expected = plan_of(Samples(read_index(root)), 120).locate(np.arange(20 * 120))[1]
    assert (numbers.numpy() == expected).all()


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_gets_its_slots_from_the_trainers_step_on(root, rank):
    data = ImageShardsDataModule(root, batch_size=120)
    data.trainer = trainer = SimpleNamespace(
        global_rank=rank,
        world_size=4,
        accumulate_grad_batches=3,
        global_step=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    loader = data.train_dataloader()
    trainer.global_step = 7  # restored after the loader was made, before it is iterated over
    positions = torch.cat([batch["position"] for batch in take(loader, 6)])
    assert (positions == torch.cat([torch.arange(30) + step * 120 + rank * 30 for step in (7, 8)])).all()


def test_the_data_module_tells_what_the_index_says(root):
    data = ImageShardsDataModule(root, batch_size=96, flip=True)
    assert (data.num_images, data.image_size, data.channels, data.num_classes) == (COUNT, 2, 1, CLASSES)
    assert data.lanes == 8 and data.flip and data.plan().num_samples == COUNT  # 11 shards
    assert ImageShardsDataModule(root, batch_size=96, lanes=3).lanes == 3


@pytest.mark.parametrize(
    "setting, complaint",
    [
        (dict(batch_size=0), r"data\.batch_size=0"),
        (dict(batch_size=96, lanes=5), r"data\.lanes=5"),
        (dict(batch_size=96, lanes=0), r"data\.lanes=0"),
        (dict(batch_size=96, num_workers=-1), r"data\.num_workers=-1"),
        (dict(batch_size=96, cache="disk"), r"data\.cache=disk"),
        (dict(batch_size=96, on_bad_sample="ignore"), r"data\.on_bad_sample=ignore must be one of error, skip"),
        (dict(batch_size=96, max_bad_share=1.5), r"data\.max_bad_share=1\.5"),
        (
            dict(batch_size=96, remote={"cache": "x"}),
            r"data\.remote\.cache is not a setting.* are attempts, timeout, folder",
        ),
        (dict(batch_size=96, remote={"attempts": 0}), r"data\.remote\.attempts=0"),
        (dict(batch_size=96, remote={"timeout": 0}), r"data\.remote\.timeout=0"),
    ],
)
def test_settings_out_of_range_are_named(root, setting, complaint):
    with pytest.raises(ValueError, match=complaint):
        ImageShardsDataModule(root, **setting)


def test_a_data_module_for_one_data_set_refuses_another(root):
    for kind, complaint in (
        (CIFAR10DataModule, "CIFAR10DataModule needs a set with image_size=32, but this one has image_size=2"),
        (LSUNDataModule, "LSUNDataModule needs a set with channels=3, but this one has channels=1"),
        (CelebAHQDataModule, "channels=3"),
    ):
        with pytest.raises(ValueError, match=complaint):
            _ = kind(root, batch_size=8).index


def test_the_set_a_run_was_begun_with_is_known_again(root, tmp_path):
    digest = ImageShardsDataModule(root, batch_size=8).index.digest
    assert ImageShardsDataModule(shutil.copytree(root, tmp_path / "moved"), 8, digest=digest).index.digest == digest
    with ShardWriter(tmp_path / "other", "numbered", image_size=2, channels=1, classes=CLASSES) as writer:
        for number in range(COUNT):
            writer.write(pixels(number), (number + 1) % CLASSES)
    with pytest.raises(ValueError, match=r"data\.root=.* holds another data set .*data\.digest="):
        _ = ImageShardsDataModule(tmp_path / "other", 8, digest=digest).index


def test_a_trainer_the_batch_does_not_divide_by_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"data\.batch_size=120 .*trainer\.accumulate=7.*=119 or .*=126"):
        fit(root, tmp_path, 5, 0, accumulate=7, resume=False)


def test_a_program_ends_though_a_loader_is_still_in_use(root):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from numbered import *
samples = Samples(read_index({str(root)!r}))
batches = iter(StreamLoader(samples, plan_of(samples), Layout(BATCH), num_workers=2))
print(len(next(batches)["image"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{BATCH}\n"), done.stderr
