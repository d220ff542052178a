"""Pruning and fitting a model that streams from its shards: peak memory, and time beside the same work in memory."""
