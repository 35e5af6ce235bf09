"Custom Diffusion, SVDiff, textual inversion: which numbers move, and where to in a step that is written out."
import copy
import pytest, torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel
from resalign.method.finetune import SpectralShift, add_token, new_token, save_token
from resalign.core.settings import UserError
from resalign.model.data import Bank, draw_sample
from resalign.method.finetune import ALGORITHMS, FinetuneConfig, finetune
from resalign.model.pipelines import train_tokenizer
import toy_finetune as toy
from toy_finetune import toy_pipe, weights
from each import each

CAPTIONS = ['a red cat', 'a blue dog', 'red', 'a dog', 'blue cat', 'a cat']
ROW = 'embeddings.token_embedding.weight'
CROSS = [f'attn2.to_{m}.weight' for m in 'kv']

@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

@pytest.fixture(scope='module')
def words(tmp_path_factory):
    "Tokenizer and a text encoder of one layer, float64"
    tokenizer = train_tokenizer(CAPTIONS, tmp_path_factory.mktemp('t'), vocabulary=20, tokens=6)
    encoder = (
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=4,
                intermediate_size=4,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=6,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        .double()
        .eval()
    )
    gen = torch.Generator().manual_seed(3)
    for p in encoder.parameters(): p.data = torch.randn(p.shape, generator=gen, dtype=torch.float64)*.5
    return tokenizer, encoder

@pytest.fixture
def pipe(words):
    p = toy_pipe(text=4)
    p.tokenizer, p.text_encoder = (copy.deepcopy(w) for w in words)
    return p

def bank(): return Bank(*toy.toy_bank(text=4))

def encoder_weights(p): return {k: v.detach().clone() for k, v in p.text_encoder.named_parameters()}

def close(a, b):
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-8, atol=1e-10, msg=lambda m: f'{k}: {m}')

def moved(a, b): return {k for k in a if a[k].shape != b[k].shape or not torch.equal(a[k], b[k])}


# ------------------------------------------------------------------ textual inversion, Custom Diffusion

def word_loss(pipe, token='<new>'):
    "L_FT where captions are read again, the new word before each; of the weights by name, the word's row is 'row'"
    start, rows = weights(pipe), pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    tokenizer, encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    tokenizer.add_tokens([token])
    ids = tokenizer(
        [f'{token} {c}' for c in CAPTIONS], padding='max_length', max_length=6, truncation=True, return_tensors='pt'
    ).input_ids
    assert (ids[:, 1] == len(rows)).all()
    encoder.resize_token_embeddings(len(rows) + 1, mean_resizing=False)
    def loss(w, step):
        text = functional_call(encoder, {ROW: torch.cat([rows, w['row'][None]])}, (ids,))[0]
        mean, std, _ = toy.toy_bank(text=4)
        return toy.denoising(
            start | {k: v for k, v in w.items() if k != 'row'},
            toy.drawn((mean, std, text), 3, toy.stream(0, 'finetune', step)),
        )

    return loss, rows.mean(0)

@each(
    'algorithm, kind, steps',
    [
        ('textual-inversion', 'sgd', 1),
        ('textual-inversion', 'adamw', 3),
        ('custom-diffusion', 'sgd', 1),
        ('custom-diffusion', 'adam', 3),
    ],
)
def test_a_word_and_what_else_moves_as_written_out_and_a_run_goes_on(pipe, tmp_path, algorithm, kind, steps):
    pipe = copy.deepcopy(pipe)
    unet, text = weights(pipe), encoder_weights(pipe)
    loss, row = word_loss(pipe)
    start = dict(row=row) | {k: unet[k] for k in CROSS*(algorithm == 'custom-diffusion')}
    trail, said = toy.descent(start, loss, toy.Rule(kind, .05), steps, clip=1.)

    def run(p, steps):
        return finetune(
            p,
            bank(),
            FinetuneConfig(algorithm=algorithm, optimizer=kind, lr=0.05, steps=steps, batch=3),
            checkpoint=tmp_path / 'c',
            captions=CAPTIONS,
        )

    if steps > 1: run(copy.deepcopy(pipe), steps - 1) # what follows goes on from its checkpoint
    log = run(pipe, steps)
    for got, expected in zip(log, said): assert got == pytest.approx(expected, rel=1e-8)
    assert len(log) == steps
    end, now = trail[-1], encoder_weights(pipe)
    close(weights(pipe), unet | {k: v for k, v in end.items() if k != 'row'})
    assert moved(unet, weights(pipe)) == set(end) - {'row'}
    torch.testing.assert_close(now[ROW][-1], end['row'], rtol=1e-8, atol=1e-10)
    assert torch.equal(now[ROW][:-1], text[ROW]) and len(now[ROW]) == len(text[ROW]) + 1 and moved(text, now) == {ROW}
    assert not any(p.requires_grad for m in (pipe.unet, pipe.text_encoder) for p in m.parameters())
    assert pipe.tokenizer.convert_tokens_to_ids('<new>') == len(text[ROW])

@each('kind, steps', [('sgd', 1), ('adamw', 3)])
def test_unet_and_text_encoder_move_as_written_out(pipe, kind, steps):
    "Captions are embedded anew in each step; the bank's own embeddings are not read"
    pipe = copy.deepcopy(pipe)
    unet, text = weights(pipe), encoder_weights(pipe)
    encoder, names = copy.deepcopy(pipe.text_encoder), {f'text {k}': k for k in text}
    ids = pipe.tokenizer(CAPTIONS, padding='max_length', max_length=6, truncation=True, return_tensors='pt').input_ids
    def loss(w, step):
        embedded = functional_call(encoder, {k: w[name] for name, k in names.items()}, (ids,))[0]
        mean, std, _ = toy.toy_bank(text=4)
        at = toy.drawn((mean, std, embedded), 3, toy.stream(0, 'finetune', step))
        return toy.denoising({k: v for k, v in w.items() if k not in names}, at)
    start = unet | {name: text[k] for name, k in names.items()}
    trail, said = toy.descent(start, loss, toy.Rule(kind, .05), steps, clip=1.)
    config = FinetuneConfig(algorithm='full', train_text_encoder=True, optimizer=kind, lr=.05, steps=steps, batch=3)
    log, end = finetune(pipe, bank(), config, captions=CAPTIONS), trail[-1]
    for got, expected in zip(log, said): assert got == pytest.approx(expected, rel=1e-8)
    close(weights(pipe), {k: end[k] for k in unet})
    close(encoder_weights(pipe), {k: end[name] for name, k in names.items()})
    assert not any(p.requires_grad for m in (pipe.unet, pipe.text_encoder) for p in m.parameters())

def test_new_words(pipe):
    # the word is the settings token
    finetune(pipe, bank(), FinetuneConfig(algorithm='textual-inversion', steps=1, token='<fox>'), captions=CAPTIONS)
    assert '<fox>' in pipe.tokenizer.get_vocab() and '<new>' not in pipe.tokenizer.get_vocab()

    # words that cannot be learned are refused before anything changes
    text = encoder_weights(pipe)
    config = FinetuneConfig(algorithm='textual-inversion', steps=1)
    with pytest.raises(UserError, match='captions'): finetune(pipe, bank(), config)
    with pytest.raises(UserError, match='token.*red</w>'):
        finetune(pipe, bank(), config.model_copy(update=dict(token='red</w>')), captions=CAPTIONS)
    pipe.text_encoder_2 = pipe.text_encoder
    with pytest.raises(UserError, match='token.*two'): finetune(pipe, bank(), config, captions=CAPTIONS)
    close(encoder_weights(pipe), text)
    assert '<new>' not in pipe.tokenizer.get_vocab()

def test_a_word_alone_is_trained_and_nothing_afterwards(pipe):
    encoder = pipe.text_encoder.requires_grad_(True)
    with new_token(pipe, '<new>', CAPTIONS) as trained:
        assert [p is trained.params[0] for p in encoder.parameters() if p.requires_grad] == [True]
    assert not any(p.requires_grad for p in encoder.parameters())

def test_a_new_word_begins_at_the_mean_of_all_words(pipe):
    before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    place = add_token(pipe, '<new>')
    rows = pipe.text_encoder.get_input_embeddings().weight
    assert place == len(before) == len(rows) - 1 == pipe.tokenizer.convert_tokens_to_ids('<new>')
    torch.testing.assert_close(rows[-1].detach(), before.mean(0))
    assert torch.equal(rows[:-1], before)

def test_captions_are_read_behind_the_word_by_the_pictures_index(pipe):
    plain = copy.deepcopy(pipe)
    with new_token(pipe, '<new>', CAPTIONS) as trained:
        (row,), inner = trained.params, trained.modules
        assert list(inner) == ['text_encoder'] and inner['text_encoder'] is pipe.text_encoder
        assert [p.requires_grad for p in pipe.text_encoder.parameters()].count(True) == 1 and row.requires_grad
        row.data.fill_(.3)
        s = draw_sample(bank(), 3, toy.stream(1))
        dressed = trained.encode_text(s)
    add_token(plain, '<new>')
    plain.text_encoder.get_input_embeddings().weight.data[-1] = .3
    ids = plain.tokenizer(
        [f'<new> {CAPTIONS[i]}' for i in s.index],
        padding='max_length',
        max_length=6,
        truncation=True,
        return_tensors='pt',
    ).input_ids
    torch.testing.assert_close(dressed.text, plain.text_encoder(ids)[0])
    assert dressed.z is s.z and dressed.index is s.index and torch.equal(dressed.t, s.t)
    close(encoder_weights(pipe), encoder_weights(plain))


def test_a_saved_word_is_its_row(pipe, tmp_path):
    add_token(pipe, '<a>')
    add_token(pipe, '<b>')
    rows = pipe.text_encoder.get_input_embeddings().weight.data
    rows[-2], rows[-1] = 1., 2.
    save_token(pipe, '<a>', tmp_path)
    kept = load_file(tmp_path/'learned_embeds.safetensors')
    assert list(kept) == ['<a>'] and kept['<a>'].tolist() == [1.]*4


# ------------------------------------------------------------------ SVDiff

def shifted(w, delta):
    "W with singular values relu(σ + δ); a vector's one value is its length, moved a thousandth as fast"
    flat = w.flatten(1) if w.ndim > 1 else w[:, None]
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    scale = 1. if w.ndim > 1 else 1e-3
    return (u @ torch.diag((s + scale*delta).clamp(min=0.)) @ v).view_as(w)

@each('shape', [(3, 5), (5, 3), (2, 3, 2, 2), (4,)])
def test_the_spectrum_is_shifted_and_stays_above_zero(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spectrum = SpectralShift(w)
    n = min(shape[0], w[0].numel()) if w.ndim > 1 else 1
    assert spectrum.delta.shape == (n,) and not spectrum.delta.any() and list(spectrum.state_dict()) == ['delta']
    assert [k for k, _ in spectrum.named_parameters()] == ['delta']
    torch.testing.assert_close(spectrum(w), w)
    delta = torch.linspace(.5, -50., n) if n > 1 else torch.tensor([-.5])
    spectrum.delta.data.copy_(delta)
    torch.testing.assert_close(spectrum(w), shifted(w, delta))

def test_svdiff_moves_the_singular_values_of_all_weights_as_written_out_and_a_run_goes_on(tmp_path):
    p, start = toy_pipe(), weights(toy_pipe())
    names = [k for k in start if k.endswith('weight')]
    def loss(w, step): return toy.loss_at(start | {k: shifted(start[k], w[k]) for k in names}, toy.toy_bank(), step, 3)
    zeros = {k: torch.zeros(min(start[k].shape[0], start[k][0].numel()) if start[k].ndim > 1 else 1) for k in names}
    trail, said = toy.descent(zeros, loss, toy.Rule('sgd', .1), 2, clip=1.)

    def run(p, steps):
        return finetune(
            p,
            Bank(*toy.toy_bank()),
            FinetuneConfig(algorithm='svdiff', optimizer='sgd', lr=0.1, steps=steps, batch=3),
            checkpoint=tmp_path / 'c',
        )

    run(toy_pipe(), 1)
    log = run(p, 2)
    for got, expected in zip(log, said): assert got == pytest.approx(expected, rel=1e-7)
    close(weights(p), start | {k: shifted(start[k], trail[-1][k]) for k in names})
    assert moved(start, weights(p)) == set(names)
    assert not any(q.requires_grad for q in p.unet.parameters())

def test_what_moves_alone(pipe):
    # gradients are asked of what moves alone
    for algorithm, said in {'textual-inversion': [], 'custom-diffusion': CROSS, 'svdiff': ['delta']*10}.items():
        p = copy.deepcopy(pipe)
        with ALGORITHMS[algorithm](p, FinetuneConfig(), CAPTIONS) as trained:
            moving = [k for k, q in p.unet.named_parameters() if q.requires_grad]
            assert [k.rpartition('.')[2] if algorithm == 'svdiff' else k for k in moving] == said
            assert len(trained.params) == len(said) + (algorithm != 'svdiff')

    # methods change nothing but what they say
    for algorithm in 'svdiff', 'custom-diffusion':
        p = copy.deepcopy(pipe)
        finetune(p, bank(), FinetuneConfig(algorithm=algorithm, steps=1, batch=3), captions=CAPTIONS)
        said = {k for k in weights(pipe) if k.endswith('weight')} if algorithm == 'svdiff' else set(CROSS)
        assert moved(weights(pipe), weights(p)) == said

