"""What `finetune_vision.py` needs besides the library: the data, the model, the picture."""
