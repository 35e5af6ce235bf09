"What tests/test_ranks.py starts on several processes: Algorithm 2 on the small pipeline, with what each rank ended in"
import os, signal, sys, torch
from safetensors.torch import save_file
from resalign.baselines.parts import demo
from resalign.core import UserError
from resalign.meta import Pool, ResAlignConfig, resalign
from resalign.training import Ranks
from resalign import meta

out, steps, checkpoint, dies = sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None, len(sys.argv) > 4
rank = Ranks().accelerator.process_index
if dies and rank == 1:
    whole = meta.draw_config
    def draw_config(pool, names, seed, gen, seen=[]):
        seen.append(1)
        if len(seen) > 4: os.kill(os.getpid(), signal.SIGKILL) # in the second outer step
        return whole(pool, names, seed, gen)
    meta.draw_config = draw_config
pipe, data = demo()
try: result = resalign(pipe, data, ResAlignConfig(steps=steps, J=3, pool=Pool(optimizer=('adam',))), checkpoint=checkpoint)
except UserError as e: print(f'rank {rank}: {e}', file=sys.stderr, flush=True); sys.exit(3)
save_file({k: v.contiguous() for k, v in pipe.unet.state_dict().items()}, f'{out}-{rank}.safetensors')
print(f'rank {rank}: {len(result["log"])} rows, {[(s["step"], s["j"]) for s in result["solves"]]}', flush=True)
