"""A name becomes a model: `load("mini")`. What may be touched here: where models are found, how they are read, what
their architectures call their parts, and what is checked before anything is believed."""

from common.loading.load import load as load
from common.loading.model import Model as Model
