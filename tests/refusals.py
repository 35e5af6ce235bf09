"What a refusal says."
from resalign.core.settings import UserError


def said(f, *args, **kw) -> str:
    "The one line of a refusal; nothing where there is none"
    try: f(*args, **kw)
    except UserError as e:
        assert '\n' not in str(e) and len(str(e)) < 700
        return str(e)
    return ''
