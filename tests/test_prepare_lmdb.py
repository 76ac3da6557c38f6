"""LSUN's LMDB is read as LMDB reads it, and a damaged one is refused or loses the damaged entry alone."""

import random

import lmdb
import pytest
from test_prepare_sources import coded, listed, starts_anywhere

from diffusion.data.sources.lmdb_folder import LmdbSource
from diffusion.data.sources.opening import open_source
from diffusion.data.sources.source import BadEntry

PAGE = 4096


def lsun(path, numbers=range(20)):
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for number in numbers:
            transaction.put(b"%040x" % (number * 7919 % 101), coded(number, "WEBP"))
    return path


def test_lsun_gives_its_values_in_the_order_of_its_keys(tmp_path):
    source = open_source(lsun(tmp_path / "church"))
    expected = sorted((f"{n * 7919 % 101:040x}", "train", None, n) for n in range(20))
    assert listed(source) == expected and source.classes == ()
    starts_anywhere(source)
    assert open_source(tmp_path / "church" / "data.mdb").kind == source.kind


def test_an_lmdb_that_is_cut_off_empty_or_none_is_refused(tmp_path):
    whole = (lsun(tmp_path / "a") / "data.mdb").read_bytes()
    for name, data, complaint in [
        ("cut", whole[: len(whole) // 2], "it is truncated"),
        ("text", b"no database at all" * 1000, "is not an LMDB"),
        ("none", b"", "is not an LMDB|truncated|empty"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(data)
        with pytest.raises(ValueError, match=f"source=.*{name}.*({complaint})"):
            open_source(tmp_path / name)
        assert [p.name for p in (tmp_path / name).iterdir()] == ["data.mdb"]
    lsun(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="the LMDB is empty"):
        open_source(tmp_path / "empty")


def random_lmdb(path, seed):
    """An LMDB with a history of puts and deletes in several transactions; what is in it."""
    rng, held = random.Random(seed), {}
    with lmdb.open(str(path), map_size=1 << 26, sync=False) as environment:
        for _ in range(rng.randint(1, 6)):
            with environment.begin(write=True) as transaction:
                for _ in range(rng.randint(1, 400)):
                    if held and rng.random() < 0.4:
                        key = rng.choice(list(held))
                        transaction.delete(key)
                        del held[key]
                    else:
                        key = bytes(rng.choices(b"abcd", k=rng.randint(1, rng.choice([3, 40, 511]))))
                        held[key] = rng.randbytes(rng.choice([0, 1, 100, 2000, 2040, 4096, rng.randint(0, 20_000)]))
                        transaction.put(key, held[key])
    return held


@pytest.mark.parametrize("seed", range(12))
def test_the_reader_gives_what_lmdb_holds_from_any_key_on(seed, tmp_path):
    held = random_lmdb(tmp_path / "x", seed)
    source = LmdbSource(tmp_path / "x", 1 << 20)
    assert [(e.place, e.read()) for e in source.entries()] == sorted(held.items())
    keys = sorted(held)
    for key in (*random.Random(seed).sample(keys, min(5, len(keys))), b"a", b"c", b"zz"):
        for start in (key, key + b"x"):
            assert [e.place for e in source.entries(start)] == [k for k in keys if k >= start]


@pytest.fixture
def tree(tmp_path):
    """(the folder of an LMDB of two levels with values within its pages and outside, its file's bytes)."""
    with lmdb.open(str(tmp_path / "x"), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for number in range(90):
            transaction.put(b"%040d" % number, bytes([number]) * (9000 if number % 3 == 0 else 300))
    return tmp_path / "x", bytearray((tmp_path / "x" / "data.mdb").read_bytes())


def pages_of(data, kind):
    return [at for at in range(2 * PAGE, len(data), PAGE) if data[at + 10] == kind]


def put(data, at, value, width=2):
    data[at : at + width] = value.to_bytes(width, "little")


def number_at(data, at, width=2):
    return int.from_bytes(data[at : at + width], "little")


def later_head(data):
    return max(0, PAGE, key=lambda at: number_at(data, at + 16 + 128, 8))


def first_node(data, page):
    return page + number_at(data, page + 16)


DAMAGE = {
    "a branch to itself": lambda d, b, leaf: put(d, first_node(d, b), b // PAGE),
    "a branch to where another leads": lambda d, b, leaf: put(
        d, first_node(d, b), number_at(d, b + number_at(d, b + 18))
    ),
    "a branch out of the file": lambda d, b, leaf: put(d, first_node(d, b), 60_000),
    "a branch to a value": lambda d, b, leaf: put(d, first_node(d, b), pages_of(d, 4)[0] // PAGE),
    "another kind of page": lambda d, b, leaf: put(d, leaf + 10, 1),
    "more nodes than fit": lambda d, b, leaf: put(d, leaf + 12, 5000),
    "no nodes": lambda d, b, leaf: put(d, leaf + 12, 16),
    "a node out of its page": lambda d, b, leaf: put(d, leaf + 16, 4093),
    "a node in the head": lambda d, b, leaf: put(d, leaf + 16, 3),
    "a key of 60,000 bytes": lambda d, b, leaf: put(d, first_node(d, leaf) + 6, 60_000),
    "a value beyond its page": lambda d, b, leaf: put(d, leaf + number_at(d, leaf + 18) + 2, 9),
    "an unknown kind of entry": lambda d, b, leaf: put(d, first_node(d, leaf) + 4, 2),
    "keys out of order": lambda d, b, leaf: put(d, first_node(d, leaf) + 8, 0xFFFF),
    "a value of many pages": lambda d, b, leaf: put(d, first_node(d, leaf) + 2, 9999),
    "a root that is none": lambda d, b, leaf: put(d, later_head(d) + 16 + 112, 3, 8),
    "another depth": lambda d, b, leaf: put(d, later_head(d) + 16 + 78, 9),
    "another number of entries": lambda d, b, leaf: put(d, later_head(d) + 16 + 104, 89, 8),
    "flags": lambda d, b, leaf: put(d, later_head(d) + 16 + 76, 4),
    "pages of no size": lambda d, b, leaf: put(d, 16 + 24, 0, 4),
    "another version": lambda d, b, leaf: put(d, 16 + 4, 2, 4),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_tree_is_refused_before_anything_is_read(damage, tree):
    folder, data = tree
    whole = bytes(data)
    (branch,), leaves = pages_of(data, 1), pages_of(data, 2)
    damage(data, branch, leaves[0])
    assert data != whole
    (folder / "data.mdb").write_bytes(data)
    with pytest.raises(ValueError, match=r"source=.*(data\.mdb is damaged: |is not an LMDB)"):
        open_source(folder)


def test_a_damaged_value_is_one_bad_entry_and_the_keys_are_listed_without_the_values(tree):
    folder, data = tree
    values = pages_of(data, 4)
    data[values[0] : values[0] + 16] = bytes(16)
    (folder / "data.mdb").write_bytes(data)
    bad = []
    for entry in open_source(folder).entries():
        try:
            entry.read()
        except BadEntry as error:
            bad.append(str(error))
    assert len(bad) == 1 and "is not the page of its value" in bad[0]
    for page in values:
        data[page : page + PAGE] = bytes(PAGE)
    (folder / "data.mdb").write_bytes(data)
    assert len(list(open_source(folder).entries())) == 90


def test_a_file_that_is_shorter_than_its_last_page_is_whole_when_that_page_is_unused(tmp_path):
    """LMDB does not write pages that a transaction takes and gives back."""
    (tmp_path / "x").mkdir()
    held = {}
    for seed in range(40):
        folder = tmp_path / str(seed)
        held = random_lmdb(folder, seed)
        data = (folder / "data.mdb").read_bytes()
        stated = (number_at(data, later_head(data) + 16 + 120, 8) + 1) * PAGE
        if len(data) < stated and held:
            break
    assert len(data) < stated
    assert len(list(LmdbSource(folder, 1 << 20).entries())) == len(held)
