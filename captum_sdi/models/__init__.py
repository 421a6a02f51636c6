"""Looped models to train and attribute, and loops for models that have none; importing registers with AutoModel."""

from captum_sdi.models.loop_layers import loop_layers
from captum_sdi.models.looped_gpt import LoopedGPTConfig, LoopedGPTForCausalLM

__all__ = ["LoopedGPTConfig", "LoopedGPTForCausalLM", "loop_layers"]
