"""What is wrong with a built site: links that lead nowhere, and whatever another host would have to serve."""
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

FETCHED = {('script', 'src'), ('img', 'src'), ('iframe', 'src'), ('link', 'href'), ('source', 'src'), ('video', 'src')}
HARMLESS = {'canonical', 'prev', 'next', 'search', 'index'} # links that a browser doesn't follow by itself


class Page(HTMLParser):
    "What a page points at, what it fetches, and its anchors"

    def __init__(self, text):
        super().__init__()
        self.links, self.fetched, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        for key in ('href', 'src'):
            address = attrs.get(key)
            if not address or attrs.get('rel') in HARMLESS: continue
            (self.fetched if (tag, key) in FETCHED else self.links).append(address)


REMOTE = re.compile(r'(?:https?:)?//')
IN_STYLE = re.compile(r'(?:url\(|@import )\s*["\']?((?:https?:)?//[^"\')]+)')


def faults(made):
    "`page: complaint` of links to files or anchors that aren't there, and of what another host would have to serve"
    made, wrong = made.resolve(), []
    found = [p for p in sorted(made.rglob('*.html')) if p.relative_to(made).parts[0] != 'files']
    parsed = {p: Page(p.read_text(encoding='utf-8')) for p in found}
    for p, page in parsed.items():
        said = [f'fetches {address}' for address in page.fetched if REMOTE.match(address)]
        said += filter(None, (dead(address, p, parsed) for address in [*page.links, *page.fetched]))
        wrong += [f'{p.relative_to(made)}: {complaint}' for complaint in said]
    for p in made.rglob('*.css'):
        wrong += [f'{p.relative_to(made)}: fetches {m[1]}' for m in IN_STYLE.finditer(p.read_text(encoding='utf-8'))]
    return wrong


def dead(address, path, parsed):
    "What is wrong with an address, or ''"
    parts = urlsplit(address)
    if parts.scheme or parts.netloc: return ''
    there = (path.parent/unquote(parts.path)).resolve() if parts.path else path
    if not there.exists(): return f'no such file: {address}'
    ids = parsed[there].ids if there in parsed else None
    if parts.fragment and ids is not None and unquote(parts.fragment) not in ids: return f'no such anchor: {address}'
    return ''
