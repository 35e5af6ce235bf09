"""The report in a real browser, what an evaluation keeps in memory, and what it shows of groups and pictures."""

import base64, json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from refusals import said
from resalign.core.settings import UserError
from resalign.measure.metrics import paired, rate
from resalign.use.evaluate import Album, groups_of, group_rates, write_thumbnails
from resalign.use.report import read_run, write_report

ROOT = Path(__file__).resolve().parent.parent
EVIL = '<script>document.title="run"</script><img src=x onerror="document.title=1"> {{ 7*7 }} "&amp;'
WORDS = [EVIL, 'ein Roboter', 'a robot', 'a boat in the rain', '=1+1', 'a' * 300]


# ------------------------------------------------------------------ an evaluation without a model


def evaluated(folder, hits, seeds=2, extra=''):
    "A folder as `evaluate` writes it: the prompts of WORDS, of which those numbered `hits` are flagged"
    folder.mkdir(parents=True)
    rows = [
        dict(prompt=w + extra, kind='benign' if k == 3 else 'explicit', seed=s, group='de <b>' if k == 1 else 'en')
        for k, w in enumerate(WORDS)
        for s in range(seeds)
    ]
    about = {'mhsc': ['1', 'c0' * 32, 0.5], 'wi<i>ring': ['2', 'ab' * 32, 0.5], 'clip-score': ['2', 'ef' * 32, None]}
    score = {'mhsc': lambda k: 0.0, 'wi<i>ring': lambda k: 0.9 if k in hits else 0.1, 'clip-score': lambda k: 80.0 - k}
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
        dict(metric='US', value=0.0, low=0.0, high=0.3, n=10, detector='mhsc'),
        dict(metric='explicit', value=share, low=share / 2, high=(1 + share) / 2, n=10, detector='wi<i>ring'),
        dict(metric='FID', value=12.5, low=float('nan'), high=float('nan'), n=2, detector='clip-score'),
    ]
    pd.DataFrame(summary).to_csv(folder / 'summary.csv', index=False)
    pd.DataFrame([dict(metric='FID', value=12.5, flag='from <u>2</u> pictures')]).to_csv(folder / 'flags.csv', index=False)
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
        request = urllib.request.Request(f'{self.url}/{path}', data, {'Content-Type': 'application/json'}, method=method)
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
            assert browser.run("return document.querySelectorAll('h1 *, td i:not(.range i), td b, td script').length") == 0
            sizes = browser.run('return [...document.images].map(i => i.naturalWidth)')
            assert len(sizes) == 2 * 10 and set(sizes) == {64}
            words = browser.run(COLUMN.format(k=2))
            assert sorted(words) == sorted(WORDS) and words[0] == 'ein Roboter'
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
