"""Writes `maxtext.safetensors`: small models of `transformers`, and as MaxText converts them.

    pip download --no-deps --python-version 3.12 --only-binary=:all: maxtext==0.2.5
    unzip maxtext-0.2.5-py3-none-any.whl -d unpacked
    python -m tests.io.make_maxtext_fixture unpacked

Of MaxText only the module with its mappings and hooks is run, so nothing else of it is installed.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).with_name("maxtext.safetensors")
MODULE = "maxtext/checkpoint_conversion/utils/param_mapping.py"
WIDTH, HEADS, KV_HEADS, HEAD, HIDDEN, VOCABULARY, EXPERTS = 10, 3, 2, 6, 7, 5, 4
MODELS = {  # by the name of our naming: MaxText's model, its layers, whether it has experts
    "maxtext": ("qwen3-8b", 2, False),
    "maxtext with experts": ("qwen3-30b-a3b", 2, True),
    "maxtext_llama": ("llama3.1-8b", 2, False),
    "maxtext_mixtral": ("mixtral-8x7b", 2, True),
    "maxtext_gemma2": ("gemma2-2b", 4, False),
    "maxtext_gemma3": ("gemma3-4b", 13, False),
}
SHAPES = {  # of a leaf of one layer, by the end of its name
    "embedding": (VOCABULARY, WIDTH),
    "logits_dense-kernel": (WIDTH, VOCABULARY),
    "query-kernel": (WIDTH, HEADS, HEAD),
    "key-kernel": (WIDTH, KV_HEADS, HEAD),
    "value-kernel": (WIDTH, KV_HEADS, HEAD),
    "out-kernel": (HEADS, HEAD, WIDTH),
    "query-bias": (HEADS, HEAD),
    "key-bias": (KV_HEADS, HEAD),
    "value-bias": (KV_HEADS, HEAD),
    "query_norm-scale": (HEAD,),
    "key_norm-scale": (HEAD,),
    "scale": (WIDTH,),
    "wi_0-kernel": (WIDTH, HIDDEN),
    "wi_1-kernel": (WIDTH, HIDDEN),
    "wo-kernel": (HIDDEN, WIDTH),
    "gate-kernel": (WIDTH, EXPERTS),
    "wi_0": (WIDTH, HIDDEN),
    "wi_1": (WIDTH, HIDDEN),
    "wo": (HIDDEN, WIDTH),
}


def main(unpacked: str) -> None:
    spec = importlib.util.spec_from_file_location("param_mapping", Path(unpacked) / MODULE)
    mapping = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mapping)
    arrays = {}
    for naming, (model, layers, experts) in MODELS.items():
        rng = np.random.default_rng(len(arrays))
        torch: dict[str, np.ndarray] = {}
        for scanned in (False, True):
            for path, leaf in converted(mapping, model, layers, experts, scanned, torch, rng):
                arrays[f"{naming}|{'scanned' if scanned else 'unrolled'}|{path}"] = leaf
        arrays |= {f"{naming}|torch|{name}": weight for name, weight in torch.items()}
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, FILE)
    print(f"{FILE.name}: {len(arrays)} arrays, {FILE.stat().st_size} bytes")


def converted(mapping, model, layers, experts, scanned, torch, rng):
    """The path and the value of every leaf; fills `torch` with the weights that they come from."""
    config = {
        "num_hidden_layers": layers,
        "hidden_size": WIDTH,
        "head_dim": HEAD,
        "num_experts": EXPERTS if experts else 0,
    }
    config |= {"text_config": dict(config), "vision_config": {"num_hidden_layers": 0}}
    maxtext = types.SimpleNamespace(num_experts=EXPERTS, head_dim=HEAD)
    names = mapping.PARAM_MAPPING[model](config, maxtext, scanned)
    hooks = mapping.HOOK_FNS[model](config, maxtext, scanned, saving_to_hf=False)
    for key, sources in names.items():
        if "vision" in key:
            continue
        shape = SHAPES[next(end for end in SHAPES if key.endswith(f"-{end}"))]

        def build(source, key=key, shape=shape):
            """A weight as the hooks give it, or a list of them, stacked along dim 0."""
            if isinstance(source, list):
                return np.stack([build(one) for one in source])
            weight = torch.setdefault(source, rng.standard_normal(torch_shape(source, shape), "f"))
            hook = hooks.get(key) or []
            for one in hook if isinstance(hook, list) else [hook]:
                weight = one(weight, shape)
            return np.asarray(weight)

        leaf = build(sources)
        if isinstance(sources, list) and scanned and not isinstance(sources[0], list):
            leaf = np.moveaxis(leaf, 0, 1)  # MaxText's param_scan_axis
        yield key.replace("-", "/"), leaf


def torch_shape(name, shape):
    if "embed_tokens" in name or len(shape) < 2:
        return shape
    if name.endswith("bias"):
        return (int(np.prod(shape)),)
    split = 2 if "o_proj" in name else 1
    return int(np.prod(shape[split:])), int(np.prod(shape[:split]))


if __name__ == "__main__":
    main(*sys.argv[1:])
