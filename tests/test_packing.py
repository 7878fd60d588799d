import random

import numpy as np
import pytest

from data.packing import first_fit, pack, split_document


def examples(n, longest, seed=0):
    rng = random.Random(seed)
    tokens = [[rng.randrange(1, 99) for _ in range(rng.randint(1, longest))] for _ in range(n)]
    return [(t, [rng.randint(0, 1) for _ in t]) for t in tokens]


def unpacked(rows):
    """Return (tokens, mask) of every segment; check that positions restart and padding is bare."""
    found = []
    arrays = [rows[key] for key in ("tokens_BT", "loss_mask_BT", "segment_ids_BT", "positions_BT")]
    for tokens, mask, segments, positions in zip(*arrays, strict=True):
        for s in range(1, segments.max() + 1):
            (here,) = np.nonzero(segments == s)
            assert (positions[here] == np.arange(len(here))).all() and (np.diff(here) == 1).all()
            found.append((tokens[here].tolist(), mask[here].astype(int).tolist()))
        assert not mask[segments == 0].any() and not tokens[segments == 0].any()
    return found


def test_packing_loses_no_token_and_no_example():
    given = examples(500, 60)
    rows = pack(given, 64)
    want = sorted((tokens, [0, *mask[1:]]) for tokens, mask in given)
    assert sorted(unpacked(rows)) == want
    fill = (rows["segment_ids_BT"] > 0).mean()
    # Control: one example a row fills half.
    assert fill > 0.9 > sum(len(t) for t, _ in given) / (500 * 64)
    rows["tokens_BT"][0, 0] += 1  # control: one wrong token shows
    assert sorted(unpacked(rows)) != want


def test_rows_have_the_batch_types():
    rows = pack(examples(5, 9), 16, pad=0)
    assert {key: array.dtype.name for key, array in rows.items()} == {
        "tokens_BT": "int32",
        "loss_mask_BT": "float32",
        "segment_ids_BT": "int32",
        "positions_BT": "int32",
    }
    assert all(array.shape == rows["tokens_BT"].shape for array in rows.values())
    assert pack([], 16)["tokens_BT"].shape == (0, 16)


def test_first_fit_takes_the_first_row_with_room():
    assert first_fit([5, 4, 3, 6, 2, 1], 8) == [(0, 0), (1, 0), (0, 5), (2, 0), (1, 4), (1, 6)]


def test_an_example_too_long_is_a_bug():
    with pytest.raises(ValueError, match="17 tokens in rows of 16"):
        pack([([1] * 17, [1] * 17)], 16)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 40])
def test_every_token_of_a_split_document_is_predicted_once(n):
    tokens = list(range(100, 100 + n))
    predicted = []
    for piece, mask in split_document(tokens, 8):
        assert 1 <= len(piece) <= 8 and mask[0] == 0
        predicted += [token for token, m in zip(piece, mask, strict=True) if m]
    assert predicted == tokens[1:]
