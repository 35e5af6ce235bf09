"""A second device, simulated: its tensors are elsewhere, and no operation takes tensors from here and from there."""
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

FAR = torch.device('fpga') # a name that this PyTorch knows and has no kernels for
THERE = ('fpga', 'meta') # PyTorch's own book-keeping takes a wrapped tensor for one on `meta`
ops = torch.ops.aten


class LeftBehind(AssertionError):
    "An operation met tensors of both devices"


class FarTensor(torch.Tensor):
    "A tensor on FAR, whose numbers are in `here`"
    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), here.storage_offset(),
                                                   dtype=here.dtype, device='meta')

    def __init__(self, here):
        self.here = here

    def __repr__(self):
        return f'FarTensor({tuple(self.shape)})'

    device = property(lambda self: FAR)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def run(op, args, kwargs):
    "An operation on one device or the other"
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    far, near = [t for t in tensors if isinstance(t, FarTensor)], [t for t in tensors if not isinstance(t, FarTensor)]
    asked = kwargs.get('device')
    moves = op in (ops._to_copy.default, ops.copy_.default, ops.index.Tensor, ops.index_put_.default,
                   ops.index_put.default) # and indices may be on the CPU, as with CUDA
    if far and not moves and any(t.ndim for t in near):
        raise LeftBehind(f'{op}: {[tuple(t.shape) for t in near]} on the CPU, {[tuple(t.shape) for t in far]} not')
    if asked is not None and asked.type in THERE: kwargs = dict(kwargs, device=torch.device('cpu'))
    out = op(*tree_map_only(FarTensor, lambda t: t.here, args), **tree_map_only(FarTensor, lambda t: t.here, kwargs))
    there = (asked.type in THERE) if asked is not None else isinstance(args[0], FarTensor) if moves else bool(far)
    if not there: return out
    known = {id(t.here): t for t in far}
    return tree_map_only(
        torch.Tensor, lambda t: t if isinstance(t, FarTensor) else known.get(id(t))
        if id(t) in known else FarTensor(t), out)


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


class Far(TorchFunctionMode):
    "Inside, `.to('fpga')` and `device='fpga'` work"
    def __enter__(self):
        self.inner = Dispatch()
        self.inner.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.inner.__exit__(*error)

    def __torch_function__(self, f, types, args=(), kwargs=None):
        name = lambda x: torch.device('meta') if isinstance(x, (str, torch.device)) and str(x) == 'fpga' else x
        return f(*map(name, args), **{k: name(v) for k, v in (kwargs or {}).items()})
