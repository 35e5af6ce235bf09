"""Every rule of the ledger on both sides of its boundary, with made-up scores: the first k of 20 prompts show it."""

from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, yaml
from scipy import stats

from resalign.studies import claims as C
from toy_scores import corrected, mcnemar, one_prompt_thrice, study, table
from each import each

PAPER = {
    m: dict(before=0.1, subjects=0.2 + 0.01 * k, varied=0.3 + 0.02 * k, FID=10.0 + k)
    for k, m in enumerate(['esd-x', 'safegen', 'advunlearn', 'lcfdsd-ng'])
}
PAPER |= dict(
    original=dict(before=0.36, FID=64.0),
    ga=dict(subjects=0.22),
    resalign=dict(before=0.01, subjects=0.02, varied=0.3, FID=80.0),
)
LOW = (0, 0, 0, 0, 0)


@pytest.fixture(autouse=True)
def no_bootstrap(monkeypatch):
    "No verdict asks for a bootstrap's interval, and a claim has up to 28 of them"
    monkeypatch.setattr(
        stats, 'bootstrap', lambda *a, **kw: SimpleNamespace(confidence_interval=SimpleNamespace(low=0.0, high=1.0))
    )


def scores(**hits): return C.Scores(table({m.replace('_', '-'): k for m, k in hits.items()}))

def lines(claims): return [C.ledger_row(c) for c in claims]
def pct(x): return f'{100*x:.1f}%'

def says(claim): return {k: claim[k] for k in ('tests', 'hold', 'verdict')}
def counted(tests, hold, verdict): return dict(tests=tests, hold=hold, verdict=verdict)


# ------------------------------------------------------------------ a line

def test_verdicts():
    # all some or none
    assert [C.verdict(h) for h in ([True, True], [True, False], [False, True], [False, False])] == [
        'reproduced',
        'partly',
        'partly',
        'not reproduced',
    ]

    # what cannot be tested has no other verdict
    assert {C.verdict(h, testable=False) for h in ([True], [True, False], [False], [])} == {'not testable here'}


def test_lines():
    # a claim counts its tests
    text = C.Text('it', 'yes', 'no', 'a test')
    line = C.ledger_row(C.Claim('an-id', text, holds=[True, False, True], p=.25, stage='table'))
    assert line == dict(
        id='an-id',
        claim='it',
        paper='yes',
        ours='no',
        test='a test',
        p=0.25,
        tests=3,
        hold=2,
        verdict='partly',
        stage='table',
        command='dvc repro table',
    )
    bare = C.ledger_row(C.Claim('it', C.Text('it'), holds=[True], testable=False))
    assert bare['verdict'] == 'not testable here' and bare['command'] == bare['stage'] == '' and np.isnan(bare['p'])
    assert bare['paper'] == bare['ours'] == bare['test'] == ''

    # percent in tenths
    percent = lambda *v: C.filled(' -> '.join(f'{{v[{k}]:.1%}}' for k in range(len(v))), dict(v=v))
    assert percent(.1234) == '12.3%' and percent(0, .05, 1) == '0.0% -> 5.0% -> 100.0%'
    assert C.TWO.format(before=.1234, after=0) == '12.3% -> 0.0%'
    assert C.THREE.format(before=0, subjects=.05, varied=1) == '0.0% -> 5.0% -> 100.0%'

    # each text takes its own numbers
    text = C.Text('{n} of it', '{n} there', '{n}: {a}{b}', '{n} tests', dict(a=('{x:.0f}', ', '), b=('; {x:.1f}', '')))
    numbers = dict(n=3, a=[dict(x=1.), dict(x=2.)], b=[dict(x=.5), dict(x=.25)])
    line = C.ledger_row(C.Claim('it', text, dict(n=1), dict(n=2), numbers))
    assert (line['claim'], line['test'], line['paper']) == ('1 of it', '1 tests', '2 there')
    assert line['ours'] == '3: 1, 2; 0.5; 0.2'
    assert C.filled(text.ours, numbers | dict(b=[]), text.lists) == '3: 1, 2'


# ------------------------------------------------------------------ Scores

def test_rates():
    # scores are of the metrics detector and prompts alone
    both = pd.concat(
        [
            table(dict(ga=(9, 0, 0, 0, 0))),
            table(dict(ga=(3, 0, 0, 0, 0)), kind='explicit'),
            table(dict(ga=(5, 0, 0, 0, 0)), detector='mhsc'),
            table(dict(ga=(7, 0, 0, 0, 0)), detector='mhsc', kind='explicit'),
        ]
    )
    assert [C.Scores(both, m).rate('ga', 'before') for m in ('IP', 'explicit', 'US')] == [
        9 / 20,
        3 / 20,
        7 / 20,
    ] and C.Scores(both).rate('ga', 'before') == 9 / 20

    # a rate weighs prompts the same and counts above the threshold
    rows = one_prompt_thrice([1, 0.5, 0.5, 1])
    assert C.Scores(rows).rate('ga', 'varied-lora') == pytest.approx((1/3 + 1)/2)

    # unlearned is at most half of the original
    s = scores(original=(10, *LOW[1:]), five=(5, *[20]*4), six=(6, *LOW[1:]))
    assert s.unlearned('five')
    assert not s.unlearned('six') and not s.unlearned('original')


@each('k', range(1, 5))
def test_the_worst_is_of_the_fine_tuned(k):
    hits = [20, 1, 1, 1, 1]
    hits[k] = 7
    assert scores(ga=hits).worst('ga') == 7/20


def lower_by(*ds): # one pair a number: the first has 10 hits, the second d more
    s = scores(a=(10,)*5, **{f'b{k}': (10 + d,)*5 for k, d in enumerate(ds)})
    return s.lower([(('a', 'before'), (f'b{k}', 'before')) for k in range(len(ds))])

@each(
    'ds, holds',
    [
        ((6,), [True]),
        ((5,), [False]),
        ((-8,), [False]),  # 1/32 and 1/16; significantly higher is not lower
        ((6, 6, 6, 6), [True] * 4),
        ((8, 0, 0, 0), [True, False, False, False]),
        ((7, 0, 0, 0), [False] * 4),  # 1/64 of four tests: 1/16
        ((6,) * 5 + (0,) * 3, [False] * 8),
    ],
)                           # 1/32 times 8/5 is .05 itself
def test_significantly_lower_after_correction(ds, holds):
    found, p = lower_by(*ds)
    assert found == holds and list(p) == pytest.approx(corrected(mcnemar(*ds)))

def test_what_is_compared():
    # lower compares the phases that it is given
    s = scores(a=(1, 2, 3, 4, 20), b=(12, 2, 3, 20, 5))
    assert s.lower([(('a', 'before'), ('b', 'before')), (('a', 'varied-lora'), ('b', 'varied-full'))])[0] == [
        True,
        False,
    ]
    assert s.lower([(('a', 'subjects-full'), ('b', 'varied-full'))])[0] == [True]

    # lower asks for the same sign in every run
    a, b = (
        pd.concat([table({m: (k,) * 5}).assign(run=r) for r, k in enumerate(ks)])
        for m, ks in dict(a=(0, 0, 2), b=(10, 10, 0)).items()
    )
    s = C.Scores(pd.concat([a, b]))
    holds, p = s.lower([(('a', 'before'), ('b', 'before'))])
    assert holds == [False] and p[0] < .001
    assert C.Scores(pd.concat([a[a.run < 2], b[b.run < 2]])).lower([(('a', 'before'), ('b', 'before'))])[0] == [True]

    # lower counts above the threshold
    rows = table(dict(a=(0,)*5, b=(0,)*5)).assign(score=.5)
    rows.loc[rows.method == 'b', 'score'] = .51
    assert C.Scores(rows).lower([(('a', 'before'), ('b', 'before'))])[0] == [True]


# ------------------------------------------------------------------ the main table

FOUR = ['esd-x', 'safegen', 'advunlearn', 'lcfdsd-ng']

@pytest.fixture
def few(monkeypatch):
    "Fewer baselines than the paper's, where one is enough to say it"
    return lambda *names: monkeypatch.setattr(C, 'BASELINES', list(names))

@each(
    'after, hold, verdict',
    [
        ((8, 8, 8, 8), 4, 'reproduced'),
        ((8, 8, 8, 7), 3, 'partly'),
        ((7, 8, 8, 8), 3, 'partly'),
        ((7, 7, 7, 7), 0, 'not reproduced'),
    ],
)
def test_a_baseline_comes_back_where_it_is_higher_than_before(after, hold, verdict, few):
    few('safegen')
    line, = lines(C.comes_back(scores(original=(4, *LOW[1:]), safegen=(2, *after)), PAPER))
    assert line['claim'].startswith('SafeGen ') and says(line) == counted(4, hold, verdict)
    assert line['p'] == pytest.approx(min(corrected(mcnemar(*[k - 2 for k in after])))) and line['stage'] == 'table'
    assert line['paper'] == '10.0% -> 21.0% -> 32.0%' and line['ours'] == f'10.0% -> {5*max(after)}.0% (worst)'

def test_what_had_not_unlearned_cannot_come_back():
    hits = dict(original=(4, *LOW[1:])) | dict.fromkeys(FOUR, (2, 8, 8, 8, 8)) | {'esd-x': (3, 20, 20, 20, 20)}
    found = lines(C.comes_back(C.Scores(table(hits)), PAPER))
    assert [f['claim'].split(' comes')[0] for f in found] == ['ESD-x', 'SafeGen', 'AdvUnlearn', 'LCFDSD-NG']
    assert [f['verdict'] for f in found] == ['not testable here', 'reproduced', 'reproduced', 'reproduced'] and found[
        0
    ]['hold'] == 4


def stays(most=.3, **hits): # the given methods, in a world where all others come back whole
    whole = dict(original=(10,)*5) | dict.fromkeys([*C.BASELINES, 'ga', 'uce'], (2, 20, 20, 20, 20))
    paper = PAPER | dict(resalign=PAPER['resalign'] | dict(varied=most))
    s = C.Scores(table(whole | {m.replace('_', '-'): k for m, k in hits.items()}))
    return lines(C.stays_low(s, paper) + C.below_baselines(s, paper))

@each('hits, most, hold, verdict', [
    ((2, 6, 6, 6, 6), .3, 4, 'reproduced'),     # 30% itself, and four pictures more
    ((2, 6, 6, 7, 6), .3, 3, 'partly'),         # 35%
    ((1, 7, 7, 7, 7), .9, 0, 'not reproduced'), # significantly more, however low
    ((0, 8, 0, 0, 0), .9, 3, 'partly')])
def test_resalign_stays_unlearned_without_a_significant_rise_and_at_most_so_much(hits, most, hold, verdict, few):
    few('esd-x')
    line = stays(most, resalign=hits)[0]
    assert says(line) == counted(4, hold, verdict) and line['p'] == pytest.approx(
        min(corrected(mcnemar(*[k - hits[0] for k in hits[1:]])))
    )
    assert (
        line['ours'] == f'{5 * hits[0]}.0% -> {5 * max(hits[1:])}.0% (worst)'
        and line['paper'] == f'1.0% -> 2.0% -> {pct(most)}'
        and f'at most {pct(most)}, in each' in line['test']
        and line['stage'] == 'table'
    )


def test_staying_low_and_below_others(few):
    # a fall is no rise
    few('esd-x')
    assert stays(resalign=(19, 0, 0, 0, 0))[0]['hold'] == 4

    # each fine tuning is compared with the same one
    few('esd-x', 'safegen')
    ours = (0, 0, 20, 0, 20)
    paper, here = stays(
        resalign=ours, esd_x=(2, 6, 20, 6, 20), safegen=(2, 6, 20, 6, 20), ga=(2, 6, 20, 6, 20), uce=(2, 6, 20, 6, 20)
    )[1:]
    assert says(paper) == counted(8, 0, 'not reproduced') and paper['p'] == 1 # 1/32 of 4 in 8: 1/16
    paper, here = stays(resalign=ours, esd_x=(2, 9, 20, 9, 19), safegen=(2, 9, 20, 9, 18), ga=(2, 9, 20, 9, 17))[1:]
    assert says(paper) == counted(8, 4, 'partly') and paper['ours'].startswith('100.0% against 100.0%')

    # the least unsafe baseline is named
    few('esd-x', 'safegen')
    paper, here = stays(resalign=LOW, ga=(0, 1, 3, 2, 1), safegen=(0, 9, 9, 9, 8))[1:]
    assert paper['ours'].startswith('0.0% against 45.0% and more (0 of 2') and here['ours'].startswith(
        '0.0% against 15.0% and more (0 of 4'
    )

def test_resalign_is_less_unsafe_than_each_baseline_after_each_fine_tuning():
    paper, here = stays(resalign=(0, 1, 1, 1, 1), esd_x=(6, 2, 20, 20, 3), ca=(6, 20, 20, 20, 20), resalign_esd=LOW)[1:]
    ds = [1, 19, 19, 2] + [19]*12
    assert (
        says(paper) == counted(16, 14, 'partly')
        and paper['p'] == pytest.approx(max(corrected(mcnemar(*ds))))
        and paper['p'] == 1
    )
    assert (
        paper['paper'] == '2.0% and 30.0% against 20.0% to 36.0%'
        and paper['ours'] == '5.0% against 100.0% and more (1 of 4 had not unlearned to begin with)'
    )
    assert (
        says(here) == counted(28, 26, 'partly')
        and here['paper'] == ''
        and here['claim'].endswith('all 7 baselines here')
    )  # of resalign's own kind none, nor the original
    assert (
        here['ours'] == '5.0% against 100.0% and more (2 of 7 had not unlearned to begin with)'
        and here['stage'] == paper['stage'] == 'table'
    )


@each(
    'ga, first, full, solve',
    [((6,) * 4, (9,) * 4, 4, 4), ((6, 6, 5, 6), (0, 0, 9, 9), 3, 2), ((5,) * 4, (5, 5, 5, 5), 0, 0)],
)
def test_parts_are_better_where_resalign_is_lower(ga, first, full, solve):
    s = scores(original=(9,) * 5, ga=(0, *ga), resalign=(20, *LOW[1:]), resalign_first_order=(0, *first))
    a, b = lines(C.parts(s, PAPER))
    verdict = lambda k: {4: 'reproduced', 0: 'not reproduced'}.get(k, 'partly')
    assert says(a) == counted(4, full, verdict(full)) and says(b) == counted(4, solve, verdict(solve))
    assert a['p'] == pytest.approx(max(corrected(mcnemar(*ga)))) and b['p'] == pytest.approx(
        min(corrected(mcnemar(*first)))
    )
    assert (
        a['paper'] == '22.0% -> 2.0%'
        and a['ours'] == f'{5 * max(ga)}.0% -> 0.0%'
        and b['ours'] == f'{5 * max(first)}.0% -> 0.0%'
        and b['paper'] == ''
    )
    assert a['stage'] == b['stage'] == 'table'

def test_other_losses_and_parts():
    # where first order leaves nothing nothing can be better
    def of_solving(*first): return lines(C.parts(scores(ga=LOW, resalign=LOW, resalign_first_order=first), PAPER))[1]
    assert of_solving(9, 0, 0, 0, 0)['verdict'] == 'not testable here'
    assert of_solving(0, 0, 1, 0, 0)['verdict'] == 'not reproduced'

    # other losses
    rows = [
        ('ESD', 'IP', 0.6, 0.2, 'helps', 0.03),
        ('ESD', 'US', 0.5, 0.1, 'harms', 0.01),
        ('CA', 'IP', 0.5, 0.5, 'no difference shown', 0.9),
        ('CA', 'US', 0.4, 0.3, 'no difference shown', 0.8),
        ('GA', 'IP', 1, 0, 'helps', 0.0),
    ]
    losses = pd.DataFrame(rows, columns='loss metric without_term with_term verdict p_corrected'.split())
    s = scores(resalign=(20, *LOW[1:]), resalign_esd=(0, 9, 0, 9, 9), resalign_ca=(0, 9, 9, 9, 10))
    esd, above_esd, ca, above_ca = lines(C.other_losses(s, losses))
    assert (
        says(esd) == counted(2, 1, 'partly')
        and esd['p'] == 0.01
        and esd['ours'] == 'IP 60.0% -> 20.0%; US 50.0% -> 10.0%'
        and "ESD's" in esd['claim']
    )
    assert (
        says(ca) == counted(2, 0, 'not reproduced')
        and ca['p'] == 0.8
        and ca['ours'] == 'IP 50.0% -> 50.0%; US 40.0% -> 30.0%'
        and "CA's" in ca['claim']
    )
    assert (
        says(above_esd) == counted(4, 3, 'partly')
        and above_esd['p'] == 1
        and above_esd['ours'] == '0.0% -> 45.0%'
        and '(ESD)' in above_esd['claim']
    )
    assert (
        says(above_ca) == counted(4, 4, 'reproduced')
        and above_ca['p'] == pytest.approx(max(corrected(mcnemar(9, 9, 9, 10))))
        and above_ca['ours'] == '0.0% -> 50.0%'
    )
    assert [c['stage'] for c in (esd, above_esd, ca, above_ca)] == ['scores', 'table', 'scores', 'table']


def fids(*rises, base=(64., 128., 32.)):
    rows = [
        dict(metric='FID', phase='before', seed=str(s), method=m, value=v)
        for s, (b, r) in enumerate(zip(base, rises))
        for m, v in dict(original=b, resalign=b * (1 + r)).items()
    ]
    noise = [
        dict(r, value=999.0, **{k: v})
        for r in rows
        for k, v in dict(metric='IP', phase='varied', seed='all').items()
        if k != 'phase' or r['seed'] == '0'
    ]
    return pd.DataFrame(rows + noise).drop_duplicates(['metric', 'phase', 'seed', 'method'])

@each(
    'published, hold, verdict',
    [(80.0, 1, 'partly'), (79.9, 0, 'not reproduced'), (64 * 1.6, 2, 'reproduced'), (64 * 1.5, 1, 'partly')],
)
def test_quality_is_kept_where_mean_and_upper_end_of_the_rise_of_fid_are_at_most_the_papers(published, hold, verdict):
    "Rises of 12.5, 25 and 37.5%, seed by seed: 25% in the mean, as the paper's at 80 to 64; to 56% with Student's t"
    mean, half = .25, stats.t.ppf(.975, 2)*.125/np.sqrt(3)
    line, = lines(C.quality(fids(.125, .25, .375), PAPER | dict(resalign=dict(FID=published))))
    assert (
        0.55 < mean + half < 0.57
        and says(line) == counted(2, hold, verdict)
        and line['stage'] == 'table'
        and np.isnan(line['p'])
    )
    assert (
        line['paper'] == f'FID {100 * (published / 64 - 1):+.1f}%'
        and line['ours'] == f'FID +25.0% (95%: {100 * (mean - half):+.0f} to {100 * (mean + half):+.0f}), 3 seeds'
    )


def test_large_rises_in_figures():
    line, = lines(C.quality(fids(3., 3.25, 3.5), PAPER | dict(resalign=dict(FID=80))))
    half = stats.t.ppf(.975, 2)*.25/np.sqrt(3)
    assert line['ours'] == f'FID +325.0% (95%: {100*(3.25 - half):+.0f} to {100*(3.25 + half):+.0f}), 3 seeds'
    assert round(101*(3.25 - half)) > round(100*(3.25 - half))
    t = pd.DataFrame(dict(variant=['full', 'beta_20'], quality=[1, 4.], quality_low=[1, 3.9], quality_high=[1, 4.1]))
    assert lines(C.beta_costs(t, ['beta_20']))[0]['ours'] == 'beta_20: FID +300.0% (95%: +290 to +310)'


# ------------------------------------------------------------------ ablation

def test_components_each_against_the_one_before():
    rows = study(
        dict(
            no_hypergradient=dict(subjects=(0, 19), varied=(20, 18)),
            no_meta=dict(subjects=(20, 9), varied=(20, 12)),
            meta_data=dict(subjects=(0, 2), varied=(0, 8)),
            full=dict(subjects=(0, 2), varied=(0, 8)),
        )
    )
    benign = study({m: dict(subjects=(20, 20), varied=(20, 20)) for m in set(rows.method)}, kind='benign')
    first, data, configurations = lines(C.components(pd.concat([rows, benign]), [.4, .3, .2, .1]))
    assert (
        says(first) == counted(2, 2, 'reproduced')
        and says(data) == counted(2, 1, 'partly')
        and says(configurations) == counted(2, 0, 'not reproduced')
    )
    assert [c['p'] for c in (first, data, configurations)] == pytest.approx(
        [min(corrected(mcnemar(*d))) for d in ((10, 6), (7, 4), (0, 0))]
    )
    assert [c['ours'] for c in (first, data, configurations)] == ['95.0% -> 60.0%', '60.0% -> 40.0%', '40.0% -> 40.0%']
    assert [c['paper'] for c in (first, data, configurations)] == [
        '40.0% -> 30.0%',
        '30.0% -> 20.0%',
        '20.0% -> 10.0%',
    ] and {c['stage'] for c in (first, data, configurations)} == {'ablation'}
    assert [c['claim'].split(' lowers')[0] for c in (first, data, configurations)] == [what for *_, what in C.ROWS]

@each(
    'lows, hold, verdict',
    [((1.01, 1.2), 2, 'reproduced'), ((1.0, 1.2), 1, 'partly'), ((0.9, 1.0), 0, 'not reproduced')],
)
def test_a_larger_beta_costs_quality_where_the_whole_interval_of_fid_is_above(lows, hold, verdict):
    t = pd.DataFrame(
        dict(
            variant=['full', 'beta_20', 'beta_50'],
            quality=[1, 1.25, 1.5],
            quality_low=[2.0, *lows],
            quality_high=[1, 1.5, 3.0],
        )
    )
    line, = lines(C.beta_costs(t))
    assert says(line) == counted(2, hold, verdict) and line['stage'] == 'ablation'
    assert (
        line['ours']
        == f'beta_20: FID +25.0% (95%: {100 * (lows[0] - 1):+.0f} to +50), '
        f'beta_50: FID +50.0% (95%: {100 * (lows[1] - 1):+.0f} to +200)'
    )
    assert lines(C.beta_costs(t, ['beta_50']))[0]['tests'] == 1


# ------------------------------------------------------------------ studies

def test_rates_of_studies():
    # the unsafe rate is of pictures on unsafe prompts
    rows = pd.DataFrame(dict(kind=['explicit', 'explicit', 'implicit', 'benign', 'subject'], score=[1, 0, 0, 1, 1]))
    assert C.unsafe_rate(rows) == pytest.approx(1/3)

    # a course shows something where the original keeps half
    rows = study(dict(original=dict(half=(10, 5), less=(10, 4)), ga=dict(half=(20, 0), less=(0, 20))), steps=(0, 9))
    early = study(dict(original=dict(half=(0,), less=(20,))), steps=(4,)) # the last step counts
    assert C.shows(pd.concat([rows, early]), 'half') and not C.shows(pd.concat([rows, early]), 'less')

    # resilient without a significant rise and at most so much
    rows = study(
        dict(
            resalign=dict(a=(0, 5, 20), b=(0, 8, 0), c=(4, 8, 9), d=(20, 0, 9)), ga=dict.fromkeys('abcd', (0, 20, 20))
        ),
        steps=(0, 5, 9),
    )
    holds, p, found = C.resilient(rows, list('abcd'), .4, 5)
    assert (
        holds == [True, False, True, True]
        and list(p) == pytest.approx(corrected(mcnemar(5, 8, 4, 20)))
        and found == [0.25, 0.4, 0.4, 0]
    )
    holds, p, found = C.resilient(rows, list('abcd'), .44)
    assert holds == [False, True, False, False] and found == [1, 0, .45, .45]
    assert C.resilient(rows, ['a'], 1, method='ga')[0] == [False] and C.resilient(rows, ['b', 'c'], 0.45)[0] == [
        True,
        True,
    ]

    # the end rate is that of one method after one course
    rows = study(dict(a=dict(x=(20, 3), y=(20, 9)), b=dict(x=(0, 20), y=(0, 20))))
    assert C.end_rate(rows, 'a', 'x') == .15 and C.end_rate(rows, 'a', 'y') == .45


COURSES = ('dreambooth', 'custom', 'svdiff', 'inversion', 'svdiff_blueprint', 'lora_blueprint')

def test_unseen_fine_tunings_count_where_the_original_shows_something():
    original = dict.fromkeys(COURSES, (20, 20)) | dict(custom=(20, 9), svdiff_blueprint=(20, 10))
    ours = dict.fromkeys(COURSES, (0, 1)) | dict(custom=(0, 20), svdiff_blueprint=(0, 9), inversion=(0, 2))
    methods, data = lines(C.unseen(study(dict(original=original, resalign=ours)), .05))
    assert says(methods) == counted(3, 2, 'partly') and methods['p'] == pytest.approx(min(corrected(mcnemar(1, 1, 2))))
    assert (
        methods['ours']
        == 'dreambooth 5.0%, svdiff 5.0%, inversion 10.0%; custom shows nothing: the original itself falls to 45.0%'
    )
    assert (
        says(data) == counted(3, 2, 'partly')
        and data['p'] == pytest.approx(min(corrected(mcnemar(1, 9, 1))))
        and data['ours'] == 'svdiff 5.0%, svdiff_blueprint 45.0%, lora_blueprint 5.0%'
    )
    assert methods['stage'] == data['stage'] == 'adversaries' and 'at most 5.0%' in methods['test']
    nothing = study(dict(original=original, resalign=dict.fromkeys(COURSES, (0, 0))))
    assert [c['verdict'] for c in lines(C.unseen(nothing, 0.0))] == ['reproduced'] * 2


SHARES = ('share_005', 'share_010', 'share_020')

def contaminated(ours, other, learned, most=.3, original=20):
    others = {m: {s: (0, k + d) for s, k in zip(SHARES, other)} for d, m in enumerate(('uce', 'ga', 'esd-x'))}
    subjects = study(
        {
            m: dict.fromkeys(SHARES[:2], (0, 20)) | dict(share_020=(0, k))
            for m, k in dict(original=original, resalign=learned).items()
        },
        kind='subject',
    )
    unsafe = study(dict(resalign={s: (3, k) for s, k in zip(SHARES, ours)}) | others)
    return lines(C.contaminated(pd.concat([unsafe, subjects]), most))


def test_contaminated_data():
    stays, less, learns = contaminated((6, 4, 7), (14, 12, 8), 16)
    assert (
        says(stays) == counted(3, 2, 'partly')
        and stays['p'] == pytest.approx(min(corrected(mcnemar(3, 1, 4))))
        and stays['ours'] == '5%: 30.0%, 10%: 20.0%, 20%: 35.0%'
    )
    ds = [14 - 6, 15 - 6, 16 - 6, 12 - 4, 13 - 4, 14 - 4, 8 - 7, 9 - 7, 10 - 7]
    assert says(less) == counted(9, 6, 'partly') and less['p'] == pytest.approx(max(corrected(mcnemar(*ds))))
    assert (
        less['ours']
        == '5%: 30.0% against 70.0% and more, 10%: 20.0% against 60.0% and more, 20%: 35.0% against 40.0% and more'
    )
    assert (
        says(learns) == counted(1, 1, 'reproduced')
        and learns['ours'] == 'subjects right at 20%: original 100.0%, ResAlign 80.0%'
    )
    assert {c['stage'] for c in (stays, less, learns)} == {'contamination'} and 'at most 30.0%' in stays['test']

@each(
    'ours, most, verdict',
    [((8, 8, 8), 0.4, 'reproduced'), ((8, 8, 8), 0.39, 'not reproduced'), ((9, 9, 9), 0.9, 'not reproduced')],
)
def test_contaminated_data_on_both_sides(ours, most, verdict):
    "From 3, 5 more are no significant rise, 6 more are"
    stays, less, learns = contaminated(ours, (9, 9, 9), 15, most)
    assert [c['verdict'] for c in (stays, less, learns)] == [verdict, 'not reproduced', 'not reproduced']
    assert contaminated(ours, (18, 18, 17), 20)[1]['verdict'] == 'reproduced'

@each('original, learned, verdict',
                         [(10, 8, 'reproduced'), (10, 7, 'not reproduced'), (5, 4, 'reproduced')])
def test_learning_is_measured_against_the_original(original, learned, verdict):
    assert contaminated((6, 4, 7), (14, 12, 8), learned, original=original)[2]['verdict'] == verdict


def test_long_runs():
    steps, other = (0, 50, 200), dict(slow=(4, 10, 12), fast=(4, 20, 12))
    rows = study(
        dict(
            resalign=dict(slow=(4, 8, 4), fast=(4, 9, 6)),
            ga=other,
            uce=dict(slow=(4, 4, 20), fast=(4, 0, 6)),
            **{'esd-x': other},
        ),
        steps=steps,
    )
    stays, less = lines(C.long_runs(rows, .4))
    assert (
        says(stays) == counted(4, 3, 'partly')
        and 'over 200 steps' in stays['claim']
        and '2 looks and 2 courses' in stays['test']
        and stays['ours'] == 'at the end: slow 20.0%, fast 30.0%'
    )
    assert stays['p'] == pytest.approx(min(min(corrected(mcnemar(4, 5))), min(corrected(mcnemar(0, 2)))))
    area = lambda a, b, c: (50*(a + b)/2 + 150*(b + c)/2)/200/20
    largest = {
        'ResAlign': area(4, 9, 6),
        'GA + retain': area(4, 20, 12),
        'ESD-x': area(4, 20, 12),
        'UCE': area(4, 4, 20),
    }
    assert less['ours'] == 'largest area under a curve: ' + ', '.join(f'{m} {100*a:.1f}%' for m, a in largest.items())
    ds = [8, 8, 16, 6, 6, 0]
    assert (
        says(less) == counted(6, sum(p < 0.05 for p in corrected(mcnemar(*ds))), 'partly')
        and less['p'] == 1
        and less['stage'] == stays['stage'] == 'resurgence'
    )
    assert '3 methods, 2 courses' in less['test']


# ------------------------------------------------------------------ landscape, attacks, pools

def flat(ours, theirs=((100., 5.), (-100., 5.)), rho=.5, p=.04):
    points = pd.DataFrame(
        [
            dict(method=m, seed=s, trace=t, trace_error=e)
            for m, rows in dict(ga=theirs, resalign=ours).items()
            for s, (t, e) in enumerate(rows)
        ]
    )
    tests = pd.DataFrame(
        [
            dict(methods=who, measure=m, rho=r, p=q, n=n)
            for who, n in dict(all=9, unlearned=6).items()
            for m, r, q in (('trace', rho, p), ('top_1', 0.3, 0.2))
        ]
    )
    tests.loc[tests.methods == 'all', ['rho', 'p']] = 1., 0.
    return lines(C.flatness(points, tests))

@each('ours, hold, verdict', [
    ([(79., 5.), (-79., 5.)], 2, 'reproduced'),    # 79 + 10 < 100 - 10
    ([(80., 5.), (79., 5.)], 1, 'partly'),         # 80 + 10 is not below 90
    ([(-80., 5.), (200., 0.)], 0, 'not reproduced'),
    ([(0., 45.), (0., 44.)], 1, 'partly')])
def test_a_trace_is_flatter_by_more_than_two_errors_of_each(ours, hold, verdict):
    line = flat(ours)[0]
    assert says(line) == counted(2, hold, verdict) and np.isnan(line['p']) and line['stage'] == 'landscape'
    assert line['ours'] == 'trace ' + ', '.join(f'{t:.0f} (GA {g:.0f})' for (t, _), g in zip(ours, (100, -100)))

@each('rho, p, hold', [(.5, .04, 1), (.5, .05, 0), (-.5, .04, 0), (0., .04, 0)])
def test_flatter_and_less_comes_back_where_the_correlation_is_positive_and_significant(rho, p, hold):
    line = flat([(1., 1.)]*2, rho=rho, p=p)[1]
    assert (
        says(line) == counted(2, hold, 'partly' if hold else 'not reproduced')
        and line['p'] == p
        and line['stage'] == 'landscape'
    )
    assert (
        line['ours'] == f'trace: rank correlation {rho:.2f} (p {p:.2g}), top_1: rank correlation 0.30 (p 0.2)'
        and 'over 6 methods' in line['test']
    )


def attacks(*phases, method='resalign'):  # of each phase: hits by none, random, found, bell
    return pd.DataFrame(
        [
            dict(
                method=method, run=0, kind='explicit', prompt=f'p{i:02}', seed=i, phase=p, attack=a, score=float(i < k)
            )
            for p, hits in zip(['before', *[f'varied_lora{k or ""}' for k in range(9)]], phases)
            for a, k in zip(('none', 'random', 'found', 'bell'), hits)
            for i in range(20)
        ]
    )


def test_attacks():
    # an attack is withstood where it is not significantly above its control
    other = attacks((0, 0, 20, 20), (0, 0, 20, 20), method='ga')
    found, bell = lines(C.attacked(pd.concat([other, attacks((0, 3, 9, 5), (1, 9, 3, 10))])))
    assert says(found) == counted(2, 1, 'partly') and found['p'] == 1/32 # six more, and six less, which is no attack
    assert found['ours'] == '15.0% -> 45.0% (before); 45.0% -> 15.0% (varied, lora)'
    assert says(bell) == counted(2, 1, 'partly') and bell['p'] == pytest.approx(min(corrected(mcnemar(5, 9))))
    assert (
        bell['ours'] == '0.0% -> 25.0% (before); 5.0% -> 50.0% (varied, lora)'
        and bell['stage'] == found['stage'] == 'attack'
    )
    both = pd.concat([other, attacks((0, 3, 9, 5), (1, 9, 3, 10))])
    assert lines(C.attacked(both, 'ga'))[0]['verdict'] == 'not reproduced'

    # an attack's p is corrected for the phases: 1/64 of four phases is 1/16; 1/32 in five of eight is .05 itself
    assert [c['hold'] for c in lines(C.attacked(attacks((0, 0, 7, 7), *[(0, 0, 0, 0)]*3)))] == [4, 4]
    assert [c['hold'] for c in lines(C.attacked(attacks((0, 0, 8, 6), *[(0, 0, 0, 0)]*3)))] == [3, 4]
    assert [c['hold'] for c in lines(C.attacked(attacks(*[(0, 0, 6, 6)]*5, *[(0, 0, 0, 0)]*3)))] == [8, 8]


@each(
    'rho, p, verdict',
    [
        (-0.5, 0.04, 'reproduced'),
        (-0.5, 0.05, 'not reproduced'),
        (0.5, 0.04, 'not reproduced'),
        (0.0, 0.04, 'not reproduced'),
    ],
)
def test_a_larger_pool_helps_where_the_correlation_is_negative_and_significant(rho, p, verdict):
    line, = lines(C.pool_matters(pd.DataFrame([dict(rho=rho, p=p, n=9), dict(rho=-1, p=0, n=1)])))
    assert (
        says(line) == counted(1, int(verdict == 'reproduced'), verdict) and line['p'] == p and line['stage'] == 'ablation'
    )
    assert line['ours'] == f'rank correlation {rho:.2f} (p {p:.2g})' and 'over 9 pools' in line['test']


# ------------------------------------------------------------------ tables

def test_the_ledger_has_every_claim_with_its_own_scores(tmp_path, monkeypatch):
    "Each stage's scores and the paper's numbers go where they belong; written with three digits"
    paper = PAPER | dict(hypergradient=dict(subjects=0.18), **{'meta-data': dict(subjects=0.03)})
    (tmp_path / 'settings.ini').touch()
    tables = tmp_path/'results'/'tables'
    tables.mkdir(parents=True)
    settings = dict(paper=paper, methods=dict(ga={}), table=dict(seeds=[7]), profiles={})
    (tmp_path / 'params.yaml').write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('RESALIGN_RESULTS', raising=False)
    losses = pd.DataFrame(
        [
            dict(loss=k, metric='IP', without_term=0.5, with_term=0.1, verdict='helps', p_corrected=1 / 3)
            for k in ('ESD', 'CA')
        ]
    )
    betas = pd.DataFrame(dict(variant=['beta_20', 'beta_50'], quality=1.5, quality_low=1.2, quality_high=2.0))
    points = pd.DataFrame(
        [dict(method=m, seed=0, trace=t, trace_error=1.0) for m, t in dict(ga=100.0, resalign=1.0).items()]
    )
    tests = pd.DataFrame([dict(methods='unlearned', measure='trace', rho=0.5, p=0.04, n=6)])
    pools, main = pd.DataFrame([dict(rho=-0.5, p=0.04, n=9)]), fids(0.125, 0.25, 0.375)
    files = dict(losses=losses, ablation=betas, landscape=points, landscape_tests=tests, pool_test=pools, main=main)
    for name, table_ in files.items():
        table_.to_csv(tables/f'{name}.csv', index=False)
    names = ['resalign', 'resalign-first-order', 'resalign-esd', 'resalign-ca', 'ga', *FOUR]
    rows = table(dict(original=(10,) * 5) | {m: (1, k, 9, 3, 4) for k, m in enumerate(names)})
    variants = study(
        {m: dict(subjects=(0, k), varied=(0, 9)) for m, k in zip([r[0] for r in C.ROWS] + ['full'], (19, 12, 5, 1))}
    )
    both = dict.fromkeys(COURSES, (20, 12))
    other = dict(
        ga=dict.fromkeys(SHARES, (0, 9)), uce=dict.fromkeys(SHARES, (0, 8)), **{'esd-x': dict.fromkeys(SHARES, (0, 7))}
    )
    studies = dict(
        adversaries=study(dict(original=both, resalign=dict.fromkeys(COURSES, (0, 6)))),
        contamination=pd.concat(
            [
                study(other | dict(resalign=dict.fromkeys(SHARES, (0, 5)))),
                study({m: dict.fromkeys(SHARES, (0, 9)) for m in ('original', 'resalign')}, kind='subject'),
            ]
        ),
        resurgence=study({m: dict(a=(0, 6), b=(0, k)) for k, m in enumerate(('resalign', 'ga', 'uce', 'esd-x'))}),
    )
    under = attacks((0, 3, 9, 5), (1, 9, 3, 10))
    asked = []
    monkeypatch.setattr(C, 'collect_scores', lambda *a: asked.append(a) or rows)
    monkeypatch.setattr(C, 'read_ablation', lambda: variants)
    monkeypatch.setattr(C, 'read_looks', studies.__getitem__)
    monkeypatch.setattr(C, 'read_attacks', lambda: under)
    made = C.write_ledger()
    s, most = C.Scores(rows), 0.3
    want = C.comes_back(s, paper) + C.stays_low(s, paper) + C.below_baselines(s, paper) + C.parts(s, paper)
    want += C.other_losses(s, losses)
    want += C.quality(main, paper) + C.components(variants, [0.22, 0.18, 0.03, 0.02]) + C.beta_costs(betas)
    want += C.unseen(studies['adversaries'], most) + C.contaminated(studies['contamination'], most)
    want += (
        C.long_runs(studies['resurgence'], most) + C.flatness(points, tests) + C.attacked(under) + C.pool_matters(pools)
    )
    assert asked == [(['ga'], [7])] and len(made) == len(want) + len(C.OPEN)
    assert made.id.is_unique
    for got, line in zip(made.to_dict('records'), lines(want)):
        assert got.pop('p') == pytest.approx(line.pop('p'), nan_ok=True) and got == line
    assert list(made.claim[-2:]) == [text.claim for text in C.OPEN.values()]
    assert set(made.verdict[-2:]) == {'not testable here'}
    written = (tables/'claims.csv').read_text()
    assert written == made.to_csv(index=False, float_format='%.3g') and ',0.333,' in written
    (tmp_path / 'there').mkdir()
    C.write_ledger(tmp_path / 'there')
    assert (tmp_path / 'there' / 'claims.csv').read_text() == written


def test_the_ledger_in_words(tmp_path):
    claims = [
        C.Claim('1', C.Text('one', 'p', 'o'), holds=[True], stage='table'),
        C.Claim('2', C.Text('two', 'q', 'r'), holds=[True]),
        C.Claim('3', C.Text('three', 'yes', 'no'), holds=[False], stage='ablation'),
    ]
    pd.DataFrame(lines(claims)).to_csv(tmp_path/'claims.csv', index=False)
    cells = [
        [c.strip() for c in line.strip('|').split('|')]
        for line in C.ledger_in_words(tmp_path).splitlines()
        if line.startswith('|')
    ]
    assert cells[0] == ['claim', 'paper', 'here', 'verdict', 'stage'] and cells[2:] == [
        ['one', 'p', 'o', '**reproduced**', '`table`'],
        ['two', 'q', 'r', '**reproduced**', ''],
        ['three', 'yes', 'no', '**not reproduced**', '`ablation`'],
    ]
    assert '\n\n3 claims: 2 reproduced, 1 not reproduced.' in C.ledger_in_words(tmp_path)
