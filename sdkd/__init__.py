"""Make Stable Diffusion 1.x/2.x small and fast: students, distillation, comparison and the `sdkd` command."""

from sdkd.telemetry import switch_off

__version__ = "0.1.0"

switch_off()
