"""The account of the machine, and the attention kernel that really ran."""

from __future__ import annotations

import json
import platform
import socket

import torch
from torch.nn import functional

from sdkd.compare.environment import attention_kernel, environment


def test_the_account_is_json_and_tells_no_host_name() -> None:
    here = environment("cpu")
    text = json.dumps(here, allow_nan=False)
    assert here["cpu"]
    assert here["cores_usable"] >= 1
    assert here["threads_torch"] == torch.get_num_threads()
    assert here["python"] == platform.python_version()
    assert here["versions"]["torch"] == torch.__version__
    assert {"sdkd", "diffusers", "onnxruntime"} <= set(here["versions"])
    assert len(here["load_average"]) == 3
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


def test_the_kernel_is_the_one_that_ran() -> None:
    query = torch.ones(1, 2, 8, 16)

    def fused() -> object:
        return functional.scaled_dot_product_attention(query, query, query)

    def plain() -> object:
        return (query @ query.transpose(-1, -2)).softmax(-1) @ query

    def math() -> object:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            return fused()

    with torch.no_grad():
        assert attention_kernel(fused) == "SDPA, flash attention (CPU)"
        assert attention_kernel(plain) == "plain matrix products and softmax"
        assert attention_kernel(math) == "SDPA, math"
        assert attention_kernel(lambda: query + 1) == "unknown"
