"""Converters from public preference data sets to mmalign shards. A new data set is a new file here, nothing else."""
