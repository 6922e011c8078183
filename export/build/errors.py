"""Why a build failed, for a person: the component, the target, what the library said last, and what to try."""

from __future__ import annotations

import re

from sdkd.core.child import ChildError
from sdkd.targets.registry import check_target

# What the library said -> what to try; the first that fits.
ADVICE = (
    (r"no space left|disk quota", "free some disk space, or copy the bundle elsewhere"),
    (
        r"out.?of.?memory|bad_alloc|cannot allocate|failed to allocate|memoryerror",
        "close other programs, or narrow --size and --batch",
    ),
    (
        r"'tensor\(float16\)' of input|types half and float|\bf16\b.{0,40}\bf32\b|could not find an implementation",
        "an operator takes no half precision here: export the model with --precision fp32, or choose another target",
    ),
    (r"cudaerror|cuda driver|no cuda", "build on a machine with an NVIDIA GPU and its driver (see: sdkd doctor)"),
    (
        r"refuses operator|no importer|plugin not found|unsupported|not.implemented|no op registered|no conversion",
        "update the target's package, or export the model again with an older --opset",
    ),
)
OTHER_ADVICE = "export the model again, update the target's package, or choose another target"
ERROR_LINE = re.compile(r"\[E\](?!.*--- (Begin|End) node)|\b(error|exception|failed|fatal)\b", re.I)
# tensorrt_rtx says so whenever it builds without a GPU, which it may; a builder that needs one says more.
NOISE = re.compile(r"catchCudaError.*cudaError 35")
SAID_LINES = 6


def explain(component: str, target: str, error: ChildError) -> str:
    """Component, target, what the library said last, and what to try."""
    if error.ended_by == "SIGKILL":
        advice = f"close other programs, narrow --size and --batch, or build it alone: --components {component}"
        return f"{component} could not be built for {target}: {error}. Try this: {advice}"
    needs_gpu = check_target(target).builds_on_gpu
    tail = [line for line in error.tail if needs_gpu or not NOISE.search(line)]
    said = [line.strip() for line in tail if ERROR_LINE.search(line)] or [line.strip() for line in tail]
    said = [line for line in dict.fromkeys(said) if line not in str(error)][-SAID_LINES:]
    advice = advice_for("\n".join([str(error), *said]))
    lines = "".join(f"\n  {line}" for line in said)
    quoted = f". The library said:{lines}\n" if said else ". "
    return f"{component} could not be built for {target}: {error}{quoted}Try this: {advice}"


def advice_for(said: str) -> str:
    """What to try after what a library said."""
    return next((advice for pattern, advice in ADVICE if re.search(pattern, said, re.I)), OTHER_ADVICE)
