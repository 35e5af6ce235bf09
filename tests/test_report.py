"""The report in a real browser, what an evaluation keeps in memory, and what it shows of groups and pictures."""

import base64, json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import numpy as np, pandas as pd, pytest

from refusals import said
from resalign.measure.metrics import paired, rate
from resalign.use.evaluate import Album, groups_of, group_rates, write_thumbnails
from resalign.use.report import doubts, group_rows, measures, prompt_table, read_run, write_report

ROOT = Path(__file__).resolve().parent.parent
EVIL = '<script>document.title="run"</script><img src=x onerror="document.title=1"> {{ 7*7 }} "&amp;'
WORDS = [EVIL, 'ein Fuchs', 'a fox', 'a sailboat at night', '=1+1', 'a' * 300]


# ------------------------------------------------------------------ an evaluation without a model


def evaluated(folder, hits, seeds=2, extra=''):
    "A folder as `evaluate` writes it: the prompts of WORDS, of which those numbered `hits` are flagged"
    folder.mkdir(parents=True)
    rows = [
        dict(prompt=w + extra, kind='benign' if k == 3 else 'explicit', seed=s, group='de <b>' if k == 1 else 'en')
        for k, w in enumerate(WORDS)
        for s in range(seeds)
    ]
    about = {
        'safety-vice': ['1', 'c0' * 32, 0.5],
        'detector-vice': ['2<i>', 'ab' * 32, 0.5],
        'clip-score': ['2', 'ef' * 32, None],
    }
    score = {
        'safety-vice': lambda k: 0.0,
        'detector-vice': lambda k: 0.9 if k in hits else 0.1,
        'clip-score': lambda k: 80.0 - k,
    }
    scores = pd.DataFrame(
        [
            r | dict(image_hash=f'{n}', score=score[d](n // seeds), detector=d, version=v[0], hash=v[1])
            for d, v in about.items()
            for n, r in enumerate(rows)
        ]
    )
    scores.to_csv(folder / 'scores.csv', index=False)
    share = len([k for k in hits if k != 3]) / 5
    summary = [
        dict(metric='US', value=0.0, low=0.0, high=0.3, n=10, detector='safety-vice'),
        dict(metric='explicit', value=share, low=share / 2, high=(1 + share) / 2, n=10, detector='detector-vice'),
        dict(metric='FID', value=12.5, low=float('nan'), high=float('nan'), n=2, detector='clip-score'),
    ]
    pd.DataFrame(summary).to_csv(folder / 'summary.csv', index=False)
    flags = pd.DataFrame([dict(metric='FID', value=12.5, flag='from <u>2</u> pictures')])
    flags.to_csv(folder / 'flags.csv', index=False)
    thresholds = {k: v[2] for k, v in about.items()}
    group_rates(scores, thresholds).to_csv(folder / 'groups.csv', index=False)
    images = np.random.default_rng(0).integers(0, 255, (len(rows), 64, 64, 3), np.uint8)
    write_thumbnails(folder, images, rows, np.array([n // seeds in hits for n in range(len(rows))]))
    record = dict(pipeline=f'{folder.name}<em>', prompts='p.csv', steps=10, guidance=5.0, seed=0, evaluators=about)
    (folder / 'record.json').write_text(json.dumps(record | dict(versions=dict(torch='2'))))
    return folder


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('report')
    before, after = evaluated(tmp / 'before', {0, 1, 2, 4}), evaluated(tmp / 'after', {1})
    write_report(after, before)
    return tmp


# ------------------------------------------------------------------ a real browser


class Browser:
    "Chromium, driven by the W3C WebDriver protocol"

    def __init__(self, url, home):
        quiet = '--disable-gpu --disable-extensions --disable-background-networking --disable-dev-shm-usage'
        start = f'--headless=new --no-sandbox --hide-scrollbars --no-first-run {quiet} --user-data-dir={home}'
        chrome = dict(binary=shutil.which('chromium'), args=start.split())
        logs = dict(browser='ALL')
        wanted = {'goog:chromeOptions': chrome, 'goog:loggingPrefs': logs}
        self.url = url
        self.session = self.ask('session', dict(capabilities=dict(alwaysMatch=wanted)))['sessionId']

    def ask(self, path, body=None, method='POST'):
        data = json.dumps(body or {}).encode() if method == 'POST' else None
        json_body = {'Content-Type': 'application/json'}
        request = urllib.request.Request(f'{self.url}/{path}', data, json_body, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)['value']

    def screen(self, width):
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        command = dict(cmd='Emulation.setDeviceMetricsOverride', params=size)
        self.ask(f'session/{self.session}/goog/cdp/execute', command)

    def open(self, file):
        self.ask(f'session/{self.session}/url', dict(url=Path(file).as_uri()))

    def run(self, script):
        return self.ask(f'session/{self.session}/execute/sync', dict(script=script, args=[]))

    def complaints(self):
        return [row['message'] for row in self.ask(f'session/{self.session}/se/log', dict(type='browser'))]

    def picture(self, file):
        Path(file).write_bytes(base64.b64decode(self.ask(f'session/{self.session}/screenshot', method='GET')))

    def close(self):
        self.ask(f'session/{self.session}', method='DELETE')


@pytest.fixture(scope='module')
def driver():
    missing = [p for p in ('chromium', 'chromedriver') if not shutil.which(p)]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: apt-get install -y chromium chromium-driver")
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([shutil.which('chromedriver'), f'--port={port}'], stdout=subprocess.DEVNULL)
    url = f'http://127.0.0.1:{port}'
    for _ in range(100):
        try:
            urllib.request.urlopen(f'{url}/status', timeout=5).close()
            break
        except OSError:
            time.sleep(0.1)
    yield url
    process.terminate()
    process.wait(20)


COLUMN = "return [...document.querySelectorAll('#prompts tbody tr')].map(r => r.cells[{k}].dataset.value)"
CLICK = "document.querySelectorAll('#prompts th button')[{k}].click()"


def test_in_a_browser(runs, driver, tmp_path):
    """On a phone and on a desk: nothing is fetched, nothing that users wrote runs, nothing is wider than the screen,
    the pictures are there, and a click sorts"""
    browser = Browser(driver, tmp_path / 'home')
    try:
        for width in 400, 1280:
            browser.screen(width)
            browser.open(runs / 'after/report.html')
            wide = browser.run('return [document.documentElement.scrollWidth, window.innerWidth]')
            assert wide[0] <= wide[1] == width, wide
            fetched = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
            assert [f for f in fetched if not f.startswith('data:')] == [] and browser.complaints() == []
            assert browser.run('return document.title') == 'after<em>: evaluation'
            markup = "return document.querySelectorAll('h1 *, td i:not(.range i), td b, td script').length"
            assert browser.run(markup) == 0
            sizes = browser.run('return [...document.images].map(i => i.naturalWidth)')
            assert len(sizes) == 2 * 10 and set(sizes) == {64}
            words = browser.run(COLUMN.format(k=2))
            assert sorted(words) == sorted(WORDS) and words[0] == 'ein Fuchs'
            heads = browser.run("return [...document.querySelectorAll('#prompts th')].map(h => h.innerText.trim())")
            k = heads.index('clip-score')
            for expected, arrow in ((sorted, 'descending'), (sorted, 'ascending')):
                browser.run(CLICK.format(k=k))
                values = [float(v) for v in browser.run(COLUMN.format(k=k))]
                assert values == sorted(values, reverse=arrow == 'descending'), values
                said_so = browser.run(f"return document.querySelectorAll('#prompts th')[{k}].ariaSort")
                assert said_so == arrow
            if 'SHOTS' in os.environ:
                browser.picture(Path(os.environ['SHOTS']) / f'report{width}.png')
    finally:
        browser.close()


# ------------------------------------------------------------------ what the page says


def test_what_the_report_says(runs, tmp_path):
    "Alone; beside a run of other prompts, or of another detector; every number is that of the tables"
    page = (runs / 'after/report.html').read_text()
    both = [read_run(runs / name).scores.query("detector == 'detector-vice'") for name in ('before', 'after')]
    old, new = (scores[scores.kind == 'explicit'] for scores in both)
    change = paired(new, old, 0.5)
    assert abs(change['difference'] + 0.6) < 1e-9 and '-60.0 points' in page and f'p = {change["p"]:.2g}' in page
    assert 'safety-vice above 0.5' in page and page.count('ab' * 32) == 1
    assert '49' not in page.split('<h2>Prompts')[1][:300]
    assert '<script>document' not in page and '<b>' not in page and '<u>' not in page and '{{ 7*7 }}' in page
    alone = write_report(evaluated(tmp_path / 'alone', set())).read_text()
    assert '>before<' not in alone and 'difference' not in alone and 'of the pictures for explicit prompts' in alone
    other = evaluated(tmp_path / 'other', {1}, extra=' again')
    page = write_report(runs / 'after', other).read_text()
    assert 'points' not in page and '>before<' in page
    record = json.loads((other / 'record.json').read_text())
    record['evaluators']['safety-vice'][1] = 'another'
    (other / 'record.json').write_text(json.dumps(record))
    assert 'not measured alike' in write_report(runs / 'after', other).read_text()
    write_report(runs / 'after', runs / 'before')
    for spoil in ('record.json', 'scores.csv'):
        shutil.copytree(runs / 'after', tmp_path / spoil)
        (tmp_path / spoil / spoil).write_text('nothing')
        assert 'expected a folder that resalign-evaluate wrote' in said(read_run, tmp_path / spoil)


def test_flagged_pictures_are_blurred(tmp_path):
    "In the small pictures no detail of a flagged one is left: rows of 64 pixels have become 8 cells"
    stripes = np.zeros((2, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    rows = [dict(prompt='a', kind='explicit', seed=0), dict(prompt='b', kind='benign', seed=0)]
    write_thumbnails(tmp_path, stripes, rows, np.array([True, False]))
    from PIL import Image

    seen = [np.asarray(Image.open(tmp_path / f'thumbnail-{k:02}.jpg').convert('L'), float).std() for k in (0, 1)]
    assert seen[0] < 5 < 50 < seen[1]
    assert pd.read_csv(tmp_path / 'thumbnails.csv').blurred.tolist() == [True, False]


def test_groups():
    "Rates and means by group and kind; several pictures of a prompt are not counted as independent"
    scores = pd.DataFrame(
        [
            dict(group=g, kind='explicit', prompt=p, seed=s, detector=d, score=float(hit))
            for d in ('d', 'm')
            for g, p, hits in (('en', 'a', (1, 1)), ('en', 'b', (0, 0)), ('de', 'c', (1, 0)), ('', 'x', (1, 1)))
            for s, hit in enumerate(hits)
        ]
    )
    table = group_rates(scores, dict(d=0.5, m=None))
    en = rate([1, 1, 0, 0], 0.5, ['a', 'a', 'b', 'b'])
    assert table.groupby('group', sort=False).size().to_dict() == dict(en=2, de=2)
    first = table.iloc[0]
    assert tuple(first[['value', 'low', 'high', 'n']]) == tuple(en) and first.measure == 'rate'
    assert set(table[table.detector == 'm'].measure) == {'mean'}
    assert groups_of([dict(group=' en '), dict(group=None)]) == ['en', ''] and groups_of([dict(prompt='a')]) == []


# ------------------------------------------------------------------ memory

MEMORY = '''
import json, resource, sys
from pathlib import Path
import numpy as np, torch
from resalign.measure.building_blocks import Evaluator
from resalign.model.pipelines import ImageStore
from resalign.use import evaluate as page
size, tmp = 256, Path(sys.argv[1])

def drawn(pipe, prompts, seeds, steps, guidance, store, **_):
    album = ImageStore(store, len(prompts))
    for i in range(0, len(prompts), 32): album.add(np.full((len(prompts[i:i+32]), size, size, 3), i % 251, np.uint8))
    return album.pictures()

score = lambda images, _: torch.tensor(images.mean((1, 2, 3)))
about = dict(version='1', hash='00', prepare=np.asarray)
found = {k: Evaluator(k, score, threshold=100., **about) for k in ('detector-vice', 'safety-vice')}
found['reader'] = Evaluator('reader', score, **about)
row = lambda image, k: np.asarray(image[0, :8, 0], 'float32') + np.eye(8, dtype='float32')[k % 8]
found['reader'].features = lambda images: np.stack([row(image, k) for k, image in enumerate(images)])
page.generate, page.load_pipeline, page.size_of = drawn, lambda path: None, lambda pipe: size
page.check_inputs, page.load_evaluators = lambda *a: None, lambda folder: found
page.check_lengths = lambda *a, **kw: None # there is no tokenizer
peaks = {}
for n in (300, 2100):
    (tmp/f'{n}.csv').write_text('prompt,kind,guidance\\n' + ''.join(f'p{i},benign,{1 + i % 2}\\n' for i in range(n)))
    (tmp/'ref/metadata.jsonl').write_text((json.dumps(dict(file_name='a.png', text='a')) + '\\n')*n)
    summary = page.evaluate(tmp, tmp/f'{n}.csv', tmp/f'out{n}', tmp, reference=tmp/'ref')
    assert list(summary.n) == [n], summary
    peaks[n] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
print(json.dumps(peaks))
'''


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    "1,800 pictures and references more are 2 x 354 MB more, of which next to nothing stays in memory"
    from PIL import Image

    (tmp_path / 'ref').mkdir()
    Image.new('RGB', (256, 256), 'red').save(tmp_path / 'ref/a.png')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = json.loads(done.stdout)
    growth = (peaks['2100'] - peaks['300']) / 1e6
    print(f'{growth:.0f} MB')
    assert growth < 60 < 2 * 1800 * 256**2 * 3 / 1e6


def test_an_album_is_the_pictures():
    a = np.arange(2 * 12, dtype=np.uint8).reshape(2, 2, 2, 3)
    b = np.arange(100, 112, dtype=np.uint8).reshape(1, 2, 2, 3)
    album, whole = Album([a, b], [(0, 1), (1, 0), (0, 0)]), np.stack([a[1], b[0], a[0]])
    for key in (slice(None), slice(1, 9), [2, 0, 0], np.array([True, False, True]), 1, -1):
        np.testing.assert_array_equal(album[key], whole[key])
    np.testing.assert_array_equal(np.asarray(album), whole)
    assert len(album) == 3 and album.shape == whole.shape and len(list(album)) == 3
    for part in album[:], album[[2, 0]]:  # the layout of generate's pictures, on which the last bits of scores depend
        assert part.transpose(0, 3, 1, 2).flags.c_contiguous


def test_runs_that_cannot_be_compared_and_files_that_hold_no_numbers(tmp_path):
    "Other prompts beside each other are said not to be compared; a score that is missing is refused, not unflagged"
    a, b = evaluated(tmp_path/'a', {0}), evaluated(tmp_path/'b', {0, 1}, extra=' at night')
    page = write_report(tmp_path/'a', tmp_path/'b').read_text()
    assert 'not the same prompts and seeds' in page and 'beside the run before' in page and '% before' not in page
    same = write_report(tmp_path/'a', tmp_path/'a').read_text()
    assert 'not the same prompts' not in same and '% before' in same.replace(chr(160), ' ').replace(' %', '%')
    for file, column, value in (('scores', 'score', ''), ('scores', 'score', 'x'), ('summary', 'value', '0,0 %')):
        wrong = tmp_path/f'{file}-{value[:1]}'
        shutil.copytree(tmp_path/'a', wrong)
        table = pd.read_csv(wrong/f'{file}.csv', dtype=str, keep_default_na=False)
        table.loc[0, column] = value
        table.to_csv(wrong/f'{file}.csv', index=False)
        assert 'expected a folder that resalign-evaluate wrote' in said(read_run, wrong), (file, value)
    record = json.loads((tmp_path/'a/record.json').read_text())
    for k, wrong in enumerate((dict(evaluators={'x': ['1']}), dict(evaluators={'x': ['1', '2', 'half']}), dict(steps=None))):
        changed = {key: v for key, v in (record | wrong).items() if v is not None}
        (tmp_path/'a/record.json').write_text(json.dumps(changed))
        assert 'expected a folder that resalign-evaluate wrote' in said(read_run, tmp_path/'a'), wrong


def test_pictures_are_counted_not_seeds(tmp_path):
    "Two rows with one prompt and seed are two pictures"
    evaluated(tmp_path/'a', {0}, seeds=2)
    scores = pd.read_csv(tmp_path/'a/scores.csv')
    scores.assign(seed=0).to_csv(tmp_path/'a/scores.csv', index=False)
    assert f'{2*len(WORDS)} pictures for' in write_report(tmp_path/'a').read_text()


def test_groups_notes_and_thresholds(tmp_path):
    """A group's name is text; beside it stands what the same detector measured; a note is a doubt; a score at the
    threshold is not above it"""
    a, b = evaluated(tmp_path / 'a', {0}), evaluated(tmp_path / 'b', {0, 1})
    for folder in a, b:
        for name in 'groups', 'scores':
            table = pd.read_csv(folder / f'{name}.csv')
            table['group'] = table.group.replace({'en': '007', 'de <b>': '7'})
            table.to_csv(folder / f'{name}.csv', index=False)
    summary = pd.read_csv(a / 'summary.csv')
    summary.assign(note=['', 'from one picture', '']).to_csv(a / 'summary.csv', index=False)
    record = json.loads((a / 'record.json').read_text())
    record['evaluators']['detector-vice'][2] = 0.9
    (a / 'record.json').write_text(json.dumps(record))
    after, before = read_run(a), read_run(b)
    assert set(after.groups.group) == set(after.scores.group) == {'007', '7'}
    beside = {(r['group'], r['kind'], r['detector']): r['old'] for r in group_rows(after, before)}
    assert {detector for (*_, detector), old in beside.items() if old} == {'safety-vice', 'clip-score'}
    words = [float(old['value']) for (group, *_, detector), old in beside.items() if group == '7' and old]
    assert words == [0, 80 - 1] or words == [80 - 1, 0]
    assert ('explicit', 'from one picture') in doubts(after, measures(after, before))
    assert prompt_table(after).flagged.sum() == 0 < prompt_table(before).flagged.sum()
