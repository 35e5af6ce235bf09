"""Pages in children of one process that has imported the libraries they use: a page costs its own cells, and is alone.

Nothing of ours is imported before a page asks for it. multiprocessing's forkserver does the forking."""
import atexit, contextlib, faulthandler, math, multiprocessing, os, re, signal, sys, time
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
    diffusers.pipelines.flux.pipeline_flux diffusers.schedulers.scheduling_ddpm
    diffusers.schedulers.scheduling_deis_multistep diffusers.schedulers.scheduling_dpmsolver_singlestep
    diffusers.schedulers.scheduling_edm_euler diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete
    diffusers.schedulers.scheduling_k_dpm_2_discrete diffusers.schedulers.scheduling_unipc_multistep
    PIL.ImageCms annotated_types fastcore.test grimp pandas.io.formats.style pydantic.fields pydantic.types sqlite3
    IPython.core.magics IPython.core.oinspect
    transformers.models.clip.modeling_clip transformers.models.t5.modeling_t5
    matplotlib.pyplot matplotlib_inline.backend_inline seaborn execnb.shell nbdev.test nbdev.showdoc nbformat
    warm
'''.split() # last, tests/warm.py
SURROUNDINGS = dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', MPLBACKEND='agg', TRANSFORMERS_VERBOSITY='error')
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(LIBRARIES)


def start():
    "The server: what it finds around it, its children find too"
    with mock.patch.dict(os.environ, SURROUNDINGS), contextlib.chdir(ROOT/'tests'): forkserver.ensure_running()


def flags(code):
    "The directives of a cell: {'export', 'eval: false', ...}"
    return {' '.join(line[2:].split()) for line in code.splitlines() if line.startswith('#|')}


def left_out(code):
    "Cells that nbdev's own test leaves out: flagged in tst_flags (slow ones unless asked for), or `eval: false`"
    from nbdev.config import get_config
    asked = {'slow'} if os.environ.get('SLOW_CELLS') else set()
    return flags(code) & ({'eval: false', *get_config(path=ROOT).tst_flags.split()} - asked)


NUMBER = re.compile(r'[-+]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?')
PLACES = re.compile(r' at 0x[0-9a-f]+|/tmp/\S+|tmp\w{8}') # of objects and folders


def shown(outputs):
    "What a reader sees: (words, numbers) of the text, and how many pictures"
    printed, values, pictures = [], [], 0
    for o in outputs:
        data = o.get('data', {})
        pictures += any(kind.startswith('image/') for kind in data)
        values.append(''.join(data.get('text/plain', [])))
        if o.get('name') != 'stderr': printed.append(''.join(o.get('text', [])))
    text = PLACES.sub('', '\n'.join(printed + values))
    words = re.sub(r'[\s.\-]+', ' ', NUMBER.sub('#', text)) # tables get other widths with other numbers
    return words.strip(), [float(n.replace('_', '').replace(',', '').rstrip('.')) for n in NUMBER.findall(text)], pictures


def stale(stored, fresh):
    "What a stored output says that the cell no longer does; numbers may differ by 5%, as from processor to processor"
    (words, numbers, pictures), (words_now, numbers_now, pictures_now) = shown(stored), shown(fresh)
    if pictures != pictures_now: return f'{pictures} pictures are stored, {pictures_now} are drawn'
    if words != words_now: return f'stored: {words!r}\nnow: {words_now!r}'
    apart = [(a, b) for a, b in zip(numbers, numbers_now) if not math.isclose(a, b, rel_tol=.05, abs_tol=.02)]
    return f'(stored, now): {apart}' if apart else ''


def run_cells(page):
    "Each cell as a reader runs it; whether all ran, and what is stored is what they say"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    shell, good = CaptureShell(mpl_format='png'), True
    shell.run('__import__("pandas").set_option("display.max_columns", 20)') # as in Jupyter, whatever the terminal
    for cell in read_nb(ROOT/page).cells:
        if cell.cell_type != 'code' or left_out(cell.source): continue
        outputs, begins = shell.run(cell.source), f'in the cell that begins {cell.source[:80]!r}'
        if shell.exc and 'raises-exception' not in cell.metadata.get('tags', []):
            for o in outputs: print(''.join(o.get('text', []) or o.get('traceback', [])))
            print(begins)
            return False
        wrong = '' if shell.exc or 'hide' in flags(cell.source) else stale(cell.outputs, outputs)
        if not wrong: continue
        good = False
        print(f'a stored output is stale, {begins}: run the page and commit it\n{wrong}')
    return good


def literate(page):
    "A page with examples, in its own folder, as nbdev runs it"
    os.chdir((ROOT/page).parent)
    return run_cells(page)


def study(page):
    "A page with the defaults of its parameters cell, at the root as papermill runs it"
    return run_cells(page)


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
