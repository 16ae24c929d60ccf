"""How the forecaster that ships with the package was trained: on generated series only, half an hour on one core.

python examples/pretrain_forecaster.py OUT [--minutes 30]
"""

import argparse
import time
from pathlib import Path

import torch

from rookery.data.synthetic_series import SyntheticWindows
from rookery.forecasting.fit import FitConfig, fit
from rookery.models import create_model, save_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path, help="file to write, for example forecaster.safetensors")
parser.add_argument("--minutes", type=float, default=30, help="time that training may take")
given = parser.parse_args()

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "intermediate_size": 448,
    "output_patches": 2,
    "context_length": 480,
}
CONTEXT, HORIZON, BATCH, EPOCHS = 480, 96, 32, 8

model = create_model("rimer", seed=1, **SIZES)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
validation = SyntheticWindows(512, CONTEXT, HORIZON, seed=99)
start = time.perf_counter()
probe = SyntheticWindows(20 * BATCH, CONTEXT, HORIZON, seed=7)
fit(create_model("rimer", seed=1, **SIZES), probe, probe, FitConfig(epochs=1, batch_size=BATCH))
seconds_a_step = (time.perf_counter() - start) / 27  # 20 steps, and a validation that costs a third of a step each
steps = round(60 * given.minutes / seconds_a_step / EPOCHS)
print(f"{EPOCHS} passes of {steps} steps of {BATCH} series")
train = SyntheticWindows(steps * BATCH, CONTEXT, HORIZON, seed=3)
config = FitConfig(epochs=EPOCHS, batch_size=BATCH, lr=2e-3, weight_decay=0.1, warmup_share=0.05)
print(
    fit(
        model, train, validation, config, lambda line: print(f"{line}, {time.perf_counter() - start:.0f} s", flush=True)
    )
)
save_model(model.to(torch.bfloat16), given.out)
