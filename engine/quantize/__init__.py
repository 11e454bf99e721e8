"""Turn a 16-bit model into a 4-bit SVDQuant checkpoint (arXiv 2411.05007).

Each group of linears that share an input goes through three stages, in `layer.py`:
smoothing moves outliers from activations into weights (`smooth.py`), a low-rank branch in 16 bits takes the large
directions of the smoothed weight (`lowrank.py`), and what remains is rounded to 4 bits in groups of 64
(`rounding.py`). `calibrate.py` collects the inputs that each layer really sees; `run.py` walks the model.
"""

from engine.quantize.layer import Recipe, quantize_group
from engine.quantize.run import quantize_model

__all__ = ["Recipe", "quantize_group", "quantize_model"]
