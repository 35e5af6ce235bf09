"""DVC runs one stage after the other. This runs stages of one thread side by side, where they don't wait for one another; a stage that doesn't pin its threads runs alone.
What agrees with dvc.lock is found out once, at the start; a stage is looked at again where something before it has run."""
import argparse, subprocess, sys, time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from dvc.repo import Repo


def waiting(targets=()) -> dict:
    "name -> (names of the stages it needs, whether it runs alone); of the targets and all before them, or of all"
    graph = Repo().index.graph # from a stage to what it needs
    known = {s.addressing: s for s in graph}
    asked = lambda k: not targets or any(k == t or k.startswith(f'{t}@') for t in targets)
    if unknown := [t for t in targets if not any(k == t or k.startswith(f'{t}@') for k in known)]: sys.exit(f'lanes: unknown stage: {", ".join(unknown)}')
    todo, found = [s for k, s in known.items() if asked(k)], {}
    while todo:
        s = todo.pop(); before = list(graph.successors(s))
        if s.addressing not in found: found[s.addressing] = {d.addressing for d in before}, 'OMP_NUM_THREADS=1' not in (s.cmd or ''); todo += before
    return found


def run(stage, force) -> tuple: # how it ended, seconds, the end of what it said
    start = time.monotonic()
    done = subprocess.run([sys.executable, '-m', 'dvc', '--wait-for-lock', 'repro', *['--force']*force, '--single-item', stage], capture_output=True, text=True)
    said = '\n'.join((done.stdout + done.stderr).splitlines()[-20:])
    return 'failed' if done.returncode else 'unchanged' if "didn't change, skipping" in said else 'run', time.monotonic() - start, said


def main(targets, lanes:int, force=False) -> int: # exit status
    "All stages in an order in which each finds what it needs; what needs a failed one is left out"
    needs, running, ends, begun = waiting(targets), {}, {}, time.monotonic() # ends: stage -> how it ended
    total, changed = len(needs), {*needs} if force else {*Repo().status([*needs])}
    ended = lambda *ways: {s for s, way in ends.items() if way in ways}
    def settled(): # what isn't run: data, what needs a failed stage, what agrees with dvc.lock and so does all before it
        bad, same = ended('failed', 'left out'), ended('data', 'unchanged')
        return {s: 'data' if s.endswith('.dvc') else 'left out' if d & bad else 'unchanged' for s, (d, _) in needs.items() if s.endswith('.dvc') or d & bad or s not in changed and d <= same}
    with ThreadPoolExecutor(lanes) as pool:
        def start(s): running[pool.submit(run, s, force)] = s, needs.pop(s)[1]
        while needs or running:
            while found := settled():
                ends |= found; needs = {s: v for s, v in needs.items() if s not in found}
                for s in found:
                    if found[s] == 'left out': print(f'{s}: left out, what it needs has failed', flush=True)
            ready = {s: alone for s, (d, alone) in needs.items() if d <= ended('data', 'unchanged', 'run')}; together = [s for s, alone in ready.items() if not alone]
            if together and not any(alone for _, alone in running.values()):
                for s in together[:lanes - len(running)]: start(s)
            elif ready and not running: start(next(iter(ready)))
            if running:
                for f in wait(running, return_when=FIRST_COMPLETED).done:
                    (way, seconds, said), stage = f.result(), running.pop(f)[0]; ends[stage] = way
                    print(f'{time.strftime("%H:%M:%S")} {len(ends)}/{total} {stage}: {way}, {seconds:.0f} s', flush=True)
                    if way == 'failed': print(said, file=sys.stderr, flush=True)
    print(f'{", ".join(f"{n} {way}" for way, n in Counter(ends.values()).items() if way != "data") or "no stage"}; {(time.monotonic() - begun)/60:.1f} minutes', flush=True)
    return int(bool(ended('failed', 'left out')))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('targets', nargs='*', help='stages, with all that they need; none: everything')
    p.add_argument('--lanes', type=int, default=2, help='stages at a time: one a core [2]')
    p.add_argument('--force', action='store_true', help='also what has not changed')
    sys.exit(main(**vars(p.parse_args())))
