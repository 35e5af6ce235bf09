"""ResAlign: unlearning that survives fine-tuning. The names below are imported when they are first asked for."""
import importlib, os

__version__ = "0.2.0"

PUBLIC = { # name -> module
    'unlearn': 'use.jobs', 'finetune': 'use.jobs', 'evaluate': 'use.evaluate', 'write_card': 'use.jobs',
    'resalign': 'method.resalign', 'ResAlignConfig': 'method.resalign', 'Pool': 'method.resalign',
    'UnlearnData': 'method.resalign', 'METHODS': 'baselines.methods',
    'hypergradient': 'method.hypergrad', 'solve': 'method.hypergrad', 'MoreauOperator': 'method.hypergrad',
    'FinetuneConfig': 'method.finetune', 'load_pipeline': 'model.pipelines', 'save_pipeline': 'model.pipelines',
    'generate': 'model.pipelines', 'pretrain': 'studies.pretraining', 'encode': 'model.data',
    'read_images': 'model.data', 'load_evaluators': 'measure.evaluators', 'UserError': 'core.settings'}
__all__ = list(PUBLIC)

# Before any library is imported. Whoever sets these variables otherwise keeps what he has set.
os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')      # onnxruntime would write an id of the device at home
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error') # two warnings about torchvision, which nothing here needs

def _keep_out_of_home():
    "matplotlib, which torchmetrics imports, keeps its list of fonts at home only for those who have used it before"
    home = os.path.expanduser('~')
    if any(os.path.isdir(os.path.join(home, *p)) for p in (('.cache', 'matplotlib'), ('.matplotlib',))): return
    user = getattr(os, 'getuid', lambda: 'user')()
    os.environ.setdefault('MPLCONFIGDIR', os.path.join(os.environ.get('TMPDIR', '/tmp'), f'resalign-matplotlib-{user}'))

if os.name == 'posix': _keep_out_of_home()

def __getattr__(name):
    if name not in PUBLIC: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{PUBLIC[name]}'), name)

def __dir__(): return sorted([*globals(), *PUBLIC])
