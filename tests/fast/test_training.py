"The one loop of optimisation: what it steps, logs, keeps and refuses, against loops written out."
import os, signal
from types import SimpleNamespace
import pytest, torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from resalign.core import training
from resalign.core.files import load_checkpoint
from resalign.core.runs import Stopped
from resalign.core.settings import UserError
from resalign.core.training import (DRAWN, OPTIMIZERS, Ranks, describe_step, flatten_moments, load_state, optimise,
                                    optimizer_step, save_state, step_seconds, sum_of_maxima, unflatten_moments)
from toy_finetune import Rule
from each import each

START = [3., -4.]
SLOPES = [
    torch.tensor([1.0, 2.0]),
    torch.tensor([-0.5, 0.1]),
    torch.tensor([6.0, 8.0]),
    torch.tensor([0.0, -2.0]),
    torch.tensor([0.3, 0.3]),
]


class Run:
    "Two numbers whose gradient at each step is given"
    def __init__(self, kind='sgd', lr=.1, scheduled=False, slopes=SLOPES):
        self.p, self.slopes, self.seen = nn.Parameter(torch.tensor(START)), slopes, []
        self.opt = OPTIMIZERS[kind]([self.p], lr)
        self.scheduler = LambdaLR(self.opt, lambda step: 1/(1 + step)) if scheduled else None
        self.module = nn.ParameterList([self.p])

    def gradients(self, step):
        assert self.p.grad is None # of the step before
        self.seen.append(step)
        self.p.grad = self.slopes[step].clone()
        return dict(loss=float(step), more=10*step)

    def __call__(self, steps=5, checkpoint=None, **kw):
        return optimise(
            'toy',
            self.gradients,
            steps,
            [self.p],
            self.opt,
            dict(net=self.module),
            self.scheduler,
            checkpoint=checkpoint,
            **kw,
        )


def path(kind='sgd', lr=.1, steps=5, clip=None, scheduled=False, slopes=SLOPES):
    "(the two numbers after each step, norms)"
    rule, w, trail, norms = Rule(kind, lr), dict(p=torch.tensor(START)), [], []
    for step in range(steps):
        g = slopes[step]
        norms.append(float((g**2).sum()**.5))
        if clip and norms[-1] > clip: g = g*clip/(norms[-1] + 1e-6)
        if scheduled: rule.lr = lr/(1 + step)
        w = rule(w, dict(p=g))
        trail.append(w['p'])
    return trail, norms

def near(p, expected): torch.testing.assert_close(p.detach(), expected, rtol=2e-6, atol=1e-6)


# ------------------------------------------------------------------ steps and their log

@each('kind', ['sgd', 'adam', 'adamw'])
def test_each_optimizer_is_the_formulas(kind):
    run = Run(kind, lr=.5)
    log = run()
    near(run.p, path(kind, .5)[0][-1])
    assert log == [dict(step=i, loss=float(i), more=10*i) for i in range(5)] and run.seen == list(range(5))
    assert list(OPTIMIZERS) == ['sgd', 'adam', 'adamw']

def test_steps():
    # gradients are clipped to max norm and the norm before is logged
    run = Run()
    log = run(max_norm=2.)
    trail, norms = path(clip=2.)
    near(run.p, trail[-1])
    assert [list(r) for r in log] == [['step', 'loss', 'more', 'grad_norm']]*5
    assert [r['grad_norm'] for r in log] == pytest.approx(norms, rel=1e-6) and min(norms) < 2 < max(norms)
    assert all(type(r['grad_norm']) is float for r in log)

    # the scheduler steps once a step
    run = Run(scheduled=True)
    run()
    near(run.p, path(scheduled=True)[0][-1])
    assert run.scheduler.last_epoch == 5

    # after is called once a step behind it
    run, seen = Run(), []
    run(after=lambda: seen.append(run.p.detach().clone()))
    assert len(seen) == 5
    for p, expected in zip(seen, path()[0]): near(p, expected)


def test_seconds_of_steps(monkeypatch):
    # step seconds are over after an error
    with pytest.raises(ZeroDivisionError), step_seconds() as seconds: 1/0
    Run()(1)
    assert seconds == []

    # step seconds are those of every step made inside
    clock = iter(range(100))
    monkeypatch.setattr(training.time, 'perf_counter', lambda: next(clock)**2)
    with step_seconds() as seconds: Run()(3)
    assert seconds == [1, 5, 9] # of the squares 0 1, 4 9, 16 25
    with step_seconds() as outer:
        with step_seconds() as inner: Run()(1)
        assert len(inner) == 1 and outer == []
        Run()(2)
    Run()(1)
    assert len(outer) == 2 and len(inner) == 1 and len(seconds) == 3

def test_the_bar_says_the_mean_loss_of_the_last_20_steps(monkeypatch):
    said, asked = [], []
    class Bar:
        def __init__(self, it, **kw):
            self.it = it
            asked.append((list(it), kw))
        def __iter__(self): return iter(self.it)
        def note(self, text): said.append(text)
    monkeypatch.setattr(training, 'progress', Bar)
    Run(slopes=[torch.ones(2)]*25)(25)
    assert asked == [(list(range(25)), dict(total=25, desc='toy', every=30, first=0))]
    assert (
        said[0] == 'loss 0.0000' and said[19] == 'loss 9.5000' and said[24] == 'loss 14.5000'
    )  # the mean of 0..19, of 5..24


# ------------------------------------------------------------------ numbers that aren't finite

@each('max_norm', [None, 1.])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(max_norm):
    run = Run(slopes=[SLOPES[0], torch.tensor([1., float('nan')])])
    with pytest.raises(UserError, match='run toy, step 1.*lr 0.1'): run(2, max_norm=max_norm)
    near(run.p, path(steps=1, clip=max_norm)[0][-1])

def test_what_is_not_finite_ends_a_run(tmp_path):
    # a loss that is not finite ends the run
    run, inner = Run(), Run.gradients
    run.gradients = lambda step: dict(inner(run, step), loss=float('inf') if step == 2 else 0.)
    with pytest.raises(UserError, match='run toy, step 2'): run()
    near(run.p, path(steps=2)[0][-1])

    # weights that are not finite are not kept
    run = Run(lr=1e30, slopes=[torch.ones(2), torch.full((2,), 1e20)])
    with pytest.raises(UserError, match='run toy, step 1'): run(2, tmp_path/'c', every=1)
    assert load_checkpoint(tmp_path/'c')[1]['log'] == [dict(step=0, loss=0., more=0)]

    # a learning rate beyond float32 is not finite and other errors pass
    def fails(words):
        def step(): raise RuntimeError(words)
        return SimpleNamespace(step=step)
    said = []
    optimizer_step(fails('value cannot be converted without overflow'), said.append)
    assert said == [float('inf')]
    with pytest.raises(RuntimeError, match='shape'): optimizer_step(fails('shape'), said.append)
    assert len(said) == 1
    run = Run(lr=1e300)
    with pytest.raises(UserError, match='run toy, step 0'): run(1)


def test_sum_of_maxima_is_the_sum_of_the_largest_sizes():
    assert sum_of_maxima([]).item() == 0.
    half = torch.tensor([[2.]], dtype=torch.bfloat16)
    assert sum_of_maxima([torch.tensor([1., -3.]), torch.zeros(0), half]).item() == 5.
    assert sum_of_maxima([nn.Parameter(torch.tensor([-2.]))]).requires_grad is False
    for bad in float('nan'), float('inf'), -float('inf'):
        assert not sum_of_maxima([torch.tensor([1.0, bad]), torch.ones(2)]).isfinite()


def test_what_the_message_names(tmp_path):
    # the message names learning rate settings pictures and checkpoint
    DRAWN.clear()
    opt = torch.optim.SGD([nn.Parameter(torch.ones(1))], .25)
    assert describe_step(dict(loss=1.), opt) == 'lr 0.25'
    assert describe_step(dict(loss=1.), opt, tmp_path/'none') == 'lr 0.25'
    DRAWN.extend([torch.tensor([3, 1]), torch.tensor([2])])
    (tmp_path/'c').write_text('')
    row = {
        'loss': 1.0,
        '0/folder': 'cats',
        '0/algorithm': 'lora',
        '0/optimizer': 'sgd',
        '0/lr': 0.1,
        '0/steps': 7,
        '0/residual': 0.5,
        'lr': 9,
    }
    assert (
        describe_step(row, opt, tmp_path / 'c')
        == '0/folder cats, 0/algorithm lora, 0/optimizer sgd, 0/lr 0.1, 0/steps 7; lr 0.25; pictures 3, 1; pictures 2; '
        f'the checkpoint in {tmp_path / "c"} is kept'
    )
    DRAWN.clear()

    # pictures of earlier steps are not named
    DRAWN.append(torch.tensor([99]))
    run = Run(slopes=[torch.tensor([float('nan'), 0.])])
    with pytest.raises(UserError) as e: run(1)
    assert 'pictures' not in str(e.value)


# ------------------------------------------------------------------ checkpoints

@each('kind', ['sgd', 'adam', 'adamw'])
def test_a_run_goes_on_where_its_checkpoint_ends(kind, tmp_path):
    Run(kind, scheduled=True)(2, tmp_path/'c')
    later, seen = Run(kind, scheduled=True), []
    log = later(5, tmp_path/'c', on_resume=lambda log: seen.extend(r['step'] for r in log))
    assert seen == [0, 1] and later.seen == [2, 3, 4]
    assert [r['step'] for r in log] == list(range(5))
    near(later.p, path(kind, scheduled=True)[0][-1])
    assert Run(kind)(5, tmp_path/'c') == log # whole: nothing left to do

def test_what_a_checkpoint_holds(tmp_path):
    # a checkpoint holds weights moments and log
    run = Run('adam')
    log = run(2, tmp_path/'c')
    tensors, meta = load_checkpoint(tmp_path/'c')
    assert set(tensors) == {'net/0', 'opt/0/step', 'opt/0/exp_avg', 'opt/0/exp_avg_sq'} and meta == dict(log=log)
    g = SLOPES
    near(tensors['net/0'], path('adam', steps=2)[0][-1])
    near(tensors['opt/0/exp_avg'], .09*g[0] + .1*g[1])
    near(tensors['opt/0/exp_avg_sq'], .000999*g[0]**2 + .001*g[1]**2)
    assert tensors['opt/0/step'].item() == 2

    # without a checkpoint a run starts anew
    (tmp_path := tmp_path/'1').mkdir()
    run = Run()
    for where in None, tmp_path/'none': assert load_state(where, dict(net=run.module), run.opt) == []
    assert run.p.tolist() == START

    # several modules and moments come back to their own
    (tmp_path := tmp_path/'2').mkdir()
    a, b = nn.Linear(1, 2), nn.Linear(1, 2)
    opt = torch.optim.Adam([*a.parameters(), *b.parameters()], .1)
    for i, p in enumerate(opt.param_groups[0]['params']): p.grad = torch.full_like(p, i + 1.)
    opt.step()
    save_state(tmp_path/'c', dict(a=a, ab=b), opt, [1, 2])
    c, d = nn.Linear(1, 2), nn.Linear(1, 2)
    fresh = torch.optim.Adam([*c.parameters(), *d.parameters()], .3)
    assert load_state(tmp_path/'c', dict(a=c, ab=d), fresh) == [1, 2]
    for old, new in ((a, c), (b, d)): assert all(map(torch.equal, old.state_dict().values(), new.state_dict().values()))
    assert [fresh.state[p]['exp_avg'].flatten()[0].item() for p in fresh.param_groups[0]['params']] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4]
    )
    assert fresh.param_groups[0]['lr'] == .3 # settings are the new run's

def kept(monkeypatch):
    steps, inner = [], training.save_state
    def save(path, state, opt, log):
        steps.append(log[-1]['step'])
        inner(path, state, opt, log)
    monkeypatch.setattr(training, 'save_state', save)
    return steps

def test_when_checkpoints_come(tmp_path, monkeypatch):
    # checkpoints come every so many steps and at the end
    steps = kept(monkeypatch)
    Run()(5, tmp_path/'a', every=2)
    assert steps == [1, 3, 4]
    steps.clear()
    Run(slopes=[torch.ones(2)*.01]*301)(301, tmp_path/'b')
    assert steps == [99, 199, 299, 300] # every 100 unless said otherwise
    steps.clear()
    Run()(2)
    assert steps == []
    monkeypatch.undo()

    # checkpoints come after minutes too
    (tmp_path := tmp_path/'1').mkdir()
    steps, now = kept(monkeypatch), [0.]
    monkeypatch.setattr(training.time, 'monotonic', lambda: now[0])
    def ticks(seconds):
        def after(): now[0] += seconds
        return after
    Run()(5, tmp_path/'a', after=ticks(50), minutes=1) # 50, 100, then 50, 100 after the last
    assert steps == [1, 3, 4]
    steps.clear()
    Run()(5, tmp_path/'b', after=ticks(151)) # every 5 minutes unless said otherwise; 300 s are not yet more
    assert steps == [1, 3, 4]
    steps.clear()
    Run()(5, tmp_path/'c', after=ticks(150))
    assert steps == [2, 4]
    monkeypatch.undo()

    # another rank keeps nothing
    (tmp_path := tmp_path/'2').mkdir()
    steps, bars = kept(monkeypatch), []
    class Second(training.Accelerator):
        is_main_process = False
    monkeypatch.setattr(training, 'Accelerator', Second)
    inner = training.progress
    monkeypatch.setattr(training, 'progress', lambda *a, **kw: bars.append(kw['every']) or inner(*a, **kw))
    Run()(2, tmp_path/'c')
    assert steps == [] and bars == [float('inf')]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Run()(1, tmp_path/'c')
    other = Run()
    with pytest.raises(UserError, match=f'{tmp_path/"c"}: a checkpoint of another model'):
        load_state(tmp_path/'c', dict(net=nn.ParameterList([nn.Parameter(torch.ones(3))])), other.opt)
    with pytest.raises(UserError, match='another model'): load_state(tmp_path/'c', dict(other=other.module), other.opt)
    save_state(tmp_path/'d', dict(net=nn.ParameterList([nn.Parameter(torch.ones(n)) for n in (1, 2)])), other.opt, [])
    with pytest.raises(UserError, match=r'another model \(size mismatch for 1: .*\); remove it'): # the last of several
        load_state(tmp_path/'d', dict(net=nn.ParameterList([nn.Parameter(torch.ones(3)) for n in (1, 2)])), other.opt)


def test_signals(tmp_path):
    # a signal ends the run after the step with a checkpoint
    run = Run()
    def after():
        if len(run.seen) == 2: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match=f'step 2 of 5.*{tmp_path/"c"}') as e: run(5, tmp_path/'c', after=after)
    assert e.value.signal == signal.SIGTERM
    assert load_checkpoint(tmp_path/'c')[1]['log'][-1]['step'] == 1 and run.seen == [0, 1]
    later = Run()
    later(5, tmp_path/'c')
    near(later.p, path()[0][-1])

    # without a checkpoint signals are not touched
    handlers = []
    Run()(1, after=lambda: handlers.append(signal.getsignal(signal.SIGTERM)))
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_a_scheduler_that_is_wound_forward_does_not_warn(tmp_path, recwarn):
    Run(scheduled=True)(2, tmp_path/'c')
    Run(scheduled=True)(3, tmp_path/'c')
    assert not [w for w in recwarn if 'lr_scheduler' in str(w.message)]


# ------------------------------------------------------------------ moments by name

def test_moments_by_name():
    # flattened moments name nested moments and leave out what is none
    table = torch.arange(3.)
    state = dict(step=torch.tensor(2.), exp_avg=torch.ones(2), none=None, quant=dict(code=table, deep=dict(n=7)))
    out = dict(flatten_moments(state))
    assert list(out) == ['step', 'exp_avg', 'quant.code', 'quant.deep.n']
    assert out['exp_avg'] is state['exp_avg']  # on top: the very tensor
    assert (
        torch.equal(out['quant.code'], table) and out['quant.code'].data_ptr() != table.data_ptr()
    )  # below: a copy, for tables are shared
    assert out['quant.deep.n'].item() == 7

    # moments of tensors of another kind are dequantized
    class Eight(torch.Tensor):
        def dequantize(self): return self.as_subclass(torch.Tensor)*2
    out = dict(flatten_moments(dict(m=torch.ones(2).as_subclass(Eight), plain=torch.ones(2), number=3)))
    assert out['m'].tolist() == [2., 2.] and out['plain'].tolist() == [1., 1.] and out['number'].item() == 3

    # unflatten undoes flatten
    state = dict(
        step=torch.tensor(2.0),
        exp_avg=torch.ones(2),
        quant=dict(code=torch.arange(3), deep=dict(n=7, m=torch.zeros(1))),
    )
    back = unflatten_moments(dict(flatten_moments(state)))
    assert type(back['quant']['deep']['n']) is int and back['quant']['deep']['n'] == 7
    assert torch.is_tensor(back['step']) and back['step'] == 2.
    assert (
        torch.equal(back['exp_avg'], state['exp_avg'])
        and torch.equal(back['quant']['code'], torch.arange(3))
        and torch.equal(back['quant']['deep']['m'], torch.zeros(1))
    )
    assert list(back) == list(state) and list(back['quant']) == ['code', 'deep']


# ------------------------------------------------------------------ ranks

def rank(index, count, reduce=None):
    ranks = Ranks()
    ranks.accelerator = SimpleNamespace(
        is_main_process=index == 0, process_index=index, num_processes=count, reduce=reduce
    )
    return ranks

def test_ranks(monkeypatch):
    # alone every term is mine and nothing is exchanged
    ranks, tensors, row = Ranks(), [torch.ones(2)], dict(a=1)
    assert ranks.is_first and all(ranks.owns(j) for j in range(4))
    out = ranks.reduce(tensors, row)
    assert out[0] is tensors and out[1] is row

    # terms go round the ranks
    assert [[j for j in range(7) if rank(i, 3).owns(j)] for i in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [rank(i, 3).is_first for i in range(3)] == [True, False, False]

    # what all have computed is counted on the first alone
    tensors, row = [torch.ones(2), torch.ones(1, 3)], dict(a=1)
    assert rank(0, 2).on_first(tensors, row) == (tensors, row)
    zeros, empty = rank(1, 2).on_first(tensors, row)
    assert empty == {} and [z.shape for z in zeros] == [t.shape for t in tensors] and not any(z.any() for z in zeros)

    # reduced tensors are summed and rows joined
    monkeypatch.setattr(training, 'gather_object', lambda rows: rows + [dict(b=2)])
    other, how = torch.tensor([10., 20., 30., 40., 50.]), []
    ranks = rank(0, 2, lambda flat, kind: how.append(kind) or flat + other)
    (a, b), row = ranks.reduce([torch.tensor([1., 2.]), torch.tensor([[3.], [4.], [5.]])], dict(a=1))
    assert a.tolist() == [11., 22.] and b.tolist() == [[33.], [44.], [55.]] and row == dict(a=1, b=2) and how == ['sum']

    # a rank that has died is said in one line
    def reduce(flat, kind): raise RuntimeError('Connection closed ' + 'x'*200 + '\nmore')

    with pytest.raises(UserError, match='another process of this run has died') as e:
        rank(0, 2, reduce).reduce([torch.ones(1)], {})
    assert ('Connection closed ' + 'x'*102 + ')') in str(e.value)


def test_the_first_ranks_result_is_written_and_the_others_thrown_away(tmp_path):
    for name in 'c', 'c.prev': (tmp_path/name).write_text('kept')
    with rank(1, 2).output_dir(tmp_path/'out', tmp_path/'c') as tmp: (tmp/'f').write_text('other')
    assert not tmp.exists() and not (tmp_path/'out').exists() and (tmp_path/'c').exists()
    with pytest.raises(ZeroDivisionError), rank(0, 2).output_dir(tmp_path/'out', tmp_path/'c'): 1/0
    assert not (tmp_path/'out').exists() and (tmp_path/'c').exists()
    with rank(0, 2).output_dir(tmp_path/'out', tmp_path/'c') as tmp: (tmp/'f').write_text('first')
    assert (
        (tmp_path / 'out/f').read_text() == 'first'
        and not (tmp_path / 'c').exists()
        and not (tmp_path / 'c.prev').exists()
    )
    with rank(0, 1).output_dir(tmp_path/'two') as tmp: (tmp/'f').write_text('no checkpoint')
    assert (tmp_path/'two/f').read_text() == 'no checkpoint'
