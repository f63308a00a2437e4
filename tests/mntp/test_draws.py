"""From uniform numbers to a batch: which tokens are chosen, what becomes of them, and where the numbers come from."""

import numpy as np
import torch

from bidirect_patch import MNTPCollator
from bidirect_patch.mntp.collator import seeded, text_draws

from ..helpers.words import UNDERSCORE, WORDS, make_tokenizer


class Given(MNTPCollator):
    """Draws what it is given."""

    given: torch.Tensor

    def draws(self, rows):
        return self.given


def collated(draws, **settings):
    """Input and labels of a text of the words 10, 11, ..., one for each column of `draws` after the first token."""
    collator = Given(make_tokenizer(), mlm_probability=0.5, mask_replace_prob=0.5, random_replace_prob=0.25, **settings)
    collator.given = torch.cat([torch.zeros(3, 1), torch.tensor(draws, dtype=torch.float32).T], 1)
    batch = collator([list(range(9, 10 + len(draws)))])
    return batch["input_ids"][0, 1:].tolist(), batch["labels"][0, 1:].tolist()


def test_a_token_is_chosen_below_the_share_alone():
    tokens, labels = collated([(0.0, 0, 0), (0.4999, 0, 0), (0.5, 0, 0), (0.9, 0, 0)])
    assert labels == [10, 11, -100, -100] and tokens == [UNDERSCORE, UNDERSCORE, 12, 13]


def test_the_second_number_says_what_hides_a_token():
    """Below the first share the mask token, below the sum of both a random one, else nothing."""
    tokens, labels = collated([(0, 0.4999, 0), (0, 0.5, 0), (0, 0.7499, 0), (0, 0.75, 0), (0, 0.99, 0)])
    assert tokens == [UNDERSCORE, UNDERSCORE, UNDERSCORE, 13, 14] and labels == [10, 11, 12, 13, 14]
    tokens, _ = collated([(0, 0.4999, 0.5), (0, 0.5, 0.5), (0, 0.7499, 0.5)])
    assert tokens == [UNDERSCORE, 3 + (WORDS + 1) // 2, 3 + (WORDS + 1) // 2]


def test_the_third_number_picks_among_the_ordinary_words():
    tokens, _ = collated([(0, 0.6, 0.0), (0, 0.6, 0.5), (0, 0.6, 1 - 2.0**-24)])
    assert tokens == [3, 3 + (WORDS + 1) // 2, 3 + WORDS], "the first, the middle and the last that are not special"


def test_a_stream_depends_on_each_number_and_stays_what_it_is():
    """Evaluations are compared over time, so the streams of a seed must not change with a new version of this code."""
    seeds = {numbers: seeded(*numbers).initial_seed() for numbers in ((0,), (1,), (0, 1), (1, 1), (0, 1, 2))}
    assert len(set(seeds.values())) == len(seeds)
    assert seeds[0,] == 7896617691693857887 and seeds[0, 1] == 2918264622725855778
    assert all(0 <= seed < 2**63 for seed in seeds.values())


def test_the_draws_of_a_text_are_uniform_and_those_of_its_real_tokens():
    ids = np.arange(5, 4005)
    draws = text_draws({"input_ids": ids}, 3)
    assert draws.shape == (3, 4000) and draws.dtype == torch.float32 and 0 <= draws.min() and draws.max() < 1
    assert torch.allclose(draws.mean(1), torch.full((3,), 0.5), atol=0.02)
    mask = np.zeros_like(ids)
    mask[100:] = 1
    padded = text_draws({"input_ids": ids, "attention_mask": mask}, 3)
    assert torch.equal(padded[:, 100:], text_draws({"input_ids": ids[100:]}, 3)) and not padded[:, :100].any()


def test_the_first_token_after_a_row_of_padding_is_a_first_token():
    collator = MNTPCollator(make_tokenizer(), mlm_probability=1.0)
    padding = {"input_ids": [10, 11], "attention_mask": [0, 0]}
    for first in (padding, [], [12]):
        assert collator([first, [20, 21, 22]])["labels"][1].tolist() == [-100, 21, 22]
