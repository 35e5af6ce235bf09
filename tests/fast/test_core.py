"Streams of random numbers, numbers that aren't finite, settings, names and progress."
import errno, hashlib, json, math, os, random, signal, socket, tracemalloc
from functools import partial
import numpy as np, pytest, torch
from resalign.core import runs
from resalign.core.files import clear_checkpoint, disk_errors, load_checkpoint, save_checkpoint, sha256, temporary_path
from resalign.core.runs import RunRecord, check_finite, generator, progress, seed_all
from resalign.core.settings import Config, UserError, escape_markdown, choose, make_config, one_line, params, root

# ------------------------------------------------------------------ random numbers

def test_random_numbers():
    # a generator is the hash of seed and names
    for seed, names in (0, ()), (7, ('a',)), (-1, ('a', 3, .5)):
        expected = int.from_bytes(hashlib.sha256(repr((seed, *(str(n) for n in names))).encode()).digest()[:7], 'big')
        g = generator(seed, *names)
        assert g.initial_seed() == expected and g.device == torch.device('cpu')
        assert torch.equal(
            torch.randn(5, generator=g), torch.randn(5, generator=torch.Generator().manual_seed(expected))
        )

    # streams do not meet
    asked = [(0,), (1,), (0, 'a'), (0, 'b'), (0, 'a', 'b'), (0, 'ab'), (0, 'b', 'a'), (0, 1), (0, 11), (0, 1, 1)]
    assert len({generator(*a).initial_seed() for a in asked}) == len(asked)
    assert generator(0, 1).initial_seed() == generator(0, '1').initial_seed() == generator(0., 1).initial_seed()
    before = torch.get_rng_state()
    torch.randn(3, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)

    # seed all seeds python numpy and torch
    def numbers(seed):
        seed_all(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    expected = (
        random.Random(5).random(),
        np.random.RandomState(5).rand(),
        torch.rand(1, generator=torch.Generator().manual_seed(5)).item(),
    )
    assert numbers(5) == expected
    assert numbers(2**32 + 5)[1] == expected[1]
    assert (
        torch.are_deterministic_algorithms_enabled()
        and torch.is_deterministic_algorithms_warn_only_enabled()
        and not torch.utils.deterministic.fill_uninitialized_memory
    )


# ------------------------------------------------------------------ check_finite, choose, words

def test_words():
    # check finite hands on what is and names the place of what is not
    t = torch.ones(2)
    assert check_finite(t, step=1) is t and check_finite(3.) == 3.
    for bad in math.nan, math.inf, -math.inf, torch.tensor([1., math.nan]), [1., math.inf]:
        with pytest.raises(UserError, match='not finite at run x, step 3') as e: check_finite(bad, run='x', step=3)
        assert '(' not in str(e.value)
    with pytest.raises(UserError, match=r'\(lr 9\)$'): check_finite(math.nan, note=lambda: 'lr 9', step=0)

    # choose returns what is known and names the nearest
    assert choose('b', iter(['a', 'b']), 'x') == 'b' and choose(2, [1, 2], 'x') == 2
    with pytest.raises(
        UserError, match=r"file: field: unknown 'optimiser', did you mean 'optimizer'\? \(known: optimizer, lr\)"
    ):
        choose('optimiser', ['optimizer', 'lr'], 'file: field')
    with pytest.raises(UserError) as e: choose('zzz', ['optimizer', 1], 'x')
    assert 'did you mean' not in str(e.value) and '(known: optimizer, 1)' in str(e.value)

    # words of others are one line and not too many
    assert (
        one_line('a\nb\x1b[2J\u202ec') == 'a b [2J c'
        and one_line('x' * 600) == 'x' * 600
        and one_line('x' * 601) == 'x' * 600 + ' ...'
        and one_line('abcd', 3) == 'abc ...'
    )
    assert str(UserError('a\nb')) == 'a b' and UserError('a')._render_traceback_() == ['UserError: a']
    assert escape_markdown('a|b `c` *d* [e](f) \\ <i>&"\n') == r'a\|b \`c\` \*d\* \[e\](f) \\ &lt;i&gt;&amp;" '


# ------------------------------------------------------------------ settings

class Inner(Config):
    rate:float = 1.

class Outer(Config):
    lr:float = 0.
    steps:int = 3
    alpha:float = 0.
    name:str = 'x'
    inner:Inner = Inner()

def test_settings():
    # settings are frozen finite and known
    c = make_config(Outer, dict(lr=.5, inner=dict(rate=2)))
    assert c.lr == .5 and c.inner.rate == 2. and c.steps == 3
    with pytest.raises(Exception, match='frozen'): c.lr = 1.
    assert make_config(Outer, {}).lr == 0. # a default may be 0
    assert make_config(Outer, dict(alpha=-1.)).alpha == -1.

    # mistakes in settings name file field and value
    cases = [
        (dict(step=1), "f.yaml: step: unknown 'step', did you mean 'steps'"),
        (dict(inner=dict(rat=1)), "f.yaml: inner.rat: unknown 'rat', did you mean 'rate'"),
        (dict(lr=0.0), 'f.yaml: lr: expected more than 0, got 0.0'),
        (dict(lr=-1), 'f.yaml: lr: expected more than 0, got -1'),
        (dict(steps=0), 'f.yaml: steps: expected more than 0, got 0'),
        (dict(steps='many'), r'f.yaml: steps: .*, got .many.'),
        (dict(alpha=math.inf), 'f.yaml: alpha: .*finite'),
        ([1], r'f.yaml: expected a mapping of settings, got \[1\]'),
    ]
    for values, says in cases:
        with pytest.raises(UserError, match=says): make_config(Outer, values, 'f.yaml')
    with pytest.raises(UserError, match='^params.yaml: '): make_config(Outer, dict(step=1))


def test_files_of_settings(tmp_path, monkeypatch):
    # a section of a file of parameters
    f = tmp_path/'p.yaml'
    f.write_text('a:\n  b: {c: [1, 2]}\n  n: 3\n')
    assert params('a.b', f) == dict(c=[1, 2])
    params('a.b', f)['c'].append(3)
    assert params('a', f) == dict(b=dict(c=[1, 2]), n=3) # nobody else's copy
    for section, says in ('a.x', "p.yaml: a.x: unknown 'x'"), ('a.n.c', "p.yaml: a.n.c: unknown 'c'"):
        with pytest.raises(UserError, match=says): params(section, f)
    with pytest.raises(UserError, match='no such file'): params('a', tmp_path/'q.yaml')
    f.write_text('a: [')
    with pytest.raises(UserError, match='not YAML'): params('a', f)

    # the root is the nearest folder with settings
    (tmp_path := tmp_path/'1').mkdir()
    (tmp_path/'a/b').mkdir(parents=True)
    (tmp_path/'a/settings.ini').write_text('')
    monkeypatch.chdir(tmp_path/'a/b')
    assert root() == (tmp_path/'a').resolve()
    (tmp_path/'a/b/settings.ini').write_text('')
    assert root() == (tmp_path/'a/b').resolve()
    monkeypatch.chdir(tmp_path)
    assert root() == tmp_path.resolve()


# ------------------------------------------------------------------ progress

def lines(monkeypatch, capsys, tick, n=5, every=30, setting='', **kw):
    "What is said about n rounds of `tick` seconds"
    now = [0.]
    def clock():
        now[0] += tick
        return now[0]
    monkeypatch.setattr(runs.time, 'monotonic', clock)
    monkeypatch.setenv('PROGRESS', setting)
    bar = progress(range(n) if 'total' not in kw else iter(range(n)), desc='it', every=every, **kw)
    for i in bar: bar.note(f'note {i}')
    return capsys.readouterr().err.splitlines()

def test_progress(monkeypatch, capsys):
    # a line every so many seconds: step, rate, time left, what was noted, memory; steps done before count as steps only
    monkeypatch.setattr(runs, 'peak_gb', lambda: 1.24)
    assert lines(monkeypatch, capsys, 10) == ['it 2/5 15.00s/step, 00:45 left, note 1, memory 1.2 GB']
    assert lines(monkeypatch, capsys, 15) == ['it 1/5 30.00s/step, 02:00 left, note 0, memory 1.2 GB',
                                              'it 3/5 20.00s/step, 00:40 left, note 2, memory 1.2 GB']
    assert lines(monkeypatch, capsys, 10, first=90, total=95) == [
        'it 92/95 15.00s/step, 00:45 left, note 1, memory 1.2 GB']
    assert lines(monkeypatch, capsys, 10, n=3, total=None)[0].startswith('it 2/? ')
    assert lines(monkeypatch, capsys, 99, every=math.inf) == lines(monkeypatch, capsys, 99, setting='0') == []
    monkeypatch.undo()

    # progress hands on what it is given
    for setting in '', '0':
        monkeypatch.setenv('PROGRESS', setting)
        assert list(progress('abc')) == list('abc')
    monkeypatch.undo()

    # on a terminal one line is written over and over, and nothing of it stays
    monkeypatch.setattr(runs.sys.stderr, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(runs, 'tqdm', partial(runs.tqdm, mininterval=0, miniters=1))
    monkeypatch.setenv('PROGRESS', '1')
    bar = progress(range(3), desc='ga', total=5, first=2)
    bar.note('before')
    seen = [bar.note(f'loss {i}') or i for i in bar]
    said = capsys.readouterr().err
    assert seen == [0, 1, 2] and '\n' not in said and said.split('\r')[-1].strip() == ''
    shown = [part.strip() for part in said.split('\r')]
    for i in range(3):
        ends = f'left, loss {i}, memory {runs.peak_gb():.1f} GB'
        assert any(line.startswith(f'ga {3 + i}/5 ') and line.endswith(ends) for line in shown), shown


# ------------------------------------------------------------------ what a run leaves

def test_what_a_run_leaves(tmp_path, capsys, monkeypatch):
    # a checkpoint comes back and the one before stands in for a damaged one
    for i in range(3): save_checkpoint(tmp_path/'c', dict(w=torch.full((2,), float(i)).requires_grad_()), dict(step=i))
    tensors, meta = load_checkpoint(tmp_path/'c')
    assert tensors['w'].tolist() == [2., 2.] and meta == dict(step=2)
    raw = bytearray((tmp_path/'c').read_bytes())
    raw[-1] ^= 1
    (tmp_path/'c').write_bytes(raw)
    assert load_checkpoint(tmp_path/'c')[1] == dict(step=1) and 'using the one before' in capsys.readouterr().err
    assert not (tmp_path/'c.prev').exists() and load_checkpoint(tmp_path/'c')[1] == dict(step=1)
    assert load_checkpoint(tmp_path/'none') is None
    for i in range(2): save_checkpoint(tmp_path/'parts/c', dict(w=torch.zeros(1)), dict(step=i))
    clear_checkpoint(tmp_path/'parts/c')
    assert not (tmp_path/'parts').exists() # nor is the one before it left

    # the library reads what is written: every dtype and shape, aligned; and never are all bytes in memory
    kinds = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, \
        torch.uint8, torch.bool
    several = {f'é{k}/{shape}': (torch.arange(math.prod(shape)) % 2).reshape(shape).to(kind)
               for k, kind in enumerate(kinds) for shape in ((), (3,), (2, 0), (5, 3))}
    several['view'] = torch.arange(12.).reshape(3, 4).T
    save_checkpoint(tmp_path/'d', several, dict(text='"é"', none=None))
    back, meta = load_checkpoint(tmp_path/'d')
    assert meta == dict(text='"é"', none=None) and set(back) == set(several)
    assert all(back[k].dtype == v.dtype and torch.equal(back[k], v) for k, v in several.items())
    tracemalloc.start()
    save_checkpoint(tmp_path/'e', {str(k): torch.zeros(2**20) for k in range(4)}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 and (tmp_path/'e').stat().st_size > 2**24

    # a hash is of names and contents
    (tmp_path := tmp_path/'1').mkdir()
    (tmp_path/'d/sub').mkdir(parents=True)
    (tmp_path/'d/b').write_bytes(b'2')
    (tmp_path/'d/sub/a').write_bytes(b'1')
    digest = lambda b: hashlib.sha256(b).digest()
    assert (
        sha256(tmp_path / 'd/b') == digest(digest(b'2')).hex()
    )  # of a file's digest: as of a folder that holds it, without the name
    assert sha256(tmp_path/'d') == digest(b'b' + digest(b'2') + b'sub/a' + digest(b'1')).hex()
    assert sha256(tmp_path/'d', [tmp_path/'d/sub/a']) == digest(b'sub/a' + digest(b'1')).hex()

    # a record keeps what it took beside it
    (tmp_path := tmp_path/'2').mkdir()
    now = [10.]
    monkeypatch.setattr(runs.time, 'monotonic', lambda: now[0])
    record = RunRecord(job='x', cost=dict(steps=3))
    now[0] = 12.34
    record.save(tmp_path/'record.json')
    kept, cost = (json.loads((tmp_path/n).read_text()) for n in ('record.json', 'cost.json'))
    assert set(kept) == {'job', 'versions', 'device', 'threads', 'written'} and kept['written'] == ['cost.json', 'record.json']
    assert cost == dict(cost=dict(steps=3), seconds=2.3)


@pytest.fixture
def heard():
    "SIGINT as a terminal has it: what a shell starts in the background ignores it"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

def test_a_signal_is_noted_and_a_second_one_interrupts(heard, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), runs.stop_signals() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before and 'once more' in capfd.readouterr().err


def test_a_signal_that_was_ignored_stays_so():
    "As `nohup` has it, for a run that outlives its terminal"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runs.stop_signals() as asked: signal.raise_signal(signal.SIGHUP)
        assert asked == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, before)


def test_disks_that_are_full_and_what_others_left(tmp_path):
    "A full quota is a full disk, a broken one is not; what a process of another machine writes is left to it"
    for number in errno.ENOSPC, errno.EDQUOT, errno.EFBIG:
        with pytest.raises(UserError, match='x: cannot be written'), disk_errors('x'): raise OSError(number, 'no')
    with pytest.raises(OSError, match='no'), disk_errors('x'): raise OSError(errno.EIO, 'no')
    ended = 2**22 + 1 # more than Linux gives to any process
    theirs, dead = (tmp_path/f'.x.tmp{ended}@{host}' for host in ('elsewhere.', socket.gethostname()))
    for p in theirs, dead: p.touch()
    assert str(os.getpid()) in temporary_path(tmp_path/'x').name
    assert theirs.exists() and not dead.exists()


def test_memory_is_in_gigabytes(monkeypatch):
    "ru_maxrss counts kibibytes on Linux, bytes on macOS"
    from types import SimpleNamespace
    from resalign.core import runs
    monkeypatch.setattr(runs.resource, 'getrusage', lambda who: SimpleNamespace(ru_maxrss=2*10**6))
    monkeypatch.setattr(runs.torch.cuda, 'is_initialized', lambda: False)
    for platform, want in (('linux', 2.048), ('darwin', .002)):
        monkeypatch.setattr(runs.sys, 'platform', platform)
        assert runs.peak_gb() == pytest.approx(want)
    monkeypatch.setattr(runs.torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(runs.torch.cuda, 'max_memory_allocated', lambda: 3*10**9)
    assert runs.peak_gb() == 3
