"""Loading needs at most 1.3 times the tensors of the largest file beside the parameters themselves."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from distill.models import DecoderConfig
from distill.weights.assemble import disassemble
from distill.weights.families import to_json
from distill.weights.networks import shapes_of, table_of
from distill.weights.safetensors import write

FILE = 30_000_000
"""Most bytes of one file; the feed-forward kernels, stacked, are twice as large."""

CODE = """
import sys
import numpy, jax, distill

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

small, large = sys.argv[1:]
distill.load(small)  # what is imported and made once
before = peak()
_, params = distill.load(large)
print(peak() - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def folder_of(path, layers):
    """A model folder with this many layers and constant weights."""
    config = DecoderConfig(vocab_size=64, layers=layers, width=256, heads=2, feed_forward=4096)
    params = {}
    for (*above, last), shape in shapes_of(config).items():
        tree = params
        for name in above:
            tree = tree.setdefault(name, {})
        tree[last] = np.broadcast_to(np.float32(0.5), shape)
    path.mkdir()
    write(path, disassemble(shapes_of(config), table_of(config, "llama"), params), shard_bytes=FILE)
    (path / "config.json").write_text(json.dumps(to_json(config, "llama")))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_less_than_one_file_beside_the_parameters(tmp_path):
    small, large = folder_of(tmp_path / "small", 1), folder_of(tmp_path / "large", 14)
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed memory returns to the system at once
    command = [sys.executable, "-c", CODE, small, large]
    done = subprocess.run(command, capture_output=True, text=True, env=returned)
    assert done.returncode == 0, done.stderr
    largest = max(path.stat().st_size for path in large.glob("*.safetensors"))
    assert len(list(large.glob("*.safetensors"))) > 5
    assert int(done.stdout) <= 1.3 * largest
