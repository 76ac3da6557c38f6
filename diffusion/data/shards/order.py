"""The order of the samples: a place in the endless stream -> (epoch, sample). It is computed, not stored.

The order is a function of (seed, epoch, global batch, lanes) only. The rules, for n samples, batch size B and C lanes:

- C divides B. Slot j of a global batch belongs to lane floor(j C / B). A rank has neighbouring slots, and so
neighbouring
  lanes.
- Each epoch shuffles the shards and puts them in a row. After e epochs lane c has delivered floor((e n + c) / C)
samples.
  The sum over the lanes is e n (Hermite's identity). So the pieces of the lanes fill each epoch exactly, for any n, and
  no lane is more than one sample ahead. Lane c has the c-th piece, which is contiguous in the row of shards, so that
  all ranks together read each shard about once.
- With shards of unequal size, small shards are placed across the borders of the eighths of the lanes.
- Within its piece a lane shuffles the samples in windows of WINDOW shards.
- Each lane ends its epoch at its own place, so that one global batch can contain samples of two epochs. No sample is
  dropped, repeated or padded.

A look-up needs one permutation of the shards per epoch, and one permutation of the samples of a window per lane. Each
takes milliseconds, even for 1e8 samples, if a shard has about ten thousand samples. This module knows counts; it knows
no files and no ranks.
"""

from typing import NamedTuple

import numpy as np

from diffusion.data.shards.layout import check_lanes
from diffusion.noise import Stream, permutation

WINDOW = 4  # shards per window: a lane shuffles within a window, and uses its shards at the same time
PARTS = 8  # parts of an epoch whose borders should cut small shards only: 2, 4 or 8 ranks read these twice


class Plan:
    """The order of the endless stream of one split.

    Args:
        counts: number of samples of each shard, in the order of the index. Samples are numbered in this order.
        batch_size: B, images per global batch.
        lanes: C, a divisor of B.
        seed: seed of the run.

    Raises:
        ValueError: the number of lanes does not divide the batch size.
    """

    def __init__(self, counts: np.ndarray | list[int], batch_size: int, lanes: int, seed: int) -> None:
        check_lanes(lanes, batch_size)
        self.counts = np.asarray(counts, dtype=np.int64)
        assert self.counts.ndim == 1 and len(self.counts) and self.counts.min() > 0
        self.batch_size, self.lanes, self.seed = batch_size, lanes, seed
        self.first_sample = np.cumsum(self.counts) - self.counts
        self.num_samples = int(self.counts.sum())
        self._epochs: dict[int, _Epoch] = {}  # cache of the latest epochs
        self._windows: dict[int, _Window] = {}  # cache of the latest window of each lane

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the numbers of the samples at these places in the endless stream.

        The cost depends on the number of changes between lanes, so look up many batches in one call.

        Args:
            places: int64, any shape.

        Returns:
            epoch and sample, int64, in the shape of `places`.
        """
        places = np.asarray(places, dtype=np.int64)
        lane, turn = self._turns(places.ravel())
        by_lane = np.argsort(lane, kind="stable")
        lane, turn = lane[by_lane], turn[by_lane]
        # the epoch is the largest e with floor((e n + c) / C) <= turn
        epoch = (self.lanes * (turn + 1) - 1 - lane) // self.num_samples
        offset = turn - (epoch * self.num_samples + lane) // self.lanes
        breaks = (np.diff(lane) != 0) | (np.diff(epoch) != 0) | (np.diff(offset) != 1)
        starts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(offset)]
        sample = np.empty_like(offset)
        for start, stop in zip(starts[:-1], starts[1:], strict=True):  # consecutive samples of one lane in one epoch
            while start < stop:
                at = int(offset[start])
                window = self._window(int(epoch[start]), int(lane[start]), at)
                taken = window.samples[at - window.begin : at - window.begin + stop - start]
                sample[start : start + len(taken)] = taken
                start += len(taken)
        found = np.empty((2, len(by_lane)), dtype=np.int64)
        found[:, by_lane] = epoch, sample
        return found[0].reshape(places.shape), found[1].reshape(places.shape)

    def _turns(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lane of each place, and its turn: the place is sample number `turn` of its lane."""
        batch, slot = np.divmod(places, self.batch_size)
        share = self.batch_size // self.lanes
        return slot // share, batch * share + slot % share

    def ahead(self, places: np.ndarray) -> tuple[list[int], int]:
        """The shards that a rank will read, from its slots of one global batch.

        Args:
            places: the places of its slots, int64 (k,).

        Returns:
            The numbers of the shards: those of the current windows of its lanes, then those of the next windows. And
            the number of global batches after which the first lane reaches its next window.
        """
        present, coming, batches = {}, {}, []
        share = self.batch_size // self.lanes
        lanes, turns = self._turns(np.asarray(places, dtype=np.int64))
        for lane, first in zip(*np.unique(lanes, return_index=True), strict=True):
            turn = int(turns[first])
            epoch = int((self.lanes * (turn + 1) - 1 - lane) // self.num_samples)
            handed_out = int((epoch * self.num_samples + lane) // self.lanes)
            window = self._window(epoch, int(lane), turn - handed_out)
            present |= dict.fromkeys(window.shards)
            end = window.begin + len(window.samples)
            batches.append((end - (turn - handed_out) + share - 1) // share)
            length = self._epoch(epoch).length(int(lane))
            after = self._epoch(epoch).shards_around(int(lane), end) if end < length else None
            coming |= dict.fromkeys(after if after is not None else self._epoch(epoch + 1).shards_around(int(lane), 0))
        return [*present, *(shard for shard in coming if shard not in present)], min(batches)

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        """The number of the shard of each sample."""
        return np.searchsorted(self.first_sample, samples, side="right") - 1

    def _epoch(self, epoch: int) -> "_Epoch":
        if epoch not in self._epochs:
            for old in sorted(self._epochs)[:-3]:
                del self._epochs[old]
            self._epochs[epoch] = _Epoch(self, epoch)
        return self._epochs[epoch]

    def _window(self, epoch: int, lane: int, offset: int) -> "_Window":
        """The window of a lane's piece that contains `offset`."""
        known = self._windows.get(lane)
        if known is None or known.epoch != epoch or not 0 <= offset - known.begin < len(known.samples):
            known = self._windows[lane] = self._epoch(epoch).window(lane, offset)
        return known


class _Window(NamedTuple):
    """A window of up to WINDOW shards in a lane's piece of an epoch.

    begin: its first offset in the piece. samples: numbers of its samples, shuffled. shards: numbers of its shards.
    """

    epoch: int
    begin: int
    samples: np.ndarray
    shards: list[int]


class _Epoch:
    """The layout of one epoch: the shuffled shards in a row, and the places in it at which the lanes' pieces begin."""

    def __init__(self, plan: Plan, epoch: int) -> None:
        self.plan, self.epoch = plan, epoch
        lane = np.arange(plan.lanes, dtype=np.int64)
        handed_out = [(e * plan.num_samples + lane) // plan.lanes for e in (epoch, epoch + 1)]
        self.lane_begins = np.concatenate([[0], np.cumsum(handed_out[1] - handed_out[0])])
        assert self.lane_begins[-1] == plan.num_samples
        borders = self.lane_begins[np.arange(1, PARTS + 1) * plan.lanes // PARTS]
        self.shards = _lay_out(permutation(len(plan.counts), plan.seed, Stream.SHARDS, epoch), plan.counts, borders)
        self.ends = np.cumsum(plan.counts[self.shards])

    def length(self, lane: int) -> int:
        """Number of samples that the lane delivers in this epoch."""
        return int(self.lane_begins[lane + 1] - self.lane_begins[lane])

    def _places(self, lane: int, offset: int) -> tuple[int, range]:
        """The number of the lane's window that contains `offset`, and the places of its shards in the row."""
        begin, end = int(self.lane_begins[lane]), int(self.lane_begins[lane + 1])
        first, at, last = np.searchsorted(self.ends, (begin, begin + offset, end - 1), side="right").tolist()
        number = (at - first) // WINDOW
        return number, range(first + number * WINDOW, min(first + (number + 1) * WINDOW, last + 1))

    def shards_around(self, lane: int, offset: int) -> list[int]:
        """The shards of the lane's window that contains `offset`; [] if the lane delivers no samples."""
        return [int(self.shards[place]) for place in self._places(lane, offset)[1]] if self.length(lane) else []

    def window(self, lane: int, offset: int) -> _Window:
        """The lane's window that contains `offset`."""
        plan, begin, end = self.plan, int(self.lane_begins[lane]), int(self.lane_begins[lane + 1])
        number, places = self._places(lane, offset)
        pieces, opening = [], end
        for place in places:
            shard, stop = self.shards[place], int(self.ends[place])
            start = stop - int(plan.counts[shard])  # where the shard begins in the row of the epoch
            inside = np.arange(max(start, begin), min(stop, end), dtype=np.int64)
            pieces.append(inside + (plan.first_sample[shard] - start))
            opening = min(opening, int(inside[0]))
        samples = np.concatenate(pieces)
        mixed = permutation(len(samples), plan.seed, Stream.SAMPLES, self.epoch, lane, number)
        return _Window(self.epoch, opening - begin, samples[mixed], [int(self.shards[place]) for place in places])


def _lay_out(shuffled: np.ndarray, counts: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Put the shuffled shards in a row, with small ones across the borders.

    A shard that would cross the next border is postponed. The first later shard that fits goes before it; if none fits,
    the smallest one crosses the border.

    Args:
        borders: ascending places in the row; the last one is its end.
    """
    waiting, row, filled = shuffled, [], 0
    for border in borders.tolist():
        while filled < border:
            sizes = counts[waiting]
            ends = filled + np.cumsum(sizes)
            whole = int(np.searchsorted(ends, border, side="right"))  # number of shards that fit before the border
            if not whole:
                fitting = np.flatnonzero(filled + sizes <= border)
                chosen = fitting[0] if len(fitting) else np.argmin(sizes)
                waiting = np.concatenate([waiting[chosen : chosen + 1], np.delete(waiting, chosen)])
                whole = 1
            row.append(waiting[:whole])
            filled += int(counts[waiting[:whole]].sum())
            waiting = waiting[whole:]
    return np.concatenate(row)
