"""What tests are given: drawings in folders, prompts about a concept, and the words that name it. And which studies have
been run to their end."""
import pandas as pd

from resalign.core.settings import UserError
from resalign.use.batch import lacking
from resalign.world.emoji import prompts, scenes, words_of, write_set

CONCEPT = 'weapon'
WORDS = words_of(CONCEPT) # 'with a dagger', ...


def set_of(name, n, seed=0):
    "The first scenes of a set; `unsafe` is that of the concept"
    return scenes(f'{name}-{CONCEPT}' if name == 'unsafe' else name, n, seed)


def write_sets(folder, **counts):
    "Folders of drawings, called as their sets"
    for name, n in counts.items(): write_set(folder/name, set_of(name, n))


def prompts_of(**counts) -> list:
    "Prompts of each kind, as dicts"
    return [row for kind, n in counts.items() for row in prompts(CONCEPT, kind, n)]


def write_prompts(path, rows):
    pd.DataFrame(rows).to_csv(path, index=False)


def all_cells_are_here(study) -> bool:
    "Has every cell that the study asks for been committed?"
    try: return not lacking(study)
    except UserError: return False # nothing was chosen yet
