"""Generation with packed weights against transformers on dense ones: tokens per second and resident memory."""
