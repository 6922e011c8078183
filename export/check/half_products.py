"""Half-precision products on a CPU without units for them: computed in float32 and rounded, which is what units do.

PyTorch then falls back to scalar loops (`_slow_conv2d_forward`): minutes for one UNet call of Stable Diffusion's size.
A product of half-precision numbers is exact in float32, and units add such products up in float32, too, so that only
the order of the additions differs. Everything between products stays with PyTorch's own half-precision kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# In the dispatcher's words; of an attention's outputs the first is half, the rest are its float32 statistics.
PRODUCTS = frozenset(
    {
        *("aten::convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    }
)


def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in `dtype` at speed, as oneDNN says; True for float32 and wider."""
    import torch

    if dtype not in (torch.float16, torch.bfloat16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    library = torch.ops.mkldnn
    asked = library._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else library._is_mkldnn_fp16_supported
    return bool(asked())


@contextlib.contextmanager
def rounded_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, products of `dtype` tensors on the CPU are computed in float32 and rounded to `dtype` once.

    Arguments of a product that mix dtypes are left to PyTorch, which refuses them.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype == dtype else tensor

    def half_here(value: Any) -> bool:
        return not isinstance(value, torch.Tensor) or (value.dtype == dtype and value.device.type == "cpu")

    class Rounded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = args, kwargs or {}
            if func.name().partition(".")[0] not in PRODUCTS or not all(map(half_here, tree_leaves(given))):
                return func(*given[0], **given[1])
            wide = tree_map_only(torch.Tensor, widen, given)
            found = func(*wide[0], **wide[1])
            return (found[0].to(dtype), *found[1:]) if isinstance(found, tuple) else found.to(dtype)

    with Rounded():
        yield


def quick_half(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """`rounded_products` where this CPU has no units for `dtype`, otherwise nothing."""
    return contextlib.nullcontext() if has_units(dtype) else rounded_products(dtype)
