"""Measures of a test set: values, calibration, intervals, significance."""
