import json

import numpy as np
import pytest
import torch
from support.files import tiny

from rookery.checkpoints import open_checkpoint
from rookery.checkpoints.safetensors import write_safetensors
from rookery.errors import BadCheckpoint

LORA = {
    f"blocks.{i}.att.{name}.lora_{side}": np.ones((4, 64) if side == "A" else (64, 4), np.float32)
    for i in range(3)
    for name in ("key", "value")
    for side in "AB"
}


def test_an_adapter_is_recognised_and_told_what_base_it_needs(tmp_path):
    # RWKV-PEFT saves small trained vectors along with the factors
    extra = {"blocks.0.att.r_k": torch.ones(1, 64), "blocks.0.att.time_mix_k": torch.ones(64)}
    torch.save({name: torch.tensor(array) for name, array in LORA.items()} | extra, tmp_path / "lora.pth")
    with pytest.raises(BadCheckpoint) as refusal:
        open_checkpoint(tmp_path / "lora.pth")
    assert str(refusal.value) == (
        f"{str(tmp_path / 'lora.pth')!r}: this is an adapter (12 tensors, as 'blocks.0.att.key.lora_A'), not a model: "
        "it changes a base model of 3 layers and width 64; give that model's file, and this one as its adapter "
        "(--adapter)"
    )


def test_an_adapter_folder_names_its_base(tmp_path):
    names = {f"base_model.model.model.layers.0.attn.r_proj.lora_{c}.weight": np.ones((4, 8)) for c in "AB"}
    write_safetensors(tmp_path / "adapter_model.safetensors", names, {})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(BadCheckpoint, match="it changes the model 'some/base'; give that model's file"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(BadCheckpoint, match="a base model of 1 layers and width 8; give"):
        open_checkpoint(tmp_path / "adapter_model.safetensors")


def test_a_tuned_state_is_recognised(tmp_path):
    torch.save({f"blocks.{i}.att.time_state": torch.ones(2, 16, 16) for i in range(3)}, tmp_path / "state.pth")
    with pytest.raises(
        BadCheckpoint, match=r"a tuned state \(3 layers of 2 × 16 × 16\), not a model; give the model's"
    ):
        open_checkpoint(tmp_path / "state.pth")


def test_the_state_of_an_optimiser_is_recognised(tmp_path):
    model = tiny()
    optimiser = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimiser.step()
    torch.save(optimiser.state_dict(), tmp_path / "optim.pth")
    with pytest.raises(BadCheckpoint, match="holds the state of an optimiser, no model; the weights are in another"):
        open_checkpoint(tmp_path / "optim.pth")


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"emb.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        BadCheckpoint, match="the index names the file 'model-00001-of-00002.safetensors', which is not"
    ):
        open_checkpoint(tmp_path)
