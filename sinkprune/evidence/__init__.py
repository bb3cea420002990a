"""What is gathered from a model before a decision: sinks, activations, calibration rows, profiles."""
