"""The shuffle of a finite data set."""

from __future__ import annotations

from rlsys.data.epochs import Epochs


def positions(epochs: Epochs, indices: range) -> list[int]:
    return [epochs.position(index) for index in indices]


def test_every_epoch_has_all_positions_in_another_order() -> None:
    epochs = Epochs(7, seed=5)
    orders = [positions(epochs, range(start, start + 7)) for start in (0, 7, 14)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert [epochs.epoch(index) for index in (0, 6, 7, 20)] == [0, 0, 1, 2]


def test_a_position_depends_on_size_seed_and_index_alone() -> None:
    forwards = positions(Epochs(7, seed=5), range(21))
    epochs = Epochs(7, seed=5)
    assert [epochs.position(index) for index in reversed(range(21))] == forwards[::-1]
    assert positions(Epochs(7, seed=6), range(21)) != forwards


def test_a_known_order_stays_the_same_over_versions() -> None:
    # numpy.random.default_rng([5, 0]).permutation(7): a resumed run relies on it.
    assert positions(Epochs(7, seed=5), range(7)) == [1, 4, 2, 3, 6, 5, 0]
