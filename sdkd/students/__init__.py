"""Block-removed students of a UNet of Stable Diffusion 1.x/2.x or SDXL, and LoRAs that fit them.

    from sdkd.students import build_student, remap_lora

Importing it loads neither torch nor diffusers.
"""

from sdkd.families import STUDENTS, StudentSpec
from sdkd.students.blocks import build_student, count_macs, count_parameters, key_map, student_config
from sdkd.students.lora_fit import remap_lora

__all__ = [
    "STUDENTS",
    "StudentSpec",
    "build_student",
    "count_macs",
    "count_parameters",
    "key_map",
    "remap_lora",
    "student_config",
]
