"""ResAlign: unlearning that survives fine-tuning. The names below are imported when they are first asked for."""
import importlib

__version__ = "0.2.0"

PUBLIC = { # name -> module
    'unlearn': 'use.jobs', 'finetune': 'use.jobs', 'evaluate': 'use.evaluate', 'write_card': 'use.jobs',
    'resalign': 'method.resalign', 'ResAlignConfig': 'method.resalign', 'Pool': 'method.resalign',
    'UnlearnData': 'method.resalign', 'METHODS': 'baselines.methods',
    'hypergradient': 'method.hypergrad', 'solve': 'method.hypergrad', 'MoreauOperator': 'method.hypergrad',
    'FinetuneConfig': 'method.finetune', 'load_pipeline': 'model.pipelines', 'save_pipeline': 'model.pipelines',
    'generate': 'model.pipelines', 'pretrain': 'studies.base', 'encode': 'model.data', 'read_images': 'model.data',
    'load_evaluators': 'measure.evaluators', 'UserError': 'core.settings'}
__all__ = list(PUBLIC)

def __getattr__(name):
    if name not in PUBLIC: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{PUBLIC[name]}'), name)

def __dir__(): return sorted([*globals(), *PUBLIC])
