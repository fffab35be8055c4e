"""What `finetune_minilm.py` needs besides the library: the encoder, its weights and the task."""
