"""Batches, streams of them, collation, losses and fingerprints: everything about examples, nothing about hooks."""
