"""BERT: what a text is encoded to depends on that text alone, and a stored one comes back. Parity with the reference is in test_parity.py."""

import json

import pytest
import torch

import rerank
from rerank import Bert, BertConfig, segments


def bert(seed=0, **changes):
    torch.manual_seed(seed)
    model = Bert(
        BertConfig(
            **dict(vocab_size=30, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_len=20)
            | changes
        )
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


@torch.no_grad()
def test_padding_and_neighbours_are_not_seen():
    model, ids, lengths = (
        bert(),
        torch.randint(30, (3, 20), generator=torch.Generator().manual_seed(0)),
        torch.tensor([20, 7, 1]),
    )
    types = segments(ids, 3)
    together = model(ids, lengths, types)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(
            together[row, :n],
            model(ids[row : row + 1, :n], types=types[row : row + 1, :n])[0],
            atol=1e-5,
            rtol=1e-5,
        )


@torch.no_grad()
def test_order_segment_and_later_tokens_matter():
    model, ids = bert(), torch.tensor([[1, 5, 3, 7, 9]])
    base = model(ids)[0, 0]
    for other in (
        model(torch.tensor([[1, 5, 3, 9, 7]])),
        model(ids, types=segments(ids, 3)),
        model(torch.tensor([[1, 5, 3, 7, 8]])),
    ):
        assert (other[0, 0] - base).abs().max() > 1e-3


def test_segments_begin_after_the_first_separator():
    assert segments(
        torch.tensor([[1, 5, 3, 7, 3, 9], [1, 3, 3, 0, 0, 0], [1, 2, 4, 5, 6, 7]]), 3
    ).tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0] * 6]


def test_dropout_is_for_training_only():
    model, ids = bert(dropout=0.5), torch.tensor([[1, 5, 3]])
    assert torch.equal(model(ids), model(ids)) and not torch.equal(model.train()(ids), model(ids))


def test_a_stored_bert_comes_back(tmp_path, capsys):
    model = bert()
    model.save(tmp_path)
    again = Bert.from_pretrained(tmp_path)
    assert (
        again.config == model.config
        and not again.training
        and all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
    )
    assert (
        rerank.main([str(tmp_path)]) == model.config
        and f"{sum(p.numel() for p in model.parameters()):,} parameters" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(model_type="t5"), "model_type is not bert"),
        (dict(hidden_size=0), "hidden_size is 0"),
        (dict(num_attention_heads=3), "not a multiple"),
        (dict(hidden_act="relu"), "'relu' is not supported"),
        (dict(num_hidden_layers=3), "encoder.layer.2"),
        (dict(num_hidden_layers=1), "encoder.layer.1"),
    ],
)
def test_a_bert_that_does_not_fit_is_refused(tmp_path, change, named):
    bert().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        Bert.from_pretrained(tmp_path)


def test_a_text_beyond_the_positions_is_refused():
    with pytest.raises(ValueError, match="21 tokens exceed the 20 positions"):
        bert()(torch.zeros(1, 21, dtype=torch.long))
