"""The small models that ship with the project: their scenes, training, evaluation and weights."""
