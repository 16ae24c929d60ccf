"""Tables on disk give the same numbers as tables in memory."""

import pytest
import torch
from support.language import randomised, some_tokens

import rookery
from rookery.checkpoints import open_checkpoint
from rookery.models import save_model
from rookery.nn.table import keep_on_disk


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["rwkv7a-test", "rwkv7b-test", "rwkv8-hybrid-test"])
def test_a_model_with_its_tables_on_disk_gives_the_same_logits(name, dtype, tmp_path):
    save_model(randomised(name, dtype=dtype), tmp_path / "m.safetensors")
    model = rookery.load(tmp_path / "m.safetensors")
    tokens = some_tokens(model, 2, 9)
    before, _ = model(tokens)
    size = sum(p.numel() for p in model.parameters())
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    replaced = keep_on_disk(model, checkpoint)
    last = model.config.num_hidden_layers - 1
    assert {f"blocks.{last}.ffn.s_emb.weight", f"blocks.{last}.ffn.enn.weight"} & set(replaced)
    assert "emb.weight" not in replaced
    assert sum(p.numel() for p in model.parameters()) == size - sum(checkpoint[n].size for n in replaced)
    assert torch.equal(model(tokens)[0], before)


def test_rows_are_read_from_the_map_of_the_file(tmp_path):
    save_model(randomised("rwkv7a-test", dtype=torch.float32), tmp_path / "m.safetensors")
    table = open_checkpoint(tmp_path / "m.safetensors")["blocks.0.ffn.s_emb.weight"]
    assert not table.flags.owndata
    assert not table.flags.writeable
