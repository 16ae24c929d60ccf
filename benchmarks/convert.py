"""Megabytes a second and peak memory of `rookery convert`, for a random RWKV-7 of a given size in every format.

    python benchmarks/convert.py [--mb 1000] [--save]

Each conversion runs in a process of its own, whose peak memory is that of private pages: pages of the mapped source
belong to the file cache. A copy of the source file, flushed to the disk, is the baseline.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from support import Machine, interleaved, report

from rookery.checkpoints.safetensors import write_model
from rookery.checkpoints.source import BFLOAT16, Stored
from rookery.families.rwkv7 import FAMILY, create

CASES = {
    "bf16 to pth": ("m.pth", ()),
    "bf16 to float32 safetensors": ("m.safetensors", ("--dtype", "float32")),
    "bf16 to fla folder": ("m", ()),
    "bf16 to float16 ggmf": ("m.bin", ("--dtype", "float16")),
    "bf16 to gguf": ("m.gguf", ()),
    "bf16 to q8_0 gguf": ("m.gguf", ("--dtype", "q8_0")),
    "bf16 to int8 safetensors": ("m.safetensors", ("--dtype", "int8")),
    "bf16 to int4 safetensors": ("m.safetensors", ("--dtype", "int4")),
}
CHILD = """
import sys, threading, time
from rookery.cli.main import main
peak, done = 0, False
def watch():
    global peak
    while not done:
        fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
        peak = max(peak, int(fields["RssAnon"].split()[0]))
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
import numpy, gguf
time.sleep(0.02); before = peak
start = time.perf_counter()
assert main(["convert", *sys.argv[1:]]) == 0
seconds = time.perf_counter() - start
done = True; thread.join()
print(seconds, before * 1024, peak * 1024)
"""


def random_model(path: Path, megabytes: float) -> int:
    """Writes a bfloat16 model of about so many megabytes, tensor by tensor; bytes of its largest tensor."""
    width = 1024
    layers = max(1, round((megabytes * 5e5 - 2 * 65536 * width) / (12.3 * width**2)))
    config = create(hidden_size=width, num_hidden_layers=layers)
    generator = np.random.default_rng(0)

    def tensor(shape: tuple[int, ...]) -> Stored:
        def read() -> np.ndarray:
            return generator.random(shape, np.float32).astype(BFLOAT16) - BFLOAT16.type(0.5)

        return Stored(shape, BFLOAT16, read, "bfloat16", 2 * int(np.prod(shape)))

    tensors = {name: tensor(shape) for name, shape in FAMILY.tensor_shapes(config).items()}
    write_model(path, tensors, family="rwkv7", config=config, fingerprint="benchmark", metadata={"tokenizer": "world"})
    return max(t.nbytes for t in tensors.values())


def copy(source: Path, destination: Path) -> None:
    with open(source, "rb") as a, open(destination, "wb") as b:
        while block := a.read(1 << 24):
            b.write(block)
        b.flush()
        os.fsync(b.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=1000.0)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--folder", help="where to write (the folder for temporary files)")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        source = folder / "source.safetensors"
        largest = random_model(source, given.mb)
        megabytes = source.stat().st_size / 1e6
        seconds = interleaved({"copy": lambda: copy(source, folder / "copy")}, rounds=1, warmup=0).median("copy")
        (folder / "copy").unlink()
        rows = [{"conversion": "copy", "MB": megabytes, "MB/s": megabytes / seconds}]
        rows += [measure(source, folder, case, megabytes, largest) for case in given.cases]
        report("convert", rows, Machine(threads=1), save=given.save)


def measure(source: Path, folder: Path, case: str, megabytes: float, largest: int) -> dict:
    name, options = CASES[case]
    out = folder / f"out-{time.monotonic_ns()}"
    out.mkdir()
    argv = [sys.executable, "-c", CHILD, str(source), str(out / name), *options]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    seconds, before, peak = map(float, done.stdout.split())
    shutil.rmtree(out)
    return {
        "conversion": case,
        "MB": megabytes,
        "MB/s": megabytes / seconds,
        "peak above start MB": (peak - before) / 1e6,
        "largest tensor MB": largest / 1e6,
    }


if __name__ == "__main__":
    main()
