"""Sweeps: successive halving over configurations, in an Optuna study."""
