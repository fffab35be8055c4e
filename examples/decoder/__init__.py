"""What `finetune_decoder.py` needs besides the library: the texts, the model, samples, pictures."""
