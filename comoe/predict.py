"""Old place of ``Predictor``: the model cards of earlier exports name it."""

from comoe.inference.predictor import Predictor as Predictor
