"""Hallucination benchmarks, one file each: from answers and annotations to scores, by the rule that the numbers in
papers were made with. No file here loads a model or asks a judge."""
