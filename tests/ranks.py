"""Algorithm 2 on the small pipeline, as tests/test_ranks.py runs it in its own process and starts it on several;
with what each rank ended in"""

import os, signal, sys
from safetensors.torch import save_file
from resalign.method.demo import demo
from resalign.core.settings import UserError
from resalign.method.resalign import Pool, ResAlignConfig, resalign
from resalign.core.training import Ranks
from resalign.method import resalign as meta


def run(out, steps: int, checkpoint=None) -> dict:  # log, solves; merged: how many sums were taken
    "So many outer steps; writes the UNet, and the first gradient that was summed"
    whole, sums = Ranks.reduce, []

    def reduce(self, tensors, row):
        total = whole(self, tensors, row)
        sums.append([t.clone() for t in total[0]])
        return total

    Ranks.reduce, (pipe, data) = reduce, demo()
    try:
        result = resalign(
            pipe, data, ResAlignConfig(steps=steps, J=3, pool=Pool(optimizer=('adam',))), checkpoint=checkpoint
        )
    finally:
        Ranks.reduce = whole
    save_file({k: v.contiguous() for k, v in pipe.unet.state_dict().items()}, f'{out}.safetensors')
    save_file({str(i): t for i, t in enumerate(sums[0])}, f'{out}-gradient.safetensors')
    return result | dict(merged=len(sums))


def dies(process: int, after: int):
    "This rank, when it draws a configuration for the so-manyth time"
    whole, seen = meta.draw_config, []

    def draw_config(*args):
        seen.append(1)
        if len(seen) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    if Ranks().accelerator.process_index == process:
        meta.draw_config = draw_config


def main(folder):
    "From the start, from a checkpoint of one process and on from one's own; last, a rank dies in the second outer step"
    rank = Ranks().accelerator.process_index
    result = run(f'{folder}/two-{rank}', 4)
    print(f'rank {rank}: {len(result["log"])} rows, {[(s["step"], s["j"]) for s in result["solves"]]}\n', end='', flush=True)
    on = run(f'{folder}/one-then-two-{rank}', 4, f'{folder}/checkpoint-of-one')
    print(f'rank {rank} went on: {len(on["log"])} rows, {on["merged"]} sums\n', end='', flush=True)
    run(f'{folder}/half-{rank}', 2, f'{folder}/checkpoint-of-two')
    print(f'rank {rank} is done\n', end='', flush=True)
    dies(1, 4)
    run(f'{folder}/died-{rank}', 2)


if __name__ == '__main__':
    try:
        main(*sys.argv[1:])
    except UserError as e:
        print(e, file=sys.stderr, flush=True)
        sys.exit(3)
