"""Measurements: `python -m bench` times ops beside their peers, `python -m bench.quality` judges recovered models."""
