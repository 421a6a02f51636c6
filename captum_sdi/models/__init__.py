"""Looped models to train and attribute; importing registers them with AutoModel."""

from captum_sdi.models.looped_gpt import LoopedGPTConfig, LoopedGPTForCausalLM

__all__ = ["LoopedGPTConfig", "LoopedGPTForCausalLM"]
