"""Make Stable Diffusion 1.x/2.x small and fast: students, distillation, comparison and the `sdkd` command."""

__version__ = "0.1.0"
