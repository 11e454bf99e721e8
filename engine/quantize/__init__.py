"""Turn a 16-bit model into a 4-bit SVDQuant checkpoint (arXiv 2411.05007).

Each group of linears that share an input goes through three stages, in `layer.py`: smoothing moves outliers from
activations into weights (`smooth.py`), a low-rank branch in 16 bits takes the large directions of the smoothed weight
(`lowrank.py`), and what remains is rounded to 4 bits in groups (`rounding.py`, `gptq.py`, `nvfp4.py`).

`run.py` walks a model block by block: `streamed.py` reads one block at a time from the files (`source.py`),
`calibrate.py` takes all calibration pictures through a block together (`lockstep.py`) and collects what its linears
read, `block.py` quantizes it, `work.py` keeps it for a run that goes on later, `output.py` writes the layout asked for.
`text_encoder.py` does the same for a T5, whose weights alone become 4-bit.
"""

from engine.quantize.layer import Recipe, quantize_group
from engine.quantize.run import quantize_model
from engine.quantize.text_encoder import quantize_text_encoder

__all__ = ["Recipe", "quantize_group", "quantize_model", "quantize_text_encoder"]
