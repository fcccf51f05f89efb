"""The preference-optimization core: types, objectives and references, in pure torch."""
