"""Texts: token ids without a learned vocabulary, pairs, speeches."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dpkit.datasets import load, load_e2e, load_shakespeare
from dpkit.datasets.text import SST2_LENGTH, SST2_TOKEN_IDS, token_id
from dpkit.errors import DataError

from .conftest import Publish

TRAIN = ["a good film \t1", "bad , bad film\t0", 'he says " no\t0', "fine\t1"]


def table(rows: list[str]) -> bytes:
    return ("sentence\tlabel\n" + "\n".join(rows) + "\n").encode()


def test_a_token_id_is_the_hash_of_the_word_on_every_machine():
    # The first 64 bits as GNU coreutils prints them: printf good | b2sum -l 64
    printed = {"good": "07878fd8745bb530", "bad": "a7e04811f6f31c53", "café": "5777a2bd3192d7e3"}
    for word, digits in printed.items():
        assert token_id(word, 1000) == 1 + int(digits, 16) % 999


def test_sentences_become_padded_token_ids(publish: Publish):
    split = load("sst2", publish("sst2", table(TRAIN), table(TRAIN[:1])))
    assert split.train_x.shape == (4, SST2_LENGTH)
    assert split.train_x.dtype == np.int64
    assert split.train_y.tolist() == [1, 0, 0, 1]
    assert [int((row != 0).sum()) for row in split.train_x] == [3, 4, 4, 1]
    assert split.train_x[1, 0] == split.train_x[1, 2]  # twice the same word
    assert split.train_x[0, 2] == split.train_x[1, 3]  # the same word elsewhere
    assert (split.train_x[:, 4:] == 0).all()
    assert split.train_x.max() < SST2_TOKEN_IDS
    assert (split.test_x[0] == split.train_x[0]).all()


def test_another_sentence_changes_no_other_row(publish: Publish):
    before = load("sst2", publish("sst2", table(TRAIN), table(TRAIN)))
    after = load("sst2", publish("sst2", table([TRAIN[0], "Unheard-of words\t1", *TRAIN[2:]]), table(TRAIN)))
    others = [0, 2, 3]
    assert (before.train_x[others] == after.train_x[others]).all()
    assert (before.train_x[1] != after.train_x[1]).any()
    assert (before.test_x == after.test_x).all()


def test_a_long_sentence_is_cut_and_odd_line_breaks_do_not_cut(publish: Publish):
    rows = [" ".join(["word"] * 200) + "\t1", "next\x85line\u2028paragraph\t0", "\t0"]
    split = load("sst2", publish("sst2", table(rows), table(rows)))
    assert [int((row != 0).sum()) for row in split.train_x] == [SST2_LENGTH, 3, 0]


@pytest.mark.parametrize("row", ["no label", "a film\t2", "a film\t"])
def test_a_row_without_a_label_is_refused_with_its_line(publish: Publish, row: str):
    with pytest.raises(DataError, match=r"train.tsv: line 3 is not a sentence, a tab and 0 or 1"):
        load("sst2", publish("sst2", table([TRAIN[0], row]), table(TRAIN)))


def test_e2e_gives_pairs_with_quotes_and_commas_undone(publish: Publish):
    train = 'mr,ref,ref_tokenised\n"name[A], area[city]",A is in the city.,A is in the city .\n'
    dev = 'mr,ref\nname[B],"B, ""the pub""\nis here."\n'
    test = '"mr","ref"\n"name[C]","C is ""far"""\n'
    data = publish("e2e", train.encode(), dev.encode(), test.encode())
    found = load_e2e(data)
    assert found.train == (("name[A], area[city]", "A is in the city."),)
    assert found.dev[0].reference == 'B, "the pub"\nis here.'
    assert found.test[0] == ("name[C]", 'C is "far"')


def test_e2e_with_another_header_is_refused(publish: Publish):
    with pytest.raises(DataError, match=r"devset.csv: the header does not begin with mr, ref"):
        load_e2e(publish("e2e", b"mr,ref\nx,y\n", b"ref,mr\nx,y\n", b"mr,ref\nx,y\n"))


def test_shakespeare_gives_speeches_by_speaker_in_their_order(publish: Publish):
    records = [("p|A", "one"), ("p|B", "two\nlines"), ("p|A", "three"), ("q|A", "four")]
    content = "\n".join(json.dumps({"user": user, "text": text, "play": "p"}) for user, text in records)
    speeches = load_shakespeare(publish("shakespeare", content.encode()))
    assert speeches == {"p|A": ["one", "three"], "p|B": ["two\nlines"], "q|A": ["four"]}
