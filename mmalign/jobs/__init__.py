"""One file per verb: where world, modality, scorer, source and loop meet."""
