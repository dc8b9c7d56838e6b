"""Proof without the pod: a training step through the real TPU compiler, ahead of time, and how fast it can be."""
