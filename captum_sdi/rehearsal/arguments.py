"""What the user passed, looked at before anything is computed.

Missing examples and a missing batch size raise AssertionError with Captum's sentence, as code written for Captum
expects; everything else ValueError or TypeError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.data.losses import LossFn
from captum_sdi.index.faiss import Faiss
from captum_sdi.offload import align_hooks, offloaded_names
from captum_sdi.preconditioners import Preconditioner
from captum_sdi.sketch.base import Sketch
from captum_sdi.words import first_few, is_integer, warn_user


def check_model(model: Any) -> None:
    """Refuse what is no model, and a model whose parameters are nowhere, or in places that no hook knows.

    Raises:
        TypeError: If it is no module.
        ValueError: If its parameters are sharded, on the meta device, or on several devices, and accelerate's hooks do
            not bring them together.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    places: dict[str, str] = {}
    offloaded = offloaded_names(model)
    is_placed = any(align_hooks(module) for module in model.modules())
    for name, parameter in model.named_parameters():
        if name not in offloaded:
            places.setdefault(str(parameter.device), name)
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"The model is sharded: {name!r} is a DTensor, of which this process holds a part (FSDP2, tensor "
                "parallelism). Load it whole, on one device or by a device_map: the weights are those that "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict returns with full_state_dict=True."
            )
    if "meta" in places:
        raise ValueError(f"The model has no weights: {places['meta']!r} is on the meta device. Load it first.")
    if len(places) > 1 and not is_placed:
        raise ValueError(
            f"The model is spread over several devices: {places}. Put it on one, with model.to(device), or load it "
            "with a device_map, whose hooks bring activations where the layers are."
        )


def check_model_in_one_place(model: Any) -> None:
    """Refuse what `check_model` does, and weights that are offloaded or on several devices.

    Raises:
        ValueError: If they are.
    """
    check_model(model)
    offloaded = offloaded_names(model)
    devices = {str(parameter.device) for parameter in model.parameters()}
    if offloaded or len(devices) > 1:
        raise ValueError(
            f"The model's weights are in several places: {first_few(sorted(offloaded or devices))}. Load it on one "
            "device, without device_map."
        )


def check_methods(
    sketch: Any,
    preconditioner: Any,
    search: Any,
    index: Any,
) -> None:
    """Refuse objects that are not of their argument's kind.

    Raises:
        TypeError: If one is not.
    """
    check_sketch(sketch)
    if not isinstance(preconditioner, Preconditioner) or isinstance(preconditioner, type):
        raise TypeError(f"preconditioner= must have acts_on and fit(point, train), got {preconditioner!r}.")
    if search is not None and (index is None or not isinstance(search, Faiss)):
        raise TypeError(f"search= must be Faiss(...), beside index=; got {search!r}, index={index!r}.")


def check_sketch(sketch: Any) -> None:
    """Refuse what is no sketch.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(sketch, Sketch) or isinstance(sketch, type):
        raise TypeError(f"sketch= must be TensorSketch(...) or Exact(), got {sketch!r}.")


def check_normalize(normalize: Any) -> None:
    """Refuse anything but "train", "both" or None.

    Raises:
        ValueError: If it is something else.
    """
    if normalize not in (None, "train", "both"):
        raise ValueError(f'normalize= must be "train", "both" or None, got {normalize!r}.')


def check_layers(layers: Any) -> None:
    """Refuse anything but "loop", None, or a list of names.

    Raises:
        TypeError: If it is something else.
        ValueError: If the list is empty.
    """
    if layers is None or layers == "loop":
        return
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(
            f"`layers` should be a list! It is {layers!r}; pass layers=[{layers!r}] for one layer, 'loop' for the "
            "loop's trainable parameters, or None for every trainable parameter."
        )
    if len(layers) == 0:
        raise ValueError("`layers` cannot be empty! Pass None for every trainable parameter, or name some modules.")
    if not all(isinstance(layer, str) for layer in layers):
        raise TypeError(f"`layers` should contain str layer names. It is {layers!r}.")


def checked_loss(loss_fn: Any, argument: str, reduces: Any = None) -> LossFn | None:
    """Return a loss function that can be called; warn, as Captum does, of one that does not say how it reduces.

    Args:
        loss_fn: The loss function; None: there is none to check.
        argument: That it came from, named in errors.
        reduces: Captum's ``sample_wise_grads_per_batch``: whether it reduces; None: what it returns decides.

    Raises:
        TypeError: If it is no function, or ``reduces`` no bool.
        AssertionError: If it reduces otherwise than is said, as in Captum.
    """
    if not (reduces is None or isinstance(reduces, bool)):
        raise TypeError(f"sample_wise_grads_per_batch must be a bool or None, got {reduces!r}.")
    if loss_fn is None:
        return None
    if not callable(loss_fn):
        raise TypeError(f"{argument} must be a function of (output, labels), got {type(loss_fn).__name__}.")
    reduction = getattr(loss_fn, "reduction", None)
    expected = '"sum" or "mean"' if reduces else '"none"'
    if not (reduces is None or reduction is None or (reduction in ("sum", "mean")) == reduces):
        raise AssertionError(  # begins with Captum's sentence
            f"reduction for `{argument}` must be {expected} when `sample_wise_grads_per_batch` is {reduces}; it is "
            f"{reduction!r}. Gradients are per example either way: leave sample_wise_grads_per_batch= out."
        )
    if not hasattr(loss_fn, "reduction"):
        warn_user(  # begins with Captum's sentence
            f'Since `{argument}` has no "reduction" attribute, the implementation assumes that `{argument}` is a '
            '"per-example" loss function if it returns one value per example, and calls it on one example at a time '
            "if it returns a scalar. Please ensure that this is the case."
        )
    return loss_fn


def check_inputs(inputs: Any) -> None:
    """Refuse no examples at all.

    Raises:
        AssertionError: If there are none, as in Captum.
    """
    if inputs is None:
        raise AssertionError(
            "`inputs` argument is required. If you wish to calculate self influence scores, please use the "
            "`self_influence` method instead."
        )


def check_top_k(
    k: Any,
    rerank: Any,
    proponents: Any,
    rank_by: Any = None,
) -> None:
    """Refuse numbers that name no top k.

    Raises:
        TypeError: If proponents is no bool.
        ValueError: If k, rerank or rank_by cannot be.
    """
    if not isinstance(proponents, bool):
        raise TypeError(f"proponents must be True, the highest influences first, or False; got {proponents!r}.")
    if k is not None and (not is_integer(k) or k < 1):
        raise ValueError(f"k must be an int of at least 1, or None for all training examples; got {k!r}.")
    if rerank is not None and (k is None or not is_integer(rerank) or rerank < k):
        raise ValueError(
            f"rerank={rerank!r} is how many candidates exact gradients decide among: pass k=, and at least k."
        )
    if rank_by is not None and (k is None or not is_integer(rank_by) or rank_by < 0):
        raise ValueError(
            f"rank_by={rank_by!r} is a 0-based loop step to rank the top k by: pass k=, and an int of 0 or more."
        )


def check_per(per: Any, rerank: int | None, *, aggregate: bool) -> None:
    """Refuse what the test examples cannot be taken apart by.

    Raises:
        ValueError: If per is unknown, or does not go with the other arguments.
    """
    if per is None:
        return
    if per not in ("token", "checkpoint"):
        raise ValueError(f'per must be "token", "checkpoint" or None; got {per!r}.')
    if aggregate or rerank is not None:
        opposite = "aggregate=True" if aggregate else f"rerank={rerank}"
        raise ValueError(f"per={per!r} and {opposite} do not go together: pass one of them.")


def checked_positions(indices: Any) -> Tensor | None:
    """Return positions in the train set as a tensor ``(n,)``; None for all.

    Raises:
        ValueError: If they are no list of positions.
    """
    if indices is None:
        return None
    positions = torch.as_tensor(indices).cpu()
    if positions.ndim != 1 or positions.is_floating_point() or len(positions) == 0 or bool((positions < 0).any()):
        raise ValueError(f"indices must be a list of positions in train_dataset, 0 or more; got {indices!r}.")
    return positions


def checked_pairs(indices: Any) -> Tensor:
    """Return positions in the train set as a tensor ``(k,)``, or ``(q, k)`` where they differ by test example.

    Raises:
        ValueError: If they are neither.
    """
    try:
        pairs = torch.as_tensor(indices).cpu()
    except (TypeError, ValueError, RuntimeError):
        pairs = torch.empty(0)
    is_wrong = pairs.ndim not in (1, 2) or pairs.numel() == 0 or pairs.is_floating_point() or pairs.dtype == torch.bool
    if is_wrong or bool((pairs < 0).any()):
        raise ValueError(
            f"indices must be positions in train_dataset, 0 or more, (k,) for all test examples or (q, k); got "
            f"{indices!r}."
        )
    return pairs.long()
