"""What `serve.py` needs: slots for adapters, an engine that batches, the HTTP app, a load test."""
