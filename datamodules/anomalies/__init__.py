"""Synthetic anomalies that are put into training images."""
