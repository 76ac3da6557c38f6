"""Command lines of chance (`fuzz_commands.py`): each works or is refused by name, and leaves nothing behind."""

import pytest
from fuzz_commands import BASES, chance_word, fuzz, keys_of, told


@pytest.mark.slow
@pytest.mark.parametrize("cases, seed", [(60, 1)])
def test_a_command_line_works_or_is_refused_by_name(cases, seed, tmp_path):
    outcomes, wrong, _ = fuzz(range(cases), seed, tmp_path)
    assert not wrong, "\n\n".join(wrong[:5])
    assert outcomes["worked"] and outcomes["refused"] and outcomes.total() == cases


def test_a_message_that_names_nothing_is_noticed():
    assert told(["optimizer.lr=fast"], "error: optimizer.lr=fast is not a number.")
    assert told(["~trainer.max_steps"], "error: trainer.max_steps cannot be removed.")
    assert not told(["optimizer.lr=fast"], "error: something is wrong.")


@pytest.mark.slow
def test_the_words_are_of_every_kind():
    import numpy as np

    for command in BASES:
        words = [chance_word(np.random.default_rng(n), command) for n in range(900)]
        assert any(word.startswith(f"{key}=") for key in keys_of(command) for word in words)
        for mark in ("~", "+", "=null", "=nan", "=[]", "=-1", "${"):
            assert any(mark in word for word in words), (command, mark)
