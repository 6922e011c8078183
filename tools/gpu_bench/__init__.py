"""The pieces of tools/gpu_report.py: what each measures, how it is run, and the page made from it."""
