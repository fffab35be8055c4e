"""Side by side with LoRA written by hand: FLOPs, memory, tracing, compilation, step time."""
