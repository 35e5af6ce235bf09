"""Pages in children of one process that has imported the libraries they use: a page costs its own cells, and is alone.

Nothing of ours is imported before a page asks for it. multiprocessing's forkserver does the forking."""
import atexit, faulthandler, multiprocessing, os, signal, sys, time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = '''
    numpy pandas scipy.stats scipy.sparse.linalg sklearn.linear_model sklearn.metrics PIL.ImageDraw yaml
    packaging.requirements pydantic.main pydantic.json_schema torch torch._dynamo torchmetrics.image.fid
    safetensors.torch accelerate peft
    diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion diffusers.loaders.single_file_utils
    diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl
    diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3
    transformers.models.clip.modeling_clip transformers.models.t5.modeling_t5
    matplotlib.pyplot matplotlib_inline.backend_inline seaborn execnb.shell nbdev.test nbdev.showdoc nbformat
'''.split()
SURROUNDINGS = dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', MPLBACKEND='agg', TRANSFORMERS_VERBOSITY='error')
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(LIBRARIES)


def start():
    "The server: what it finds around it, its children find too"
    with mock.patch.dict(os.environ, SURROUNDINGS): forkserver.ensure_running()


def literate(page):
    "nbdev's own test of a page: cells flagged in tst_flags (slow ones unless asked for) or `eval: false` are left out"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    asked = {'slow'} if os.environ.get('SLOW_CELLS') else set()
    flags = [f for f in get_config().tst_flags.split() if f not in asked]
    ok, _ = test_nb(ROOT/page, skip_flags=flags, basepath=ROOT)
    return ok


def study(page):
    "A page with the defaults of its parameters cell, at the root as papermill runs it"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    shell = CaptureShell(mpl_format='png')
    for cell in read_nb(ROOT/page).cells:
        if cell.cell_type != 'code': continue
        outputs = shell.run(cell.source)
        if not shell.exc or 'raises-exception' in cell.metadata.get('tags', []): continue
        for o in outputs: print(''.join(o.get('text', []) or o.get('traceback', [])))
        print(f'in the cell that begins {cell.source[:80]!r}')
        return False
    return True


def nothing(page):
    "To wait for the server"
    return True


def surroundings(page):
    "What a page finds: the libraries loaded, nothing of ours, one thread, no window, its own process group"
    import matplotlib, torch
    ours = [m for m in sys.modules if m.split('.')[0] in ('resalign', 'tests', 'pytest')]
    absent = [m for m in LIBRARIES if m not in sys.modules]
    print(dict(ours=ours, absent=absent, threads=torch.get_num_threads(), backend=matplotlib.get_backend(),
               offline=os.environ.get('HF_HUB_OFFLINE'), cwd=os.getcwd(), group=os.getpgid(0) == os.getpid()))
    return True


def child(how, page, log, limit):
    "In the child: a process group of its own, output to `log`, at `limit` seconds the lines that every thread is at"
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2): os.dup2(out, fd)
    os.chdir(ROOT)
    sys.path[:] = [str(ROOT), *(p for p in sys.path if p and not Path(p).is_relative_to(ROOT/'tests'))]
    faulthandler.dump_traceback_later(limit)
    ok = how(page)
    faulthandler.cancel_dump_traceback_later()
    atexit._run_exitfuncs() # multiprocessing's children end without: temporary folders would stay
    print(f'{time.process_time():.1f} s of CPU', flush=True)
    sys.exit(not ok)


def run(how, page, log, limit):
    "Exit status (None: killed at `limit`), seconds, and what was said"
    start()
    begun = time.monotonic()
    p = CONTEXT.Process(target=child, args=(how, page, str(log), limit))
    p.start()
    try: p.join(limit + 1)
    finally:
        if hung := p.is_alive():
            os.killpg(p.pid, signal.SIGKILL)
            p.join()
    said = log.read_text(errors='replace') if log.exists() else ''
    return None if hung else p.exitcode, time.monotonic() - begun, said
