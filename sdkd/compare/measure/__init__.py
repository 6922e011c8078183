"""Measuring subjects: how they are opened, timed, judged, and held against earlier reports."""
