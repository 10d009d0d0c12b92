"""What ships with the repo fits together, and the default command starts from it."""

from pathlib import Path

import pytest
import torch

import adapters
import train
from model import LM, load_tokenizer


@pytest.fixture(scope="module")
def lm():
    return LM.from_pretrained(train.ASSETS / "lm")


@pytest.mark.parametrize(
    "folder", sorted(p.parent.name for p in train.ASSETS.glob("*/adapter_config.json"))
)
def test_a_stored_connector_belongs_to_the_stored_lm_and_says_what_it_was_made_for(lm, folder):
    connector, config = (
        adapters.load_adapter(train.ASSETS / folder, lm),
        adapters.read_adapter_config(train.ASSETS / folder),
    )
    assert folder == f"{config['method']}_{len(connector.layers)}"


@pytest.mark.parametrize("method", train.recurse.COMPOSITIONS)
def test_a_method_starts_from_its_stored_connector_where_there_is_one(lm, method):
    args = train.parse(["--method", method])
    stored, started = (
        train.ASSETS / f"{method}_{args.connector_layers}",
        train.new_adapter(args, lm, load_tokenizer(train.ASSETS / "lm"), []),
    )
    assert stored.is_dir() or method != "neural_recursion"  # the main job's is there
    if stored.is_dir():
        assert all(
            torch.equal(a, b)
            for a, b in zip(started.parameters(), adapters.load_adapter(stored, lm).parameters())
        )


def test_the_assets_stay_small():
    assert (
        sum(path.stat().st_size for path in Path(train.ASSETS).rglob("*") if path.is_file())
        <= 32 * 2**20
    )
