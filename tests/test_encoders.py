"""T5 and BERT themselves. That they equal the references is in test_parity.py."""

from functools import partial

import pytest
import torch
from conftest import close, randomise, seeded

import rerank
import t5


def make_bert(**changes):
    sizes = dict(vocab_size=30, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_len=20)
    return randomise(rerank.Bert(rerank.BertConfig(**sizes | changes))).requires_grad_(False).eval()


def make_t5(**changes):
    sizes = dict(vocab_size=30, dim=16, n_layers=2, n_heads=2, head_dim=6, hidden_dim=24)
    sizes |= dict(buckets=8, max_distance=12)
    return randomise(t5.T5Encoder(t5.T5Config(**sizes | changes))).requires_grad_(False).eval()


def states(model, ids, *arguments):
    embed = getattr(model, "embed", torch.clone)  # BERT reads the ids themselves
    return model(embed(ids), *arguments)


@pytest.mark.parametrize("make", [make_bert, make_t5])
def test_every_position_sees_its_whole_text_and_nothing_else(make):
    model, ids = make(), torch.randint(30, (3, 20), generator=seeded())
    together = states(model, ids, torch.tensor([20, 7, 1]))
    for row, n in enumerate((20, 7, 1)):  # neither padding nor neighbours
        close(together[row, :n], states(model, ids[row : row + 1, :n])[0], 1e-5)
    for other in ([2, 5, 3, 7, 9], [1, 5, 3, 7, 8], [1, 5, 3, 9, 7]):
        change = states(model, torch.tensor([other, [1, 5, 3, 7, 9]])).diff(dim=0)
        assert change.abs().amax(-1).min() > 1e-3


def test_token_types_change_after_the_first_separator_and_matter():
    ids = torch.tensor([[1, 5, 3, 7, 3, 9], [1, 3, 3, 0, 0, 0], [1, 2, 4, 5, 6, 7]])
    types, bert = rerank.token_type_ids(ids, 3), make_bert()
    assert types.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0] * 6]
    change = (bert(ids, token_type_ids=types) - bert(ids)).abs().amax(-1)
    assert change[:2].min() > 1e-3 and not change[2].any()


def test_dropout_is_for_training_only():
    bert, ids = make_bert(dropout=0.5), torch.tensor([[1, 5, 3]])
    assert torch.equal(bert(ids), bert(ids))
    assert not torch.equal(bert.train()(ids), bert(ids))


def test_text_beyond_the_positions_is_refused():
    with pytest.raises(ValueError, match="21 tokens exceed this BERT's 20 positions"):
        make_bert()(torch.zeros(1, 21, dtype=torch.long))


def test_near_distances_have_a_bucket_each_and_far_ones_share():
    distances = torch.tensor([-500, -128, -64, -8, -7, -1, 0, 1, 7, 8, 64, 128, 500])
    buckets = t5.distance_bucket(distances, make_t5(buckets=32, max_distance=128).config)
    assert buckets.tolist() == [15, 15, 14, 8, 7, 1, 0, 17, 23, 24, 30, 31, 31]


@pytest.mark.parametrize("make", [make_bert, make_t5, partial(make_t5, gated=False)])
def test_saved_encoder_comes_back_and_main_prints_it(tmp_path, capsys, make):
    model = make()
    model.save(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    pairs = zip(again.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert {p.requires_grad for p in again.parameters()} == {isinstance(model, rerank.Bert)}
    file = rerank if isinstance(model, rerank.Bert) else t5
    assert file.main([str(tmp_path)]) == model.config
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in capsys.readouterr().out
