"""What is kept of the samples. More in tests/test_history.py, by whole runs."""

import torch

from lab.method.sample_store import in_turns


def test_visits_are_kept_in_their_order_each_sample_once_a_time():
    indices = torch.tensor([5, 2, 5, 7, 2, 5])
    turns = torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 9.0])
    rounds = [each.tolist() for each in in_turns(indices, turns)]
    assert rounds == [[1, 2, 3], [4, 0], [5]]
    assert not [*in_turns(indices[:0], turns[:0])]
