"""From cells to the main table: reading, pooling, tests and layout, on tables made by hand."""

import matplotlib
import numpy as np, pandas as pd, pytest
from scipy import stats

from resalign.core.settings import UserError
from resalign.studies import table as R
from toy_scores import PHASES, mcnemar, table

matplotlib.use('agg')
COLUMNS = 'method seed phase finetune metric value low high n detector'.split()


def bootstrap(values):
    return tuple(
        stats.bootstrap(
            (np.asarray(values, float),), np.mean, n_resamples=2000, method='percentile', rng=np.random.default_rng(0)
        ).confidence_interval
    )


def row(**kw):
    return (
        dict(
            method='ga',
            seed=0,
            phase='before',
            finetune='none',
            metric='IP',
            value=0.5,
            low=0.4,
            high=0.6,
            n=4,
            detector='wiring',
        )
        | kw
    )


# ------------------------------------------------------------------ reading

def cell(folder, method, seed, metric='IP', hits=(0, 1, 0, 0, 1)):
    (folder/f'{method}-{seed}').mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row(method=method, seed=seed, metric=metric)]).to_csv(
        folder / f'{method}-{seed}' / 'summary.csv', index=False
    )
    wide = dict(detector='wiring', kind='implicit', prompt=['a', 'b'], seed=[5, 6]) | {
        p.replace('-', '_'): [h, 0.25] for p, h in zip(PHASES, hits)
    }
    pd.DataFrame(wide).to_csv(folder/f'{method}-{seed}'/'scores.csv', index=False)

def test_cells_are_collected_by_method_and_seed(tmp_path):
    for m in ('uce', 'ga'):
        for s in (0, 2): cell(tmp_path, m, s)
    got = R.collect(['uce', 'ga'], [0, 2], tmp_path)
    assert (
        list(zip(got.method, got.seed)) == [('uce', 0), ('uce', 2), ('ga', 0), ('ga', 2)]
        and list(got) == COLUMNS
        and list(got.index) == [0, 1, 2, 3]
    )
    scores = R.collect_scores(['uce', 'ga'], [2], tmp_path)
    one = scores[(scores.method == 'ga') & (scores.prompt == 'a')]
    assert list(zip(one.phase, one.finetune, one.score, one.run, one.seed)) == [
        ('before', 'none', 0, 2, 5),
        ('subjects', 'full', 1, 2, 5),
        ('subjects', 'lora', 0, 2, 5),
        ('varied', 'full', 0, 2, 5),
        ('varied', 'lora', 1, 2, 5),
    ]
    assert (
        len(scores) == 20
        and set(scores[scores.prompt == 'b'].score) == {0.25}
        and list(scores.index) == list(range(20))
    )


def test_what_is_wrong_with_a_cell_is_named(tmp_path):
    def refused(words, f=R.collect, methods=('ga',)):
        with pytest.raises(UserError, match=words): f(methods, [0], tmp_path)
    refused('ga-0/summary.csv: no such file.*dvc repro table')
    cell(tmp_path, 'ga', 0)
    (tmp_path/'ga-0').rename(tmp_path/'uce-0')
    refused(r"uce-0/summary.csv: .*'ga'.*expected uce and 0", methods=['uce'])
    cell(tmp_path, 'ga', 0)
    (tmp_path/'ga-0').rename(tmp_path/'ga-1')
    with pytest.raises(UserError, match='expected ga and 1'): R.collect(['ga'], [1], tmp_path)
    cell(tmp_path, 'ga', 0)
    for name in ('summary', 'scores'):
        path, f = tmp_path/'ga-0'/f'{name}.csv', R.collect if name == 'summary' else R.collect_scores
        whole = pd.read_csv(path)
        for c in COLUMNS if name == 'summary' else list(whole):
            whole.drop(columns=c).to_csv(path, index=False)
            refused(f"{name}.csv: column '{c}'", f)
        whole[:0].to_csv(path, index=False)
        refused(f'{name}.csv: no rows', f)
        path.write_text('')
        refused(f'{name}.csv: not a CSV', f)


# ------------------------------------------------------------------ over seeds

def test_the_mean_over_seeds_has_students_interval():
    v = pd.Series([.1, .4, .3])
    half = stats.t.ppf(.975, 2)*v.std()/3**.5
    assert R.over_seeds(v, 7) == pytest.approx((v.mean(), v.mean() - half, v.mean() + half, 7))
    assert R.over_seeds(v, 7, share=True)[1:3] == pytest.approx((0, v.mean() + half)) and R.over_seeds(1 - v, 7, True)[
        1:3
    ] == pytest.approx((1 - v.mean() - half, 1))
    assert R.over_seeds(pd.Series([3.]), 9) == (3, 3, 3, 9)
    far = stats.t.ppf(.975, 1)*1
    assert R.over_seeds(pd.Series([1., 3.]), 2)[1:3] == pytest.approx((2 - far, 2 + far))

def test_seeds_are_pooled_by_prompts_where_scores_are_counted_and_by_seed_elsewhere():
    "Prompt x has three pictures of four: over pictures three quarters, over prompts a half"
    scores = pd.DataFrame(
        [
            dict(
                detector=d,
                kind=k,
                prompt=p,
                seed=i,
                score=float(s and d == 'wiring'),
                method=m,
                run=r,
                phase=ph,
                finetune=f,
            )
            for d, k in (('wiring', 'implicit'), ('mhsc', 'explicit'), ('wiring', 'explicit'))
            for m, hit in (('ga', 1), ('uce', 0))
            for r in (0, 1)
            for ph, f in (('before', 'none'), ('varied', 'lora'))
            for i, (p, s) in enumerate(zip('xxxy', [hit, hit, hit, 0]))
        ]
    )
    cells = [
        dict(method=m, phase=p, finetune=f) for m in ('ga', 'uce') for p, f in (('before', 'none'), ('varied', 'lora'))
    ]
    rows = [
        row(**c, seed=s, metric=k, value=v + s, n=4 + s, detector=d)
        for c in cells
        for s in (0, 1)
        for k, v, d in (
            ('FID', 9.0, 'reader'),
            ('objects', 0.2, 'reader'),
            ('IP', 99.0, 'wiring'),
            ('US', 99.0, 'mhsc'),
        )
    ]
    got = R.pooled(pd.DataFrame(rows), scores)
    assert list(got) == COLUMNS and set(got.seed) == {'all'} and len(got) == 16
    at = lambda metric, method, phase: got[(got.metric == metric) & (got.method == method) & (got.phase == phase)].iloc[
        0
    ]
    ip = at('IP', 'ga', 'varied')
    assert (ip.value, ip.n, ip.detector) == (.5, 8, 'wiring') and (ip.low, ip.high) == bootstrap([1, 0])
    assert (at('IP', 'uce', 'before').value, at('US', 'ga', 'before').value, at('US', 'ga', 'before').detector) == (
        0,
        0,
        'mhsc',
    )
    fid, right = at('FID', 'ga', 'before'), at('objects', 'uce', 'varied')
    half = stats.t.ppf(.975, 1)*.5
    assert (fid.value, fid.n, fid.finetune) == (9.5, 9, 'none')
    assert (fid.low, fid.high) == pytest.approx((9.5 - half, 9.5 + half)) and (
        right.value,
        right.low,
        right.high,
    ) == pytest.approx((0.7, 0, 1))  # a share stays within 0 and 1


def test_resalign_against_every_other_in_every_phase():
    ip = table(dict(resalign=(1, 2, 3, 4, 5), ga=(1, 9, 0, 4, 20), uce=(7, 7, 7, 7, 7)))
    us = table(dict(resalign=(0,)*5, ga=(6,)*5, uce=(5,)*5), detector='mhsc', kind='explicit')
    noise = table(dict(resalign=(20,)*5, ga=(0,)*5, uce=(0,)*5), kind='explicit')
    got = R.paired_tests(pd.concat([ip, us, noise]))
    assert (
        list(got)[:5] == ['metric', 'phase', 'finetune', 'a', 'b']
        and set(got.a) == {'resalign'}
        and len(got) == 2 * 5 * 2
    )
    found = {(r.metric, r.phase, r.finetune, r.b): (r.difference, r.p) for r in got.itertuples()}
    ours, theirs = (1, 2, 3, 4, 5), dict(ga=(1, 9, 0, 4, 20), uce=(7,)*5)
    for m, ks in theirs.items():
        for p, k, mine in zip(PHASES, ks, ours):
            data, _, how = p.partition('-')
            assert found['IP', data, how or 'none', m] == pytest.approx(((mine - k)/20, mcnemar(mine - k)[0])), (m, p)
    assert found['US', 'before', 'none', 'ga'] == pytest.approx((-0.3, 1 / 32)) and found[
        'US', 'varied', 'full', 'uce'
    ] == pytest.approx((-0.25, 1 / 16))
    assert set(R.paired_tests(pd.concat([ip, us]), 'ga').b) == {'resalign', 'uce'}


# ------------------------------------------------------------------ layout

def test_numbers_and_labels():
    # numbers as they are shown
    r = lambda *v: pd.Series(dict(zip(('value', 'low', 'high'), v)))
    assert R.percent(r(.1234, .0549, .2051)) == '12.3 (5–21)'
    assert [R.plain(r(v)) for v in (10., 9.994, -10., -9.5, .126)] == ['10.0', '9.99', '-10.0', '-9.50', '0.13']

    # shares in percent the rest as numbers
    shown = {
        k: R.main_table(pd.DataFrame([row(metric=k)]), k).before[0]
        for k in ('IP', 'US', 'explicit', 'objects', 'FID', 'CLIP', 'aesthetics')
    }
    assert shown == dict.fromkeys(('IP', 'US', 'explicit', 'objects'), '50.0 (40–60)') | dict.fromkeys(
        ('FID', 'CLIP', 'aesthetics'), '0.50'
    )

    # labels name the detectors of the rows
    assert (
        R.labels(ROWS) == R.LABELS
        and 'wiring' in R.LABELS['IP']
        and 'mhsc' in R.LABELS['US']
        and '0.5' in R.LABELS['IP']
    )
    photos = R.labels(ROWS.assign(detector='nudenet'))
    assert (
        'objects' not in photos
        and photos['FID'] == 'FID (Inception features)'
        and '(detector `nudenet`, threshold 0.45)' in photos['IP']
        and photos['CLIP'] == R.LABELS['CLIP']
    )
    assert photos['IP'].startswith(R.LABELS['IP'].split(' (')[0]) and '(detector `mhsc`, threshold 0.5)' in photos['US']

ROWS = pd.DataFrame(
    [
        row(method=m, metric=k, phase=p, finetune=f, value=v, low=v - 0.01, high=v + 0.01)
        for m, base in (('uce', 0.1), ('ga', 0.2))
        for k, more in (('IP', 0), ('FID', 2))
        for v, (p, f) in ((base + more, ('before', 'none')), (base + more + 0.05, ('varied', 'lora')))
    ]
)


def test_tables_in_words():
    # a row a method and a column a phase with the papers own beside
    paper = dict(ga=dict(before=.36, varied=.123, FID=16.9))
    ip, fid = R.main_table(ROWS, 'IP', paper), R.main_table(ROWS, 'FID', paper)
    heads = ['before', 'subjects, full', 'subjects, LoRA', 'varied, full', 'varied, LoRA']
    assert list(ip) == ['method', *heads, 'paper, before', 'paper, DreamBench++', 'paper, DiffusionDB'] and list(
        fid
    ) == ['method', *heads, 'paper, before']
    assert ip.values.tolist() == [
        ['UCE', '10.0 (9–11)', '', '', '', '15.0 (14–16)', '', '', ''],
        ['GA + retain', '20.0 (19–21)', '', '', '', '25.0 (24–26)', '36.0', '', '12.3'],
    ]
    assert fid.values.tolist() == [
        ['UCE', '2.10', '', '', '', '2.15', ''],
        ['GA + retain', '2.20', '', '', '', '2.25', '16.9'],
    ]
    assert list(R.main_table(ROWS, 'IP')) == list(R.main_table(ROWS, 'FID')) == ['method', *heads]

    # all metrics as markdown
    said = R.markdown(ROWS, 'A title', 'a note')
    parts = said.split('\n\n')
    assert (
        parts[:2] == ['# A title', 'a note']
        and said.endswith('\n')
        and [p.strip('*') for p in parts if p.startswith('**')] == list(R.LABELS.values())
    )
    assert parts[3].splitlines()[2].startswith('| UCE') and R.markdown(ROWS, 'A title').split('\n\n')[1].startswith(
        '**IP'
    )


def test_the_headline_s_points_are_the_values_of_each_phase(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    kept = []
    monkeypatch.setattr(plt, 'close', kept.append)
    rows = pd.DataFrame(
        [
            row(
                method=m,
                metric=k,
                phase=p.partition('-')[0],
                finetune=p.partition('-')[2] or 'none',
                value=v / 100,
                low=v / 100 - 0.02,
                high=v / 100 + 0.01,
            )
            for m, base in (('ga', 10), ('original', 50))
            for k, more in (('IP', 0), ('US', 5))
            for v, p in zip(range(base + more, base + more + 5), PHASES)
        ]
    )
    R.headline(rows, tmp_path/'h.png', ['original', 'ga'])
    assert (tmp_path/'h.png').stat().st_size > 1000
    ip, us = kept[0].axes
    assert [t.get_text() for t in ip.get_yticklabels()] == ['Original', 'GA + retain'] and (
        ip.get_title(),
        ip.get_xlim(),
    ) == ('IP: unsafe pictures on implicit prompts', (-3, 103))
    points = lambda ax: [[x for x, _ in np.round(c.lines[0].get_xydata(), 6)] for c in ax.containers]
    assert points(ip) == [[50 + k, 10 + k] for k in range(5)] and points(us) == [[55 + k, 15 + k] for k in range(5)]
    bar = ip.containers[0].lines[2][0].get_segments()[0]
    assert bar[:, 0] == pytest.approx([48, 51]) and [c.lines[0].get_ydata()[0] for c in ip.containers] == pytest.approx(
        [-0.3, -0.15, 0, 0.15, 0.3]
    )


# ------------------------------------------------------------------ for other studies

def whole(
    **methods,
):  # method -> IP before, after varied-lora and subjects-full; US before, after; FID; objects; worst IP by seed
    out = []
    for m, (ip, lora, full, us, us_after, fid, right, seeds) in methods.items():
        m = m.replace('_', '-')
        both = [
            ('IP', ip, 'before', 'none'),
            ('IP', lora, 'varied', 'lora'),
            ('IP', full, 'subjects', 'full'),
            ('US', us, 'before', 'none'),
            ('US', us_after, 'varied', 'full'),
            ('FID', fid, 'before', 'none'),
            ('objects', right, 'before', 'none'),
        ]
        out += [
            row(method=m, seed='all', metric=k, value=v, low=v - 0.01, high=v + 0.01, phase=p, finetune=f)
            for k, v, p, f in both
        ]
        out += [
            row(method=m, seed=s, metric='IP', value=w, phase=p, finetune='lora')
            for s, v in enumerate(seeds)
            for p, w in (('varied', v), ('subjects', 0.0), ('before', 1.0))
        ]
    return pd.DataFrame(out)


def world(lora=.05, fid=104.9, best=.25):
    return whole(
        original=(0.8, 0.7, 0.9, 0.6, 0.5, 100.0, 0.9, (0.9, 0.8)),
        resalign=(0.0, lora, 0.01, 0.02, 0.03, fid, 0.75, (0.04, 0.06)),
        ga=(0.1, best, best - 0.01, 0.2, 0.3, 120.0, 0.5, (0.5, 0.4)),
        uce=(0.2, 0.6, 0.7, 0.1, 0.15, 90.0, 0.8, (0.7, 0.7)),
        resalign_first_order=(0.0, 0.0, 0.0, 0.0, 0.0, 100.0, 1.0, (0.0, 0.0)),
    )


def test_before_and_worst_after():
    rows = world()[lambda d: d.seed == 'all']
    assert R.before(rows, 'FID').value.to_dict() == {
        'original': 100,
        'resalign': 104.9,
        'ga': 120,
        'uce': 90,
        'resalign-first-order': 100,
    }
    worst = R.worst_after(rows, 'uce')
    assert (
        (worst.value, worst.phase, worst.finetune) == (0.7, 'subjects', 'full')
        and R.worst_after(rows, 'original').value == 0.9
        and R.worst_after(rows, 'ga', 'US').value == 0.3
    )
