"""The order of the samples: place in the endless stream -> (epoch, sample), computed and not stored.

It is a function of (seed, epoch, global batch, lanes) alone. The rules, for n samples, global batches of B, C lanes:

- C divides B, and slot j of a global batch belongs to lane floor(j C / B). A rank takes neighbouring slots, hence
  neighbouring lanes.
- Each epoch shuffles the shards and lays them end to end. After e epochs lane c has handed out floor((e n + c) / C)
  samples; these add up to e n (Hermite's identity), so the pieces of the lanes fill each epoch exactly, whatever n,
  and no lane is more than one sample ahead. Lane c takes the c-th piece, contiguous along the shuffled shards, so all
  ranks together read each shard about once.
- Shards of unequal size are laid so that small ones come to lie across the borders of the eighths of the lanes.
- Within its piece a lane shuffles the samples in windows of WINDOW shards.
- An epoch ends for each lane in turn, wherever that falls in a global batch: one batch may straddle two epochs.
  Nothing is dropped, repeated or padded.

Look-ups cost a permutation of the shards per epoch and one of a window's samples per lane, also among 1e8 samples:
milliseconds each, as long as a shard holds some ten thousand of them. This module knows counts, not files or ranks.
"""

from typing import NamedTuple

import numpy as np

from diffusion.data.shards.layout import check_lanes
from diffusion.noise import Stream, permutation

WINDOW = 4  # shards: how far a lane's samples are mixed, and how many shards of a lane are in use at a time
PARTS = 8  # of an epoch, whose borders cut small shards: what 2, 4 or 8 ranks read twice lies there


class Plan:
    """The endless stream of one split.

    Args:
        counts: samples of each shard, in the index's order; samples are numbered through in that order.
        batch_size: images of a global batch, B.
        lanes: C, a divisor of B.
        seed: of the run.

    Raises:
        ValueError: the lanes do not divide the batch.
    """

    def __init__(self, counts: np.ndarray | list[int], batch_size: int, lanes: int, seed: int) -> None:
        check_lanes(lanes, batch_size)
        self.counts = np.asarray(counts, dtype=np.int64)
        assert self.counts.ndim == 1 and len(self.counts) and self.counts.min() > 0
        self.batch_size, self.lanes, self.seed = batch_size, lanes, seed
        self.first_sample = np.cumsum(self.counts) - self.counts
        self.num_samples = int(self.counts.sum())
        self._epochs: dict[int, _Epoch] = {}  # the latest few
        self._windows: dict[int, _Window] = {}  # the latest of each lane

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, sample), each int64 and of the shape of `places`, int64 places in the endless stream.

        What costs is the number of times that lanes change from one ascending place to the next, so many batches are
        best asked for at once.
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
        for start, stop in zip(starts[:-1], starts[1:], strict=True):  # runs of one lane along one epoch
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
        """(lane, turn): the place is the turn-th sample that its lane hands out."""
        batch, slot = np.divmod(places, self.batch_size)
        share = self.batch_size // self.lanes
        return slot // share, batch * share + slot % share

    def ahead(self, places: np.ndarray) -> tuple[list[int], int]:
        """What a rank will read: (shards, batches), of its slots of one global batch, `places` int64 (k,).

        The shards are those of the windows that its lanes are in, then those of their next windows; the batches say
        after how many global batches the first lane comes to its next window.
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
        """The shard's number for each sample number."""
        return np.searchsorted(self.first_sample, samples, side="right") - 1

    def _epoch(self, epoch: int) -> "_Epoch":
        if epoch not in self._epochs:
            for old in sorted(self._epochs)[:-3]:
                del self._epochs[old]
            self._epochs[epoch] = _Epoch(self, epoch)
        return self._epochs[epoch]

    def _window(self, epoch: int, lane: int, offset: int) -> "_Window":
        """The window of a lane's piece that holds `offset`."""
        known = self._windows.get(lane)
        if known is None or known.epoch != epoch or not 0 <= offset - known.begin < len(known.samples):
            known = self._windows[lane] = self._epoch(epoch).window(lane, offset)
        return known


class _Window(NamedTuple):
    """Up to WINDOW shards of a lane's piece of an epoch: its first offset in the piece, its samples, shuffled."""

    epoch: int
    begin: int
    samples: np.ndarray
    shards: list[int]


class _Epoch:
    """One epoch laid out: the shuffled shards end to end, and where the lanes' pieces begin on that line."""

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
        """Samples that the lane hands out in this epoch."""
        return int(self.lane_begins[lane + 1] - self.lane_begins[lane])

    def _places(self, lane: int, offset: int) -> tuple[int, range]:
        """The number of the lane's window around `offset`, and the places of its shards on the line."""
        begin, end = int(self.lane_begins[lane]), int(self.lane_begins[lane + 1])
        first, at, last = np.searchsorted(self.ends, (begin, begin + offset, end - 1), side="right").tolist()
        number = (at - first) // WINDOW
        return number, range(first + number * WINDOW, min(first + (number + 1) * WINDOW, last + 1))

    def shards_around(self, lane: int, offset: int) -> list[int]:
        """The shards of the lane's window around `offset`; none if the lane hands out nothing."""
        return [int(self.shards[place]) for place in self._places(lane, offset)[1]] if self.length(lane) else []

    def window(self, lane: int, offset: int) -> _Window:
        """The lane's window around `offset`."""
        plan, begin, end = self.plan, int(self.lane_begins[lane]), int(self.lane_begins[lane + 1])
        number, places = self._places(lane, offset)
        pieces, opening = [], end
        for place in places:
            shard, stop = self.shards[place], int(self.ends[place])
            start = stop - int(plan.counts[shard])  # of the shard, on the epoch's line
            inside = np.arange(max(start, begin), min(stop, end), dtype=np.int64)
            pieces.append(inside + (plan.first_sample[shard] - start))
            opening = min(opening, int(inside[0]))
        samples = np.concatenate(pieces)
        mixed = permutation(len(samples), plan.seed, Stream.SAMPLES, self.epoch, lane, number)
        return _Window(self.epoch, opening - begin, samples[mixed], [int(self.shards[place]) for place in places])


def _lay_out(shuffled: np.ndarray, counts: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """The shuffled shards in a row, with small ones across the borders (ascending places on the row, the last its end).

    A shard that would cross the next border waits; the first of those behind it that fit go before, and when none does,
    the smallest crosses.
    """
    waiting, row, filled = shuffled, [], 0
    for border in borders.tolist():
        while filled < border:
            sizes = counts[waiting]
            ends = filled + np.cumsum(sizes)
            whole = int(np.searchsorted(ends, border, side="right"))  # so many fit one after another
            if not whole:
                fitting = np.flatnonzero(filled + sizes <= border)
                chosen = fitting[0] if len(fitting) else np.argmin(sizes)
                waiting = np.concatenate([waiting[chosen : chosen + 1], np.delete(waiting, chosen)])
                whole = 1
            row.append(waiting[:whole])
            filled += int(counts[waiting[:whole]].sum())
            waiting = waiting[whole:]
    return np.concatenate(row)
