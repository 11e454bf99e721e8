"""Train the small models: one driver a model (`python -m zoo.train.flux_tiny`), shared parts beside it.

flow.py holds the flow-matching core, optim.py the flat optimizer, EMA and the clock, dist.py the processes, text.py the
tokenizers and encoders, captions.py and pool.py the data, vae.py, denoiser.py and distill.py the stages.
"""
