"""What `bench/serving.py` measures, with what, and how it is told."""
