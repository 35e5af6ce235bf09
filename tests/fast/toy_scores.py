"""Made-up scores, for the tests of tables, studies and claims. The first k of n prompts show the concept: of two
methods the one with d hits fewer is lower in d pictures and higher in none: McNemar's exact p is 2**(1-d)."""
import numpy as np, pandas as pd
from scipy import stats

PHASES = ['before', 'subjects-full', 'subjects-lora', 'varied-full', 'varied-lora']


def mcnemar(*differences) -> list:
    "Exact p of pairs of which one side has d hits more, all on pictures where the other has none"
    return [min(1., 2**(1 - abs(d))) for d in differences]

def corrected(ps) -> list:
    "Benjamini and Hochberg, from their definition"
    ranked, n = sorted(ps), len(ps)
    return [min(min(1., q*n/(k + 1)) for k, q in enumerate(ranked) if q >= p) for p in ps]

def table(hits:dict, n=20, runs=1, detector='wiring', kind='implicit') -> pd.DataFrame: # as from `collect_scores`
    "hits: method -> how many of n prompts, a number a phase"
    rows = [
        dict(
            detector=detector,
            kind=kind,
            prompt=f'p{i:02}',
            seed=i,
            score=float(i < k),
            method=m,
            run=r,
            phase=p.split('-')[0],
            finetune=(p + '-none').split('-')[1],
        )
        for m, ks in hits.items()
        for p, k in zip(PHASES, ks)
        for r in range(runs)
        for i in range(n)
    ]
    return pd.DataFrame(rows)

def study(hits:dict, n=20, kind='implicit', steps=(0, 9), run=0) -> pd.DataFrame: # as from `read_looks`
    "hits: method -> course -> how many of n prompts, a number a step"
    rows = [dict(run=run, kind=kind, prompt=f'p{i:02}', seed=i, course=c, step=s, score=int(i < k), method=m)
            for m, courses in hits.items() for c, ks in courses.items() for s, k in zip(steps, ks) for i in range(n)]
    return pd.DataFrame(rows)

def one_prompt_thrice(score) -> pd.DataFrame:
    "Three pictures of prompt x, one of y"
    return pd.DataFrame(dict(detector='wiring', kind='implicit', method='ga', phase='varied', finetune='lora',
                             prompt=list('xxxy'), seed=range(4), run=0, score=score))


# what looks at a model leave: a row a picture, a column a look
WIDE = pd.DataFrame(dict(kind=['explicit', 'benign'], prompt=['a', 'b'], seed=[1, 2], before=[0, 1],
                         lr_0003_0010=[1, 1], lr_0003_0200=[1, 0], slow_0010=[0, 0]))

def cells(long, *columns): return sorted(long[list(columns)].itertuples(index=False, name=None))

def bootstrap(values) -> tuple: # low, high
    "95% of the mean, as the studies ask scipy for it"
    rng = np.random.default_rng(0)
    found = stats.bootstrap((np.asarray(values, float),), np.mean, n_resamples=2000, method='percentile', rng=rng)
    return tuple(found.confidence_interval)
