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

import numpy as np

from diffusion.data.layout import check_lanes
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
        self._windows: dict[int, tuple[int, int, np.ndarray]] = {}  # lane -> epoch, first offset, samples of its window

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, sample), each int64 (k,), of places int64 (k,) in the endless stream; fast for neighbours."""
        batch, slot = np.divmod(np.asarray(places, dtype=np.int64), self.batch_size)
        share = self.batch_size // self.lanes
        lane, turn = slot // share, batch * share + slot % share  # the turn-th sample that the lane hands out
        # the epoch is the largest e with floor((e n + c) / C) <= turn
        epoch = (self.lanes * (turn + 1) - 1 - lane) // self.num_samples
        offset = turn - (epoch * self.num_samples + lane) // self.lanes
        breaks = (np.diff(lane) != 0) | (np.diff(epoch) != 0) | (np.diff(offset) != 1)
        starts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(offset)]
        sample = np.empty_like(offset)
        for start, stop in zip(starts[:-1], starts[1:], strict=True):  # runs of one lane along one epoch
            while start < stop:
                at = int(offset[start])
                first, window = self._window(int(epoch[start]), int(lane[start]), at)
                taken = window[at - first : at - first + stop - start]
                sample[start : start + len(taken)] = taken
                start += len(taken)
        return epoch, sample

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        """The shard's number for each sample number."""
        return np.searchsorted(self.first_sample, samples, side="right") - 1

    def _window(self, epoch: int, lane: int, offset: int) -> tuple[int, np.ndarray]:
        """The shuffled window of a lane's piece that holds `offset`: its first offset and its samples."""
        known = self._windows.get(lane)
        if known is None or known[0] != epoch or not 0 <= offset - known[1] < len(known[2]):
            if epoch not in self._epochs:
                for old in sorted(self._epochs)[:-3]:
                    del self._epochs[old]
                self._epochs[epoch] = _Epoch(self, epoch)
            known = self._windows[lane] = (epoch, *self._epochs[epoch].window(lane, offset))
        return known[1:]


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

    def window(self, lane: int, offset: int) -> tuple[int, np.ndarray]:
        """The window of the lane's piece around `offset`: its first offset and its samples, int64, shuffled."""
        plan, begin, end = self.plan, int(self.lane_begins[lane]), int(self.lane_begins[lane + 1])
        first, at, last = np.searchsorted(self.ends, (begin, begin + offset, end - 1), side="right").tolist()
        number = (at - first) // WINDOW
        pieces, opening = [], end
        for which in range(first + number * WINDOW, min(first + (number + 1) * WINDOW, last + 1)):
            shard, stop = self.shards[which], int(self.ends[which])
            start = stop - int(plan.counts[shard])  # of the shard, on the epoch's line
            inside = np.arange(max(start, begin), min(stop, end), dtype=np.int64)
            pieces.append(inside + (plan.first_sample[shard] - start))
            opening = min(opening, int(inside[0]))
        samples = np.concatenate(pieces)
        mixed = permutation(len(samples), plan.seed, Stream.SAMPLES, self.epoch, lane, number)
        return opening - begin, samples[mixed]


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
