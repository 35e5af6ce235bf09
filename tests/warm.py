"""Imported by the server that pages are forked from, after the libraries: what nearly every page would do once more.

transformers makes its table of renamed weights (a thousand patterns) at the first text encoder; libyaml reads YAML ten times
as fast as yaml's own reader, to the same values; the garbage collector needn't look at the libraries in every child."""
import gc
import yaml
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping('clip_text_model')
yaml.SafeLoader = yaml.CSafeLoader
gc.collect()
gc.freeze()
