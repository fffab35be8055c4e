"""What `benchmarks/peers.py` compares: a module for each library, in a process of its own."""
