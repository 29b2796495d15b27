"""Tuning methods: adapters, LoRA, prompt learners, the learnable upsampler, and the dict of all."""
