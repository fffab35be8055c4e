"""`lorax-fn merge` against a plain copy of the same files, and against PEFT's `merge_and_unload`.

    python -m benchmarks.merge --peft-python ENV/bin/python   (with torch, peft and transformers)

The base is a Llama of 1.1 B random weights in bfloat16, in shards, the adapter LoRA of rank 16 on
every kernel. Each round runs each of the three once, as a process of its own: from files to files
on disk. Throughput is the size of the base over the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tqdm import tqdm

import lorax_fn as lora

# What a process says at its end: its processor time, and the most memory that it held.
PEAK = """
import atexit, sys, time
def peak():
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    sys.stderr.write(f"\\npeak: {time.process_time()} {fields['VmHWM'].split()[0]}\\n")
atexit.register(peak)
"""
COPY = """
import os, shutil, sys
for path in sorted(os.scandir(sys.argv[1]), key=lambda entry: entry.name):
    target = os.path.join(sys.argv[2], path.name)
    shutil.copyfile(path.path, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
"""
OURS = "from lorax_fn.cli import main; main()"
PEFT = """
import sys, torch, transformers, peft
base, adapter, out = sys.argv[1:4]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="600MB")
"""


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a Llama."""

    hidden: int = 2048
    inner: int = 5632
    kv: int = 256
    layers: int = 22
    vocab: int = 32000
    rank: int = 16

    def kernels(self) -> dict[str, tuple[int, int]]:
        """The shapes of a layer's kernels, as PyTorch has them."""
        d, inner = self.hidden, self.inner
        return {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (self.kv, d),
            "self_attn.v_proj": (self.kv, d),
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (inner, d),
            "mlp.up_proj": (inner, d),
            "mlp.down_proj": (d, inner),
        }


SMALL = Size(hidden=64, inner=96, kv=32, layers=2, vocab=128, rank=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peft-python", help="an interpreter that has torch, peft, transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to work; wants 10 GB")
    parser.add_argument("--smoke", action="store_true", help="the smallest model, one round")
    options = parser.parse_args()
    size, rounds = (SMALL, 1) if options.smoke else (Size(), options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), size, rounds, options.peft_python)


def measure(folder: Path, size: Size, rounds: int, peft_python: str | None) -> None:
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    shapes = make_base(base, size)
    make_adapter(adapter, shapes, size.rank)
    n_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    commands = {
        "copy": [sys.executable, "-c", PEAK + COPY, base, out],
        "lorax_fn": [sys.executable, "-c", PEAK + OURS, "merge", base, adapter, "-o", out, "-q"],
    }
    if peft_python:
        commands["PEFT"] = [peft_python, "-c", PEAK + PEFT, base, adapter, out]
    costs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    results = {}
    for _ in tqdm(range(rounds)):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            costs[name].append(run(command))
            results[name] = digest(out, shapes)
    print(f"{n_bytes / 1e9:.2f} GB in {len(list(base.glob('*.safetensors')))} files, "
          f"largest tensor {max(map(np.prod, shapes.values())) * 2 / 1e6:.0f} MB")  # fmt: skip
    print("            seconds    GB/s  of a processor  peak RSS MB")
    for name, rounds_of in costs.items():
        wall, processor = (min(column) for column in list(zip(*rounds_of, strict=True))[:2])
        peak = max(cost[2] for cost in rounds_of)
        print(
            f"{name:10s}  {wall:7.2f}  {n_bytes / wall / 1e9:6.2f}  {processor:14.2f}  {peak:11.0f}"
        )
    print("largest difference of lorax_fn's weights")
    for name in sorted(set(results) - {"lorax_fn"}):
        print(f"    from {name}: {compare(results['lorax_fn'], results[name])}")


def make_base(folder: Path, size: Size) -> dict[str, tuple[int, ...]]:
    """Shards of random weights with the config that `transformers` wants; returns their shapes."""
    folder.mkdir()
    ends = {
        "model.embed_tokens.weight": (size.vocab, size.hidden),
        "model.norm.weight": (size.hidden,),
        "lm_head.weight": (size.vocab, size.hidden),
    }
    groups = [ends]
    for i in range(size.layers):
        prefix = f"model.layers.{i}"
        layer = {f"{prefix}.{name}.weight": shape for name, shape in size.kernels().items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        groups.append(layer | {f"{prefix}.{name}.weight": (size.hidden,) for name in norms})
    rng = np.random.default_rng(0)
    weight_map = {}
    for i in range(0, len(groups), 6):
        shapes = {name: shape for group in groups[i : i + 6] for name, shape in group.items()}
        file = f"model-{i:05d}.safetensors"
        tensors = {
            name: (rng.standard_normal(shape, np.float32) / 50).astype(jnp.bfloat16)
            for name, shape in shapes.items()
        }
        safetensors.numpy.save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 32,
        "num_key_value_heads": size.kv // 32,
        "vocab_size": size.vocab,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return {name: shape for group in groups for name, shape in group.items()}


def make_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int) -> None:
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    params |= {name: jnp.zeros(shape, jnp.bfloat16)
               for name, shape in shapes.items() if "proj" in name}  # fmt: skip
    axes = lora.Axes(contract=(1,), out=(0,))
    rules = [lora.LoRA(r".*_proj\.weight", rank=rank, alpha=2 * rank, axes=axes)]
    factors = lora.init(jax.random.key(0), params, rules)
    factors = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), factors
    )
    lora.save_peft(folder, params, factors, names="torch")


def run(command: list) -> tuple[float, float, float]:
    """Seconds, seconds of a processor, and the most memory that the process held, in MB."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    process = subprocess.run(
        list(map(str, command)), env=env, capture_output=True, text=True, check=False
    )
    took = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(process.stderr)
    processor, peak = process.stderr.rpartition("peak: ")[2].split()
    return took, float(processor), int(peak) / 1024


def digest(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A few rows of some merged weights."""
    names = [name for name in shapes if "proj" in name][:: max(1, len(shapes) // 8)]
    found = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="flax") as file:
            for name in set(names) & set(file.keys()):
                found[name] = np.asarray(file.get_slice(name)[:4], np.float32)
    return found


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> str:
    largest = max(np.abs(ours[name] - theirs[name]).max() for name in ours)
    return f"{largest:.1e}, of weights up to {max(np.abs(w).max() for w in ours.values()):.2f}"


if __name__ == "__main__":
    main()
