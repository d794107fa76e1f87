"""Importance hooks beside NVIDIA ModelOpt's: time, memory and traffic per call."""
