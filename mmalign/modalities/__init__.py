"""Modalities: how likely a sample is under a network. Heavy libraries are imported by the loaders, never from here."""
