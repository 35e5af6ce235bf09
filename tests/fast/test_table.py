"From cells to the main table: what is gathered, means over models, pairs, the worst fine-tuning, on cells made by hand."
from itertools import product

import pandas as pd, pytest

from resalign.studies import table as T
from resalign.studies.models import SUMMARY

PHASES = ['before', 'subjects-full', 'varied-lora']


def exact(differences) -> float:
    "The two-sided sign-flip test, from its definition"
    flips = [abs(sum(s*d for s, d in zip(signs, differences))) for signs in product((1, -1), repeat=len(differences))]
    return sum(f >= abs(sum(differences)) - 1e-9 for f in flips)/len(flips)


def write(folder, method, seed, hits, n=10, phases=PHASES, end=''): # hits: of n pictures, a number a phase
    "summary.csv and scores.csv of a cell: implicit prompts, and CMMD"
    about = dict(detector='detector-vice', kind='implicit')
    scores = [dict(about, prompt=f'p{i}', seed=i, **{p: float(i < k) for p, k in zip(phases, hits)}) for i in range(n)]
    rows = [dict(zip(SUMMARY, (m, k/n, 0, 1, n, 'detector-vice')), phase=p)
            for p, k in zip(phases, hits) for m in ('unsafe', 'IP')]
    rows += [dict(zip(SUMMARY, ('CMMD', seed + k/n, 0, 9, n, 'clip-score')), phase=p) for p, k in zip(phases, hits)]
    folder = folder/f'{method}-{seed}{end}'
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder/'summary.csv', index=False)
    pd.DataFrame(scores).to_csv(folder/'scores.csv', index=False)


HITS = dict(ga=[(0, 3, 5), (1, 4, 9), (0, 2, 4)], uce=[(1, 7, 2), (1, 9, 1), (1, 8, 0)]) # a row a model


@pytest.fixture
def main(tmp_path, monkeypatch):
    monkeypatch.setenv('RESALIGN_RESULTS', str(tmp_path))
    for m, models in HITS.items():
        for seed, hits in enumerate(models): write(tmp_path/'runs'/'table', m, seed, hits)
    return T.collect({f'{m}-{s}': dict(method=m, seed=s, concept='vice') for m in HITS for s in range(3)})


def test_a_row_a_model_and_one_for_all(main):
    assert list(main) == T.COLUMNS and len(main) == 2*3*(3 + 1)*3 and set(main.concept) == {'vice'}
    assert set(zip(main.phase, main.finetune)) == {('before', 'none'), ('subjects', 'full'), ('varied', 'lora')}
    for m, models in HITS.items():
        rows = main[(main.method == m) & (main.phase == 'varied')].set_index(['metric', 'seed'])
        own = [hits[2]/10 for hits in models]
        assert [rows.value['IP', s] for s in range(3)] == own
        assert rows.value['IP', 'all'] == pytest.approx(sum(own)/3) and rows.n['IP', 'all'] == 3
        assert rows.value['CMMD', 'all'] == pytest.approx(sum(own)/3 + 1) and rows.detector['CMMD', 'all'] == 'clip-score'
        assert rows.low['IP', 'all'] < rows.value['IP', 'all'] < rows.high['IP', 'all']


def test_pairs_and_the_worst_fine_tuning(main):
    pairs = T.pairs_apart(main, list(HITS)).set_index('phase')
    for phase, k in (('before', 0), ('subjects', 1), ('varied', 2)):
        d = [(a[k] - b[k])/10 for a, b in zip(*HITS.values())]
        assert pairs.p[phase] == pytest.approx(exact(d)) and pairs.difference[phase] == pytest.approx(sum(d)/3)
    assert set(pairs.models) == {3} and not pairs.apart.any() # three models tell nothing apart
    worst = T.before_after(main)
    assert dict(worst.finetune) == dict(ga='varied-lora', uce='subjects-full')
    assert dict(worst.after) == pytest.approx(dict(ga=.6, uce=.8)) and worst.before['uce'] == pytest.approx(.1)


FURTHER = dict(ga=[(0, 1, 5), (0, 2, 4), (0, 0, 3)]) # of three models: before, and after two more fine-tunings


def test_further_fine_tunings_of_a_model(tmp_path, main):
    "A model's rate is the mean over all of them, of that fine-tuning alone; the model stays the replicate"
    grid = {f'{m}-{s}': dict(method=m, seed=s, concept='vice') for m in HITS for s in range(3)}
    phases = ['before', 'varied-lora@1', 'varied-lora@2']
    for seed, hits in enumerate(FURTHER['ga']): write(tmp_path/'runs'/'table', 'ga', seed, hits, phases=phases, end='-further')
    more = {f'ga-{s}-further': dict(method='ga', seed=s, concept='vice') for s in range(3)}
    got = T.collect(grid, more).astype(dict(seed=str)).set_index(['method', 'phase', 'metric', 'seed'])
    old = main.astype(dict(seed=str)).set_index(['method', 'phase', 'metric', 'seed'])
    each = [(h[2] + sum(f[1:]))/30 for h, f in zip(HITS['ga'], FURTHER['ga'])]
    assert [got.value['ga', 'varied', 'IP', str(s)] for s in range(3)] == pytest.approx(each)
    assert got.value['ga', 'varied', 'unsafe', 'all'] == pytest.approx(sum(each)/3)
    assert got.n['ga', 'varied', 'unsafe', 'all'] == got.n['ga', 'varied', 'IP', '0'] == 3 # models; fine-tunings
    assert set(got.index) == set(old.index)
    same = [k for k in old.index if (k[0], k[1]) != ('ga', 'varied') or k[2] == 'CMMD']
    pd.testing.assert_frame_equal(got.loc[same], old.loc[same])
    rates = T.rates_of_each(T.several(T.gather('table', more)[1], T.gather('table', grid)[1]))
    assert rates.set_index(['seed', 'finetuning']).unsafe.to_dict() == pytest.approx(
        {(s, k): hits/10 for s in range(3) for k, hits in enumerate((HITS['ga'][s][2], *FURTHER['ga'][s][1:]))})


def test_spread_by_hand():
    rates = pd.DataFrame(dict(method='ga', seed=[0, 0, 1, 1], unsafe=[.1, .3, .5, .7]))
    got = T.spread(rates).loc['ga'] # variances: .02 within; of the means .08, less .02/2
    assert list(got**2) == pytest.approx([.07, .02])


def test_which_cells(monkeypatch):
    "More models of the headline methods; of a real profile as many of each, all its methods and fine-tunings"
    grid = T.params('table')
    monkeypatch.setattr(T, 'settings_of', lambda method: {})
    names = list(T.models())
    assert sum(n.startswith('uce-') for n in names) == grid['headline_seeds']
    assert sum(n.startswith('pgu-') for n in names) == grid['seeds']
    more = T.further()
    assert all(f'{n}-further' in more for n in names if n.startswith('resalign-plus-')) and 'original-0-further' not in more
    assert set(T.cells()) == {*names, *more} and list(more['ga-0-further']['finetunings']) == [
        f'varied-lora@{k}' for k in range(1, grid['further']['times'] + 1)]
    assert list(T.models(['ga'], [2])) == ['ga-2'] and len(T.models(['ga'])['ga-0']['finetunings']) == len(grid['finetunings'])
    with T.sources.use_profile('sd14'):
        real = T.models()
        assert set(T.headline()) == {c['method'] for c in real.values()} == set(T.all_methods())
        assert not T.further() and len(real) == grid['seeds']*len(T.all_methods()) and {c['concept'] for c in real.values()} == {None}


def test_what_counts_of_several_fine_tunings():
    "Unsafe prompts alone, above a half; benign ones are looked at after the first"
    about = dict(method='ga', run=4, phase='varied-lora', seed=0)
    rows = [dict(about, finetuning=k, prompt=f'p{i}', kind='implicit', detector='detector-vice', score=score)
            for k, scores in enumerate([(.5, .6), (.9, .7), (.1, .5)]) for i, score in enumerate(scores)]
    rows += [dict(about, finetuning=0, prompt='b', kind='benign', detector=d, score=.9)
             for d in ('detector-vice', 'clip-score')]
    scores = pd.DataFrame(rows)
    assert T.rates_of_each(scores).unsafe.tolist() == [.5, 1, 0]
    found = T.of_each(scores, 'vice').set_index('metric')
    assert dict(found.value) == dict(unsafe=.5, IP=.5) and set(found.n) == {3} and set(found.seed) == {4}


def test_resalign_against_each_other_method_and_in_words():
    "Fewer pairs to correct for; what ends lower is named from below"
    rates = dict(ga=.5, resalign=.1, uce=.3)
    rows = [dict(method=m, seed=s, phase='varied', finetune='lora', metric='unsafe', value=r + s/100)
            for m, r in rates.items() for s in range(8)]
    pairs = T.pairs_apart(pd.DataFrame(rows), list(rates))
    assert [{a, b} for a, b in zip(pairs.a, pairs.b)] == [{'ga', 'resalign'}, {'resalign', 'uce'}]
    assert list(pairs.p_holm) == [2*2/2**8]*2
    def said(**after): return T.in_words(pd.DataFrame(dict(after=after)))
    after = 'Unsafe after the worst harmless fine-tuning:\n'
    assert said(original=1., resalign=30., ga=20., uce=10., salun=60.) == (
        f'{after}UCE 10%, GA + retain 20%, ResAlign 30%; highest SalUn 60%')
    assert said(original=1., resalign=5., ga=20., uce=10.) == f'{after}ResAlign 5%; highest GA + retain 20%'
    assert said(resalign=5., uce=1.) == f'{after}UCE 1%, ResAlign 5%'
