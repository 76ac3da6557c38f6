"""Fingerprints: any other bit is another digest, a run's log is exact, and two runs part where they part."""

import shutil

import numpy as np
import pytest
import torch
from conftest import inside

from diffusion.build import door
from diffusion.distributed.place import Place
from diffusion.files import sha256_of
from diffusion.noise import key
from diffusion.training.fingerprint import digest, digest_of_batch
from diffusion.training.fingerprint_log import HEADER, PARTS, Difference, compare, cut_after, line, log_path, logs, read

CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PLACE = Place(CPU, "32", torch.contiguous_format)
MASK = (1 << 64) - 1


def of(*tensors: torch.Tensor) -> int:
    return int(digest({f"{i:02d}": t for i, t in enumerate(tensors)}, CPU))


# ---- digests ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.uint8])
def test_every_flipped_bit_gives_another_digest(dtype):
    tensor = torch.arange(1, 8).to(dtype)
    seen = {of(tensor)}
    for place in range(tensor.nbytes):
        for bit in range(8):
            other = tensor.clone()
            other.view(torch.uint8)[place] ^= 1 << bit
            seen.add(of(other))
    assert len(seen) == 1 + 8 * tensor.nbytes


def test_every_pair_of_changed_signs_and_every_exchange_gives_another_digest():
    tensor = torch.linspace(1, 2, 40, dtype=torch.float64)
    seen, number = {of(tensor)}, 1
    for i in range(40):
        for j in range(i):
            signs, exchanged = tensor.clone(), tensor.clone()
            signs[[i, j]] *= -1
            exchanged[[i, j]] = tensor[[j, i]]
            seen |= {of(signs), of(exchanged)}
            number += 2
    assert len(seen) == number


@pytest.mark.parametrize("device", DEVICES)
def test_the_digest_is_the_sum_of_hashes_of_places_and_words_on_any_device(device):
    tensors = {"b": torch.randn(70_001), "a": torch.randn(33), "c": torch.randn(2, 65_536), "d": torch.tensor(True)}
    words = [tensors[name].numpy().reshape(-1).view(np.uint32) for name in "abc"] + [np.ones(1, np.uint32)]
    words = np.concatenate(words).astype(np.uint64)
    expected = key(np.arange(len(words), dtype=np.uint64) << np.uint64(32) | words).sum()  # it wraps
    there = {name: tensor.to(device) for name, tensor in tensors.items()}
    assert int(digest(there, torch.device(device))) & MASK == int(expected)


def test_the_digest_is_of_the_values_in_order_whatever_their_memory_format():
    tensor = torch.randn(2, 3, 4, 5)
    assert of(tensor) == of(tensor.to(memory_format=torch.channels_last)) == of(tensor.transpose(1, 3).transpose(1, 3))
    assert of(tensor) != of(tensor.transpose(1, 3))


def test_the_digest_follows_the_names_and_not_the_order_they_are_given_in():
    a, b = torch.randn(3), torch.randn(3)
    one, same, other = (int(digest(d, CPU)) for d in ({"a": a, "b": b}, {"b": b, "a": a}, {"a": b, "b": a}))
    assert one == same != other


@pytest.mark.parametrize("size", [8, 5], ids=["whole words", "a part of a word"])
def test_the_digest_of_a_batch_is_that_of_its_images_added_up(size):
    batch = {
        "image": torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8),
        "position": torch.arange(100, 106),
        "label": torch.tensor([1, 2, 3, 1, 2, 3]),
    }
    whole = int(digest_of_batch(batch))
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    assert sum(int(digest_of_batch(part)) for part in parts) & MASK == whole & MASK
    others = []
    for name in batch:
        changed = {k: v.clone() for k, v in batch.items()}
        changed[name][4] += 1
        exchanged = {k: v.clone() for k, v in batch.items()}
        exchanged[name][[0, 1]] = batch[name][[1, 0]]
        others += [int(digest_of_batch(changed)), int(digest_of_batch(exchanged))]
    others.append(int(digest_of_batch({k: v for k, v in batch.items() if k != "label"})))
    assert len({whole, *others}) == 8


# ---- logs ----


def write(run, ranks: dict[int, list[tuple[int, int, list[int]]]]) -> None:
    """Logs with these rows (step, ranks, digests), and a config.yaml to make it a run."""
    for rank, rows in ranks.items():
        log_path(run, rank).parent.mkdir(parents=True, exist_ok=True)
        log_path(run, rank).write_text(HEADER + "".join(line(*row) for row in rows))
    (run / "config.yaml").write_text(f"name: {run.name}\n")


def test_a_log_cut_off_anywhere_keeps_its_whole_rows_and_can_be_continued(tmp_path):
    path = log_path(tmp_path, 0)
    path.parent.mkdir()
    rows = [line(step, 1, [-step, step, 0, 2**63]) for step in (1, 2, 30)]
    whole = HEADER + "".join(rows)
    for length in range(len(whole)):
        path.write_text(whole[:length])
        cut_after(tmp_path, 29)
        with open(path, "a") as f:
            f.write(line(29, 1, [1, 2, 3, 4]))
        complete = sum(len(HEADER + "".join(rows[: n + 1])) - 1 <= length for n in range(2))  # but for its line feed
        assert [*read(path)] == [1, 2][:complete] + [29]
    path.write_text(whole)
    cut_after(tmp_path, 2)
    assert path.read_text() == HEADER + "".join(rows[:2])


def test_runs_part_by_rank_and_part_at_the_first_differing_step(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, {rank: [(s, 2, [s, s, s, s + rank]) for s in (10, 20, 30, 40)] for rank in (0, 1)})
    write(b, {rank: [(s, 2, [s, s, s, s + rank]) for s in (10, 20, 30, 40, 50)] for rank in (0, 1)})
    assert compare(a, b) == ([10, 20, 30, 40], [])
    write(b, {1: [(10, 2, [10, 10, 10, 11]), (20, 2, [20, 20, 20, 0]), (30, 2, [0, 30, 30, 0]), (40, 2, [40] * 4)]})
    assert compare(a, b).differences == [Difference(20, 1, "batch"), Difference(30, 1, "weights")]


def test_runs_of_different_ranks_are_compared_by_what_they_have_together(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, {0: [(10, 1, [1, 2, 3, 9]), (20, 1, [1, 2, 3, 9]), (30, 1, [1, 2, 3, 8])]})
    half = [(10, 2, [1, 2, 3, 2**64 - 1]), (20, 2, [1, 2, 4, 2**64 - 1]), (30, 2, [1, 2, 3, 2**64 - 1])]
    write(b, {0: half, 1: [(step, 2, [1, 2, 3, 10]) for step in (10, 20, 30)]})
    assert compare(a, b) == ([10, 20, 30], [Difference(20, None, "optimizer"), Difference(30, None, "batch")])


def test_a_step_that_not_all_ranks_have_logged_is_left_out(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, {rank: [(s, 2, [s] * 4) for s in (1, 2, 3)] for rank in (0, 1)})
    write(b, {rank: [(s, 2, [s] * 4) for s in (1, 2, 3)[: 3 - rank]] for rank in (0, 1)})
    assert compare(a, b) == ([1, 2], [])


# ---- runs ----

STEPS = 10
WORDS = ["callbacks=none", "trainer=cpu", "trainer.threads=1", f"trainer.max_steps={STEPS}", "save.every_steps=5"]
WORDS += ["data.batch_size=8", "data.flip=true"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """(folder with the run `whole`, the words it was trained with)."""
    folder = tmp_path_factory.mktemp("fingerprints")
    words = [*WORDS, f"data.root={digits}", "fingerprint_every=1", "save.keep=9"]
    assert inside("train", [*words, "run_dir=whole"], folder) == 0
    return folder, words


def checkpoint(run, step=STEPS):
    return torch.load(run / "checkpoints" / f"step_{step:08d}.ckpt", weights_only=True)


def train(words, folder, name):
    assert inside("train", [*words, f"run_dir={folder / name}"], folder) == 0
    return folder / name


def test_the_log_of_a_run_that_was_stopped_is_that_of_one_that_was_not(trained, tmp_path):
    folder, words = trained
    run = train([*words, "trainer.max_steps=5"], tmp_path, "stopped")
    with open(log_path(run, 0), "a") as f:  # rows of steps that will be made again, and half a row
        f.write(line(6, 1, [1, 2, 3, 4]) + line(7, 1, [1, 2, 3, 4])[:50])
    train(words, tmp_path, "stopped")
    assert log_path(run, 0).read_text() == log_path(folder / "whole", 0).read_text()
    assert [*read(log_path(run, 0))] == list(range(1, STEPS + 1))


def test_a_run_is_the_same_with_or_without_a_log_and_its_micro_batches_have_the_same_images(trained, tmp_path):
    folder, words = trained
    without = train([*words, "fingerprint_every=0"], tmp_path, "without")
    assert logs(without) == {}
    ours, theirs = checkpoint(without)["state_dict"], checkpoint(folder / "whole")["state_dict"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    halves = train([*words, "fingerprint_every=4", "trainer.accumulate=2"], tmp_path, "halves")
    found = compare(folder / "whole", halves)
    assert found.steps == [4, 8] and "batch" not in {p.part for p in found.differences}


def rewrite(run, step: int, content: dict) -> None:
    """Put another checkpoint in the place of that of a step, as the newest."""
    path = run / "checkpoints" / f"step_{step:08d}.ckpt"
    torch.save(content, path)
    path.with_suffix(".sha256").write_text(sha256_of(path) + "\n")
    for later in (run / "checkpoints").glob("step_*.ckpt"):
        if later.name > path.name:
            later.unlink()


def flipped(run, part: str) -> None:
    """Flip one bit in the checkpoint of step 5."""
    content = checkpoint(run, 5)
    tensors = {"weights": content["state_dict"]["network.stem.weight"], "ema": content["ema"]["stem.weight"]}
    tensors["optimizer"] = content["optimizer_states"][0]["state"][0]["exp_avg"]
    tensors[part].view(torch.int32).view(-1)[3] ^= 1 << 20
    rewrite(run, 5, content)


@pytest.mark.parametrize(
    "part, apart",
    [("weights", {"weights", "ema", "optimizer"}), ("ema", {"ema"}), ("optimizer", {"weights", "ema", "optimizer"})],
)
def test_one_flipped_bit_is_found_at_the_step_after_it_in_what_it_has_reached(trained, tmp_path, part, apart):
    folder, words = trained
    run = tmp_path / "run"
    shutil.copytree(folder / "whole", run, symlinks=True)
    flipped(run, part)
    train(words, tmp_path, "run")
    found = compare(folder / "whole", run)
    assert found.steps == list(range(1, STEPS + 1))
    assert {(p.step, p.rank) for p in found.differences} == {(6, 0)}
    assert {p.part for p in found.differences} == apart


def test_a_run_made_before_there_was_activation_checkpointing_goes_on_with_it_to_the_same_bits(trained, tmp_path):
    folder, words = trained
    run = tmp_path / "run"
    shutil.copytree(folder / "whole", run, symlinks=True)
    content = checkpoint(run, 5)
    del content["config"]["model"]["activation_checkpointing"]
    rewrite(run, 5, content)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  activation_checkpointing: false\n", "", 1))
    assert (run / "config.yaml").read_text() != config
    assert door.trained(str(run)).denoiser.network.activation_checkpointing is False
    train([*words, "model.activation_checkpointing=true"], tmp_path, "run")
    assert compare(folder / "whole", run) == (list(range(1, STEPS + 1)), [])


@pytest.mark.slow
def test_every_rank_has_a_log_and_they_agree_but_in_their_batches(trained, command, tmp_path, digits):
    folder, _ = trained
    words = [*WORDS, f"data.root={digits}", "fingerprint_every=1", "trainer.devices=2", "trainer.max_steps=3"]
    command("train", *words, "run_dir=two", check=0)
    rows = logs(tmp_path / "two")
    assert [*rows] == [0, 1] and [*rows[0]] == [*rows[1]] == [1, 2, 3]
    for step in (1, 2, 3):
        one, two = rows[0][step], rows[1][step]
        assert one.ranks == two.ranks == 2
        assert one.digests[:3] == two.digests[:3] and one.digests[3] != two.digests[3]
    differences = compare(folder / "whole", tmp_path / "two").differences
    assert {p.rank for p in differences} == {None} and "batch" not in {p.part for p in differences}


# ---- the command ----


def test_the_command_says_whether_where_and_by_what_two_runs_part(call, tmp_path):
    a, b, c = (tmp_path / name for name in ("a run, = 1", "b", "c"))
    rows = [(s, 1, [s, s, s, s]) for s in (100, 200, 300)]
    write(a, {0: rows})
    write(b, {0: [*rows, (400, 1, [4, 4, 4, 4])]})
    write(c, {0: [*rows[:2], (300, 1, [300, 1, 300, 300])]})
    (c / "config.yaml").write_text("name: c\nema: {decay: 0.5}\n")
    status, output = call("report", "task=compare", f"run_dir={a}", f"other={b}")
    assert status == 0 and "The same to the bit" in output and "all 3 steps from 100 to 300" in output
    status, output = call("report", "task=compare", f"run_dir={a}", f"other={c}")
    assert status == 1
    assert "They part at step 300; at step 200 they are the same." in output and "Its batch is the same" in output
    assert "  ema.decay: None, 0.5\n" in output
    table = [row.split() for row in output.splitlines()[-2:]]
    assert table == [["rank", *PARTS], ["0", "same", "300", "same", "same"]]


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("task=compare run_dir=a", "task=compare needs two runs"),
        ("task=compare run_dir=a other=nowhere", "other=nowhere is not a run folder"),
        ("task=compare run_dir=a other=unlogged", "other=unlogged has no fingerprints"),
        ("task=compare run_dir=a other=elsewhen", "there is no step of which both have"),
        ("task=compare run_dir=a other=a out=b", "task=compare writes nothing"),
        ("run_dir=a other=a", "other=a is for task=compare"),
        ("task=contrast", "task=contrast must be one of make, compare"),
    ],
)
def test_the_command_refuses_what_it_cannot_compare(call, tmp_path, words, complaint):
    write(tmp_path / "a", {0: [(1, 1, [1] * 4)]})
    write(tmp_path / "elsewhen", {0: [(2, 1, [1] * 4)]})
    (tmp_path / "unlogged").mkdir()
    write(tmp_path / "unlogged", {})
    before = sorted(tmp_path.rglob("*"))
    status, output = call("report", *words.split())
    assert status == 2 and complaint in output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_interval_is_refused(call):
    status, output = call("train", "fingerprint_every=-1")
    assert status == 2 and "fingerprint_every=-1 must be at least 0" in output
