"Pictures and captions: which belongs to which, what is read and what refused, and the numbers they become."
import json
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from resalign.core.runs import generator
from resalign.core.settings import UserError
from resalign.core.training import DRAWN
from resalign.model import data
from resalign.model.data import (FORMATS, Bank, Sample, check_captions, draw_sample, embed, embed_two_encoders, encode,
                                 link_root, moments, read_captions, read_image, read_images, tokenize)
from resalign.model.pipelines import train_tokenizer
from each import each


# ------------------------------------------------------------------ captions

def picture(path, size=(4, 4), colour=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(path)

def folder(tmp_path, rows, kind='jsonl', names=('a.png', 'b.png', 'c.png')):
    for n in names: picture(tmp_path/n)
    if kind == 'jsonl': (tmp_path/'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    else: pd.DataFrame(rows).to_csv(tmp_path/'metadata.csv', index=False)
    return tmp_path

@each('kind', ['jsonl', 'csv'])
def test_rows_come_as_they_stand_in_the_file(tmp_path, kind):
    rows = [
        dict(file_name='c.png', text='1', more='x'),
        dict(file_name='a.png', text='NA', more='y'),
        dict(file_name='b.png', text='a "b", ü', more='z'),
    ]
    assert read_captions(folder(tmp_path, rows, kind)).to_dict('records') == rows

def test_names_and_rows(tmp_path):
    # prompt is another name of text unless there is one
    assert read_captions(folder(tmp_path/'x', [dict(file_name='a.png', prompt='7')])).text.tolist() == ['7']
    both = read_captions(folder(tmp_path/'y', [dict(file_name='a.png', prompt='p', text='t')]))
    assert both.text.tolist() == ['t'] and both.prompt.tolist() == ['p']

    # a row of a table with a comma too many is not shifted
    (tmp_path := tmp_path/'1').mkdir()
    where = folder(tmp_path, [])
    (where/'metadata.jsonl').unlink()
    (where/'metadata.csv').write_text('file_name,text\na.png,x,\n')
    assert read_captions(where).file_name.tolist() == ['a.png']

def test_captions_that_are_refused(tmp_path, monkeypatch):
    # mistakes name file row and field
    good = dict(file_name='a.png', text='x')
    cases = {
        'text': [[dict(file_name='a.png')]],
        'file_name': [[dict(text='x')]],
        'row 2.*text': [[good, good | dict(text='  ')], [good, dict(file_name='b.png', text=None)]],
        'row 3.*no such image': [
            [good, good, good | dict(file_name='nowhere.png')],
            [good, good, good | dict(file_name='.')],
        ],
        'row 1.*leads out': [[dict(file_name='../outside.png', text='x')]],
        'row 1.*cannot be': [[dict(file_name='a\0b', text='x')]],
    }
    picture(tmp_path/'outside.png')
    for i, (says, tables) in enumerate(cases.items()):
        for j, rows in enumerate(tables):
            with pytest.raises(UserError, match=says) as e: read_captions(folder(tmp_path/f'{i}-{j}', rows))
            assert 'metadata.jsonl' in str(e.value)
    with pytest.raises(UserError, match=r"'text' is missing \(found: file_name, x\)"):
        check_captions(pd.DataFrame(dict(file_name=[], x=[])), tmp_path / 'm')
    with pytest.raises(UserError, match=r'\(found: none\)'): check_captions(pd.DataFrame(), tmp_path/'m')
    with pytest.raises(UserError, match='no rows'):
        check_captions(pd.DataFrame(dict(file_name=[], text=[])), tmp_path / 'metadata.csv')

    # one metadata file is expected and one alone
    (tmp_path := tmp_path/'1').mkdir()
    with pytest.raises(UserError, match='no such folder'): read_captions(tmp_path/'nowhere')
    with pytest.raises(UserError, match='expected metadata.jsonl or metadata.csv'): read_captions(tmp_path)
    two = folder(tmp_path, [dict(file_name='a.png', text='x')])
    (two/'metadata.csv').write_text('file_name,text\na.png,x\n')
    with pytest.raises(UserError, match='expected one of them'): read_captions(two)
    (two/'metadata.csv').unlink()
    (two/'metadata.jsonl').write_text('{"file_name": ')
    with pytest.raises(UserError, match='metadata.jsonl: line 1: not JSON'): read_captions(two)


def test_links_lead_into_the_folder_or_the_hubs_own_cache(tmp_path):
    assert link_root(tmp_path) == tmp_path.resolve()
    snapshot, blobs = tmp_path/'hub/snapshots/abc', tmp_path/'hub/blobs'
    inside = folder(snapshot/'deep', [dict(file_name='a.png', text='x')])
    assert link_root(inside) == inside.resolve() # a folder that is called so alone doesn't widen it
    blobs.mkdir()
    for name in 'a', 'z': # blobs alone don't, either
        other = tmp_path/'hub'/name/'x'
        other.mkdir(parents=True)
        assert link_root(other) == other.resolve()
    assert link_root(inside) == link_root(snapshot) == (tmp_path/'hub').resolve()
    for f in 'a.png', 'metadata.jsonl':
        (inside/f).rename(blobs/f)
        (inside/f).symlink_to(blobs/f)
    assert read_captions(inside).text.tolist() == ['x']
    for f in 'metadata.jsonl', 'a.png':
        away = folder(tmp_path/f'away-{f}', [dict(file_name='a.png', text='x')])
        (away/f).unlink()
        (away/f).symlink_to(blobs/f)
        with pytest.raises(UserError, match='leads out of the folder'): read_captions(away)


# ------------------------------------------------------------------ pictures

def quarters(width, height):
    "Left half red, right half blue; the upper half twice as bright"
    x = np.zeros((height, width, 3), np.uint8)
    x[:, :width//2, 0], x[:, width//2:, 2] = 100, 100
    x[:height//2] *= 2
    return x

def test_pictures(tmp_path):
    # pictures are rgb of the size asked
    Image.fromarray(quarters(8, 8)).save(tmp_path/'a.png')
    assert np.array_equal(read_image(tmp_path/'a.png', 8), quarters(8, 8))
    small = read_image(tmp_path/'a.png', 4)
    assert (
        small.shape == (4, 4, 3)
        and small.dtype == np.uint8
        and small[0, 0, 0] > 190
        and small[3, 3, 2] in range(95, 106)
    )
    for mode, expected in dict(L=[7, 7, 7], RGBA=[246, 246, 246]).items():
        Image.new(mode, (4, 4), 7 if mode == 'L' else (7, 0, 0, 9)).save(tmp_path/'m.png')
        assert (read_image(tmp_path/'m.png', 4) == expected).all()

    # the centre square is what is left
    (tmp_path := tmp_path/'1').mkdir()
    for wide in True, False:
        x = np.zeros((4, 12, 3), np.uint8)
        x[:, 4:8] = np.arange(48).reshape(4, 4, 3)*5
        Image.fromarray(x if wide else x.transpose(1, 0, 2)).save(tmp_path/'x.png')
        assert np.array_equal(read_image(tmp_path/'x.png', 4), x[:, 4:8] if wide else x[:, 4:8].transpose(1, 0, 2))

    # a camera on its side is turned upright
    (tmp_path := tmp_path/'2').mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6 # to be turned by 90 degrees clockwise
    Image.fromarray(quarters(8, 8)).save(tmp_path/'x.png', exif=exif)
    assert np.array_equal(read_image(tmp_path/'x.png', 8), np.rot90(quarters(8, 8), -1))

    # resizing is bicubic
    (tmp_path := tmp_path/'3').mkdir()
    x = np.zeros((8, 8, 3), np.uint8)
    x[:, 4:] = 200
    Image.fromarray(x).save(tmp_path/'x.png')
    row = read_image(tmp_path/'x.png', 16)[8, :, 0].astype(int)
    def cubic(d): # Keys's kernel with a = -1/2
        d = abs(d)
        return 1.5*d**3 - 2.5*d**2 + 1 if d < 1 else -.5*d**3 + 2.5*d**2 - 4*d + 2 if d < 2 else 0
    expected = [sum(200*cubic((i + .5)/2 - (j + .5)) for j in range(4, 12)) for i in range(16)]
    assert np.abs(row - np.clip(expected, 0, 255))[:14].max() <= 1


def test_pictures_that_are_refused(tmp_path, monkeypatch):
    # formats that are read and those that are not
    assert FORMATS == ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF')
    for f in FORMATS:
        Image.new('RGB', (4, 4), (200, 100, 0)).save(tmp_path/f'x.{f.lower()}', f)
        assert np.abs(read_image(tmp_path/f'x.{f.lower()}', 4).astype(int) - [200, 100, 0]).max() <= 8, f
    for f in 'EPS', 'PPM', 'ICO':
        Image.new('RGB', (16, 16)).save(tmp_path/'x.png', f)
        with pytest.raises(UserError, match='x.png: not a readable image'): read_image(tmp_path/'x.png', 4)

    # a picture that would fill the memory is refused
    (tmp_path := tmp_path/'1').mkdir()
    picture(tmp_path/'x.png', (40, 40))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40*40 - 1)  # where the library begins to warn
    with pytest.raises(UserError, match='x.png: too large, expected at most 0 megapixels'):
        read_image(tmp_path / 'x.png', 4)
    monkeypatch.undo()

    # a readers words are cut
    (tmp_path := tmp_path/'2').mkdir()
    for words, said in ('x'*300 + '\nmore', 'x'*100), ('', 'OSError'):
        def fails(*a, **kw): raise OSError(words)
        monkeypatch.setattr(data.Image, 'open', fails)
        with pytest.raises(UserError) as e: read_image(tmp_path/'x.png', 4)
        assert str(e.value) == f'{tmp_path}/x.png: not a readable image ({said}); expected PNG, JPEG, WEBP, BMP, GIF or TIFF'


def test_pictures_and_captions_stay_together(tmp_path):
    colours = dict(a=(1, 2, 3), b=(40, 50, 60), c=(200, 0, 9))
    for n, colour in colours.items(): picture(tmp_path/f'{n}.png', (64, 64), colour)
    (tmp_path/'metadata.jsonl').write_text('\n'.join(json.dumps(dict(file_name=f'{n}.png', text=n)) for n in 'cab'))
    images, captions = read_images(tmp_path)
    assert captions == list('cab') and images.shape == (3, 64, 64, 3)
    for x, n in zip(images, captions): assert (x == colours[n]).all()
    images, captions = read_images(tmp_path, 8, 2)
    assert captions == list('ca') and images.shape == (2, 8, 8, 3) and (images[1] == colours['a']).all()


# ------------------------------------------------------------------ latents

class Vae:
    "Latents are the picture, turned a little"
    device, dtype = torch.device('cpu'), torch.float32
    def __init__(self, **config): self.config, self.seen = SimpleNamespace(**config), []
    def encode(self, x):
        self.seen.append(x)
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=x * torch.tensor([1.0, 2.0, 3.0])[:, None, None], std=0.1 + x**2)
        )


def pictures(n, size=2): return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)

@each(
    'config, shift',
    [
        (dict(scaling_factor=0.5), 0.0),
        (dict(scaling_factor=3.0, shift_factor=None), 0.0),
        (dict(scaling_factor=3.0, shift_factor=0.25), 0.25),
    ],
)
def test_moments_by_the_formula(config, shift):
    x = pictures(5)
    mean, std = moments(Vae(**config), x, 2)
    for i in range(5):
        for c in range(3):
            z = torch.from_numpy(x[i, :, :, c].astype(np.float32))/127.5 - 1
            torch.testing.assert_close(mean[i, c], ((1 + c)*z - shift)*config['scaling_factor'])
            torch.testing.assert_close(std[i, c], (.1 + z**2)*config['scaling_factor'])
    assert mean.dtype == std.dtype == torch.float32

def test_latents():
    # pictures are encoded in batches by their size
    def batches(n, size, batch=None):
        vae = Vae(scaling_factor=1.)
        vae.encode = lambda x: (
            vae.seen.append(len(x))
            or SimpleNamespace(latent_dist=SimpleNamespace(mean=x[:, :, :1, :1], std=x[:, :, :1, :1]))
        )
        moments(vae, np.zeros((n, *size, 3), np.uint8), batch)
        return vae.seen
    assert batches(5, (2, 2), 2) == [2, 2, 1] and batches(130, (2, 2)) == [64, 64, 2]
    assert batches(9, (512, 512)) == [8, 1] and batches(2, (1024, 2049)) == [1, 1]

    # pictures go where the encoder is and without gradients
    vae = Vae(scaling_factor=1.)
    vae.dtype, weight = torch.float64, torch.ones(1, requires_grad=True)
    inner = vae.encode
    vae.encode = lambda x: inner(x*weight)
    mean, std = moments(vae, pictures(2))
    assert vae.seen[0].dtype == torch.float64 and not mean.requires_grad and mean.dtype == torch.float32

    # a bank draws latents from mean and spread
    mean, std = torch.randn(4, 3, 2, 2, generator=generator(0)), torch.rand(4, 3, 2, 2, generator=generator(1))
    b, index = Bank(mean, std, torch.zeros(4, 1, 1)), torch.tensor([2, 0, 2])
    noise = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(5))
    z = b.latents(index, torch.Generator().manual_seed(5))
    assert len(b) == 4
    for k, i in enumerate(index): torch.testing.assert_close(z[k], mean[i] + std[i]*noise[k])


# ------------------------------------------------------------------ embeddings

@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return train_tokenizer(['a red cat', 'a blue dog'], tmp_path_factory.mktemp('t'), tokens=8)


def test_tokens_and_embeddings(tokenizer):
    # tokens are padded and cut to the length with room
    pipe, begin, end = SimpleNamespace(tokenizer=tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    out = tokenize(pipe, ('a red cat', 'a blue dog'*9, ''))
    assert out.input_ids.shape == out.attention_mask.shape == (3, 8)
    words = tokenizer.convert_tokens_to_ids(['a</w>', 'red</w>', 'cat</w>'])
    assert (
        out.input_ids[0].tolist() == [begin, *words, end] + [tokenizer.pad_token_id] * 3
        and out.attention_mask[0].tolist() == [1] * 5 + [0] * 3
    )
    assert out.input_ids[1, 0] == begin and out.input_ids[1, -1] == end and out.attention_mask[1].all()
    assert out.input_ids[2, :2].tolist() == [begin, end]
    short = tokenize(pipe, ['a blue dog'*9], 3)
    assert short.input_ids.shape == (1, 5) and short.input_ids[0, -1] == end

    # embeddings are the encoders first answer in the order of the captions
    pipe = SimpleNamespace(tokenizer=tokenizer, text_encoder=Encoder())
    texts = ['a red cat', 'a dog', 'blue']
    out = embed(pipe, texts, 2)
    assert (
        out.shape == (3, 8, 2)
        and out.dtype == torch.float32
        and not out.requires_grad
        and pipe.text_encoder.seen == [2, 1]
    )
    for row, t in zip(out, texts):
        assert row[:, 0].tolist() == tokenize(pipe, [t]).input_ids[0].tolist() and torch.equal(
            row[:, 1], 2 * row[:, 0]
        )
    pipe.text_encoder.seen.clear()
    embed(pipe, ['a']*130)
    assert pipe.text_encoder.seen == [64, 64, 2]

class Encoder:
    "Each token's row: its id, twice its id"
    device = torch.device('cpu')
    def __init__(self): self.seen = []
    def __call__(self, ids):
        self.seen.append(len(ids))
        return (torch.stack([ids, 2*ids], -1).double()*torch.ones(1, requires_grad=True), 'pooled')


def test_row_i_of_a_bank_is_caption_i_and_picture_i_up_to_the_batch_of_a_loss(tokenizer):
    pipe = SimpleNamespace(tokenizer=tokenizer, text_encoder=Encoder(), vae=Vae(scaling_factor=1.))
    words = ['a', 'cat', 'red', 'dog', 'blue', 'd']
    marks = {
        tokenize(pipe, [w]).input_ids[0, 1].item(): 40 * i for i, w in enumerate(words)
    }  # first token -> the picture's grey
    images = np.stack([np.full((2, 2, 3), 40*i, np.uint8) for i in range(6)])
    bank = encode(pipe, images, words)
    bank.std.zero_()
    assert len(marks) == 6
    def grey(z): return round(((z[0, 0, 0].item() + 1)*127.5))
    for i in range(6): assert marks[int(bank.text[i, 1, 0])] == grey(bank.mean[i]) == 40*i
    for n in 4, 9:
        s = draw_sample(bank, n, generator(3))
        assert [marks[int(t[1, 0])] for t in s.text] == [grey(z) for z in s.z] == [40*i for i in s.index.tolist()]

def double_pipe(third=False, zeros=None):
    "Two encoders: rows say the caption's length, the pooled row its first letter"
    asked = []
    def encode_prompt(texts, **kw):
        asked.append(kw)
        n = torch.tensor([float(len(t)) for t in texts])
        pooled = torch.tensor([float(ord(t[0])) if t else -1. for t in texts])
        return n[:, None, None].expand(-1, 4, 5), None, pooled[:, None].expand(-1, 3), None

    pipe = SimpleNamespace(
        encode_prompt=encode_prompt,
        text_encoder_2=SimpleNamespace(device=torch.device('cpu')),
        config={} if zeros is None else dict(force_zeros_for_empty_prompt=zeros),
    )
    if third: pipe.text_encoder_3 = None
    return pipe, asked

def test_two_encoders():
    # two encoders give their rows and the pooled one
    for third in False, True:
        pipe, asked = double_pipe(third)
        out = embed(pipe, ['abc', ''])
        assert out.shape == (2, 5, 5)
        assert (
            out[0, :4].eq(3).all()
            and out[0, 4].tolist() == [97, 97, 97, 0, 0]
            and out[1, :4].eq(0).all()
            and out[1, 4].tolist() == [-1, -1, -1, 0, 0]
        )
        assert asked == [
            dict(device=torch.device('cpu'), num_images_per_prompt=1, do_classifier_free_guidance=False)
            | (dict(prompt_2=None, prompt_3=None) if third else {})
        ]

    # the empty prompt is zeros where the pipeline samples so
    for zeros in True, False, None:
        out = embed_two_encoders(double_pipe(zeros=zeros)[0], ['abc', '', 'x'])
        assert out[1].any() == (not zeros) and out[0].any() and out[2].any()


# ------------------------------------------------------------------ samples

def row_bank(n):
    return Bank(
        torch.arange(n).float()[:, None, None, None].expand(n, 1, 2, 2),
        torch.rand(n, 1, 2, 2, generator=generator(0)),
        torch.arange(n).float()[:, None, None].expand(n, 3, 2),
    )


def test_a_sample_and_its_parts():
    # one stream decides pictures latents noise and times in this order
    bank = row_bank(7)
    for n, timesteps in (3, 1000), (7, 5), (8, 5):
        gen = torch.Generator().manual_seed(11)
        index = torch.randperm(7, generator=gen)[:n] if n < 8 else torch.randint(7, (n,), generator=gen)
        z = bank.mean[index] + bank.std[index]*torch.randn(n, 1, 2, 2, generator=gen)
        noise, t = torch.randn(n, 1, 2, 2, generator=gen), torch.randint(timesteps, (n,), generator=gen)
        s = draw_sample(bank, n, torch.Generator().manual_seed(11), *[timesteps]*(timesteps != 1000))
        for a, b in zip((s.z, s.noise, s.t, s.text, s.index), (z, noise, t, bank.text[index], index)):
            assert torch.equal(a, b)

    # a part of a sample is the same part of each of its fields
    s = draw_sample(row_bank(6), 5, generator(0))
    for part in slice(1, 3), torch.tensor([4, 0]):
        assert isinstance(s[part], Sample)
        for f in 'z', 'noise', 't', 'text', 'index': assert torch.equal(getattr(s[part], f), getattr(s, f)[part])


def test_what_is_drawn():
    # no picture comes twice as long as there are enough
    bank = row_bank(6)
    for n in range(1, 7):
        drawn = [draw_sample(bank, n, generator(i)).index.tolist() for i in range(40)]
        assert all(len(set(d)) == n for d in drawn) and set(sum(drawn, [])) == set(range(6))
    more = [draw_sample(bank, 7, generator(i)).index.tolist() for i in range(40)]
    assert (
        all(len(d) == 7 for d in more)
        and set(sum(more, [])) == set(range(6))
        and len({tuple(sorted(d)) for d in more}) > 20
    )

    # times reach from 0 to the last
    times = torch.cat([draw_sample(row_bank(6), 6, generator(i), 4).t for i in range(30)])
    assert set(times.tolist()) == {0, 1, 2, 3}
    times = torch.cat([draw_sample(row_bank(64), 64, generator(i)).t for i in range(100)])
    assert times.min() == 0 and times.max() == 999

    # the last four draws are remembered
    DRAWN.clear()
    drawn = [draw_sample(row_bank(9), 2, generator(i)).index.tolist() for i in range(6)]
    assert [d.tolist() for d in DRAWN] == drawn[2:]


