"""Importing this imports what every case needs before it is timed, and computes nothing.

The server from which the processes of cases are forked imports it, too: so they begin with everything there. Nothing
here may start a thread that computes or touch a GPU: neither survives a fork.
"""

import accelerate
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
import diffusers.schedulers
import safetensors.torch
import transformers.models.clip.modeling_clip
import transformers.models.clip.tokenization_clip

import engines.pipeline
import sdkd.compare.worker
import sdkd.models

__all__ = ["accelerate", "diffusers", "engines", "safetensors", "sdkd", "transformers"]
