"""Quality on a real model: `python -m bench.quality` prunes and recovers it by every method of one protocol."""
