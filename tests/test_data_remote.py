"""Remote data sets, from a real HTTP server that fails, truncates and is slow, and from commands."""

import errno
import hashlib
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from changing import CHANGES, overwrite, overwrite_a_sample, without_digests
from numbered import BATCH, COUNT, global_batches, number_of, pixels, plan_of

from diffusion.data.module import ImageShardsDataModule
from diffusion.data.shards.index import INDEX_NAME, read_index
from diffusion.data.shards.layout import Layout
from diffusion.data.shards.readers import CachedShards
from diffusion.data.shards.remote import Access, FileCache, SourceChanged, Unreachable, address
from diffusion.data.shards.samples import Samples
from diffusion.data.shards.stream import StreamLoader
from diffusion.files import Unwritable

QUICK = Access(attempts=6, timeout=5.0)


@pytest.fixture
def folder(root):
    return root


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("diffusion.data.shards.remote.FIRST_PAUSE", 0.01)


class Server:
    """Serves a folder with ranges; `fails` and `truncates` are shares of the requests, `pause` seconds before each."""

    def __init__(self, folder: Path, fails=0.0, truncates=0.0, pause=0.0, seed=0, ranges=True):
        server, self.asked, self.sent = self, [], 0
        rng, lock = np.random.default_rng(seed), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with lock:
                    fate = rng.random()
                    server.asked.append((self.path, self.headers.get("Range")))
                time.sleep(pause)
                file = folder / self.path.lstrip("/")
                if fate < fails / 2:
                    return self.send_error(503)
                if fate < fails:
                    return self.connection.close()
                if not file.is_file():
                    return self.send_error(404)
                content, start = file.read_bytes(), 0
                if ranges and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
                    start = int(asked[1])
                    if start >= len(content):
                        return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                sent = content[start:]
                if fate < fails + truncates:
                    sent = sent[: len(sent) // 2]
                with lock:
                    server.sent += len(sent)
                self.wfile.write(sent)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(folder):
    running = []

    def start(**how):
        running.append(Server(how.pop("folder", folder), **how))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def samples_of(url, cache_folder, limit=10**9, access=QUICK, **settings):
    index = read_index(url, access=access)
    return Samples(index, shards=CachedShards(index, FileCache(cache_folder, limit, access)), **settings)


def digests(folder):
    """sha256 of all files of the set; offsets of shards that are laid out alike are one."""
    return {sha256 for shard in read_index(folder).shards for _, _, sha256 in shard.files}


# ---- whole epochs ----


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_from_a_server_that_fails_truncates_and_is_slow_is_complete_and_exact(
    folder, serve, tmp_path, workers
):
    server = serve(fails=0.2, truncates=0.1, pause=0.02)
    samples = samples_of(server.url, tmp_path / "cache")
    met = global_batches(samples, ranks=2, workers=workers, steps=2)  # the ranks share the cache
    expected = plan_of(Samples(read_index(folder))).locate(np.arange(2 * BATCH))[1]
    assert (met[1].ravel().numpy() == expected).all()
    fetched = sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    assert fetched == sorted(digests(folder))
    assert all(hashlib.sha256((tmp_path / "cache" / name).read_bytes()).hexdigest() == name for name in fetched)


def test_each_shard_is_fetched_once_by_all_processes(folder, serve, tmp_path):
    server = serve(pause=0.005)
    samples = samples_of(server.url, tmp_path)
    global_batches(samples, ranks=2, workers=3, steps=2)
    asked = [path for path, _ in server.asked if path != f"/{INDEX_NAME}"]
    assert len(asked) == len(set(asked)) == len(digests(folder))


def test_a_resumed_run_finds_the_shards_on_its_machine(serve, tmp_path):
    first = serve()
    global_batches(samples_of(first.url, tmp_path), 1, 0, steps=2)
    first.stop()
    second = serve()  # at another address: a shard is known by its digest
    global_batches(samples_of(second.url, tmp_path), 1, 0, steps=2)
    assert [path for path, _ in second.asked] == [f"/{INDEX_NAME}"]


# ---- what is fetched when ----


def test_only_the_windows_in_use_and_the_next_are_fetched(serve, tmp_path):
    server = serve()
    samples = samples_of(server.url, tmp_path)
    plan = plan_of(samples, batch_size=4, lanes=1, seed=5)  # 11 shards: windows of 4, 4 and 3
    loader = iter(StreamLoader(samples, plan, Layout(4)))
    line = plan.shard_of(plan.locate(np.arange(COUNT))[1])
    windows = [set(line[:300]), set(line[400:700]), set(line[800:])]
    assert [len(w) for w in windows] == [4, 4, 3]

    def fetched():
        return {int(name[6:11]) for path, _ in list(server.asked) if (name := path[1:]).endswith(".tar")}

    def eventually(condition):
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    next(loader)
    eventually(lambda: fetched() == windows[0] | windows[1])  # the second without being asked for
    for _ in range(80):
        next(loader)
    assert fetched() == windows[0] | windows[1]
    for _ in range(30):  # into the second
        next(loader)
    eventually(lambda: fetched() == windows[0] | windows[1] | windows[2])


def test_ahead_names_the_shards_of_this_window_and_the_next_and_when_they_change():
    plan = plan_of(type("Counts", (), {"counts": np.full(40, 10)}), batch_size=8, lanes=4, seed=1)
    for ranks, rank in itertools.product((1, 2), (0, 1)):
        if rank >= ranks:
            continue
        layout, told, change = Layout(8, rank, ranks), [], 0
        for step in range(150):  # three epochs
            shards, batches = plan.ahead(layout.slots(step))
            used = set(plan.shard_of(plan.locate(layout.slots(step))[1]).tolist())
            assert used <= set(shards) and len(shards) == len(set(shards)) and batches > 0
            if step >= change:
                told, change = shards, step + batches
            assert set(shards) == set(told)  # nothing else is wanted before the change that was said


# ---- the cache ----


def test_the_cache_never_holds_more_than_its_limit_and_what_was_taken_away_comes_back(folder, serve, tmp_path):
    server = serve()
    sizes = sorted(path.stat().st_size for path in folder.glob("*.tar"))
    limit = sum(sizes[-3:]) + 30_000  # three shards of eleven, and offsets
    samples = samples_of(server.url, tmp_path, limit)
    rng, most = np.random.default_rng(0), 0
    for number in rng.permutation(COUNT)[:150]:
        image, _ = samples[int(number)]
        assert (image == pixels(number)).all()
        held = [path.stat().st_size for path in tmp_path.iterdir() if not path.name.startswith(".")]
        most = max(most, sum(held))
    assert most <= limit and most > 0.5 * limit
    assert len(server.asked) > 60


def test_the_least_lately_used_goes_first(tmp_path):
    content = {name: os.urandom(1000) for name in "abcd"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    cache = FileCache(tmp_path / "cache", 3000, QUICK)
    digest = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}

    def path(name):
        found = cache.path(f"pipe:cat {tmp_path}/{name}", 1000, digest[name])
        assert found.read_bytes() == content[name]
        return found

    for age, name in enumerate("abc"):
        os.utime(path(name), (age, age))
    path("a")  # used again
    path("d")
    left = {name for name in "abcd" if (tmp_path / "cache" / digest[name]).exists()}
    assert left == {"a", "c", "d"}


def test_what_is_not_of_the_cache_is_neither_counted_nor_removed(tmp_path):
    """The folder is shared with other caches of this package, and may hold anything."""
    cache = FileCache(tmp_path / "cache", 1500, QUICK)
    others = ["references/r.safetensors", "verified/v", "notes.txt", f"{'a' * 64}.x.part", f"{'b' * 64}/inner"]
    for name in others:
        (cache.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (cache.folder / name).write_bytes(bytes(5000))
        os.utime(cache.folder / name, (0, 0))
    (tmp_path / "elsewhere").write_bytes(bytes(5000))
    (cache.folder / ("c" * 64)).symlink_to(tmp_path / "elsewhere")
    found = []
    for name in "xyz":
        (tmp_path / name).write_bytes(name.encode() * 1000)
        digest = hashlib.sha256(name.encode() * 1000).hexdigest()
        found.append(cache.path(f"pipe:cat {tmp_path}/{name}", 1000, digest))
    assert [path.exists() for path in found] == [False, False, True]
    assert all((cache.folder / name).stat().st_size == 5000 for name in [*others, "c" * 64])


def test_a_limit_below_what_is_in_use_is_refused(serve, tmp_path):
    server = serve()
    module = ImageShardsDataModule(server.url, 8, remote={"folder": str(tmp_path), "gigabytes": 1e-5})
    module.trainer = type("Trainer", (), {"num_nodes": 1})
    with pytest.raises(ValueError, match=r"data\.remote\.gigabytes=1e-05 is too small: 8 lanes use up to 11 shards"):
        module.train_dataloader()
    with pytest.raises(ValueError, match=r"data\.remote\.gigabytes=1e-06 is too small for the files"):
        samples_of(server.url, tmp_path, 1000)[0]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_named_at_once_and_not_taken_for_a_broken_connection(folder, serve, tmp_path):
    server, small = serve(), tmp_path / "disk"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=True)
    try:
        samples = samples_of(server.url, small / "cache")
        asked, message = (
            len(server.asked),
            rf"^data\.remote\.folder={small}/cache: No space left on device: [\d.]+ kB are ",
        )
        with pytest.raises(Unwritable, match=message + r"needed for http://.*\.tar, [\d.]+ k?B are free\."):
            for number in range(len(samples)):
                samples[number]
        assert len(server.asked) - asked <= 3
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_a_folder_that_is_only_read_serves_what_it_holds(folder, serve, tmp_path, monkeypatch):
    """As on a read-only file system, where not even the time of use can be noted."""
    server, cache = serve(), tmp_path / "cache"
    before = samples_of(server.url, cache)[0]

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.utime", refuse)
    assert (samples_of(server.url, cache)[0][0] == before[0]).all()


# ---- one file ----


def test_a_broken_connection_is_gone_on_with(folder, serve, tmp_path):
    server = serve(truncates=0.6, seed=1)
    name = "train-00000.tar"
    with open(tmp_path / "x", "w+b") as file:
        QUICK.fetch(f"{server.url}/{name}", file, (folder / name).stat().st_size)
    assert (tmp_path / "x").read_bytes() == (folder / name).read_bytes()
    assert server.sent == (folder / name).stat().st_size and len(server.asked) > 1  # no byte twice


def test_without_ranges_it_begins_again(folder, serve, tmp_path):
    server = serve(truncates=0.7, seed=0, ranges=False)
    name = "train-00003.tar"
    with open(tmp_path / "x", "w+b") as file:
        QUICK.fetch(f"{server.url}/{name}", file)
    assert (tmp_path / "x").read_bytes() == (folder / name).read_bytes() and len(server.asked) > 1


def test_a_download_that_was_killed_is_gone_on_with(folder, serve, tmp_path):
    server = serve()
    name, content = "train-00001.tar", (folder / "train-00001.tar").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / f"{digest}.{len(content)}.part").write_bytes(content[:1000])
    assert FileCache(tmp_path, 10**9, QUICK).path(f"{server.url}/{name}", len(content), digest).read_bytes() == content
    assert server.asked == [(f"/{name}", "bytes=1000-")]


@pytest.mark.parametrize("wrong", ["a byte", "shorter", "longer"])
def test_a_file_that_is_not_the_one_of_the_index_is_never_used(folder, serve, tmp_path, wrong):
    copy = tmp_path / "served"
    copy.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        if file.name == "train-00002.tar":
            content = {"a byte": b"x" + content[1:], "shorter": content[:-1], "longer": content + b"x"}[wrong]
        (copy / file.name).write_bytes(content)
    server = serve(folder=copy)
    samples = samples_of(server.url, tmp_path / "cache", access=Access(3, 5.0))
    samples[0]
    reason = "ended after" if wrong == "shorter" else "when it was fetched once more: the file there is not the one"
    with pytest.raises(
        Unreachable if wrong == "shorter" else SourceChanged, match=rf"train-00002\.tar cannot.*{reason}"
    ):
        samples[2 * 93]
    assert len([path for path, _ in server.asked if path == "/train-00002.tar"]) == (3 if wrong == "shorter" else 2)


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_that_changes_is_fetched_again(folder, serve, tmp_path, monkeypatch, change, digests):
    """Whatever happens to a copy in the cache, the samples are those of the server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if not digests:
        folder = without_digests(shutil.copytree(folder, tmp_path / "older"))
    server = serve(folder=folder)
    samples, shards = samples_of(server.url, tmp_path / "cache"), read_index(folder).shards
    assert all((samples[number][0] == pixels(number)).all() for number in range(COUNT))
    fetched = len(server.asked)
    tar, other = (tmp_path / "cache" / shards[k].sha256 for k in (4, 7))
    if change is overwrite_a_sample:
        with open(tar, "r+b") as file:
            file.seek(int(read_index(folder).offsets(shards[4])[17][0]))
            file.write(b"damaged!!")
    else:
        change(tar, other)
    assert all((samples[number][0] == pixels(number)).all() for number in range(COUNT))
    names = {path for path, _ in server.asked[fetched:]}
    assert {"/train-00004.tar"} <= names <= {"/train-00004.tar", "/train-00007.tar"}
    assert hashlib.sha256(tar.read_bytes()).hexdigest() == tar.name


def test_where_the_file_of_the_server_has_changed_too_it_says_so(folder, serve, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "served")
    samples, shard = samples_of(serve(folder=copy).url, tmp_path / "cache"), read_index(copy).shards[4]
    samples[4 * 93]
    for tar in (copy / shard.path, tmp_path / "cache" / shard.sha256):
        overwrite(tar, copy / "train-00007.tar")
    with pytest.raises(
        SourceChanged, match=r"/train-00004\.tar cannot be read.*the file there is not the one of the data"
    ):
        samples[4 * 93 + 1]


def test_a_server_that_is_gone_is_a_clear_error_in_every_loader(serve, tmp_path):
    server = serve()
    loaders = []
    for rank in range(2):
        samples = samples_of(server.url, tmp_path / f"machine {rank}", access=Access(2, 2.0))
        loaders.append(StreamLoader(samples, plan_of(samples, 8), Layout(8, rank, 2), num_workers=rank))
    iterators = [iter(loader) for loader in loaders]
    server.http.socket.close()
    server.stop()
    before = set(multiprocessing.active_children())
    for iterator in iterators:
        with pytest.raises(Unreachable, match=rf"^{server.url}/train-\d+\.tar cannot be read: .*Is the server there\?"):
            for _ in range(3 * COUNT):
                next(iterator)
    del iterators, iterator
    assert not set(multiprocessing.active_children()) - before


def test_a_server_that_says_nothing_is_given_up(folder, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent, open(tmp_path / "x", "w+b") as file:
        with pytest.raises(Unreachable, match="timed out"):
            Access(2, 0.2).fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/x", file)


def test_what_the_server_will_not_give_is_not_asked_for_again(serve, tmp_path):
    server = serve()
    with pytest.raises(Unreachable, match="404"):
        read_index(f"{server.url}/elsewhere", access=QUICK)
    assert len(server.asked) == 1


# ---- commands ----


def test_a_pipe_gives_the_same_samples(folder, tmp_path):
    odd = tmp_path / "a b'c"
    odd.symlink_to(folder)
    samples = samples_of(f'pipe:cat "{odd}/"{{}}', tmp_path / "cache")
    for number in (0, 500, COUNT - 1):
        assert (samples[number][0] == pixels(number)).all()


@pytest.mark.parametrize(
    "command, complaint",
    [
        ("false {}", "status 1"),
        ("cat /nowhere/{}", "status 1"),
        ("sleep 30; echo {}", "wrote nothing for 0.3 s"),
        ("cat", "has no {}"),
    ],
)
def test_a_command_that_fails_or_hangs_is_named(command, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_index(f"pipe:{command}", access=Access(2, 0.3))


def test_a_name_out_of_an_index_is_no_command_and_no_url():
    assert address("pipe:cat /sets/{}", "a; rm -rf x") == "pipe:cat /sets/'a; rm -rf x'"
    assert address("https://host/set/", "a b?c#d") == "https://host/set/a%20b%3Fc%23d"


@pytest.mark.parametrize("scheme, tool", [("s3", "aws"), ("gs", "gsutil")])
def test_object_stores_are_read_by_their_own_tools(folder, tmp_path, monkeypatch, scheme, tool):
    """A program of the tool's name that answers as it does: the bytes of the object on its standard output."""
    (tmp_path / "bin").mkdir()
    words = {"aws": '[ "$1 $2 $3 $5" = "s3 cp --only-show-errors -" ] || exit 3; object=$4'}
    words["gsutil"] = '[ "$1" = cat ] || exit 3; object=$2'
    program = tmp_path / "bin" / tool
    program.write_text(f'#!/bin/sh\n{words[tool]}\nexec cat "{folder}/${{object#{scheme}://bucket/sets/}}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    samples = samples_of(f"{scheme}://bucket/sets", tmp_path / "cache")
    assert (samples[77][0] == pixels(77)).all()
    with pytest.raises(Unreachable, match="ended with status 1"):
        read_index(f"{scheme}://bucket/sets/elsewhere", access=Access(1, 5.0))


@pytest.mark.slow
def test_training_from_a_server_and_with_the_server_gone(digits, serve, command, tmp_path):
    server = serve(folder=digits, fails=0.2, truncates=0.1)
    words = [
        f"data.root={server.url}", f"data.remote.folder={tmp_path}/cache", "data.num_workers=2", "callbacks=none",
        "model.width=32", "trainer.max_steps=3", "data.remote.attempts=3", "data.remote.timeout=2", "log_every=1",
    ]  # fmt: skip
    command("train", *words, check=0)
    server.stop()
    done = command("train", *words, "run_dir=runs/other", check=2)
    assert re.fullmatch(rf"error: {server.url}/index.json cannot be read: .* Is the server there\?.*\n", done.stderr)
    assert not (tmp_path / "runs" / "other").exists()


def test_the_configuration_checker_needs_no_torch_for_an_http_root(serve):
    code = "import sys, diffusion.data.shards.index as i; i.read_index(sys.argv[1]); print('torch' in sys.modules)"
    words = [sys.executable, "-c", code, serve().url]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "False\n"


def test_numbers_survive(serve, tmp_path):
    """What the other tests compare by: an image says its number."""
    samples = samples_of(serve().url, tmp_path)
    assert number_of(torch.from_numpy(samples[300][0])[None]).item() == 300
