"""Looped models to train and attribute, and loops for models that have none.

Importing registers the looped GPT with `AutoConfig` and `AutoModelForCausalLM`.
"""

from captum_sdi.models.looped_gpt import LoopedGPTForCausalLM
from captum_sdi.models.looped_gpt_config import LoopedGPTConfig
from captum_sdi.models.looping import loop_layers

__all__ = ["LoopedGPTConfig", "LoopedGPTForCausalLM", "loop_layers"]
