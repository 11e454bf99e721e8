"""Parts of bench/evaluate.py and bench/latency.py: what to run, what to paint, how to score, how to tell."""
