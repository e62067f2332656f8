"""Layer 0: the formulas, as pure torch functions. No state, no distribution, no models, no configuration."""
