"""``import comoe.hub`` lets ``AutoConfig`` and ``AutoModel`` of transformers load exports of comoe."""

from comoe.inference.auto import ComoeConfig as ComoeConfig
from comoe.inference.auto import ComoeModel as ComoeModel
from comoe.inference.hub import push_export as push_export
